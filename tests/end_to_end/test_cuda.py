"""A frozen model on a GPU: same answers, codes untouched, ties kept."""

import pytest
import torch

import zeropoint as zp
from tests.models import build, example_inputs, outputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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
