"""What every picture shares: figures that belong to nobody else, colours, labels."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from zeropoint.errors import PlotError
from zeropoint.numerics import check_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, SKY, RED, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
INK, GREY, PALE = "#333333", "#767676", "#dddddd"
SMALL = 8  # points
_DPI = 110


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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts make room for each other. Raises PlotError."""
    return _figure_type()(figsize=(width, height), layout="constrained")


def new_axes(width: float, height: float) -> Axes:
    """The only axes of a new figure."""
    return new_figure(width, height).add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes are a part of."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def tidy(
    ax: Axes, title: str, x: str = "", y: str = "", grid: Literal["x", "y", "both"] | None = None
) -> None:
    """Title, labels with units, no frame where there is no axis."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(axis=grid, color="#e8e8e8", linewidth=0.8)


def legend_above(ax: Axes) -> None:
    """In a row at the right of the title, where it covers nothing."""
    handles, _ = ax.get_legend_handles_labels()
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL + 1,
    )


def numbers(values: Tensor) -> Tensor:
    """As float64 on the CPU, without gradient. Raises PlotError (meta device), NonFiniteError."""
    if values.device.type == "meta":
        raise PlotError(
            f"a tensor of shape {tuple(values.shape)} on the meta device has no values to draw; "
            "load the weights first"
        )
    values = values.detach().cpu().double()
    check_finite(values)
    return values
