"""From checkpoint to checkpoint: the same bytes as by way of a model in memory, whatever happened
on the way.
"""

import errno
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import zeropoint as zp
from tests.models import ARCHITECTURES, build, outputs, tokenizer
from zeropoint.checkpoints import floats, native
from zeropoint.errors import (
    CheckpointError,
    GroupSizeError,
    NonFiniteError,
    RecipeError,
    SourceError,
    StreamError,
    UnknownNameError,
)
from zeropoint.flows import stream, writing

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A tied Llama with a tokenizer."""
    build("llama-tied").save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def in_memory(folder, out, **options):
    model, words = zp.load(folder, **options)
    zp.save(model, out, tokenizer=words)
    return model


# --- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8"},
        {"weights": "nf4", "double_quant": True},
        {"weights": "mxfp4"},
        {"weights": "nvfp4"},
        {"weights": "any4", "group_size": 16},
        {"weights": "e8p", "group_size": 16},
        {"weights": "int4", "group_size": 32, "algorithm": "mse", "exclude": "*embed*"},
        {"weights": "int2", "group_size": 32, "float_zero_point": True},
    ],
    ids=["int8", "nf4", "mxfp4", "nvfp4", "any4", "e8p", "int4 mse", "int2 float zero point"],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_writes_what_saving_the_loaded_model_writes(tmp_path, name, options):
    build(name).save_pretrained(tmp_path / "float")
    options = options | {"strict": False}
    report = zp.compress(tmp_path / "float", tmp_path / "streamed", **options)
    model = in_memory(tmp_path / "float", tmp_path / "saved", **options)
    assert files(tmp_path / "streamed") == files(tmp_path / "saved")
    assert zp.verify(tmp_path / "streamed") == []
    assert report.bytes_after == zp.footprint(model).total_bytes
    loaded, _ = zp.load(tmp_path / "float")
    assert report == zp.quantize(loaded, **{k: v for k, v in options.items() if k != "algorithm"})
    names = ["float", "saved", "streamed", "streamed.quantize.log"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_of_half_precision_in_shards(tmp_path, dtype, monkeypatch):
    build("mistral").to(dtype).save_pretrained(tmp_path / "float", max_shard_size="40KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 3
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", 25_000)
    zp.compress(tmp_path / "float", tmp_path / "out", "int8", workers=3)
    in_memory(tmp_path / "float", tmp_path / "saved", weights="int8")
    found = files(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in found) > 2
    assert found == files(tmp_path / "saved")


def test_everything_that_is_no_weight_is_carried_over(folder, tmp_path):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    zp.compress(folder, tmp_path / "out")
    names = {*files(tmp_path / "out")}
    assert {"1_Pooling/config.json", "modeling_own.py", "tokenizer.json"} <= names
    assert not {"pytorch_model.bin", ".git/HEAD"} & names
    assert zp.verify(tmp_path / "out") == []
    _, words = zp.load(tmp_path / "out")
    assert words("w2 w5").input_ids == tokenizer()("w2 w5").input_ids


def test_tensors_that_the_model_does_not_have_are_carried_over(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    extra = torch.arange(6.0).view(2, 3)
    save_file(
        tensors | {"mtp.layers.0.weight": extra}, folder / "model.safetensors", {"format": "pt"}
    )
    zp.compress(folder, tmp_path / "out", "int4", strict=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["mtp.layers.0.weight"], extra)
    assert zp.verify(tmp_path / "out") == []
    found, _ = zp.load(tmp_path / "out")
    expected, _ = zp.load(folder, weights="int4", strict=False)
    assert torch.equal(outputs(found), outputs(expected))
    manifest = json.loads((tmp_path / "out" / "zeropoint.json").read_text())
    assert manifest["carried"] == ["mtp.layers.0.weight"]


def test_a_checkpoint_of_the_base_model_fits_the_larger_one_but_for_what_it_lacks(tmp_path):
    """Names get or lose the prefix of the base model."""
    build("gpt2").transformer.save_pretrained(tmp_path / "base")
    zp.compress(tmp_path / "base", tmp_path / "out", task="text-generation")
    found, _ = zp.load(tmp_path / "out", task="text-generation")
    expected, _ = zp.load(tmp_path / "base", weights="int8", task="text-generation")
    assert torch.equal(outputs(found), outputs(expected))


def test_a_replaced_checkpoint_and_one_that_is_not(folder, tmp_path):
    zp.compress(folder, tmp_path / "out")
    first = files(tmp_path / "out")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        zp.compress(folder, tmp_path / "out", "int4", strict=False)
    assert files(tmp_path / "out") == first
    zp.compress(folder, tmp_path / "out", "int4", strict=False, overwrite=True)
    assert files(tmp_path / "out") != first and zp.verify(tmp_path / "out") == []
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        zp.compress(folder, tmp_path / "thesis", overwrite=True)


def test_progress_counts_megabytes_and_ends(folder, tmp_path, monkeypatch):
    steps = []
    zp.compress(folder, tmp_path / "out", on_step=lambda *step: steps.append(step))
    done = [d for what, d, _ in steps if "verifying" not in what]
    assert done == sorted(done) and "model.embed_tokens.weight" in {what for what, _, _ in steps}
    assert any("verifying" in what for what, _, _ in steps)


# --- interrupted ----------------------------------------------------------------------------------


class Stop(Exception):
    """What ends a run in these tests."""


def stop_after(monkeypatch, count):
    """The run ends when so many weights are written; later runs do not."""
    written = []
    write = writing.Shard.put

    def put(self, name, tensor):
        if len(written) >= count:
            raise Stop
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(writing.Shard, "put", put)
    return written


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_a_run_that_ended_is_gone_on_with(folder, tmp_path, monkeypatch, count):
    zp.compress(folder, tmp_path / "whole", "int4", strict=False)
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(Stop):
            zp.compress(folder, tmp_path / "out", "int4", strict=False, workers=1)
    assert not (tmp_path / "out").exists()
    begun = []
    choose = stream.Algorithm.choose

    def counting(self, weight, *rest):
        begun.append(weight)
        return choose(self, weight, *rest)

    monkeypatch.setattr(stream.Algorithm, "choose", counting)
    zp.compress(folder, tmp_path / "out", "int4", strict=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    weights = len(json.loads((tmp_path / "out" / "zeropoint.json").read_text())["weights"])
    assert weights - count <= len(begun) <= weights - count // 3, "three parts for a weight"
    assert not (tmp_path / ".out.unfinished").exists()


@pytest.mark.parametrize("after", ["copying", "verifying"])
def test_a_run_that_ended_after_the_tensors(folder, tmp_path, monkeypatch, after):
    """Nothing that was half written or is of yesterday stays."""
    zp.compress(folder, tmp_path / "whole")

    def stop(*arguments):
        raise Stop

    with monkeypatch.context() as patch:
        if after == "copying":
            patch.setattr(stream.native, "write_config", stop)
        else:
            patch.setattr(stream, "install_directory", stop)
        with pytest.raises(Stop):
            zp.compress(folder, tmp_path / "out")
    (tmp_path / ".out.unfinished" / "checkpoint" / "stale.txt").write_text("x")
    (tmp_path / ".out.unfinished" / "checkpoint" / "stale.safetensors").write_text("x")
    zp.compress(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_was_damaged_meanwhile_is_written_again(folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(Stop):
            zp.compress(folder, tmp_path / "out", workers=1)
    partial = tmp_path / ".out.unfinished" / "checkpoint" / "model.safetensors"
    size = partial.stat().st_size
    with partial.open("r+b") as file:  # as after a power failure: zeros where data was
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    zp.compress(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_recipe_or_source_is_refused_unless_it_starts_over(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stop):
            zp.compress(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another recipe.*--fresh"):
        zp.compress(folder, tmp_path / "out", "int4", strict=False)
    with pytest.raises(CheckpointError, match="another algorithm"):
        zp.compress(folder, tmp_path / "out", algorithm="mse")
    os.utime(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="another source"):
        zp.compress(folder, tmp_path / "out")
    zp.compress(folder, tmp_path / "out", fresh=True)
    zp.compress(folder, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("fresh", [False, True])
def test_another_process_is_not_disturbed(folder, tmp_path, monkeypatch, fresh):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stop):
            zp.compress(folder, tmp_path / "out")
    before = files(tmp_path / ".out.unfinished" / "checkpoint")
    job = stream.prepare(folder, {"weights": "int8"})
    job = replace(job, contents=replace(job.contents, algorithm="rtn"))
    identity = stream._identity(job, stream.get_algorithm("rtn"), stream.NO_RECORD)
    running = stream.Journal(tmp_path / ".out.unfinished" / "journal.jsonl", identity)
    with pytest.raises(CheckpointError, match="written by another process"):
        zp.compress(folder, tmp_path / "out", fresh=fresh)
    running.close()
    assert files(tmp_path / ".out.unfinished" / "checkpoint") == before
    zp.compress(folder, tmp_path / "out")
    assert zp.verify(tmp_path / "out") == []


KILLS = 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on
def test_a_kill_at_any_moment_loses_nothing(folder, tmp_path):
    """SIGKILL at random moments, again and again until a run comes to its end."""
    zp.compress(folder, tmp_path / "whole", workers=1)
    start = time.perf_counter()
    zp.compress(folder, tmp_path / "timed", workers=1)
    seconds = time.perf_counter() - start
    moments = random.Random(0)
    killed = 0
    for trial in range(KILLS):
        out = tmp_path / f"out{trial}"
        child = os.fork()
        if child == 0:  # no native threads in the child: those of the parent are not there
            torch.set_num_threads(1)
            zp.compress(folder, out, workers=1)
            os._exit(0)
        time.sleep(moments.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if out.exists():  # killed after the last step, or while it tidied up
            assert files(out) == files(tmp_path / "whole")
        zp.compress(folder, out, overwrite=True)
        assert files(out) == files(tmp_path / "whole")
        assert [p.name for p in tmp_path.glob(f".out{trial}.*")] == []
    assert killed >= KILLS // 3


def test_a_full_disk_loses_nothing(folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "whole")
    write, left = writing.Shard.put, [10_000]

    def put(self, name, tensor):
        left[0] -= tensor.nbytes
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", put)
        with pytest.raises(CheckpointError, match="No space left .* the same call goes on"):
            zp.compress(folder, tmp_path / "out")
    zp.compress(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_read_error_in_the_middle_loses_nothing(folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "whole")
    opened, left = floats.safe_open, [8]

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(floats, "safe_open", failing)
        with pytest.raises(CheckpointError, match="weight cannot be read: .*Input/output error"):
            zp.compress(folder, tmp_path / "out", workers=1)
    done = (tmp_path / ".out.unfinished" / "journal.jsonl").read_text().splitlines()
    assert len(done) > 3 and not (tmp_path / "out").exists()
    zp.compress(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_too_little_space_is_known_before(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="has 0.0 MB free"):
        zp.compress(folder, tmp_path / "out")


def test_a_result_that_reads_back_differently_is_not_installed(folder, tmp_path, monkeypatch):
    write = writing.Shard.put

    def put(self, name, tensor):
        write(self, name, tensor.clone().view(torch.uint8) ^ 1 if name == DOWN else tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", put)
        with pytest.raises(CheckpointError, match=f"{DOWN} has been written, .* is the disk sound"):
            zp.compress(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    zp.compress(folder, tmp_path / "out")
    assert zp.verify(tmp_path / "out") == []


# --- refused --------------------------------------------------------------------------------------


def change(folder, **tensors):
    stored = load_file(folder / "model.safetensors") | tensors
    kept = {name: t for name, t in stored.items() if t is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    weight = load_file(folder / "model.safetensors")[DOWN]
    weight[3, 4] = float("nan")
    change(folder, **{DOWN: weight})
    with pytest.raises(NonFiniteError, match=rf"{DOWN}: 1 NaN .* first at \[3, 4\]"):
        zp.compress(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_the_models(folder, tmp_path):
    change(folder, **{NORM: torch.ones(3)})
    with pytest.raises(SourceError, match=rf"{NORM} is \(3,\), but the model has \(64,\)"):
        zp.compress(folder, tmp_path / "out")
    change(folder, **{NORM: None})
    with pytest.raises(SourceError, match=f"incomplete: it has no {NORM}"):
        zp.compress(folder, tmp_path / "out")


def test_what_can_only_be_read_as_a_whole_says_so(tmp_path):
    build("t5").bfloat16().save_pretrained(tmp_path / "t5")
    with pytest.raises(StreamError, match=r"wo of a T5.* zp.load\(source, weights"):
        zp.compress(tmp_path / "t5", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(StreamError, match="is a .gguf file"):
        zp.compress(tmp_path / "m.gguf", tmp_path / "out")


def test_what_is_quantized_already_is_refused(folder, tmp_path):
    zp.compress(folder, tmp_path / "int8")
    with pytest.raises(SourceError, match="is quantized already; give the float model") as refusal:
        zp.compress(tmp_path / "int8", tmp_path / "out")
    assert not isinstance(refusal.value, StreamError), "loading it as a whole would not help"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"weights": "int9"}, UnknownNameError, "int9"),
        ({"effort": "low"}, RecipeError, "uses no calibration data"),
        ({"workers": 0}, RecipeError, "workers=0"),
        ({"weights": "int4", "group_size": 48}, GroupSizeError, "48"),
        (
            {"weights": "int4", "recipe": zp.Recipe(rules=(zp.Rule(match="*"),))},
            RecipeError,
            "give",
        ),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_leave_no_trace(folder, tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        zp.compress(folder, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["float"]
