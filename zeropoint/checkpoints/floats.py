"""Float checkpoints in safetensors, seen from their headers: which tensors there are, and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zeropoint.checkpoints.shard import DTYPES
from zeropoint.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", INDEX_SUFFIX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")
"""Files that hold weights, in this format or another; all others are carried over as they are."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a file that nobody has read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, mapped from the file. Raises CheckpointError."""
        try:
            with safe_open(self.file, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(self.name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read: {e}") from e
        return tensor


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files: of those that the index lists, or of all.

    Raises CheckpointError: no such file, one that is cut off, a name that is in two files or in
    none.
    """
    listed = _listed(folder)
    files = sorted({folder / f for f in listed.values()}) if listed else _all_files(folder)
    stored: dict[str, Stored] = {}
    for file in files:
        for tensor in _of_file(file):
            if tensor.name in stored:
                other = stored[tensor.name].file.name
                raise CheckpointError(f"{folder}: {tensor.name} is in {other} and in {file.name}")
            stored[tensor.name] = tensor
    missing = sorted(listed.keys() - stored.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: the index lists {missing[0]} in {listed[missing[0]]}, which does not hold "
            "it; download the file again"
        )
    return stored


def _listed(folder: Path) -> Mapping[str, str]:
    """Name of each tensor's file by the index; empty where there is none."""
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if not indexes:
        return {}
    if len(indexes) > 1:
        names = ", ".join(i.name for i in indexes)
        raise CheckpointError(f"{folder} has {len(indexes)} indexes: {names}; remove all but one")
    try:
        weight_map = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{indexes[0]} cannot be read: {e!r}") from e
    for file in files.values():
        if Path(file).name != file or file in ("", ".", "..") or "\0" in file:
            raise CheckpointError(f"{indexes[0]} names {file!r}, which is outside the folder")
    return files


def _all_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors files, and others (.bin, .pt) are not opened, because "
            "they may run code; save the model again with a recent transformers"
        )
    return files


def _of_file(file: Path) -> list[Stored]:
    names = {code: dtype for dtype, code in DTYPES.items()}
    tensors = []
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                entry = opened.get_slice(name)
                if entry.get_dtype() not in names:
                    raise CheckpointError(f"{file}: {name} is {entry.get_dtype()}, not supported")
                shape, dtype = tuple(entry.get_shape()), names[entry.get_dtype()]
                tensors.append(Stored(file=file, name=name, shape=shape, dtype=dtype))
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} cannot be read: {e}; download it again") from e
    return tensors
