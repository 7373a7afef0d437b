"""Our safetensors writer beside the library's own."""

import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from zeropoint.checkpoints.shard import DTYPES, Shard, as_bytes, layout, write_file

TENSORS = {
    "b": torch.arange(7, dtype=torch.uint8),
    "a": torch.arange(6.0).view(2, 3),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "view": torch.arange(12.0).view(3, 4).t(),
    "é": torch.tensor([True, False]),
}


def header(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["all", "none"])
def test_the_library_writes_the_same_values_and_reads_ours(tmp_path, tensors):
    write_file(tmp_path / "ours", tensors, {"format": "pt", "k": "v"})
    plain = {name: t.contiguous() for name, t in tensors.items()}
    save_file(plain, tmp_path / "theirs", metadata={"format": "pt", "k": "v"})
    assert header(tmp_path / "ours") == header(tmp_path / "theirs")
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    tensor = torch.arange(5).to(dtype)
    write_file(tmp_path / "f", {"t": tensor, "odd": torch.ones(3, dtype=torch.uint8)}, {})
    read = load_file(tmp_path / "f")["t"]
    assert read.dtype == dtype and bytes(as_bytes(read)) == bytes(as_bytes(tensor))


def test_tensors_without_memory_have_a_layout(tmp_path):
    here = layout(TENSORS, {})
    there = layout({name: t.to("meta") for name, t in TENSORS.items()}, {})
    assert here == there
    assert all(start % 4 == 0 for name, (start, _) in here.spans.items() if name in "a view empty")


def test_any_order_and_threads_make_the_same_file(tmp_path):
    write_file(tmp_path / "once", TENSORS, {"k": "v"})
    shard = Shard(tmp_path / "pieces", layout(TENSORS, {"k": "v"}))
    threads = [threading.Thread(target=shard.put, args=item) for item in reversed(TENSORS.items())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shard.close()
    assert (tmp_path / "once").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_a_file_that_was_begun_is_gone_on_with(tmp_path):
    plan = layout(TENSORS, {"k": "v"})
    first = Shard(tmp_path / "f", plan)
    first.put("a", TENSORS["a"])
    first.close()
    second = Shard(tmp_path / "f", plan)
    assert second.get("a") == bytes(as_bytes(TENSORS["a"])) and second.get("b") == bytes(7)
    second.close()


@pytest.mark.parametrize("damage", ["short", "long", "header"])
def test_of_a_file_that_was_damaged_the_rest_is_kept(tmp_path, damage):
    """Its tensors may be in no other place."""
    plan = layout(TENSORS, {"k": "v"})
    write_file(tmp_path / "whole", TENSORS, {"k": "v"})
    write_file(tmp_path / "f", TENSORS, {"k": "v"})
    if damage == "header":
        with (tmp_path / "f").open("r+b") as file:
            file.seek(20)
            file.write(b"#")
    else:
        os.truncate(tmp_path / "f", plan.size + (-1 if damage == "short" else 1))
    shard = Shard(tmp_path / "f", plan)
    shard.flush()
    assert shard.get("a") == bytes(as_bytes(TENSORS["a"]))
    last = max(plan.spans, key=lambda name: plan.spans[name][1])
    shard.put(last, TENSORS[last])
    shard.close()
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "f").stat().st_size == plan.size


def test_a_tensor_of_another_size_is_refused(tmp_path):
    shard = Shard(tmp_path / "f", layout(TENSORS, {}))
    with pytest.raises(AssertionError, match="b has 8 bytes, not 7"):
        shard.put("b", torch.zeros(8, dtype=torch.uint8))
    shard.close()
