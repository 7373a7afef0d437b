"""What collects statistics of activations: `update(x)`, then `result()`. One file per observer.

To add an observer of ranges: one file, one row in OBSERVERS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zeropoint.errors import RecipeError, UnknownNameError, nearest
from zeropoint.observers.cross import CrossObserver
from zeropoint.observers.hessian import Hessian, HessianObserver
from zeropoint.observers.kl import KlObserver
from zeropoint.observers.mean_square import MeanSquareObserver
from zeropoint.observers.minmax import MinMaxObserver
from zeropoint.observers.moving_average import MovingAverageObserver
from zeropoint.observers.mse import MseObserver
from zeropoint.observers.percentile import PercentileObserver
from zeropoint.observers.ranges import Range, RangeObserver

__all__ = [
    "OBSERVERS",
    "CrossObserver",
    "Hessian",
    "HessianObserver",
    "MeanSquareObserver",
    "Range",
    "RangeObserver",
    "make_observer",
]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of the table. make: takes the observer's options, and the format where it matters."""

    name: str
    summary: str
    make: Callable[..., RangeObserver]


OBSERVERS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name="minmax", summary="clips nothing", make=MinMaxObserver),
        Kind(
            name="moving_average",
            summary="the range of a typical batch",
            make=MovingAverageObserver,
        ),
        Kind(name="percentile", summary="all but 0.001 % on each side", make=PercentileObserver),
        Kind(name="mse", summary="least squared error", make=MseObserver),
        Kind(name="kl", summary="least changed distribution (TensorRT)", make=KlObserver),
    )
}


def make_observer(name: str, format: str, **options: Any) -> RangeObserver:
    """A new observer of ranges for activations of this format. Options of None count as left out.

    Raises UnknownNameError, and RecipeError for an option that it does not have or that makes no
    sense.
    """
    if name not in OBSERVERS:
        raise UnknownNameError(f"{name!r} is not an observer; {nearest(str(name), OBSERVERS)}")
    make = OBSERVERS[name].make
    takes = inspect.signature(make).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in takes:
            raise RecipeError(f"observer={name!r} has no {option}; leave it out")
    return make(**given, **({"format": format} if "format" in takes else {}))
