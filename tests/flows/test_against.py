"""A checkpoint compared with the model it was made of: right ones pass, no other does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import zeropoint as zp
from tests.checkpoints.cases import edit_manifest, edit_tensors
from tests.models import build
from zeropoint.algorithms import ALGORITHMS
from zeropoint.errors import CheckpointError, SourceError, StreamError
from zeropoint.flows import against
from zeropoint.flows.verify import examine

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of which nothing is tied."""
    folder = tmp_path_factory.mktemp("against") / "float"
    build("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama-tied", "bert", "gpt2", "t5-tied", "vit"])
def test_every_architecture_is_that_of_its_source(tmp_path, name):
    build(name).save_pretrained(tmp_path / "float")
    zp.compress(tmp_path / "float", tmp_path / "out", "int4", strict=False)
    found = examine(tmp_path / "out", against=tmp_path / "float")
    assert found.problems == () and found.unchecked == ()
    assert found.likeness.compared == found.tensors
    assert 0 < found.likeness.largest_error < 0.2


def test_every_algorithm_has_a_limit():
    assert against.LIMITS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int4", "float_zero_point": True, "group_size": 16},
        {"weights": "int8"},
        {"weights": "int2"},
        {"weights": "int4", "group_size": -1},
        {"weights": "nf4", "double_quant": True},
        {"weights": "float8_e4m3fn"},
        {"weights": "bfloat16"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_kind_of_format_and_algorithm(folder, tmp_path, options, algorithm, monkeypatch):
    monkeypatch.setattr(against, "CHUNK_ELEMENTS", 1000)
    zp.compress(folder, tmp_path / "out", **options, algorithm=algorithm, strict=False)
    assert zp.verify(tmp_path / "out", against=folder) == []


@pytest.mark.parametrize("algorithm", ["gptq", "auto"])
def test_what_was_calibrated_is_balanced_first(folder, tmp_path, algorithm):
    model, _ = zp.load(folder)
    zp.quantize(model, "int4")
    ids = torch.randint(3, 99, (2, 32), generator=torch.Generator().manual_seed(0))
    report = zp.freeze(model, algorithm, data=[ids])
    assert any(layer.folded_into for layer in report.layers)
    zp.save(model, tmp_path / "out")
    found = examine(tmp_path / "out", against=folder)
    assert found.problems == ()
    assert "model.layers.0.input_layernorm.weight" in found.likeness.balanced
    assert "balanced" in found.unchecked[0]


def test_what_the_model_does_not_have_may_be_missing(tmp_path):
    """As the position_ids of older BERTs, which transformers does not load."""
    build("llama").save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "model.safetensors"
    save_file(load_file(path) | {"extra": torch.ones(3)}, path, metadata={"format": "pt"})
    model, _ = zp.load(tmp_path / "float")
    zp.quantize(model, "int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "out")
    zp.compress(tmp_path / "float", tmp_path / "carried", "int8")
    assert zp.verify(tmp_path / "out", against=tmp_path / "float") == []
    assert zp.verify(tmp_path / "carried", against=tmp_path / "float") == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_that_was_cast_on_the_way(folder, tmp_path, dtype):
    """Before its codes were chosen, or after."""
    before, _ = zp.load(folder, dtype=dtype)
    zp.quantize(before, "int8")
    zp.freeze(before)
    after, _ = zp.load(folder)
    zp.quantize(after, "int8")
    zp.freeze(after)
    after.to(getattr(torch, dtype))
    for name, model in (("before", before), ("after", after)):
        zp.save(model, tmp_path / name)
        assert zp.verify(tmp_path / name, against=folder) == []


def test_a_static_range_is_no_tensor_of_the_source(folder, tmp_path):
    model, _ = zp.load(folder)
    zp.quantize(model, "int8", activations="int8")
    zp.freeze(model)
    with zp.calibrate(model, "minmax"), torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None])
    zp.save(model, tmp_path / "out")
    assert zp.verify(tmp_path / "out", against=folder) == []


# --- it can fail ----------------------------------------------------------------------------------


def doubled(t):
    t[f"{DOWN}_scale"].mul_(2)


def a_tenth_more(t):
    t[f"{DOWN}_scale"].mul_(1.1)


def one_scale_lost(t):
    t[f"{DOWN}_scale"][3, 1] = t[f"{DOWN}_scale"][3, 0] * 2


def rows_swapped(t):
    rows = t[DOWN].view(64, -1)
    rows[[0, 1]] = rows[[1, 0]]


def one_code_changed(t):
    t[DOWN][5] ^= 0x40  # the highest code is 0xF


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize(
    "change", [doubled, a_tenth_more, one_scale_lost, rows_swapped, one_code_changed]
)
def test_a_weight_that_is_another_is_named(folder, tmp_path, change, algorithm):
    zp.compress(folder, tmp_path / "out", "int4", algorithm=algorithm, strict=False)
    edit_tensors(tmp_path / "out", change)
    assert zp.verify(tmp_path / "out") == []
    (problem,) = zp.verify(tmp_path / "out", against=folder)
    assert "block [" in problem and f"{DOWN} is further from the source's than int4" in problem


@pytest.mark.parametrize("algorithm", [None, "gptq", "auto", "of tomorrow"])
@pytest.mark.parametrize("change", [doubled, rows_swapped])
def test_fed_forward_codes_have_a_limit_too(folder, tmp_path, change, algorithm):
    """One that a factor for each row and column does not undo."""
    zp.compress(folder, tmp_path / "out", "int8")
    edit_manifest(tmp_path / "out", lambda m: m.update(algorithm=algorithm))
    if algorithm is None:  # as of an earlier version
        edit_manifest(tmp_path / "out", lambda m: m.pop("algorithm"))
    assert zp.verify(tmp_path / "out", against=folder) == []
    edit_tensors(tmp_path / "out", change)
    problems = zp.verify(tmp_path / "out", against=folder)
    if change is doubled:
        assert problems == []
    else:
        assert [p.split(" is further")[0] for p in problems] == [DOWN]


def test_tensors_that_were_kept_have_their_bits(folder, tmp_path):
    zp.compress(folder, tmp_path / "out", "int8", exclude=DOWN.removesuffix(".weight"))
    edit_tensors(tmp_path / "out", lambda t: t[DOWN].view(torch.int32)[7, 7].bitwise_xor_(1))
    edit_tensors(tmp_path / "out", lambda t: t[NORM].view(torch.int32)[7].bitwise_xor_(1))
    expected = [f"{n} was not quantized, and differs from the source's" for n in (DOWN, NORM)]
    assert sorted(zp.verify(tmp_path / "out", against=folder)) == sorted(expected)


def test_what_is_missing_and_what_is_too_much(folder, tmp_path):
    zp.compress(folder, tmp_path / "out", "int8")

    def move(manifest):
        manifest["tensors"]["model.other.weight"] = manifest["tensors"].pop(NORM)

    edit_tensors(tmp_path / "out", lambda t: t.update({"model.other.weight": t.pop(NORM)}))
    edit_manifest(tmp_path / "out", move)
    assert zp.verify(tmp_path / "out", against=folder) == [
        f"{NORM} is in the source, but not in the checkpoint",
        "model.other.weight is in the checkpoint, but not in the source",
    ]


def test_another_model_of_the_same_shapes(folder, tmp_path):
    zp.compress(folder, tmp_path / "out", "int2", strict=False)
    other = tmp_path / "other"
    build("llama", seed=5).save_pretrained(other)
    problems = zp.verify(tmp_path / "out", against=other)
    assert len(problems) == 16 + 5, "weights and norms"
    tensors = load_file(folder / "model.safetensors")
    other_shape = tensors | {NORM: torch.ones(3)}
    save_file(other_shape, other / "model.safetensors", {"format": "pt"})
    (problem,) = zp.verify(tmp_path / "out", against=other)
    assert f"is not of {other}: " in problem and f"{NORM} is (3,)" in problem
    no_number = tensors | {DOWN: tensors[DOWN] * torch.nan}
    save_file(no_number, other / "model.safetensors", {"format": "pt"})
    (problem,) = zp.verify(tmp_path / "out", against=other)
    assert problem.startswith(f"{DOWN}: the source's cannot be quantized: ")


def test_a_damaged_checkpoint_is_not_compared(folder, tmp_path):
    zp.compress(folder, tmp_path / "out")
    (tmp_path / "out" / "extra.txt").touch()
    found = examine(tmp_path / "out", against=folder)
    assert found.likeness is None and found.problems == ("extra.txt is not in the manifest",)


def test_what_cannot_be_compared(folder, tmp_path):
    zp.compress(folder, tmp_path / "out")
    with pytest.raises(SourceError, match="does not exist"):
        zp.verify(tmp_path / "out", against=tmp_path / "nothing")
    with pytest.raises(SourceError, match="is quantized already"):
        zp.verify(tmp_path / "out", against=tmp_path / "out")
    t5 = build("t5").bfloat16()
    t5.save_pretrained(tmp_path / "t5")
    loaded, _ = zp.load(tmp_path / "t5", weights="int8")
    zp.save(loaded, tmp_path / "t5-int8")
    with pytest.raises(StreamError, match="t5-int8 cannot be compared tensor by tensor: .*float32"):
        zp.verify(tmp_path / "t5-int8", against=tmp_path / "t5")
    edit_manifest(tmp_path / "out", lambda m: m.update(algorithm=3))
    with pytest.raises(CheckpointError, match="its 'algorithm' is 3, which is no name"):
        zp.load(tmp_path / "out")
