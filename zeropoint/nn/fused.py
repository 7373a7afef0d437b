"""What lies between linear layers in one pass over memory: RMS norms, gates of perceptrons, and
attention.

A fused module stands in for the float module it was made from, whose parameters and children it
has, under the same names. Where a call must not go straight to the native library (gradients,
tracing, another device) that module's own forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zeropoint import native
from zeropoint.kernels.ops import nobody_looks
from zeropoint.nn import cache

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class NormFormula:
    """y = x / sqrt(mean(x^2) + eps) * (weight + shift), in float32; rounded to the dtype of x at
    the end, and before the product, too, where it `rounds_first`. Zhang and Sennrich 2019, eq. 4.
    """

    eps: float
    shift: float
    rounds_first: bool


@dataclass(frozen=True, kw_only=True)
class GateFormula:
    """y = down(activation(gate(x)) * up(x)). Shazeer 2020, equation 6.

    gate, up, down: names of children, as is `gated_by`, the one that computes the activation.
    """

    gate: str
    up: str
    down: str
    gated_by: str
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class AttentionFormula:
    """y = output(softmax(scale * Q K^T) V) of each head, each token seeing those up to its own, Q
    and K rotated by their positions. Vaswani et al. 2017, equation 1; Su et al. 2021, equation 34.

    queries, keys, values, output: names of children. norms: those of each head's queries and keys,
    or none. layer: its number in a cache.
    """

    queries: str
    keys: str
    values: str
    output: str
    norms: tuple[str, ...]
    head_dim: int
    scale: float
    layer: int


class FusedModule(nn.Module):
    """In the place of `original`: shares its parameters, buffers and children, and has its other
    attributes.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is not registered as a child
        # The same dictionaries: what one is given the other has.
        self._parameters = original._parameters
        self._buffers = original._buffers
        self._modules = original._modules
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":  # not there yet: it is being copied
                raise
            return getattr(self._original[0], name)

    @property
    def original(self) -> nn.Module:
        """The float module, as it was."""
        self._original[0].training = self.training
        return self._original[0]

    def extra_repr(self) -> str:
        original = self._original[0]
        return f"{type(original).__name__}({original.extra_repr()})"

    def _child(self, name: str) -> nn.Module:
        child = self._modules[name]
        assert child is not None
        return child


def as_written(module: nn.Module) -> nn.Module:
    """The module itself, or the one it stands for."""
    return module.original if isinstance(module, FusedModule) else module


class FusedRMSNorm(FusedModule):
    """An RMS norm in one pass. x, y: (..., K) float; weight: (K,) float."""

    def __init__(self, original: nn.Module, formula: NormFormula) -> None:
        super().__init__(original)
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        formula = self.formula
        if (
            nobody_looks(x)
            and x.dim() > 0
            and x.shape[-1] == weight.numel()
            and weight.is_cpu
            # A product of two dtypes is of the wider one; float32 holds both.
            and (weight.dtype is x.dtype or not formula.rounds_first)
            and weight.dtype in native.DTYPES
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        ):
            return native.rms_norm(
                x,
                weight,
                eps=formula.eps,
                shift=formula.shift,
                rounds_first=formula.rounds_first,
            )
        y: Tensor = self._original[0].forward(x)
        return y


class FusedMLP(FusedModule):
    """A gated perceptron whose activation and product are one pass. x, y: (..., K) float."""

    def __init__(self, original: nn.Module, formula: GateFormula) -> None:
        super().__init__(original)
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        formula = self.formula
        gate, up = self._child(formula.gate)(x), self._child(formula.up)(x)
        gated_by = self._child(formula.gated_by)
        if (
            nobody_looks(gate)
            and nobody_looks(up)
            and gate.dtype is up.dtype
            and gate.shape == up.shape
            and not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad))
            and not has_hooks(gated_by)
        ):
            y = native.gated(gate, up, formula.activation)
        else:
            y = gated_by(gate) * up
        z: Tensor = self._child(formula.down)(y)
        return z


# Arguments of a forward that do not change what is computed, as long as there is no mask.
_IRRELEVANT = {"position_ids", "use_cache", "output_attentions", "output_hidden_states"}


class FusedAttention(FusedModule):
    """Rotary embedding and causal attention in one pass each; keys and values are written where
    they stay. x, y: (B, T, K) float.

    With a mask, or a cache other than transformers' DynamicCache, the float module's forward runs.
    """

    def __init__(self, original: nn.Module, formula: AttentionFormula) -> None:
        super().__init__(original)
        self.formula = formula

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            attention_mask is None
            and position_embeddings is not None
            and not self.training
            and nobody_looks(hidden_states)
            and hidden_states.dim() == 3
            and hidden_states.numel() > 0
            and kwargs.keys() <= _IRRELEVANT
            and not (torch.is_grad_enabled() and self._learns(hidden_states))
        ):
            y = self._attended(hidden_states, *position_embeddings, past_key_values)
            if y is not None:
                return self._child(self.formula.output)(y), None
        answer: tuple[Tensor, Tensor | None] = self.original.forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return answer

    def _learns(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.parameters())

    def _attended(self, x: Tensor, cos: Tensor, sin: Tensor, cached: Any) -> Tensor | None:
        """What the output projection is given, (B, T, N); None where the float module has to."""
        formula = self.formula
        batch, tokens, _ = x.shape
        width = formula.head_dim
        layer = None
        if cached is not None:
            layer = cache.growing_layer(cached, formula.layer)
            if layer is None or (tokens > 1 and cache.length_of(layer) > 0):
                return None
        if not (cos.dtype is sin.dtype is x.dtype and cos.is_cpu and sin.is_cpu):
            return None
        if cos.shape != sin.shape or cos.shape not in ((batch, tokens, width), (1, tokens, width)):
            return None
        q, k, v = (
            self._child(name)(x).contiguous().view(batch, tokens, -1, width)
            for name in (formula.queries, formula.keys, formula.values)
        )
        if formula.norms:
            q, k = (self._child(norm)(y) for norm, y in zip(formula.norms, (q, k), strict=True))
        if (
            not (q.dtype is k.dtype is v.dtype is x.dtype)
            or k.shape != v.shape
            or q.shape[2] % k.shape[2] != 0
            or (layer is not None and not cache.extend(layer, tokens, k))
        ):
            return None
        if layer is None:
            keys, values = (k.new_empty(batch, k.shape[2], tokens, width) for _ in range(2))
        else:
            keys, values = layer.keys, layer.values
        q = native.rotate(
            q.contiguous(), k.contiguous(), v, cos.contiguous(), sin.contiguous(), keys, values
        )
        y = native.attend(q, keys, values, formula.scale)
        if y is None:
            y = nn.functional.scaled_dot_product_attention(
                q, keys, values, is_causal=tokens > 1, scale=formula.scale, enable_gqa=True
            ).transpose(1, 2)
        return y.reshape(batch, tokens, -1)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody is told of the module's calls, or has replaced its forward (accelerate)."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
