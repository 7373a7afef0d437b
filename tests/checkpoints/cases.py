"""A small checkpoint, and ways to change it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zeropoint as zp
from zeropoint.checkpoints import native

WIDTH = 32


class Small(nn.Module):
    """A tied embedding and head, a layer of another scheme, a norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("offset", torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices: (B,) int; returns (B, 7)."""
        return self.head(self.norm(self.layer(self.embed(indices)) + self.offset))


def small(seed: int = 0) -> Small:
    """A frozen `Small` (int4 and int8) with weights drawn from `seed`."""
    model = Small()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    zp.quantize(model, "int4")
    zp.freeze(model)
    return model


INPUT = torch.arange(7)


@torch.no_grad()
def output_of(path: Path) -> torch.Tensor:
    """What the checkpoint at `path` computes."""
    return zp.load(path, model=Small())[0](INPUT)


def read_manifest(path: Path) -> dict:
    return json.loads((path / native.MANIFEST).read_text())


def write_manifest(path: Path, manifest: dict, *, sign: bool = True) -> None:
    """Write a manifest; sign: with the digest and the hashes of the files as they are now."""
    if sign:
        for file, row in manifest["files"].items():
            if (path / file).is_file():
                data = (path / file).read_bytes()
                row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rest = {k: v for k, v in manifest.items() if k != "digest"}
        text = json.dumps(rest, sort_keys=True)
        manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / native.MANIFEST).write_text(json.dumps(manifest))


def edit_manifest(path: Path, change, *, sign: bool = True) -> None:
    """Apply `change` to the manifest, in place."""
    manifest = read_manifest(path)
    change(manifest)
    write_manifest(path, manifest, sign=sign)


def edit_tensors(path: Path, change) -> None:
    """Apply `change` to the stored tensors in place, and make the hashes right again."""
    file = path / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    edit_manifest(path, lambda manifest: None)
