"""Calibrated from checkpoint to checkpoint: the codes of the model in memory, block by block."""

import errno
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import zeropoint as zp
from tests.models import ARCHITECTURES, build, example_inputs, tokenizer
from zeropoint.checkpoints import native
from zeropoint.errors import CheckpointError, NonFiniteError, RecipeError, StreamError, TextError
from zeropoint.flows import blocks, stream, writing
from zeropoint.flows.data import Calibration
from zeropoint.model import shelf

SMALL = Calibration(tokens=128, window=16, batch_tokens=32)
PROPAGATED = replace(SMALL, propagate=0.5)
both_streams = pytest.mark.parametrize(
    "how", [SMALL, PROPAGATED], ids=["one stream", "and the original one"]
)
TEXTS = [" ".join(f"w{i * j % 90}" for i in range(200)) for j in (1, 7)]


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A Qwen2, which has biases, in bfloat16 and in shards."""
    build("qwen2").bfloat16().save_pretrained(tmp_path / "float", max_shard_size="40KB")
    return tmp_path / "float"


def compress(folder, out, **options):
    how = {"algorithm": "gptq", "data": TEXTS, "tokenizer": tokenizer(), "calibration": SMALL}
    return zp.compress(folder, out, "int4", strict=False, **how | options)


def in_memory(folder, out, **options):
    """By way of a model in memory. Returns what freezing reports."""
    model, _ = zp.load(folder)
    zp.quantize(model, "int4", strict=False, exclude=options.pop("exclude", None))
    how = {"data": TEXTS, "tokenizer": tokenizer(), "calibration": SMALL, "algorithm": "gptq"}
    report = zp.freeze(model, **how | options)
    zp.save(model, out)
    return report


# --- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_writes_what_freezing_the_loaded_model_writes(tmp_path, name):
    build(name).save_pretrained(tmp_path / "float")
    model, _ = zp.load(tmp_path / "float")
    data = [example_inputs(model)]
    report = zp.compress(
        tmp_path / "float", tmp_path / "streamed", "int4", strict=False, algorithm="gptq", data=data
    )
    zp.quantize(model, "int4", strict=False)
    frozen = zp.freeze(model, "gptq", data=data)
    zp.save(model, tmp_path / "saved")
    assert files(tmp_path / "streamed") == files(tmp_path / "saved")
    assert report.calibration == frozen and report.to_dict()["calibration"] == frozen.to_dict()
    assert zp.verify(tmp_path / "streamed") == []
    names = ["float", "saved", "streamed", "streamed.quantize.log"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    "options",
    [{}, {"data": "self"}, {"algorithm": "auto"}, {"calibration": PROPAGATED}],
    ids=["texts", "self", "auto", "propagated"],
)
def test_half_precision_in_shards_by_text(folder, tmp_path, monkeypatch, options):
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", 25_000)
    report = compress(folder, tmp_path / "out", **options)
    found = files(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in found) > 2
    assert in_memory(folder, tmp_path / "saved", **options) == report.calibration
    assert found == files(tmp_path / "saved")


def test_texts_are_read_by_the_tokenizer_of_the_source(tmp_path):
    build("llama-tied").save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    found = compress(tmp_path / "float", tmp_path / "out", tokenizer=None).calibration
    assert found == in_memory(tmp_path / "float", tmp_path / "saved")
    assert found.calibration == "texts" and found.tokens == 128


@both_streams
def test_layers_that_are_kept_and_blocks_without_any_other(folder, tmp_path, how):
    exclude = ["model.layers.0.*", "*.q_proj"]
    compress(folder, tmp_path / "out", exclude=exclude, calibration=how)
    in_memory(folder, tmp_path / "saved", exclude=exclude, calibration=how)
    assert files(tmp_path / "out") == files(tmp_path / "saved")


def test_one_block_is_in_memory_at_a_time(folder, tmp_path, monkeypatch):
    seen = []
    entered, left = blocks.OnDisk.enter, blocks.OnDisk.leave

    def real(residence):
        tensors = [(b, t) for b in residence._names for t in (*b.parameters(), *b.buffers())]
        return {residence._names[b] for b, t in tensors if not t.is_meta}

    def enter(self, block):
        passed = entered(self, block)
        seen.append((self._names[block], real(self)))
        return passed

    def leave(self, block, passed):
        assert real(self) == {self._names[block]}
        left(self, block, passed)
        assert real(self) == set()

    monkeypatch.setattr(blocks.OnDisk, "enter", enter)
    monkeypatch.setattr(blocks.OnDisk, "leave", leave)
    compress(folder, tmp_path / "out")
    assert seen == [(f"model.layers.{i}", {f"model.layers.{i}"}) for i in range(len(seen))]
    assert len(seen) > 1


@pytest.mark.parametrize(
    "where",
    [{"offload": True}, {"max_memory": "9KB"}, {"offload": True, "max_memory": 5000}],
    ids=str,
)
def test_hidden_states_in_files_make_no_difference(folder, tmp_path, monkeypatch, where):
    seen = set()
    entered = blocks.OnDisk.enter

    def enter(self, block):
        seen.update(p.parent for p in tmp_path.rglob("hidden-*.safetensors"))
        return entered(self, block)

    monkeypatch.setattr(blocks.OnDisk, "enter", enter)
    where = where | ({"offload": tmp_path / "states"} if "offload" in where else {})
    compress(folder, tmp_path / "out", **where, calibration=PROPAGATED)
    expected = where.get("offload", tmp_path / ".out.unfinished" / "hidden")
    assert seen == {expected, expected / "original"} and not expected.exists()
    in_memory(folder, tmp_path / "saved", calibration=PROPAGATED)
    assert files(tmp_path / "out") == files(tmp_path / "saved")


# --- interrupted ----------------------------------------------------------------------------------


class Stop(Exception):
    """What ends a run in these tests."""


@both_streams
@pytest.mark.parametrize("count", [0, 1, 3, 12, 30, 45])
def test_a_run_that_ended_is_gone_on_with(folder, tmp_path, monkeypatch, count, how):
    report = compress(folder, tmp_path / "whole", calibration=how)
    written = []
    put = writing.Shard.put

    def stopping(self, name, tensor):
        if len(written) >= count:
            raise Stop
        written.append(name)
        put(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", stopping)
        with pytest.raises(Stop):
            compress(folder, tmp_path / "out", workers=1, calibration=how)
    chosen = []
    choose = stream.Algorithm.choose

    def counting(self, weight, *rest):
        chosen.append(weight)
        return choose(self, weight, *rest)

    monkeypatch.setattr(stream.Algorithm, "choose", counting)
    again = compress(folder, tmp_path / "out", calibration=how)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert again.calibration == report.calibration
    groups = 4  # of weights with one input, in each block
    blocks_written = {".".join(n.split(".")[:3]) for n in written[:-1] if ".layers." in n}
    finished = max(0, len(blocks_written) - 1)
    assert len(chosen) <= 1 + groups * (2 - finished), "head, and blocks that were not finished"
    assert not (tmp_path / ".out.unfinished").exists()


def test_text_that_the_model_wrote_is_not_written_again(folder, tmp_path, monkeypatch):
    compress(folder, tmp_path / "whole", data=None)

    def stop(*arguments):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(blocks.OnDisk, "enter", stop)
        with pytest.raises(Stop):
            compress(folder, tmp_path / "out", data=None)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "write", stop)
        compress(folder, tmp_path / "out", data="self")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_other_data_or_options_are_refused(folder, tmp_path, monkeypatch):
    def stop(*arguments):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(blocks.OnDisk, "leave", stop)
        with pytest.raises(Stop):
            compress(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another data.*--fresh"):
        compress(folder, tmp_path / "out", data=TEXTS[:1])
    with pytest.raises(CheckpointError, match='another calibration: .*"seed": 0.*"seed": 1'):
        compress(folder, tmp_path / "out", calibration=Calibration(seed=1))
    with pytest.raises(CheckpointError, match="another algorithm"):
        compress(folder, tmp_path / "out", algorithm="auto")
    compress(folder, tmp_path / "out", data=TEXTS[:1], fresh=True)
    assert zp.verify(tmp_path / "out") == []


def test_a_block_that_was_damaged_meanwhile_is_done_again(folder, tmp_path, monkeypatch):
    compress(folder, tmp_path / "whole")
    leave, left = blocks.OnDisk.leave, []

    def stopping(self, block, passed):
        leave(self, block, passed)
        left.append(block)
        if len(left) == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(blocks.OnDisk, "leave", stopping)
        with pytest.raises(Stop):
            compress(folder, tmp_path / "out")
    working = tmp_path / ".out.unfinished"
    assert len([*(working / "blocks").iterdir()]) == 2
    (working / "blocks" / "model.layers.1.json").write_text("{}")
    partial = working / "checkpoint" / "model.safetensors"
    data = bytearray(partial.read_bytes())
    header = int.from_bytes(data[:8], "little")
    start = data.index(b'"model.layers.0.mlp.down_proj.weight"')
    span = data[start : start + 200].split(b'"data_offsets":[')[1].split(b"]")[0]
    data[8 + header + int(span.split(b",")[0])] ^= 1
    partial.write_bytes(data)
    compress(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_loses_nothing(folder, tmp_path, monkeypatch):
    report = compress(folder, tmp_path / "whole")
    write, left = writing.Shard.put, [40_000]

    def put(self, name, tensor):
        left[0] -= tensor.nbytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", put)
        with pytest.raises(CheckpointError, match="No space left .* the same call goes on"):
            compress(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [*(tmp_path / ".out.unfinished" / "blocks").iterdir()], "some block was finished"
    assert compress(folder, tmp_path / "out").calibration == report.calibration
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_disk_that_is_full_of_hidden_states_loses_nothing(folder, tmp_path, monkeypatch):
    compress(folder, tmp_path / "whole")
    saved, left = shelf.save_file, [6]

    def save(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "save_file", save)
        with pytest.raises(CheckpointError, match="No space left .* the same call goes on"):
            compress(folder, tmp_path / "out", offload=tmp_path / "states")
    assert not (tmp_path / "states").exists()
    compress(folder, tmp_path / "out", offload=tmp_path / "states")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_read_error_in_the_middle_loses_nothing(folder, tmp_path, monkeypatch):
    report = compress(folder, tmp_path / "whole")
    read = blocks.Stored.read

    def failing(self):
        done = tmp_path / ".out.unfinished" / "blocks" / "model.layers.0.json"
        if done.exists() and self.name == "model.layers.1.mlp.up_proj.weight":
            raise CheckpointError(f"{self.name} cannot be read: Input/output error")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Stored, "read", failing)
        with pytest.raises(CheckpointError, match="up_proj.weight cannot be read: Input/output"):
            compress(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert compress(folder, tmp_path / "out").calibration == report.calibration
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_run_that_ended_after_the_result_was_in_its_place_reports_all_of_it(
    folder, tmp_path, monkeypatch
):
    report = compress(folder, tmp_path / "whole")

    def stop(*arguments):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Calibrated, "forget", stop)
        with pytest.raises(Stop):
            compress(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    again = compress(folder, tmp_path / "out")
    assert again.calibration == report.calibration and again == report
    assert [p.name for p in tmp_path.glob(".out.*")] == []


KILLS = 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on
def test_a_kill_at_any_moment_loses_nothing(folder, tmp_path):
    """SIGKILL at random moments, again and again until a run comes to its end."""
    how = {"workers": 1, "calibration": PROPAGATED}
    compress(folder, tmp_path / "whole", **how)
    start = time.perf_counter()
    compress(folder, tmp_path / "timed", **how)
    seconds = time.perf_counter() - start
    moments = random.Random(0)
    killed = 0
    for trial in range(KILLS):
        out = tmp_path / f"out{trial}"
        child = os.fork()
        if child == 0:  # no native threads in the child: those of the parent are not there
            torch.set_num_threads(1)
            compress(folder, out, **how)
            os._exit(0)
        time.sleep(moments.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if out.exists():  # killed after the last step, or while it tidied up
            assert files(out) == files(tmp_path / "whole")
        compress(folder, out, overwrite=True, calibration=PROPAGATED)
        assert files(out) == files(tmp_path / "whole")
        assert [p.name for p in tmp_path.glob(f".out{trial}.*")] == []
    assert killed >= KILLS // 3


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"calibration": None, "effort": "high"}, StreamError, 'effort "high".*whole model'),
        ({"effort": "low"}, RecipeError, "give one of the two"),
        ({"data": []}, TextError, "empty"),
        (
            {"algorithm": "mse", "data": None, "calibration": None, "offload": "x"},
            RecipeError,
            "has no hidden states",
        ),
        ({"max_memory": "much"}, RecipeError, "much"),
    ],
    ids=["high", "both", "empty", "no states", "memory"],
)
def test_what_needs_the_whole_model_or_makes_no_sense(folder, tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        compress(folder, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_blocks_that_share_a_weight_cannot_be_had_one_by_one(folder, tmp_path, monkeypatch):
    live = stream.live_model

    def sharing(*arguments, **options):
        model = live(*arguments, **options)
        first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
        second.up_proj._parameters["weight"] = first.up_proj._parameters["weight"]
        return model

    monkeypatch.setattr(stream, "live_model", sharing)
    with pytest.raises(StreamError, match=r"layers.1.mlp.up_proj shares .*calibrate it in memory"):
        compress(folder, tmp_path / "out")


def test_a_model_without_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks.native, "MAX_SHARD_BYTES", 25_000)
    build("bert").save_pretrained(tmp_path / "float")
    monkeypatch.setattr("zeropoint.model.capture.chains", lambda model, wanted: {})
    with pytest.raises(StreamError, match="has no blocks that run one by one"):
        compress(tmp_path / "float", tmp_path / "out", data=[torch.arange(32)])


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    file = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][3, 4] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"{name}: .* first at \[3, 4\]"):
        compress(folder, tmp_path / "out")
