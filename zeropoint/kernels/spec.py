"""What a kernel is asked for, and what a kernel is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One weight's job. shape: (N, K) of the weight. device: "cpu", "cuda", ..."""

    op: Literal["linear", "embedding"]
    scheme: Scheme
    shape: tuple[int, int]
    device: str


class Kernel(Protocol):
    """A module of this folder. `why_not` answers None, or the reason why this kernel cannot do the
    job.
    """

    def why_not(self, spec: Spec) -> str | None: ...

    def linear(self, x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor: ...

    def embedding(self, indices: Tensor, weight: QTensor, dtype: torch.dtype) -> Tensor: ...
