"""The oracle: every kernel is compared with this.
float64, written from the formulas, sharing no code with the rest.

bit j of code i of a row = bit (i * bits + j) of the row's bytes
real = scale * (code - zero_point), or scale * levels[code], or scale * code, or that of `_vectors`
y = x @ real.T + bias, x rounded to int8 by token first when the scheme says so
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.kernels.spec import Spec
from zeropoint.numerics import double_quant, e8p
from zeropoint.qtensor import QTensor


def why_not(spec: Spec) -> str | None:
    """Never chosen by rank: it exists to be compared with."""
    return "the float64 oracle is slow; force it with ZEROPOINT_KERNEL=reference"


def weight_values(weight: QTensor) -> Tensor:
    """Dequantized weight. Returns (N, K) float64."""
    fmt = weight.scheme.fmt
    n, k = weight.shape
    if fmt.kind == "downcast":
        return weight.packed.double()
    assert weight.scale is not None
    stored = weight.packed.view(n, -1).long()
    if fmt.kind == "float8":
        assert fmt.dtype is not None
        codes = stored.to(torch.uint8).view(fmt.dtype).double()
    else:
        first_bit = torch.arange(k, device=stored.device) * fmt.bits
        unsigned = torch.zeros(n, k, dtype=torch.long, device=stored.device)
        for j in range(fmt.bits):
            bit = first_bit + j
            unsigned += ((stored[:, bit // 8] >> (bit % 8)) & 1) << j
        if fmt.kind == "vector":
            codes = _vectors(unsigned)
        elif weight.levels is not None:
            codes = weight.levels.double().expand(n, -1).gather(1, unsigned)
        elif fmt.levels is not None:
            codes = torch.tensor(fmt.levels, dtype=torch.float64, device=stored.device)[unsigned]
        else:
            codes = (unsigned - 2 ** (fmt.bits - 1)).double()
    if weight.zero_point is not None:
        codes = codes - _per_value(weight.zero_point, n, k)
    return _per_value(_scales(weight), n, k) * codes


def _vectors(codes: Tensor) -> Tensor:
    """Eight codes of two bits are a word, low bits first: its low byte says the pattern, the next 7
    bits which of the first seven values are negative, the last whether 1/4 is added or taken off.
    The eighth is negative where that makes their sum even. codes: (n, K) int64.
    """
    words = (codes.view(len(codes), -1, 8) << torch.arange(0, 16, 2, device=codes.device)).sum(-1)
    values = e8p.wholes().to(words.device)[words & 0xFF].double() + 0.5
    for i in range(7):
        values[..., i] *= 1 - 2 * ((words >> (8 + i)) & 1)
    values[..., 7] *= 1 - 2 * (values.sum(-1) % 2)
    return (values + (words >> 15).unsqueeze(-1) / 2 - 0.25).view(codes.shape)


def _scales(weight: QTensor) -> Tensor:
    """(R, G) float. Of nvfp4: a float32 for all, then the bytes of e4m3, their product rounded to
    float32. Else in 8 bits: a float32 offset, then per 256 scales a float32 absmax and codes;
    scale = offset + absmax * levels[code], rounded to float32 as it is stored nowhere else.
    """
    assert weight.scale is not None
    if not weight.scheme.double_quant:
        return weight.scale
    n, k = weight.shape
    groups = k // (weight.scheme.group_size or k)
    i = torch.arange(n * groups, device=weight.scale.device)
    if weight.scheme.scale_dtype == "float8_e4m3fn":
        small = weight.scale[4 + i].view(torch.float8_e4m3fn).float()
        return (small * _floats(weight.scale, torch.zeros_like(i))).view(n, groups)
    block = 4 + i // 256 * 260
    code = weight.scale[block + 4 + i % 256].long()
    absmax = _floats(weight.scale, block)
    offset = _floats(weight.scale, torch.zeros_like(block))
    levels = double_quant.levels().to(code.device)
    return (levels[code] * absmax + offset).view(n, groups)


def _floats(stored: Tensor, at: Tensor) -> Tensor:
    """The float32 numbers whose first bytes are at these places."""
    places = at.unsqueeze(1) + torch.arange(4, device=at.device)
    return stored[places].view(torch.float32).view(-1)


def _per_value(parameter: Tensor, n: int, k: int) -> Tensor:
    """(R, G) scales or zero points, one copy for each of the (n, k) values."""
    rows, groups = parameter.shape
    return parameter.double().repeat_interleave(k // groups, dim=1).expand(n, k)


def linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias. x: (..., K) float; weight: (N, K); bias: (N,); returns (..., N) of
    x's dtype.
    """
    tokens = x.double()
    if weight.scheme.activations == "int8":
        tokens = _int8_tokens(x)
    y = tokens @ weight_values(weight).T
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


def _int8_tokens(x: Tensor) -> Tensor:
    """scale * round(x / scale), scale = max |x| / 127 of the token in float32. x: (..., K)."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(scale > 0, torch.round(x / scale), 0.0)
    return scale.double() * codes.double()


def embedding(indices: Tensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight. indices: (...) int; weight: (N, K); returns (..., K) of `dtype`."""
    return weight_values(weight)[indices].to(dtype)
