"""Several algorithms on one weight; the one that loses least on inputs that none of them saw.

Feedback fits codes to the inputs it is shown, and with few of them more to these than to the model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zeropoint.algorithms import gptq
from zeropoint.algorithms.choice import Choice, Moments, output_error
from zeropoint.algorithms.rtn import rtn
from zeropoint.algorithms.search import search
from zeropoint.scheme import Scheme


def choose(weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
    """The choice of least |(W - Q) X|^2 over unseen inputs X. weight: (N, K) float.

    Rounding, a grid searched with columns weighted by their inputs, and `gptq`. Its `output_error`
    is that on the unseen inputs. Raises NonFiniteError, GroupSizeError, ScaleRangeError.
    """
    found = gptq.choose(weight, moments, scheme)
    if moments is None or moments.unseen is None or not torch.isfinite(moments.unseen).all():
        return found
    importance = moments.seen.diagonal()
    tried = [found]
    if torch.isfinite(importance).all():
        searched = search(weight, scheme, importance)
        tried.append(Choice(weight=searched, algorithm="mse"))
    tried.append(Choice(weight=rtn(weight, scheme), algorithm="rtn"))
    unseen = moments.unseen
    errors = [output_error(weight, c.weight.dequantize(torch.float32), unseen) for c in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    reason = tried[best].reason
    if best:
        reason = (
            f"on inputs that none had seen it loses {errors[best]:.3g} of the output, "
            f"{found.algorithm} {errors[0]:.3g}"
        )
    return replace(tried[best], output_error=errors[best], reason=reason)
