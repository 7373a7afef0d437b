"""What the forward of an attention module computes, found by trying it.

It takes a cache and calls whatever attention the configuration names, and so cannot be read from a
trace. Its projections are replaced by float64 noise, and what reaches the projection back is
compared with what causal attention with a rotary embedding makes of that: a factor, a limit or a
bias that nobody listed shows in the digits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint import native
from zeropoint.model.attention import HEAD_DIM, LAYOUTS, linear_shape
from zeropoint.model.formula import UNTRACEABLE
from zeropoint.nn.fused import AttentionFormula

_NORMS = ("q_norm", "k_norm")  # of each head, where there are any
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
    scale = getattr(module, "scaling", head_dim**-0.5)
    if not isinstance(scale, float) or scale <= 0:
        return None
    children = {name for name, child in module._modules.items() if child is not None}
    for layout in LAYOUTS:
        projections = {*layout.inputs, layout.output}
        others = children - projections
        if layout.rows != "apart" or not projections <= children:
            continue
        if others not in (set(), set(_NORMS)):
            continue
        formula = AttentionFormula(
            queries=layout.inputs[0],
            keys=layout.inputs[1],
            values=layout.inputs[2],
            output=layout.output,
            norms=_NORMS if others else (),
            head_dim=head_dim,
            scale=scale,
            layer=layer,
        )
        if _computes(module, formula):
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


class _Times(nn.Module):
    """In the place of a norm: a product of the last axis, which has to be a head."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _Past:
    """A cache that has seen `_PAST` tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.layer: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        self.layer = layer
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What goes in, of sequences B, tokens T and heads H of width D, and what was there before."""

    x: Tensor  # (B, T, K)
    q: Tensor  # (B, T, H * D), as k and v, which have fewer heads
    k: Tensor
    v: Tensor
    cos: Tensor  # (B, T, D), as sin
    sin: Tensor
    keys: Tensor  # (B, H, L, D), as values
    values: Tensor
    factors: Tensor  # (2, D), in the place of norms

    def children(self, formula: AttentionFormula) -> dict[str, nn.Module]:
        names = formula.queries, formula.keys, formula.values
        given = zip(names, (self.q, self.k, self.v), strict=True)
        norms = zip(formula.norms, self.factors, strict=False)
        return {
            formula.output: _Given(None),
            **{name: _Given(value) for name, value in given},
            **{name: _Times(factor) for name, factor in norms},
        }

    def expected(self, formula: AttentionFormula) -> Tensor:
        """What the projection back is given, (B, T, H * D)."""
        factors = self.factors if formula.norms else torch.ones(2, 1)

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], -1, formula.head_dim).transpose(1, 2)

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * self.cos[:, None] + torch.cat([-second, first], -1) * self.sin[:, None]

        queries = rotated(heads(self.q) * factors[0])
        keys = torch.cat([self.keys, rotated(heads(self.k) * factors[1])], 2)
        values = torch.cat([self.values, heads(self.v)], 2)
        shared = queries.shape[1] // keys.shape[1]
        scores = queries @ keys.repeat_interleave(shared, 1).mT * formula.scale
        hidden = torch.ones(scores.shape[-2:]).triu(1 + self.keys.shape[2]).bool()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        y = weights @ values.repeat_interleave(shared, 1)
        return y.transpose(1, 2).reshape(*self.q.shape)


@torch.no_grad()
def _computes(module: nn.Module, formula: AttentionFormula) -> bool:
    names = formula.queries, formula.keys, formula.values, formula.output
    shapes = [linear_shape(module.get_submodule(name)) for name in names]
    if None in shapes:
        return False
    (n, k), *keys_and_values, (_, inner) = (shape for shape in shapes if shape is not None)
    width, kv_n = formula.head_dim, keys_and_values[0][0]
    if (
        keys_and_values != [(kv_n, k)] * 2
        or n != inner
        or n % width
        or kv_n % width
        or n % max(kv_n, 1)
    ):
        return False
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for tokens, past in ((_TOKENS, 0), (1, _PAST)):
        for of_queries, of_keys, of_values in _SIZES:
            trial = _Trial(
                x=noise(_BATCH, tokens, k),
                q=noise(_BATCH, tokens, n) * of_queries,
                k=noise(_BATCH, tokens, kv_n) * of_keys,
                v=noise(_BATCH, tokens, kv_n) * of_values,
                cos=noise(_BATCH, tokens, width),
                sin=noise(_BATCH, tokens, width),
                keys=noise(_BATCH, kv_n // width, past, width) * of_keys,
                values=noise(_BATCH, kv_n // width, past, width) * of_values,
                factors=noise(2, width),
            )
            if not _agrees(module, formula, trial, _TOLERANCE * of_values):
                return False
    return True


def _agrees(module: nn.Module, formula: AttentionFormula, trial: _Trial, tolerance: float) -> bool:
    cache = _Past(trial.keys, trial.values) if trial.keys.shape[2] else None
    children, other = trial.children(formula), copy.copy(module)
    vars(other).update(_modules=children, training=False)
    try:
        answer = other(
            trial.x,
            position_embeddings=(trial.cos, trial.sin),
            attention_mask=None,
            past_key_values=cache,
        )
    except UNTRACEABLE:
        return False
    expected = trial.expected(formula)
    given = {name: child.x for name, child in children.items() if isinstance(child, _Given)}
    y = given.pop(formula.output)
    return (
        isinstance(answer, tuple)
        and len(answer) == 2
        and answer[0] is y
        and answer[1] is None
        and all(x is trial.x for x in given.values())
        and (cache is None or cache.layer == formula.layer)
        and y.shape == expected.shape
        and torch.allclose(y, expected, rtol=0, atol=tolerance)
    )
