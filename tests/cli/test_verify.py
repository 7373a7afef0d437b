"""zeropoint verify: exit code 0 for sound, 1 for damage, 2 for what is no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cli.conftest import Cli
from tests.models import build


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_sound_checkpoint(cli: Cli, checkpoint: Path) -> None:
    ran = cli("verify", checkpoint)
    assert (ran.code, ran.err) == (0, "")
    data = cli("verify", checkpoint, "--json", "-").json
    assert data["sound"] is True
    assert ran.out == f"{checkpoint} is sound: {data['files']} files, {data['tensors']} tensors\n"
    assert data["tensors"] == 16 + 5  # weight matrices; two norms per layer and one


def test_a_flipped_bit(cli: Cli, checkpoint: Path) -> None:
    _flip_a_bit(checkpoint / "model.safetensors")
    ran = cli("verify", checkpoint)
    assert ran.code == 1
    assert "is not sound: 1 problem\n" in ran.out
    assert "model.safetensors has another SHA-256" in ran.out
    ran = cli("verify", checkpoint, "--json", "-")
    assert ran.code == 1
    assert ran.json["sound"] is False
    assert len(ran.json["problems"]) == 1


def test_every_problem_is_listed(cli: Cli, checkpoint: Path) -> None:
    _flip_a_bit(checkpoint / "model.safetensors")
    (checkpoint / "extra.txt").touch()
    ran = cli("verify", checkpoint)
    assert ran.code == 1
    assert "is not sound: 2 problems\n" in ran.out
    assert "extra.txt is not in the manifest" in ran.out


def test_a_manifest_of_a_newer_version(cli: Cli, checkpoint: Path) -> None:
    path = checkpoint / "zeropoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    ran = cli("verify", checkpoint)
    assert ran.code == 1
    assert "written by a newer zeropoint (format 99" in ran.out
    ran = cli("generate", checkpoint, "--prompt", "w2")
    assert ran.code == 2
    assert "pip install -U zeropoint" in ran.err


def test_a_manifest_that_is_not_json(cli: Cli, checkpoint: Path) -> None:
    (checkpoint / "zeropoint.json").write_text("{")
    ran = cli("verify", checkpoint, "--json", "-")
    assert ran.code == 1
    assert (ran.json["files"], ran.json["tensors"]) == (None, None)


def test_what_is_no_checkpoint(cli: Cli, llama: Path) -> None:
    ran = cli("verify", llama)
    assert ran.code == 2
    assert "only zeropoint checkpoints can be verified" in ran.err
    ran = cli("verify", llama / "missing")
    assert ran.code == 2
    assert "is not a folder" in ran.err


def test_against_its_source_and_another_model(cli: Cli, checkpoint: Path, llama: Path) -> None:
    ran = cli("verify", checkpoint, "--against", llama)
    assert ran.code == 0
    assert f"21 tensors are those of {llama}; most is lost: 0." in ran.out
    build("llama", seed=1).save_pretrained(llama.parent / "other")
    ran = cli("verify", checkpoint, "--against", llama.parent / "other")
    assert ran.code == 1
    assert "is not sound: 21 problems" in ran.out
    assert "model.norm.weight was not quantized, and differs from the source's" in ran.out


def test_another_librarys_checkpoint(cli: Cli, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "squeeze"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.codes": torch.zeros(3)}, tmp_path / "model.safetensors")
    ran = cli("verify", tmp_path)
    assert (ran.code, ran.out) == (
        1,
        f"{tmp_path}: nothing wrong was found, and little is known of it\n",
    )
    assert "warning: not checked: quant_method 'squeeze' is not known" in ran.err
    data = cli("verify", tmp_path, "--json", "-").json
    assert data["sound"] is None
    assert data["method"] == "squeeze" and len(data["unchecked"]) == 2 and data["compared"] is None


def test_a_damaged_checkpoint_is_not_run(cli: Cli, checkpoint: Path) -> None:
    _flip_a_bit(checkpoint / "model.safetensors")
    ran = cli("generate", checkpoint, "--prompt", "w2")
    assert (ran.code, ran.out) == (2, "")
    assert f"`zeropoint verify {checkpoint}` lists all damage" in ran.err
