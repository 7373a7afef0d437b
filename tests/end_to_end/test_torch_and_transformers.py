"""Quantized models inside torch.compile, torch.export and transformers.pipeline."""

from __future__ import annotations

import pytest
import torch
import transformers

import zeropoint as zp
from tests.models import VOCABULARY, build, example_inputs, llama, outputs, tokenizer
from zeropoint.nn import QModule

# torch's own, when the compiler is imported.
torchs_warnings = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = llama(tied=True, layers=1).eval()
    zp.quantize(model, "int4")
    zp.freeze(model)
    return model


@torchs_warnings
@pytest.mark.parametrize("state", ["live", "frozen"])
def test_a_model_compiles_as_one_graph(state):
    torch.manual_seed(0)
    model = llama(tied=True, layers=1).eval()
    zp.quantize(model, "int4")
    if state == "frozen":
        zp.freeze(model)
    expected = outputs(model)
    torch._dynamo.reset()
    # Traces like inductor, without needing a C++ compiler; tests/nn compiles with inductor.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**example_inputs(model), use_cache=False).logits
    torch._dynamo.reset()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torchs_warnings
def test_an_exported_model_keeps_operators_and_codes(tiny):
    inputs = example_inputs(tiny) | {"use_cache": False}
    with torch.no_grad():
        program = torch.export.export(tiny, (), inputs)
        found = program.module()(**inputs).logits
    assert torch.equal(found, outputs(tiny))
    operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    linears = [m for m in tiny.modules() if isinstance(m, QModule) and m.role == "linear"]
    assert sum(o == "zeropoint.linear.default" for o in operators) == len(linears) == 8
    assert sum(o == "zeropoint.embedding.default" for o in operators) == 1
    assert program.state_dict["model.embed_tokens.weight"].dtype == torch.uint8


def test_the_pipeline_generates_what_the_model_does(tmp_path):
    model = build("llama")
    zp.quantize(model, "int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "saved", tokenizer=tokenizer())
    loaded, words = zp.load(tmp_path / "saved")
    assert len(words) == VOCABULARY
    generate = transformers.pipeline("text-generation", model=loaded, tokenizer=words)
    found = generate("w5 w17 w42", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = torch.tensor([[5, 17, 42]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    assert found == "w5 w17 w42" + words.decode(expected[0, 3:]) and expected.shape == (1, 8)


def test_sampling_and_beams_work_on_a_frozen_model():
    model = build("llama-tied")
    zp.quantize(model, "int4")
    zp.freeze(model)
    ids = torch.tensor([[5, 17, 42]])
    mask = torch.ones_like(ids)
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=3)
    torch.manual_seed(3)
    sampled = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=True)
    assert beams.shape == sampled.shape == (1, 7)
    uncached = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, num_beams=3, use_cache=False
    )
    assert torch.equal(beams, uncached)
