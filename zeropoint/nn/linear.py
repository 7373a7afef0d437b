"""Quantized `nn.Linear`, and the same with the weight transposed as GPT-2 has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.kernels import ops
from zeropoint.nn.qmodule import QModule
from zeropoint.numerics.activations import round_tokens
from zeropoint.scheme import Role, Scheme


class QLinear(QModule):
    """y = x @ dequantize(weight).T + bias. x: (..., K) float; weight: (N, K); bias: (N,) float."""

    float_type = "torch.nn.modules.linear.Linear"

    bias: nn.Parameter | None

    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        super().__init__(scheme, shape, dtype)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)

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
    def role(self) -> Role:
        return "linear"

    def forward(self, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        eager = self._eager
        if eager is not None and eager.holds(self._parts()) and eager.takes(x, bias):
            return eager(x, bias)
        if self.frozen:
            return self._frozen_forward(x, bias)
        if self.scheme.activations is not None:
            x = round_tokens(x)
        return nn.functional.linear(x, ops.image(self.float_weight(), self.scheme), bias)

    def _frozen_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.qweight
        assert self.kernel is not None
        stale = self._eager is None or not self._eager.holds(self._parts())
        if stale and not torch.compiler.is_compiling():
            self._eager = ops.EagerLinear(weight, self.kernel)
        return ops.linear(x, weight, bias, self.kernel)

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
