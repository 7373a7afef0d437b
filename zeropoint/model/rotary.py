"""What the forward of an attention module computes, found by trying it.

It takes a cache and calls whatever attention the configuration names, and so cannot be read from a
trace. Its projections are replaced by float64 noise, and what reaches the projection back is
compared with what causal attention with a rotary embedding makes of that: a factor, a limit or a
bias that nobody listed shows in the digits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint import native
from zeropoint.model.attention import HEAD_DIM, LAYOUTS, linear_shape
from zeropoint.model.formula import UNTRACEABLE
from zeropoint.nn.fused import AttentionFormula

_BATCH, _TOKENS, _PAST = 2, 5, 4
_SIZES = ((1.0, 1.0, 1.0), (1e3, 1e-3, 1e3), (1e-3, 1e3, 1e-3))  # of queries, keys and values
_TOLERANCE = 1e-9  # float64 adds up errors of 1e-14


def attention_of(module: nn.Module) -> AttentionFormula | None:
    """What this module computes, if it is causal attention with a rotary embedding, nothing else.
    Vaswani et al. 2017, equation 1; Su et al. 2021, equation 34.
    """
    layer = getattr(module, "layer_idx", None)
    head_dim = next((getattr(module, a) for a in HEAD_DIM if hasattr(module, a)), None)
    if module._parameters or not isinstance(layer, int) or not isinstance(head_dim, int):
        return None
    if head_dim % 2 or not 0 < head_dim <= native.MOST_WIDTH:
        return None
    scale = float(getattr(module, "scaling", head_dim**-0.5))
    for layout in LAYOUTS:
        if layout.rows != "apart" or set(module._modules) != {*layout.inputs, layout.output}:
            continue
        formula = AttentionFormula(
            queries=layout.inputs[0],
            keys=layout.inputs[1],
            values=layout.inputs[2],
            output=layout.output,
            head_dim=head_dim,
            scale=scale,
            layer=layer,
        )
        if scale > 0 and _computes(module, formula):
            return formula
    return None


class _Given(nn.Module):
    """Returns a tensor, or its input. Keeps its input."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        # Its own: forwards may work in place.
        self.value, self.x = None if value is None else value.clone(), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return x if self.value is None else self.value


class _Past:
    """A cache that has seen `_PAST` tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.layer: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        self.layer = layer
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


@torch.no_grad()
def _computes(module: nn.Module, formula: AttentionFormula) -> bool:
    names = formula.queries, formula.keys, formula.values, formula.output
    shapes = [linear_shape(module.get_submodule(name)) for name in names]
    if None in shapes:
        return False
    (n, k), *keys_and_values, (_, inner) = (shape for shape in shapes if shape is not None)
    heads, kv_heads = n // formula.head_dim, keys_and_values[0][0] // formula.head_dim
    if (
        keys_and_values != [(kv_heads * formula.head_dim, k)] * 2
        or n != inner
        or n != heads * formula.head_dim
        or not kv_heads
        or heads % kv_heads
    ):
        return False
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for tokens, past in ((_TOKENS, 0), (1, _PAST)):
        for of_queries, of_keys, of_values in _SIZES:
            x, cos, sin = noise(_BATCH, tokens, k), *noise(2, _BATCH, tokens, formula.head_dim)
            q = noise(_BATCH, tokens, n) * of_queries
            keys = noise(_BATCH, kv_heads, past, formula.head_dim) * of_keys
            values = noise(_BATCH, kv_heads, past, formula.head_dim) * of_values
            k_new = noise(_BATCH, tokens, kv_heads * formula.head_dim) * of_keys
            v_new = noise(_BATCH, tokens, kv_heads * formula.head_dim) * of_values
            cache = _Past(keys, values) if past else None
            given = [_Given(value) for value in (q, k_new, v_new, None)]
            try:
                answer = _with_children(module, dict(zip(names, given, strict=True)))(
                    x, position_embeddings=(cos, sin), attention_mask=None, past_key_values=cache
                )
            except UNTRACEABLE:
                return False
            expected = _expected(q, k_new, v_new, cos, sin, keys, values, formula)
            if not (
                isinstance(answer, tuple)
                and len(answer) == 2
                and answer[0] is given[3].x
                and answer[1] is None
                and all(g.x is x for g in given[:3])
                and (cache is None or cache.layer == formula.layer)
                and answer[0].shape == expected.shape
                and torch.allclose(answer[0], expected, rtol=0, atol=_TOLERANCE * of_values)
            ):
                return False
    return True


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    other = copy.copy(module)
    vars(other).update(_modules=children, training=False)
    return other


def _expected(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    formula: AttentionFormula,
) -> Tensor:  # fmt: skip
    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, formula.head_dim).transpose(1, 2)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    keys, values = torch.cat([keys, rotated(heads(k))], 2), torch.cat([values, heads(v)], 2)
    queries = rotated(heads(q))
    shared = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat_interleave(shared, 1).mT * formula.scale
    hidden = torch.ones(scores.shape[-2:]).triu(1 + scores.shape[-1] - scores.shape[-2]).bool()
    factors = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    y = factors @ values.repeat_interleave(shared, 1)
    return y.transpose(1, 2).reshape(*q.shape)
