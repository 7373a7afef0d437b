"""How long-running functions tell what they are doing:

they call `on_step` as they go, `on_unit` for what is finished, and whoever called them may listen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OnStep = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)"""


def no_progress(what: str, done: int, total: int) -> None:
    """The default listener: says nothing."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work that is finished: a weight, a tensor, a layer. bytes_before, bytes_after:
    read and written; seconds: it took; None where that is not known. error: |W - image| / |W| of
    some of its rows; None for what is not quantized, or was done by an earlier run. output_error:
    as `LayerReport` has it.
    """

    name: str
    bytes_before: int | None = None
    bytes_after: int | None = None
    seconds: float | None = None
    error: float | None = None
    output_error: float | None = None


OnUnit = Callable[[Unit], None]


def no_units(unit: Unit) -> None:
    """The default listener: says nothing."""
