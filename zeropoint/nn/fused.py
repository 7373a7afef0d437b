"""What lies between linear layers in one pass over memory: RMS norms, and gates of perceptrons.

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

    def _child(self, name: str) -> nn.Module:
        child = self._modules[name]
        assert child is not None
        return child


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody is told of the module's calls, or has replaced its forward (accelerate)."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
