"""Activations on the grid of a format while they are used. What is rounded goes on as floats.

    dynamic   one scale for each token, from the token itself
    static    one scale, and for int8 one zero point, for the whole tensor, fixed in advance

The gradient passes straight through all of them (arXiv:1308.3432).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.numerics.affine import affine_parameters, round_scale_up
from zeropoint.numerics.formats import FORMATS, Format

INT8 = FORMATS["int8"]
Q_MAX = INT8.q_max


def round_tokens(x: Tensor, format: str = "int8") -> Tensor:
    """x = scale * round(x / scale), scale = max |x| / largest code of each token (row of the last
    axis).

    x: (..., K) float; returns the same shape and dtype. The largest code is 127 for int8, 448 for
    float8_e4m3fn, 57344 for float8_e5m2. A token that holds an Inf or a NaN becomes NaN.

    >>> round_tokens(torch.tensor([[1.0, 0.3, -0.001]]))
    tensor([[1.0000, 0.2992, 0.0000]])
    >>> round_tokens(torch.tensor([[1.0, 0.3, 0.02]]), "float8_e4m3fn")
    tensor([[1.0000, 0.2857, 0.0201]])
    """
    wide = _wide(x)
    fmt = FORMATS[format]
    scale = wide.abs().amax(dim=-1, keepdim=True) / fmt.real_max
    codes = torch.where(scale == 0, 0.0, _symmetric_codes(wide / scale, fmt))
    return _straight_through(x, codes * scale + 0.0)


def round_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str = "int8"
) -> Tensor:
    """x = scale * (clamp(round(x / scale) + zero_point, q_min, q_max) - zero_point).

    x: (...) float; scale: () float32 > 0; zero_point: () int8, or None for 0; float8 has none.
    Returns the shape and dtype of x. What is outside the range saturates; an Inf or a NaN becomes
    NaN, and with it what a layer makes of its token.

    >>> x = torch.tensor([-1.0, 0.1, 9.0])
    >>> round_static(x, torch.tensor(0.25), torch.tensor(-124, dtype=torch.int8))
    tensor([-1.,  0.,  9.])
    """
    wide = _wide(x)
    fmt = FORMATS[format]
    step = scale.to(wide.dtype)
    steps = wide / step
    if fmt.kind == "float8":
        codes = _symmetric_codes(steps, fmt)
    else:
        zero = 0 if zero_point is None else zero_point.to(wide.dtype)
        codes = (torch.round(steps) + zero).clamp(fmt.q_min, fmt.q_max) - zero
    not_a_number = wide - wide  # 0 where x is finite
    return _straight_through(x, codes * step + not_a_number)


def round_but_outliers(x: Tensor, threshold: float) -> Tensor:
    """LLM.int8() (arXiv:2208.07339): columns in which any |x| >= threshold stay as they are.

    x: (..., K) float; a column is one of the K over all tokens. The others are rounded to int8,
    with scale = max |x| / 127 of each token over its values below the threshold, those in columns
    that stay included, as bitsandbytes has it. An Inf is an outlier; a NaN makes its token NaN.

    >>> round_but_outliers(torch.tensor([[1.0, 0.3, 7.1], [0.1, 0.1, 0.2]]), 6.0)
    tensor([[1.0000, 0.2992, 7.1000],
            [0.1008, 0.1008, 0.2000]])
    """
    wide = _wide(x)
    outlier = wide.abs() >= threshold
    column = outlier.flatten(0, -2).any(dim=0) if x.dim() > 1 else outlier
    rest = torch.where(outlier, 0.0, wide)
    scale = rest.abs().amax(dim=-1, keepdim=True) / Q_MAX
    codes = torch.where(scale == 0, 0.0, torch.round(rest / scale))
    return _straight_through(x, torch.where(column, wide, codes * scale + 0.0))


def static_parameters(low: float, high: float, format: str) -> tuple[Tensor, Tensor | None]:
    """The scale, and for int8 the zero point, of a range, widened to contain 0.

    int8: `affine_parameters`; float8: scale = max(|low|, |high|) / largest number. Returns ()
    float32 > 0 and () int8 or None. Raises ScaleRangeError for a range that float32 cannot hold.

    >>> static_parameters(-1.0, 9.2, "int8")
    (tensor(0.0400), tensor(-103, dtype=torch.int8))
    """
    fmt = FORMATS[format]
    ends = torch.tensor([low, high], dtype=torch.float64)
    if fmt.kind == "float8":
        largest = ends.abs().max()
        exact = torch.where(largest > 0, largest / fmt.real_max, 1.0)
        return round_scale_up(exact, torch.float32), None
    return affine_parameters(ends[0], ends[1], fmt, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _symmetric_codes(steps: Tensor, fmt: Format) -> Tensor:
    """The nearest codes, as floats. steps: x / scale."""
    if fmt.dtype is None:
        return torch.round(steps)
    inside = steps.clamp(-fmt.real_max, fmt.real_max)  # beyond, some float8 have only NaN
    return inside.to(fmt.dtype).to(steps.dtype)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    rounded = rounded.to(x.dtype)
    return rounded + (x - x.detach()) if x.requires_grad else rounded  # + 0: exact
