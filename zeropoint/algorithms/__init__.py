"""How codes are chosen for a given scheme. To add an algorithm:

one file, and one line in ALGORITHMS.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import UnknownNameError, nearest
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

Algorithm = Callable[[Tensor, Scheme], QTensor]

ALGORITHMS: dict[str, Algorithm] = {"rtn": rtn}


def get_algorithm(name: str) -> Algorithm:
    """The algorithm called `name`. Raises UnknownNameError."""
    if name not in ALGORITHMS:
        raise UnknownNameError(f"{name!r} is not an algorithm; {nearest(str(name), ALGORITHMS)}")
    return ALGORITHMS[name]
