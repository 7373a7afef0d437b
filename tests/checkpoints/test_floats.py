"""Headers of float checkpoints: what is there, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from zeropoint.checkpoints.floats import read_headers
from zeropoint.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16()}, tmp_path / "x.safetensors")
    save_file({"c": torch.arange(3)}, tmp_path / "y.safetensors")
    return tmp_path


def index(folder, weight_map):
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_tensors_are_known_without_being_read(folder):
    stored = read_headers(folder)
    assert {n: (s.file.name, s.shape, s.dtype, s.nbytes) for n, s in stored.items()} == {
        "a": ("x.safetensors", (2, 3), torch.float32, 24),
        "b": ("x.safetensors", (4,), torch.bfloat16, 8),
        "c": ("y.safetensors", (3,), torch.int64, 24),
    }
    assert torch.equal(stored["c"].read(), torch.arange(3))


def test_only_files_of_the_index_count(folder):
    index(folder, {"a": "x.safetensors", "b": "x.safetensors"})
    assert read_headers(folder).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "../x.safetensors"}, "outside the folder"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": "x\0.safetensors"}, "outside the folder"),
        ({"a": ".."}, "outside the folder"),
        ({"a": "z.safetensors"}, "z.safetensors cannot be read"),
        ({"d": "x.safetensors"}, "lists d in x.safetensors, which does not hold it"),
        ({"a": "model.safetensors.index.json"}, "cannot be read"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"weight_map": 3}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_an_index_that_makes_no_sense(folder, weight_map, says):
    index(folder, weight_map)
    with pytest.raises(CheckpointError, match=says):
        read_headers(folder)


def test_two_indexes_and_a_tensor_in_two_files(folder):
    save_file({"a": torch.ones(1)}, folder / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in x.safetensors and in z.safetensors"):
        read_headers(folder)
    index(folder, {"a": "x.safetensors"})
    (folder / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="2 indexes"):
        read_headers(folder)


HOSTILE = {
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "header beyond the file": (100).to_bytes(8, "little") + b"{}",
    "no json": (4).to_bytes(8, "little") + b"abcd",
    "deep json": (80_000).to_bytes(8, "little") + b"[" * 80_000,
    "empty": b"",
    "one byte": b"\1",
}


def with_header(entry, data=b""):
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE |= {
    "negative offset": with_header({"a": tensor([1], [-4, 0])}),
    "offset beyond the file": with_header({"a": tensor([1 << 40], [0, 1 << 42])}, b"1234"),
    "shape overflows": with_header({"a": tensor([1 << 40, 1 << 40], [0, 4])}, b"1234"),
    "shape and offsets differ": with_header({"a": tensor([2], [0, 4])}, b"1234"),
    "overlap": with_header({"a": tensor([1], [0, 4]), "b": tensor([1], [2, 6])}, b"123456"),
    "unknown dtype": with_header({"a": tensor([1], [0, 4], "F33")}, b"1234"),
    "no dtype": with_header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_an_error_that_names_it(tmp_path, data):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="m.safetensors"):
        read_headers(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="may run code"):
        read_headers(tmp_path)
