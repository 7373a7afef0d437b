"""Plans, compared with what is then done."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from torch import nn

import zeropoint as zp
from bench._gguf import write_gguf
from tests.models import ARCHITECTURES, build, tokenizer
from zeropoint.errors import RecipeError, SourceError, StreamError, UnknownNameError
from zeropoint.flows import plan as module
from zeropoint.flows import trial
from zeropoint.flows.budget import parse_bytes


@pytest.fixture
def folder(tmp_path):
    build("llama-tied").save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def size(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "mxfp4", "nvfp4", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_are_those_of_the_result(tmp_path, name, weights):
    build(name).save_pretrained(tmp_path / "float")
    plan = zp.plan(tmp_path / "float", weights)
    report = zp.compress(tmp_path / "float", tmp_path / "out", weights, strict=False)
    assert plan.report == report and plan.weights == weights and plan.whole is None
    assert plan.bytes_after == report.bytes_after
    assert plan.disk_bytes == size(tmp_path / "out")


@pytest.mark.parametrize("how", [{"algorithm": "mse"}, {"algorithm": "gptq", "effort": "low"}])
def test_the_disk_is_exact_with_shards_and_all_that_lies_beside(folder, tmp_path, monkeypatch, how):
    monkeypatch.setattr(module.native, "MAX_SHARD_BYTES", 20_000)
    (folder / "original").mkdir()
    (folder / "original" / "notes.txt").write_text("carried")
    for left in ("model.gguf", "pytorch_model.bin", ".cache"):
        (folder / left).write_text("not carried")
    planned = zp.plan(folder, "int8", **how)
    if "effort" in how:
        how = how | {"data": [torch.arange(64)]}
    zp.compress(folder, tmp_path / "out", "int8", **how)
    assert (tmp_path / "out" / module.native.INDEX).is_file()
    assert planned.disk_bytes == size(tmp_path / "out")


MEASURE = """
import json, sys
import torch
import zeropoint as zp
from zeropoint.evaluate.memory import peak_rss_bytes
from zeropoint.flows.data import Calibration
source, out, weights, algorithm = sys.argv[1:]
how = {"algorithm": algorithm}
if algorithm == "gptq":
    how["calibration"] = Calibration(tokens=1024)
planned = zp.plan(source, weights, **how)
if algorithm == "gptq":
    how["data"] = torch.arange(1024)[None]
zp.compress(source, out, weights, **how)
print(json.dumps([planned.peak_rss_bytes, peak_rss_bytes()]))
"""


def measured(tmp_path, weights, algorithm, **shape):
    """The peak that was planned, and the real one, of a Llama with weights of `shape`."""
    config = SimpleNamespace(
        architectures=["LlamaForCausalLM"], model_type="llama", head_dim=64, dtype="float32",
        tie_word_embeddings=True, **shape,
    )  # fmt: skip
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text(json.dumps(vars(config)))
    zp_model = module.float_skeleton(tmp_path / "float")
    tensors = {
        name: torch.full(p.shape, 0.01) if algorithm == "rtn" else torch.randn(p.shape) / 32
        for name, p in zp_model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    arguments = [str(tmp_path / "float"), str(tmp_path / "out"), weights, algorithm]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_memory_is_what_it_takes(tmp_path, weights):
    """A model whose weights are not lost in the size of Python: 600 MB, 150 MB the largest."""
    planned, real = measured(
        tmp_path, weights, "rtn", hidden_size=2048, intermediate_size=8192, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=18000,
    )  # fmt: skip
    assert planned == pytest.approx(real, rel=0.15)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_memory_is_what_calibrating_takes(tmp_path):
    """Two blocks of 61 MB, whose solves take 600 MB."""
    planned, real = measured(
        tmp_path, "int4", "gptq", hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=4096,
    )  # fmt: skip
    assert planned == pytest.approx(real, rel=0.15)


def test_the_memory_of_calibrating_grows_with_the_text_and_the_model(tmp_path, monkeypatch):
    # What the process itself has changes between two plans, when memory is given back.
    monkeypatch.setattr(module, "resident_bytes", lambda: 0)
    two, eight = deep(tmp_path / "2", 2), deep(tmp_path / "8", 8)

    def peak(folder, tokens=4096, propagate=0.0):
        how = zp.Calibration(tokens=tokens, propagate=propagate)
        return zp.plan(folder, "int4", algorithm="gptq", calibration=how).peak_rss_bytes

    more = peak(two, tokens=32768) - peak(two)
    states, parts = 2 * 256, 256 + 768
    assert more == pytest.approx((states + parts) * (32768 - 4096) * 4, rel=0.2), "of one block"
    assert peak(eight) == pytest.approx(peak(two), rel=0.1)
    block = 4 * (4 * 256 * 256 + 3 * 256 * 768 + 2 * 256)
    originals = peak(two, propagate=0.5) - peak(two)
    assert originals == pytest.approx(block + 2 * 4096 * 256 * 4 / 2, rel=0.2)


def test_nothing_is_read_but_headers(folder, monkeypatch):
    def refuse(self):
        raise AssertionError(f"{self.name} is read")

    monkeypatch.setattr(module.Stored, "read", refuse)
    assert zp.plan(folder, "int4").bytes_after > 0


def test_a_hub_repository_sends_its_headers_only(folder, monkeypatch):
    """The hub is not reachable in tests: its two answers are put in its place."""
    infos = {
        name: TensorInfo(dtype="F32", shape=list(t.shape), data_offsets=(0, t.nbytes))
        for name, t in load_file(folder / "model.safetensors").items()
    }
    answer = SafetensorsRepoMetadata(
        metadata={}, sharded=False, weight_map=dict.fromkeys(infos, "model.safetensors"),
        files_metadata={"model.safetensors": SafetensorsFileMetadata(metadata={}, tensors=infos)},
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda name: asked.append(name) or answer
    )
    local = module.float_skeleton
    monkeypatch.setattr(module, "float_skeleton", lambda where, task: local(folder, task))
    plan = zp.plan("owner/name", "int4")
    assert asked == ["owner/name"]
    assert plan.report == zp.plan(folder, "int4").report and plan.whole is None


def test_a_gguf_file_and_what_cannot_be_streamed_are_loaded_as_a_whole(tmp_path):
    write_gguf(build("llama-tied"), tmp_path / "m.gguf")
    plan = zp.plan(tmp_path / "m.gguf", "int4")
    model = build("llama-tied")
    assert plan.report == zp.quantize(model, "int4", strict=False)
    assert "dequantized while it is read" in plan.whole
    build("t5").bfloat16().save_pretrained(tmp_path / "t5")
    plan = zp.plan(tmp_path / "t5", "int8")
    assert "float32" in plan.whole and "loaded as a whole" in str(plan)
    expected, _ = zp.load(tmp_path / "t5")
    assert plan.report.bytes_before == pytest.approx(zp.footprint(expected).total_bytes, rel=0.5)


# --- warnings -------------------------------------------------------------------------------------


def test_few_bits_without_data_are_warned_about(folder):
    assert "expect gibberish" in zp.plan(folder, "int2").warnings[0]
    assert "lose much" in zp.plan(folder, "int4").warnings[0]
    assert zp.plan(folder, "int8").warnings == ()


def test_a_size_that_does_not_divide_is_one_warning_for_all_layers(folder):
    plan = zp.plan(folder, "int4", group_size=48)
    gibberish, by_64, by_128, coverage = plan.warnings
    assert by_64.startswith("model.layers.0.self_attn.q_proj and 11 more: K=64 is not a multiple")
    assert by_128.startswith("model.layers.0.mlp.down_proj and 1 more: K=128 is not a multiple")
    assert "lose much" in gibberish and "the recipe promises" in coverage


def test_what_will_be_kept_is_said(tmp_path):
    build("vit").save_pretrained(tmp_path / "vit")
    kept = [m for m in zp.plan(tmp_path / "vit").report.modules if m.action == "kept"]
    warnings = zp.plan(tmp_path / "vit").warnings
    assert kept and any("will be kept: no quantized counterpart of Conv2d" in w for w in warnings)


# --- budgets --------------------------------------------------------------------------------------


def test_the_widest_format_that_fits(folder):
    sizes = {name: zp.plan(folder, name).bytes_after for name in module.FOR_BUDGETS}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    for name, needed in sizes.items():
        assert zp.plan(folder, budget=needed).weights == name
    with pytest.raises(RecipeError, match=r"nothing fits in 0.0 MB: int2 takes 0.0 MB"):
        zp.plan(folder, budget=min(sizes.values()) - 1)


def test_the_context_counts(folder):
    plan = zp.plan(folder, "int8", context=100)
    # keys and values of 2 layers, 2 heads of 16, float32
    assert plan.kv_cache_bytes == 2 * 2 * 2 * 16 * 100 * 4
    fits = plan.bytes_after + plan.kv_cache_bytes
    assert zp.plan(folder, budget=fits, context=100).weights == "int8"
    assert zp.plan(folder, budget=fits - 1, context=100).weights == "int6"
    assert zp.plan(folder, budget=fits - 1).weights == "int8"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8e9), ("8 gib", 8 * 2**30), ("7.5MB", 7.5e6), (123, 123), ("12", 12), ("3 kB", 3000)],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "8 G B", "8XB", "nan", "1e9"])
def test_what_is_no_size(text, folder):
    with pytest.raises(RecipeError, match="is no size"):
        zp.plan(folder, budget=text)


def test_refused(folder, tmp_path):
    with pytest.raises(RecipeError, match="a budget chooses the format"):
        zp.plan(folder, "int4", budget="1GB")
    with pytest.raises(UnknownNameError, match="int9"):
        zp.plan(folder, "int9")
    with pytest.raises(SourceError, match="does not exist"):
        zp.plan(tmp_path / "nothing")
    zp.compress(folder, tmp_path / "out")
    with pytest.raises(SourceError, match="quantized already"):
        zp.plan(tmp_path / "out")
    assert Path(folder).is_dir()


# --- trials ---------------------------------------------------------------------------------------


def deep(path, layers):
    """A Llama without embeddings to speak of, in `layers` blocks of 0.8 M weights."""
    config = SimpleNamespace(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=256, head_dim=64,
        intermediate_size=768, num_hidden_layers=layers, num_attention_heads=4, dtype="float32",
        num_key_value_heads=4, vocab_size=128, tie_word_embeddings=True,
        max_position_embeddings=64,
    )  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(vars(config)))
    shapes = module.float_skeleton(path).state_dict()
    tensors = {n: torch.randn(p.shape) / 16 for n, p in shapes.items() if n != "lm_head.weight"}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("algorithm", ["mse", "gptq", "auto"])
def test_a_trial_grows_with_the_layers(tmp_path, monkeypatch, algorithm):
    """By a clock that counts weights and tokens, not seconds: the machine may be busy."""
    clock = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    choose, run = trial.Algorithm.choose, nn.Linear.forward

    def chosen(self, weight, *rest):
        clock[0] += weight.numel()
        return choose(self, weight, *rest)

    def passed(self, x):
        clock[0] += x.numel()
        return run(self, x)

    monkeypatch.setattr(trial.Algorithm, "choose", chosen)
    monkeypatch.setattr(nn.Linear, "forward", passed)
    how = {"algorithm": algorithm, "trial": True}
    few = zp.plan(deep(tmp_path / "few", 2), "int4", **how)
    many = zp.plan(deep(tmp_path / "many", 8), "int4", **how)
    assert few.tried[0] == many.tried[0] == "model.layers.0"
    assert 0 < few.quantize_seconds and "from a trial on model.layers.0" in str(few)
    assert many.quantize_seconds / few.quantize_seconds == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("algorithm", "effort"), [("rtn", None), ("gptq", "low")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_trial_of_other_models_is_positive(tmp_path, name, algorithm, effort):
    build(name).save_pretrained(tmp_path / "float")
    options = {"algorithm": algorithm, "effort": effort}
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    plan = zp.plan(tmp_path / "float", "int8", trial=True, **options)
    assert plan.quantize_seconds > 0 and plan.to_dict()["tried"] == list(plan.tried)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    without = zp.plan(tmp_path / "float", "int8", **options)
    assert without.quantize_seconds is None and without.tried == ()
    assert without.report == plan.report


def test_a_trial_by_a_budget_is_of_what_fits(folder):
    needed = zp.plan(folder, "int4").bytes_after
    plan = zp.plan(folder, budget=needed, trial=True)
    assert plan.weights == "int4" and plan.quantize_seconds > 0


def test_what_there_is_no_trial_of(folder, tmp_path):
    with pytest.raises(SourceError, match="owner/name is on the hub.*leave trial"):
        zp.plan("owner/name", trial=True)
    with pytest.raises(StreamError, match='not loaded as a whole.*effort "high"'):
        zp.plan(folder, algorithm="gptq", effort="high", trial=True)
    assert 'effort "high"' in zp.plan(folder, algorithm="gptq", effort="high").whole
    write_gguf(build("llama-tied"), tmp_path / "m.gguf")
    with pytest.raises(StreamError, match="leave trial .--trial. out: a .gguf file"):
        zp.plan(tmp_path / "m.gguf", trial=True)
    build("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(StreamError, match="reads no text; no trial of calibrating"):
        zp.plan(tmp_path / "vit", "int8", algorithm="gptq", trial=True)
    assert zp.plan(tmp_path / "vit", "int8", trial=True).quantize_seconds > 0
    with pytest.raises(RecipeError, match="uses no calibration data"):
        zp.plan(folder, algorithm="mse", effort="low")


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0.2, "about 1 s"), (100, "about 100 s"), (180, "about 3 min"), (9000, "about 2 h")],
)
def test_seconds_as_a_person_says_them(seconds, says):
    assert module.duration(seconds) == says
