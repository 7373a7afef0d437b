"""GGUF files that the benchmark writes hold the model: transformers reads the same one back."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench._gguf import write_gguf
from tests.models import llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_written_model_reads_back_the_same(tmp_path, dtype, tied):
    torch.manual_seed(0)
    model = llama(tied=tied).eval().to(dtype)
    write_gguf(model, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=dtype)
    expected, got = model.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert again.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert again.config.num_key_value_heads == 2
