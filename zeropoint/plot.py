"""Pictures of quantized weights, ranges, errors and trade-offs, for notebooks and files.

Every function returns a matplotlib Figure: a notebook shows it, `figure.savefig(path)` writes it.
pyplot and its settings are never touched. matplotlib comes with `pip install 'zeropoint[plot]'`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

from zeropoint.errors import PlotError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["losses"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#767676"
_DPI = 110


def losses(
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]] = (),
    *,
    ax: Axes | None = None,
) -> Figure:
    """A training run: the loss against the step.

    train, held_out: (step, loss) pairs; losses in nats per token. A loss that is NaN or Inf leaves
    a gap, and the label says how many there are. ax: where to draw, a new figure otherwise.
    Raises PlotError (nothing to draw, matplotlib is missing).
    """
    if not train:
        raise PlotError(
            "train=[] has no losses; pass (step, loss) pairs, as a report's .losses has"
        )
    ax = ax or _axes(6.4, 3.6)
    series = (("training", train, _BLUE, ""), ("held out", held_out, _RED, "o"))
    for label, points, color, marker in series:
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        broken = sum(not math.isfinite(value) for value in values)
        ax.plot(
            steps,
            [value if math.isfinite(value) else math.nan for value in values],
            color=color,
            marker=marker or ("o" if len(points) == 1 else ""),
            markersize=4,
            linewidth=1.5,
            label=f"{label} ({broken} not finite)" if broken else label,
        )
    _tidy(ax, "Loss while training", "step", "loss (nats per token)")
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    ax.legend(frameon=False)
    return _figure_of(ax)


# --- shared ---


@lru_cache(maxsize=1)
def _figure_type() -> type[Figure]:
    """Figure that notebooks show by itself: without pyplot nothing else registers one."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise PlotError(
            "zeropoint.plot draws with matplotlib, which is not installed; "
            "pip install 'zeropoint[plot]'"
        ) from e

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            written = BytesIO()
            self.savefig(written, format="png", dpi=_DPI)
            return written.getvalue()

    return NotebookFigure


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts make room for each other."""
    return _figure_type()(figsize=(width, height), layout="constrained")


def _axes(width: float, height: float) -> Axes:
    return _figure(width, height).add_subplot()


def _figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _tidy(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, labels with units, and no frame where there is no axis."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
