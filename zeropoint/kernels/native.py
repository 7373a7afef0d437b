"""The native CPU kernels: codes are multiplied as they are, never turned into a float weight.

How they work, with the layout drawn: `docs/kernels.md`. The instruction set is the fastest of the
machine, or the one that `ZEROPOINT_ISA` names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zeropoint import native
from zeropoint.kernels import torch_dense
from zeropoint.kernels.spec import Spec
from zeropoint.numerics import get_scale_dtype
from zeropoint.qtensor import QTensor

GROUP_STEP = 32  # columns that one vector of partial sums covers at least


def why_not(spec: Spec) -> str | None:
    """CPU only; a code for every value; groups of a multiple of 32."""
    if spec.scheme.fmt.width > 1:
        return f"{spec.scheme.format} has codes for {spec.scheme.fmt.width} values together"
    if spec.device != "cpu":
        return f"it runs on the CPU, the weight is on {spec.device}"
    size = spec.scheme.group_size
    if size is not None and size % GROUP_STEP:
        return f"group_size={size} is not a multiple of {GROUP_STEP}"
    if get_scale_dtype(spec.scheme.scale_dtype) not in native.SCALE_DTYPES:
        return f"it does not read scales of {spec.scheme.scale_dtype}"
    if 0 in spec.shape:
        return "the weight is empty"
    if spec.shape[1] > native.MOST_COLUMNS:
        return f"K={spec.shape[1]} is more than {native.MOST_COLUMNS}"
    return native.why_not()


def linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias. x: (..., K) float; weight: (N, K); bias: (N,); returns (..., N) of
    x's dtype.
    """
    if x.dtype not in native.DTYPES:  # float64
        return torch_dense.linear(x, weight, bias)
    return native.linear(x, weight, bias)


def bind_linear(weight: QTensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`linear` of one weight and x of `native.DTYPES`, for callers that have made all checks."""
    return native.bind_linear(weight)


def embedding(indices: Tensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight. indices: (...) int; returns (..., K) of `dtype`."""
    if dtype not in native.DTYPES:
        return torch_dense.embedding(indices, weight, dtype)
    return native.rows(weight, indices, dtype)
