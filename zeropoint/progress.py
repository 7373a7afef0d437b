"""How long-running functions tell what they are doing:

they call `on_step`, and whoever called them may listen.
"""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)"""


def no_progress(what: str, done: int, total: int) -> None:
    """The default listener: says nothing."""
