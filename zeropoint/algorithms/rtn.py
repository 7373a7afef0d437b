"""Round to nearest: no data, no search."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from zeropoint import native
from zeropoint.algorithms.choice import Choice, Moments
from zeropoint.qtensor import QTensor, quantized, weight_in_units
from zeropoint.scheme import Scheme


def rtn(weight: Tensor, scheme: Scheme) -> QTensor:
    """Round every weight to the nearest code of a grid that spans its block.
    codes = clamp(round(w / s) + z).

    weight: (N, K) float. Raises NonFiniteError, GroupSizeError, ScaleRangeError.
    """
    plain = replace(scheme, double_quant=False)
    if native.can_quantize(weight, plain):
        qweight = native.quantize(weight, plain)
        if qweight is not None:
            return qweight.with_scheme(scheme)
    values, unit = weight_in_units(weight, scheme)
    qweight = QTensor.from_codes(quantized(values, plain), plain, weight.dtype)
    return qweight.with_scheme(scheme, unit)


def choose(weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
    """`rtn` as a row of the table."""
    return Choice(weight=rtn(weight, scheme), algorithm="rtn")
