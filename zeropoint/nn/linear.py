"""Quantized `nn.Linear`, and the same with the weight transposed as GPT-2 has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.kernels import ops
from zeropoint.nn.inputs import INPUT_PARTS, InputRange, in_kernel, rounded, weight_only
from zeropoint.nn.qmodule import QModule
from zeropoint.numerics.activations import round_tokens
from zeropoint.scheme import Role, Scheme


class QLinear(QModule):
    """y = x @ dequantize(weight).T + bias. x: (..., K) float; weight: (N, K); bias: (N,) float.

    x is cast to the scheme's compute_dtype and rounded as its activations say (`nn.inputs`), and y
    cast back. input_scale, input_zero_point: the static range of x, None while it has none.
    """

    float_type = "torch.nn.modules.linear.Linear"

    bias: nn.Parameter | None

    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        super().__init__(scheme, shape, dtype)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)
        self.input_range: InputRange | None = None
        self._watch: Callable[[Tensor], None] | None = None
        self._compute = getattr(torch, scheme.compute_dtype) if scheme.compute_dtype else None
        self._weight_only = weight_only(scheme)
        self._eager: ops.EagerLinear | None = None  # of calls that go straight to the kernel
        self._bound: ops.EagerLinear | None = None  # of those and of the others; see `_product`

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme) -> QLinear:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
        new = cls(scheme, cls.weight_shape(module), weight.dtype, bias)
        new._parameters = {"weight": weight, "bias": bias}  # in the float module's order
        return new.train(module.training)

    def to_float(self) -> nn.Module:
        new: Any = self._empty_float()
        if self.frozen:
            new.weight = nn.Parameter(self.from_layout(self.qweight.dequantize()).contiguous())
        else:
            new.weight = self._parameters["weight"]
        new.bias = self._parameters["bias"]
        module: nn.Module = new.train(self.training)
        return module

    def _empty_float(self) -> nn.Module:
        return nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )

    def float_weight(self) -> Tensor:
        return self.from_layout(super().float_weight())

    @property
    def input_scale(self) -> Tensor | None:
        """Of the static range. () float32 > 0."""
        return self._buffers.get("input_scale")

    @property
    def input_zero_point(self) -> Tensor | None:
        """Of the static range of int8 inputs. () int8."""
        return self._buffers.get("input_zero_point")

    @property
    def role(self) -> Role:
        return "linear"

    def forward(self, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        eager = self._eager
        if eager is not None:
            owner = self._tied_to[0] if self._tied_to else self
            y = eager.run(owner._buffers, x, bias)
            if y is not None:
                return y
        if self._compute is None or not x.is_floating_point():
            return self._product(*self._rounded(x), bias)
        narrow = None if bias is None else bias.to(self._compute)
        return self._product(*self._rounded(x.to(self._compute)), narrow).to(x.dtype)

    def _rounded(self, x: Tensor) -> tuple[Tensor, Scheme]:
        """The input as it is multiplied, and what of the scheme is left for the kernel to do."""
        if self._watch is not None:
            self._watch(x)
            return x, self._weight_only
        scale = self.input_scale
        if in_kernel(self.scheme, scale):
            return x, self.scheme
        return rounded(x, self.scheme, scale, self.input_zero_point), self._weight_only

    def _product(self, x: Tensor, scheme: Scheme, bias: Tensor | None) -> Tensor:
        if not self.frozen:
            if scheme.activations is not None:
                x = round_tokens(x)
            image = ops.image(self.float_weight(), self.scheme, self.grid)
            return nn.functional.linear(
                x, image if self._compute is None else image.to(x.dtype), bias
            )
        assert self.kernel is not None
        bound = self._bound
        if bound is not None:
            y = bound.run(self._parts(), x, bias)
            if y is not None:
                return y
        weight = self._qweight(scheme)
        holds = bound is not None and bound.holds(self._parts())
        if not holds and not torch.compiler.is_compiling():
            self._bound = ops.EagerLinear(weight, self.kernel)
            direct = scheme is self.scheme and self._compute is None
            self._eager = self._bound if direct else None
        return ops.linear(x, weight, bias, self.kernel)

    def _unbind(self) -> None:
        self._eager = self._bound = None

    def watch(self, see: Callable[[Tensor], None] | None) -> None:
        """Show every input to `see` and multiply it as it is, until `watch(None)`. In place."""
        self._watch = see
        self._unbind()

    @property
    def watched(self) -> bool:
        """Whether somebody is being shown every input."""
        return self._watch is not None

    def fix_input(self, scale: Tensor, zero_point: Tensor | None, seen: InputRange | None) -> None:
        """Round every input by one range from now on. In place. The parts: see `INPUT_PARTS`."""
        device = (self.qweight.packed if self.frozen else self.float_weight()).device
        parts = zip(INPUT_PARTS, (scale, zero_point), strict=True)
        self._buffers.update({n: p.to(device) for n, p in parts if p is not None})
        self.input_range = seen
        self._unbind()

    def extra_repr(self) -> str:
        return super().extra_repr() + (", static input" if self.input_scale is not None else "")

    def _sizes(self, n: int, k: int) -> str:
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}"


class QConv1D(QLinear):
    """Quantized `transformers.pytorch_utils.Conv1D`: a linear layer whose float weight is stored as
    (K, N).
    """

    float_type = "transformers.pytorch_utils.Conv1D"

    @staticmethod
    def weight_shape(module: Any) -> tuple[int, int]:
        k, n = module.weight.shape
        return int(n), int(k)

    @classmethod
    def from_layout(cls, weight: Tensor) -> Tensor:
        return weight.t()

    def _empty_float(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            conv: nn.Module = Conv1D(self.out_features, self.in_features)
        return conv
