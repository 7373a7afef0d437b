"""Whatever happens to a finished checkpoint: `verify` reports it, and loading it gives the original
or an error of ours.
"""

import json
import random
import shutil

import pytest
import torch

import zeropoint as zp
from tests.models import build, outputs
from zeropoint.checkpoints import native
from zeropoint.errors import ZeropointError

TRIALS = 30  # of each kind


def flip(file, others, chance):
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def truncate(file, others, chance):
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


def lengthen(file, others, chance):
    file.write_bytes(file.read_bytes() + bytes(chance.randrange(1, 9)))


def remove(file, others, chance):
    file.unlink()


def swap(file, others, chance):
    shards = [p for p in others if p.suffix == ".safetensors"]
    first, second = chance.sample(shards, 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def copy(file, others, chance):
    shutil.copyfile(file, file.with_name("extra.safetensors"))


def edit(file, others, chance):
    """A value of a JSON file becomes another one."""
    target = chance.choice([p for p in others if p.suffix == ".json"])
    data = json.loads(target.read_text())
    key = chance.choice(list(data))
    data[key] = chance.choice([v for v in (None, 7, "x", [], {}) if v != data[key]])
    target.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint in several shards, and what its model answers."""
    folder = tmp_path_factory.mktemp("corruption")
    build("llama-tied").save_pretrained(folder / "float")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MAX_SHARD_BYTES", 20_000)
        zp.compress(folder / "float", folder / "sound", "int4", strict=False)
    return folder / "sound", outputs(zp.load(folder / "sound")[0])


@pytest.mark.parametrize("change", [flip, truncate, lengthen, remove, swap, copy, edit])
def test_no_corruption_passes(sound, tmp_path, change):
    path, expected = sound
    names = sorted(p.name for p in path.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2
    chance = random.Random(change.__name__)
    for trial in range(TRIALS):
        folder = tmp_path / str(trial)
        shutil.copytree(path, folder)
        files = [folder / name for name in names]
        change(chance.choice(files), files, chance)
        try:
            problems = zp.verify(folder)
        except ZeropointError as e:
            problems = [str(e)]
        assert problems, trial
        try:
            loaded, _ = zp.load(folder)
        except ZeropointError:
            continue
        assert torch.equal(outputs(loaded), expected), trial
