"""A model on a GPU: quantized there as on the CPU; moved there, codes untouched and ties kept."""

import copy

import pytest
import torch

import zeropoint as zp
from tests.models import build, example_inputs, outputs, tokenizer
from zeropoint.flows.distance import distance
from zeropoint.model.walk import quantized_modules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FEW = zp.Calibration(tokens=256, window=16)
TUNED = zp.Calibration(tokens=256, window=16, tune_steps=4)


def ids(rows=16):
    return torch.randint(2, 99, (rows, 16), generator=torch.Generator().manual_seed(0))


def on_gpu(model):
    return {name: tensor.to("cuda") for name, tensor in example_inputs(model).items()}


@torch.no_grad()
def error(model, expected):
    """Relative, of the logits on the example inputs, which move to where the model is."""
    device = next(iter((*model.parameters(), *model.buffers()))).device
    inputs = {name: tensor.to(device) for name, tensor in example_inputs(model).items()}
    return float((model(**inputs).logits.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("weights", list(zp.formats.FORMATS))
def test_a_frozen_model_moves_to_the_gpu_and_back(weights):
    model = build("llama")
    zp.quantize(model, weights=weights)
    zp.freeze(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = outputs(model).detach()
    model.to("cuda")
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    inputs = {name: tensor.to("cuda") for name, tensor in example_inputs(model).items()}
    got = model(**inputs).logits.detach()
    # float32 sums of K <= 128 terms in another order, through 2 layers: 1e-4 of the logits
    torch.testing.assert_close(
        got.cpu(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    model.to("cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name
    assert torch.equal(outputs(model), expected)


def test_ties_survive_the_move():
    model = build("llama-tied")
    zp.quantize(model)
    zp.freeze(model)
    size = zp.footprint(model).total_bytes
    model.to("cuda")
    assert model.lm_head.tied_to is model.model.embed_tokens
    assert model.lm_head.weight.packed.is_cuda
    assert zp.footprint(model).total_bytes == size


def test_a_checkpoint_loads_onto_the_gpu(tmp_path):
    model = build("llama")
    zp.quantize(model, weights="int4")
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    loaded, _ = zp.load(tmp_path / "m", device_map="cuda:0")
    assert all(t.is_cuda for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_released_model_gives_the_gpu_back(frozen):
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # the workspace of cuBLAS
    before = zp.memory().devices[0]
    model = build("llama-tied").to("cuda")
    if frozen:
        zp.quantize(model)
        zp.freeze(model)
    model(**{name: tensor.to("cuda") for name, tensor in example_inputs(model).items()})
    during = zp.memory().devices[0]
    zp.release(model)
    after = zp.memory().devices[0]
    assert during.allocated_bytes > before.allocated_bytes
    assert after.allocated_bytes == before.allocated_bytes
    assert after.reserved_bytes <= during.reserved_bytes


@pytest.mark.parametrize("weights", ["int4", "int2", "nf4", "any4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq", "gptq", "auto"])
def test_algorithms_are_as_good_there(algorithm, weights):
    if algorithm == "hqq" and not weights.startswith("int"):
        pytest.skip("hqq is for integer formats")
    errors = {}
    for device in ("cpu", "cuda"):
        model = build("llama-tied")
        expected = outputs(model)
        model.to(device)
        zp.quantize(model, weights)
        more = {"data": ids(), "calibration": FEW} if algorithm in ("gptq", "auto") else {}
        report = zp.freeze(model, algorithm, **more)
        assert all(
            m.qweight.packed.device.type == device for m in quantized_modules(model).values()
        )
        assert not any("damp" in (x.reason or "") for x in report.layers)
        errors[device] = error(model, expected)
    # Sums in another order move single codes to a neighbour; what they answer stays as near.
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)


def test_tuning_runs_there():
    model = build("llama-tied")
    model.to("cuda")
    zp.quantize(model, "int3", group_size=32)
    batches = [{"input_ids": part} for part in ids(64).split(4)]
    report = zp.freeze(model, "gptq", data=batches, calibration=TUNED)
    assert report.tuning is not None
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))


def test_finetuning_runs_there():
    model = build("llama-tied").to("cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # answers that depend on the weights
    teacher = copy.deepcopy(model)
    zp.quantize(model, "int3", group_size=32, learned_scale=True)
    batch = on_gpu(model)
    with torch.no_grad():
        before = float(distance(model(**batch), teacher(**batch), batch))
    settings = zp.Training(steps=24, window=16, batch_tokens=64, learning_rate=1e-3, held_out=0.2)
    zp.finetune(model, ids(64), teacher=teacher, training=settings)
    with torch.no_grad():
        assert float(distance(model(**batch), teacher(**batch), batch)) < before


@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("observer", [None, "percentile"])
def test_inputs_are_rounded_there(activations, observer):
    model = build("llama")
    expected = outputs(model)
    model.to("cuda")
    zp.quantize(model, "int8", activations=activations)
    zp.freeze(model)
    if observer is not None:
        with zp.calibrate(model, observer), torch.no_grad():
            model(**on_gpu(model))
    found = error(model, expected)
    assert 0 < found < 0.05
    assert error(model.to("cpu"), expected) == pytest.approx(found, rel=0.1)


def test_a_budget_is_spent_there():
    model = build("llama").to("cuda")
    recipes = zp.quantize(
        model, budget=60_000, formats=("int2", "int4", "int8"), data=ids(), calibration=FEW
    )
    zp.freeze(model)
    assert zp.footprint(model).total_bytes <= 60_000
    assert recipes.measured_kl == pytest.approx(recipes.predicted_kl, rel=1.0)


def test_rotation_keeps_the_answers_there():
    model = build("llama")
    expected = outputs(model)
    zp.rotate(model.to("cuda"), example=on_gpu(model))
    assert error(model, expected) < 1e-5


def test_comparing_and_generating_there():
    text = " ".join(f"w{i}" for i in ids(16).flatten().tolist())
    results = []
    for device in ("cpu", "cuda"):
        model = build("llama").to(device)
        quantized = copy.deepcopy(model)
        zp.quantize(quantized, "int4")
        zp.freeze(quantized)
        found = zp.compare(model, quantized, text, tokenizer=tokenizer(), window=32)
        results.append(found.to_dict()["kl"]["mean"])
        inputs = {n: t.to(device) for n, t in example_inputs(model).items()}
        assert quantized.generate(**inputs, max_new_tokens=4).shape[1] == 13
    assert results[1] == pytest.approx(results[0], rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it deprecates and still uses
@torch.no_grad()
def test_it_compiles_there():
    model = build("llama").to("cuda")
    zp.quantize(model, "int4")
    zp.freeze(model)
    inputs = on_gpu(model) | {"use_cache": False}
    expected = model(**inputs).logits
    got = torch.compile(model, fullgraph=True)(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
