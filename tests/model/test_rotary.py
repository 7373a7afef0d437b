"""What an attention module computes is found by trying it: published ones, and what looks so."""

import math

import pytest
import torch
import transformers
from torch import nn
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmo.modeling_olmo import OlmoAttention
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

import zeropoint as zp
from zeropoint.model.rotary import attention_of
from zeropoint.nn.fused import AttentionFormula

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def attention(kind, layer=0, **settings):
    name = kind.__name__.replace("Attention", "Config")
    config = getattr(transformers, name)(**SIZES | settings)
    config._attn_implementation = settings.get("attn_implementation", "sdpa")
    return kind(config, layer_idx=layer).eval()


def formula(**changes):
    parts = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj", "output": "o_proj"}
    parts |= {"norms": (), "head_dim": 16, "scale": 0.25, "layer": 0}
    return AttentionFormula(**parts | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "found"),
    [
        (lambda: attention(LlamaAttention), formula()),
        (lambda: attention(LlamaAttention, layer=3, head_dim=32), "wide"),
        (lambda: attention(LlamaAttention, attention_bias=True), formula()),
        (lambda: attention(LlamaAttention, num_key_value_heads=4), formula()),
        (lambda: attention(MistralAttention, sliding_window=4), formula()),  # by its mask
        (lambda: attention(Qwen2Attention), formula()),
        (lambda: attention(OlmoAttention), formula()),
        (lambda: attention(GraniteAttention, attention_multiplier=0.7), formula(scale=0.7)),
        (lambda: attention(SmolLM3Attention), formula()),
        (lambda: attention(Qwen3Attention, head_dim=16), formula(norms=("q_norm", "k_norm"))),
    ],
)
def test_attention_of_published_models_is_found(module, found, dtype):
    if found == "wide":
        found = formula(layer=3, head_dim=32, scale=32**-0.5)
    assert attention_of(module().to(dtype)) == found


def test_noise_is_its_own():
    module = attention(LlamaAttention)
    attributes, before = dict(vars(module)), torch.get_rng_state()
    assert attention_of(module) == formula()
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(module) == attributes and not module.training


def test_quantized_projections_are_no_obstacle():
    module = attention(LlamaAttention)
    zp.quantize(module, "int4")
    assert attention_of(module) == formula()
    zp.freeze(module)
    assert attention_of(module) == formula()
    assert attention_of(module.to("meta")) == formula()  # they are not asked


@pytest.mark.parametrize(
    "module",
    [
        lambda: attention(Olmo2Attention),  # norms of all heads together
        lambda: attention(OlmoAttention, clip_qkv=8.0),
        lambda: attention(SmolLM3Attention, layer=3),  # no rotary embedding
        lambda: attention(Phi3Attention),  # one projection of all three
        lambda: attention(LlamaAttention, attn_implementation="eager"),  # causal by its mask
        lambda: attention(LlamaAttention, head_dim=258),
        lambda: nn.MultiheadAttention(64, 4),
        lambda: nn.Linear(4, 4),
    ],
)
def test_what_computes_something_else_is_not(module):
    assert attention_of(module()) is None


class Changed(nn.Module):
    """Causal attention with a rotary embedding, and one thing changed."""

    def __init__(self, change):
        super().__init__()
        self.change, self.layer_idx, self.head_dim, self.scaling = change, 1, 16, 0.25
        self.q_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.k_proj, self.v_proj = nn.Linear(64, 32), nn.Linear(64, 32)
        if change == "a parameter":
            self.sink = nn.Parameter(torch.zeros(4))
        if change == "a child":
            self.dropout = nn.Dropout()

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values):
        change, x = self.change, hidden_states
        shape = (*x.shape[:-1], -1, 16)
        if change == "other inputs":
            x = x + 1e-6
        q, k, v = (
            p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        if change != "no rotation":
            q, k = apply_rotary_pos_emb(q, k, cos, -sin if change == "backwards" else sin)
        layer = 0 if change == "another layer" else self.layer_idx
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, layer)
        if change == "heads in turns":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT * (0.2501 if change == "another scale" else 0.25)
        if change == "a limit":
            scores = 1e3 * torch.tanh(scores / 1e3)
        if change == "a bias":
            scores = scores - 1e-6 * torch.arange(scores.shape[-1])
        if x.shape[1] > 1 and change != "everything is seen":
            hidden = torch.ones(scores.shape[-2:]).triu(1)
            if change == "a window":
                hidden = hidden + torch.ones(scores.shape[-2:]).tril(-3)
            scores = scores.masked_fill(hidden.bool(), -math.inf)
        factors = scores.softmax(-1)
        if change == "a sum of less than one":
            factors = factors * (1 - 1e-6)
        y = (factors @ v).transpose(1, 2).reshape(*x.shape[:-1], -1)
        if change == "the cache's numbers":
            y = y + 1e-6 * (past_key_values is not None)
        y = self.o_proj(y)
        if change == "another output":
            y = y * 2
        if change == "an error":
            raise ValueError("no")
        if change == "a tensor":
            return y
        return y, factors if change == "the factors" else None


def test_nothing_changed_is_found():
    assert attention_of(Changed("nothing")) == formula(layer=1)


@pytest.mark.parametrize(
    "change",
    [
        "a parameter", "a child", "other inputs", "no rotation", "backwards", "another layer",
        "heads in turns", "another scale", "a limit", "a bias", "everything is seen", "a window",
        "a sum of less than one", "the cache's numbers", "another output", "an error", "a tensor",
        "the factors",
    ],
)  # fmt: skip
def test_one_thing_changed_is_not(change):
    assert attention_of(Changed(change)) is None
