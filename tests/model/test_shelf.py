"""A list of tensors, some of which are in files."""

import pytest
import torch

from zeropoint.model.shelf import Shelf


def tensors(dtype=torch.bfloat16):
    return [torch.full((2, 3), i, dtype=dtype) for i in range(4)]


@pytest.mark.parametrize("limit", [0, 12, 25, 10_000])
def test_it_gives_back_what_was_put_on_it(tmp_path, limit):
    shelf = Shelf(tmp_path / "hidden", limit)
    for tensor in tensors():
        shelf.append(tensor)
    assert len(shelf) == 4 and all(torch.equal(a, b) for a, b in zip(shelf, tensors(), strict=True))
    in_files = len([*tmp_path.rglob("*.safetensors")])
    assert in_files == max(0, 4 - limit // 12), "twelve bytes each"
    shelf[3] = torch.ones(2, 3)
    assert torch.equal(shelf[-1], torch.ones(2, 3)) and shelf[3].dtype == torch.float32
    assert [float(t[0, 0]) for t in shelf[1:3]] == [1.0, 2.0]
    shelf.clear()
    assert len(shelf) == 0 and not (tmp_path / "hidden").exists()


def test_memory_that_got_free_is_used_again(tmp_path):
    shelf = Shelf(tmp_path, 24)
    for tensor in tensors(torch.float32):  # 24 bytes: one fits
        shelf.append(tensor)
    assert len([*tmp_path.iterdir()]) == 3
    for i, tensor in enumerate(tensors()):  # 12 bytes: two fit
        shelf[i] = tensor
    assert len([*tmp_path.iterdir()]) == 2


def test_what_was_read_does_not_change_when_its_place_does(tmp_path):
    shelf = Shelf(tmp_path, 0)
    shelf.append(torch.zeros(3))
    read = shelf[0]
    shelf[0] = torch.ones(3)
    assert torch.equal(read, torch.zeros(3))
