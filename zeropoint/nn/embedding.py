"""Quantized `nn.Embedding`: only the rows that are looked up are dequantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zeropoint.kernels import ops
from zeropoint.nn.qmodule import QModule
from zeropoint.scheme import Role, Scheme


class QEmbedding(QModule):
    """y = dequantize(weight)[indices]. indices: (...) int; weight: (N, K); y: (..., K) in the
    model's dtype.
    """

    float_type = "torch.nn.modules.sparse.Embedding"

    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, padding_idx: int | None
    ) -> None:
        super().__init__(scheme, shape, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"Embedding with {option}={getattr(module, option)} is not supported"
        return None

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme) -> QEmbedding:
        assert isinstance(module, nn.Embedding)
        new = cls(scheme, cls.weight_shape(module), module.weight.dtype, module.padding_idx)
        new._parameters["weight"] = module.weight  # type: ignore[assignment]
        return new.train(module.training)

    def to_float(self) -> nn.Module:
        new = nn.Embedding(
            self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta"
        )
        weight = self._parameters.get("weight")
        new.weight = nn.Parameter(self.qweight.dequantize()) if weight is None else weight
        return new.train(self.training)

    @property
    def role(self) -> Role:
        return "embedding"

    def forward(self, indices: Tensor) -> Tensor:
        if self.frozen:
            assert self.kernel is not None
            return ops.embedding(indices, self.qweight, self._dtype, self.kernel)
        weight, grid = self.float_weight(), self.grid
        if self.scheme.granularity == "tensor" or self.scheme.double_quant:
            return nn.functional.embedding(
                indices, ops.image(weight, self.scheme, grid), self.padding_idx
            )
        chosen = indices.reshape(-1)  # rows do not share scales
        rows = nn.functional.embedding(chosen, weight, self.padding_idx)
        if not len(rows):
            return rows.view(*indices.shape, self.embedding_dim)
        if grid is not None:
            grid = grid.rows(chosen)
        return ops.image(rows, self.scheme, grid).view(*indices.shape, self.embedding_dim)

    def _sizes(self, n: int, k: int) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{n}, {k}{padding}"
