"""A fused module answers as the module it stands for, has its parts, and steps aside when asked."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Gemma2Config, LlamaConfig, Qwen3Config, StaticCache
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from zeropoint import native
from zeropoint.model.formula import gate_of, norm_of
from zeropoint.model.rotary import attention_of
from zeropoint.nn.fused import FusedAttention, FusedMLP, FusedRMSNorm

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
K = 64
NORMS = (LlamaRMSNorm, Olmo2RMSNorm, Gemma2RMSNorm, nn.RMSNorm)
MLPS = {LlamaMLP: LlamaConfig, Gemma2MLP: Gemma2Config}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(kind, dtype=torch.float32):
    """With random parameters."""
    if kind in MLPS:
        module = kind(MLPS[kind](hidden_size=K, intermediate_size=2 * K))
    else:
        module = kind(K, eps=1e-6)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i) / (8 if parameter.dim() == 2 else 1))
    return module.to(dtype)


def fused(module):
    if isinstance(module, tuple(MLPS)):
        return FusedMLP(module, gate_of(module))
    return FusedRMSNorm(module, norm_of(module))


def _noted(made, name, function, *args, **kwargs):
    made.append(name)
    return function(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """Names of the native functions, as they are called."""
    made = []
    for name in ("rms_norm", "gated", "rotate", "attend"):
        spy = partial(_noted, made, name, getattr(native, name))
        monkeypatch.setattr(native, name, spy)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*NORMS, *MLPS], ids=lambda k: k.__name__)
@torch.inference_mode()
def test_it_answers_as_the_module_it_stands_for(kind, dtype, calls):
    module = module_of(kind, dtype)
    for shape in ((1, 1, K), (2, 7, K), (K,), (0, K), (3, 200, K)):
        x = noise(*shape).to(dtype)
        y, expected = fused(module)(x), module(x)
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(y, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    assert calls == ["gated" if kind in MLPS else "rms_norm"] * 5


@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
def test_in_bfloat16_it_answers_bit_for_bit_as_torch(kind):
    module = module_of(kind, torch.bfloat16)
    with torch.inference_mode():
        x = noise(3, 50, K).to(torch.bfloat16)
        different = fused(module)(x) != module(x)
    assert different.float().mean() < 1e-3  # but for sums that torch adds in another order


@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
def test_gradients_are_those_of_the_float_module(kind, calls):
    module = module_of(kind)
    x = noise(2, 3, K)
    grads = []
    for m in (module, fused(module)):
        module.zero_grad()
        at = x.clone().requires_grad_()
        m(at).square().sum().backward()
        grads.append([at.grad, *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and not calls


@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
def test_what_traces_a_model_sees_the_float_module(kind, calls):
    module, x = module_of(kind), noise(2, 3, K)
    expected = module(x)
    with torch.no_grad():
        exported = torch.export.export(fused(module), (x,)).module()
        compiled = torch.compile(fused(module), backend="eager", fullgraph=True)
        for other in (exported, compiled, torch.func.vmap(fused(module))):
            torch.testing.assert_close(other(x), expected.detach())
        fused(module).to("meta")(x.to("meta"))
    assert not calls


@torch.inference_mode()
def test_a_norm_of_two_dtypes_is_promoted_as_torch_does_it(calls):
    x = noise(2, K).to(torch.bfloat16)
    module = module_of(LlamaRMSNorm)  # float32 * bfloat16 is float32
    assert fused(module)(x).dtype is torch.float32 and torch.equal(fused(module)(x), module(x))
    assert not calls
    wide = module_of(Olmo2RMSNorm)  # rounded at the end
    torch.testing.assert_close(fused(wide)(x), wide(x))
    x64 = noise(2, K).double()
    assert torch.equal(fused(module)(x64), module(x64))
    assert calls == ["rms_norm"]


def test_a_wrong_width_raises_what_the_float_module_raises():
    with pytest.raises(RuntimeError, match="size of tensor"), torch.inference_mode():
        fused(module_of(LlamaRMSNorm))(noise(2, K + 1))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
def test_names_parts_and_attributes_are_those_of_the_float_module(kind):
    module = module_of(kind)
    new = fused(module)
    assert list(new.state_dict()) == list(module.state_dict())
    assert [n for n, _ in new.named_modules()] == [n for n, _ in module.named_modules()]
    if kind is LlamaRMSNorm:
        assert new.variance_epsilon == module.variance_epsilon
        assert new.weight is module.weight
    else:
        assert new.intermediate_size == 2 * K and new.gate_proj is module.gate_proj
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = new.nothing
    inside = f"{K},), eps=1e-06" if kind is LlamaRMSNorm else ""
    assert f"{kind.__name__}({'(' if inside else ''}{inside})" in repr(new)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
@torch.inference_mode()
def test_a_copy_has_parts_of_its_own(kind, copied):
    new = fused(module_of(kind))
    x = noise(2, K)
    expected = new(x)
    other = copied(new)
    for parameter in new.parameters():
        parameter.zero_()
    assert torch.equal(other(x), expected) and torch.equal(new(x), torch.zeros_like(x))
    assert list(other.original.parameters())[0] is next(other.parameters())


@torch.inference_mode()
def test_what_is_put_in_its_place_is_used_by_both():
    new = fused(module_of(LlamaMLP))
    new.gate_proj = nn.Linear(K, 2 * K, bias=False)
    assert new.original.gate_proj is new.gate_proj
    norm = fused(module_of(LlamaRMSNorm))
    norm.load_state_dict({"weight": torch.ones(K)}, assign=True)
    assert norm.original.weight is norm.weight
    norm.to(torch.bfloat16)
    x = noise(2, K).to(torch.bfloat16)
    assert torch.equal(norm.original(x), norm(x))
    assert not norm.eval().original.training


# --- attention ------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": K,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "head_dim": 16,
}
CONFIG = LlamaConfig(**SIZES)
CONFIGS = {LlamaAttention: CONFIG, Qwen3Attention: Qwen3Config(**SIZES)}
for config in CONFIGS.values():
    config._attn_implementation = "sdpa"


def attention(dtype=torch.float32, kind=LlamaAttention):
    """As transformers computes it, and fused."""
    module = kind(CONFIGS[kind], layer_idx=0).eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i) / 8)
    module = module.to(dtype)
    return module, FusedAttention(module, attention_of(module))


def tokens_at(position, tokens, dtype, batch=2, positions_of_each=False):
    """What a decoder layer passes: tokens, and the cosines and sines of their positions."""
    x = noise(batch, tokens, K, seed=position).to(dtype)
    at = torch.arange(position, position + tokens) + 3 * torch.arange(batch)[:, None]
    angles = at[:, :, None] * 0.1 ** torch.arange(8).repeat(2)
    angles = angles if positions_of_each else angles[:1]
    return {
        "hidden_states": x,
        "attention_mask": None,
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
    }


def assert_close(found, expected):
    """Within a few roundings of the largest value."""
    assert found[1] is expected[1] is None
    size = float(expected[0].detach().abs().max())
    atol = 8 * torch.finfo(expected[0].dtype).eps * size
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_attention_answers_as_the_float_module(dtype, each, kind, calls):
    module, new = attention(dtype, kind)
    caches = DynamicCache(config=CONFIG), DynamicCache(config=CONFIG)
    position = 0
    for tokens in (33, 1, 1, 1):
        inputs = tokens_at(position, tokens, dtype, positions_of_each=each)
        assert_close(new(**inputs), module(**inputs))
        found, expected = (
            m(**inputs, past_key_values=c) for m, c in zip((new, module), caches, strict=True)
        )
        assert_close(found, expected)
        position += tokens
    mine, theirs = (c.layers[0] for c in caches)
    assert mine.get_seq_length() == theirs.get_seq_length() == position
    for name in ("keys", "values"):
        assert_close((getattr(mine, name), None), (getattr(theirs, name), None))
    assert calls == ["rotate", "attend"] * 8


@torch.inference_mode()
def test_attention_that_is_not_plain_is_the_float_modules(calls):
    module, new = attention()
    inputs = tokens_at(0, 5, torch.float32)
    padded = torch.ones(2, 1, 5, 5).tril().bool() & (torch.arange(5) > 1)
    padded[:, :, :2, 0] = True
    for other in (
        {"attention_mask": padded},
        {"is_causal": False},
        {"past_key_values": StaticCache(config=CONFIG, max_cache_len=5)},
        {"position_embeddings": tuple(x.half() for x in inputs["position_embeddings"])},
    ):
        found, expected = new(**inputs | copy.deepcopy(other)), module(**inputs | other)
        assert torch.equal(found[0], expected[0]) and not calls
    new.train()
    assert torch.equal(new(**inputs)[0], module(**inputs)[0]) and not calls
    new.eval()
    with pytest.raises(RuntimeError, match="0 elements"):
        new(**tokens_at(0, 0, torch.float32))
    with pytest.raises(TypeError):
        new(inputs["hidden_states"])
    # Tokens that follow others, of which transformers passes a mask.
    found, expected = DynamicCache(config=CONFIG), DynamicCache(config=CONFIG)
    for cache, m in ((found, new), (expected, module)):
        m(**tokens_at(0, 3, torch.float32), past_key_values=cache)
    calls.clear()
    mask = torch.ones(2, 1, 5, 8).tril(3).bool()
    inputs = tokens_at(3, 5, torch.float32) | {"attention_mask": mask}
    assert_close(new(**inputs, past_key_values=found), module(**inputs, past_key_values=expected))
    assert not calls


@torch.inference_mode()
def test_the_float_attention_drops_factors_while_it_trains_only():
    module = attention()[0].train()
    module.attention_dropout = 0.5
    new = FusedAttention(module, attention_of(module))
    mask = torch.ones(2, 1, 5, 5).tril().bool()
    inputs = tokens_at(0, 5, torch.float32) | {"attention_mask": mask}
    assert new.training and not torch.equal(new(**inputs)[0], new(**inputs)[0])
    new.eval()
    assert torch.equal(new(**inputs)[0], new(**inputs)[0])


def test_gradients_of_attention_are_those_of_the_float_module(calls):
    module, new = attention()
    inputs = tokens_at(0, 5, torch.float32)
    grads, projected = [], []
    module.q_proj.register_forward_hook(lambda m, *_: projected.append(m))
    for m in (module, new):
        module.zero_grad()
        at = inputs["hidden_states"].clone().requires_grad_()
        m(**inputs | {"hidden_states": at})[0].square().sum().backward()
        grads.append([at.grad, *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and not calls
    assert len(projected) == 2  # once each
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert_close(new(**inputs), module(**inputs))
    assert calls == ["rotate", "attend"]


def test_what_traces_a_model_sees_the_float_attention(calls):
    module, new = attention()
    inputs = tokens_at(0, 5, torch.float32)
    expected = module(**inputs)[0].detach()
    with torch.no_grad():
        exported = torch.export.export(new, (), inputs).module()
        compiled = torch.compile(new, backend="eager", fullgraph=True)
        for other in (exported, compiled):
            torch.testing.assert_close(other(**inputs)[0], expected)
    assert not calls


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.inference_mode()
def test_a_copy_of_attention_has_parts_of_its_own(copied):
    module, new = attention()
    inputs = tokens_at(0, 5, torch.float32)
    assert list(new.state_dict()) == list(module.state_dict()) and new.scaling == module.scaling
    expected = new(**inputs)[0]
    other = copied(new)
    for parameter in new.parameters():
        parameter.zero_()
    assert torch.equal(other(**inputs)[0], expected) and not new(**inputs)[0].any()


@torch.inference_mode()
def test_projections_of_other_strides_and_shapes_are_read_right(calls):
    module, new = attention()
    inputs = tokens_at(0, 5, torch.float32)

    class Part(nn.Module):
        """Half of a wider output: rows with a gap between them."""

        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x).repeat(1, 1, 2)[..., : self.linear.out_features]

    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(new, name, Part(getattr(new, name)))
    assert_close(new(**inputs), module(**inputs))
    assert calls == ["rotate", "attend"]
    new.v_proj = nn.Linear(K, K)  # heads that do not fit those of the keys
    assert torch.equal(new(**inputs)[0], module(**inputs)[0]) and calls == ["rotate", "attend"]
