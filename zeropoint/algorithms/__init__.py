"""How codes are chosen for a given scheme. To add an algorithm:

one file, and one line in ALGORITHMS, which also says what the algorithm has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from zeropoint.algorithms import auto, gptq, hqq, rtn, search
from zeropoint.algorithms.choice import Choice, Moments
from zeropoint.errors import UnknownNameError, nearest
from zeropoint.qtensor import QTensor, weight_in_units
from zeropoint.scheme import Scheme

Needs = Literal["nothing", "inputs", "unseen inputs"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row of the table.

    find: (weight (N, K), moments of its inputs or None, scheme) -> Choice, pure. needs: nothing, or
    the moments, which take calibration data.
    """

    name: str
    find: Callable[[Tensor, Moments | None, Scheme], Choice]
    needs: Needs
    summary: str

    def choose(self, weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
        """`find`, then scales in 8 bits where the scheme says so: codes are chosen before that, as
        bitsandbytes does.
        """
        plain = replace(scheme.stored, double_quant=False)
        values, unit = weight_in_units(weight, scheme)
        choice = self.find(values, moments, plain)
        found = replace(choice.weight.with_scheme(scheme.stored, unit), dtype=weight.dtype)
        return replace(choice, weight=found)

    def __call__(self, weight: Tensor, scheme: Scheme, moments: Moments | None = None) -> QTensor:
        """Only the codes."""
        return self.choose(weight, moments, scheme).weight


ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm(
            name="rtn",
            find=rtn.choose,
            needs="nothing",
            summary="round to nearest, on a grid that spans the range",
        ),
        Algorithm(
            name="mse",
            find=search.choose,
            needs="nothing",
            summary="round to nearest, on the grid of least squared error",
        ),
        Algorithm(
            name="hqq",
            find=hqq.choose,
            needs="nothing",
            summary="round to nearest, with zero points that count outliers less",
        ),
        Algorithm(
            name="gptq",
            find=gptq.choose,
            needs="inputs",
            summary="feed rounding errors forward, weighted by calibration inputs",
        ),
        Algorithm(
            name="auto",
            find=auto.choose,
            needs="unseen inputs",
            summary="for each weight, what loses least on inputs that were kept back",
        ),
    )
}


def get_algorithm(name: str) -> Algorithm:
    """The algorithm called `name`. Raises UnknownNameError."""
    if name not in ALGORITHMS:
        raise UnknownNameError(f"{name!r} is not an algorithm; {nearest(str(name), ALGORITHMS)}")
    return ALGORITHMS[name]
