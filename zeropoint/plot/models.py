"""Whole models: layers, ranges of activations, what a size costs, a training run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from zeropoint.errors import PlotError
from zeropoint.evaluate.compare import Comparison, EncoderComparison, LanguageComparison
from zeropoint.flows.activations import CalibratedLayer, CalibrationTable
from zeropoint.flows.report import FreezeReport, Report
from zeropoint.plot.canvas import (
    BLUE,
    GREY,
    INK,
    PALE,
    RED,
    SKY,
    SMALL,
    figure_of,
    legend_above,
    new_axes,
    new_figure,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_BITS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)  # ticks of `tradeoff`
COLUMNS = 4  # of the small pictures of `activations`
# Where a label may stand, seen from its point: (points, right, up), nearest first.
_NEAR = 7
_PLACES = [
    (reach, right, up)
    for reach in (_NEAR, 16, 28, 42, 58, 76, 96)
    for right, up in (
        *((1, 0), (0, 1), (0, -1), (-1, 0)),
        *((0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7)),
    )
]


def layers(report: FreezeReport | Report, *, first: int = 25, ax: Axes | None = None) -> Figure:
    """A bar for each layer, longest first.

    report: of `zp.freeze` with an algorithm that calibrates: the share of each layer's output that
    is lost; of `zp.quantize`: megabytes before and after. first: how many layers; what is left out
    is said below. ax: where to draw, a new figure otherwise.
    Raises PlotError (the report knows no output errors, nothing to draw, matplotlib is missing).
    """
    if isinstance(report, FreezeReport):
        rows: list[tuple[str, float, float | None]] = [
            (layer.name, 100 * (layer.output_error or 0.0), None) for layer in report.worst
        ]
        title, unit = f"Output lost by {report.algorithm}", "% of the squared output"
        if not rows:
            raise PlotError(
                f"algorithm={report.algorithm!r} knows no output errors, which take calibration "
                "data; use zp.freeze(model, 'gptq', data=...), or draw the report of zp.quantize"
            )
    else:
        modules = sorted(report.modules, key=lambda m: -m.bytes_before)
        rows = [(m.name, m.bytes_after / 1e6, m.bytes_before / 1e6) for m in modules]
        title, unit = "Weights before and after", "MB"
        if not rows:
            raise PlotError("the report has no modules; its model has no weight matrices")
    if first < 1:
        raise PlotError(f"first={first} draws no layer; use 1 or more")
    shown, rest = rows[:first], rows[first:]
    names = [name for name, _, _ in shown]
    ax = ax or new_axes(8, 0.9 + 0.2 * len(shown))
    if any(before is not None for _, _, before in shown):
        ax.barh(names, [before or 0.0 for *_, before in shown], color=PALE, label="before")
    ax.barh(names, [value for _, value, _ in shown], color=BLUE, height=0.5, label="after")
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=SMALL, length=0)
    ax.margins(y=0.5 / len(shown))
    left_out = (
        f"; {len(rest)} more layers have at most {rest[0][2] or rest[0][1]:.2g}" if rest else ""
    )
    tidy(ax, title, unit + left_out, grid="x")
    if isinstance(report, Report):
        legend_above(ax)
    return figure_of(ax)


def activations(table: CalibrationTable, *, seen: CalibrationTable | None = None) -> Figure:
    """The range of every layer's input, low to high, a small picture for each kind of layer.

    table: of `zp.calibration_table`. seen: another one of the same model, drawn behind it; one by
    the observer "minmax" has all that was seen. Layers of one kind differ only in numbers in
    their names, and stand in the model's order. The axis is linear from -1 to 1 and logarithmic
    beyond.
    Raises PlotError (the tables are of different layers, matplotlib is missing).
    """
    behind = {row.module: row for row in seen.rows} if seen else {}
    if seen and behind.keys() != {row.module for row in table.rows}:
        raise PlotError(
            f"the table has {len(table.rows)} layers, seen= has {len(behind)}, and their names "
            "differ; both must be of one model"
        )
    kinds: dict[str, list[CalibratedLayer]] = {}
    for row in table.rows:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", row.module), []).append(row)
    columns = min(COLUMNS, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = new_figure(max(4.5, 2.5 * columns), 0.6 + 1.9 * lines)
    from matplotlib.ticker import MaxNLocator  # after the figure, whose error says what is missing

    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for ax, title, rows in zip(axes, _short(list(kinds)), kinds.values(), strict=False):
        at = range(len(rows))
        if seen:
            lows, highs = zip(
                *((behind[r.module].low, behind[r.module].high) for r in rows), strict=True
            )
            ax.vlines(at, lows, highs, color=SKY, alpha=0.55, linewidth=5, label=_observer(seen))
        lows, highs = zip(*((r.low, r.high) for r in rows), strict=True)
        ax.vlines(at, lows, highs, color=BLUE, linewidth=2, label=_observer(table))
        ax.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_xlim(-0.8, len(rows) - 0.2)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_formatter("{x:g}")
        tidy(ax, "", grid="y")
        ax.set_title(title, loc="left", fontsize=SMALL + 1)
        ax.tick_params(labelsize=SMALL)
    for ax in axes[len(kinds) :]:
        ax.remove()
    figure.suptitle("Ranges of the inputs of linear layers", x=0.01, ha="left", fontsize=11)
    figure.supxlabel("layers of the kind, in the model's order", fontsize=SMALL + 1)
    figure.supylabel("input value", fontsize=SMALL + 1)
    if seen:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=SMALL + 1
        )
    return figure


def _observer(table: CalibrationTable) -> str:
    return ", ".join(dict.fromkeys(row.observer or "checkpoint" for row in table.rows))


def _short(kinds: list[str]) -> list[str]:
    """What comes after the last number of each name, where that still tells the names apart."""
    ends = [kind.rpartition("*.")[2] for kind in kinds]
    return ends if len(set(ends)) == len(ends) else kinds


def tradeoff(comparisons: Mapping[str, Comparison], *, ax: Axes | None = None) -> Figure:
    """What a size costs: distance to the original (logarithmic) against bits per weight.

    comparisons: by the label that each gets; all of one kind, on the same text. The distance is the
    mean KL divergence of language models, and 1 - cosine of encoders' embeddings; one of 0, which a
    logarithmic axis cannot show, stands at its foot and says so. The line joins those that nothing
    smaller beats. ax: where to draw, a new figure otherwise.
    Raises PlotError (nothing to draw, different texts or kinds, matplotlib is missing).
    """
    if not comparisons:
        raise PlotError("comparisons={} has nothing to draw; pass {label: zp.compare(...), ...}")
    measured = {label: _measured(c) for label, c in comparisons.items()}
    texts = {(type(c), c.to_dict()["text"], _measured(c)[2]) for c in comparisons.values()}
    if len(texts) > 1:
        raise PlotError(
            f"the comparisons are of {len(texts)} different texts, lengths or kinds of model; "
            "measure all on the same"
        )
    foot = min((y for _, y, _ in measured.values() if y > 0), default=1.0) / 10
    points = {
        label if y > 0 else f"{label} (0)": (x, y if y > 0 else foot)
        for label, (x, y, _) in measured.items()
    }

    ax = ax or new_axes(7, 4.2)
    from matplotlib.ticker import FixedLocator  # after the axes, whose error says what is missing

    best = [p for p in sorted(points.values()) if not any(_beats(q, p) for q in points.values())]
    ax.plot(*zip(*best, strict=True), color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    xs, ys = zip(*points.values(), strict=True)
    ax.scatter(xs, ys, s=34, color=BLUE, zorder=3)
    ax.set_yscale("log")
    ax.set_xscale("log", base=2)
    ax.margins(x=0.08, y=0.12)
    ax.xaxis.set_major_locator(FixedLocator(_BITS))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    language = isinstance(next(iter(comparisons.values())), LanguageComparison)
    y_label = "mean KL divergence (nats per token)" if language else "1 - mean cosine"
    tidy(ax, "What a size costs", "bits per weight, the whole model", y_label, grid="both")
    _label(ax, points)
    return figure_of(ax)


def _measured(comparison: Comparison) -> tuple[float, float, int]:
    """Bits per weight, distance to the reference >= 0, and by how many tokens or sentences."""
    if isinstance(comparison, LanguageComparison):
        distance, amount = comparison.kl_mean, comparison.tokens
    else:
        assert isinstance(comparison, EncoderComparison)
        distance, amount = 1 - comparison.cosine_mean, comparison.sentences
    return comparison.candidate_bits_per_weight, max(0.0, distance), amount


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a is as small and as near as b, and better in one of the two."""
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _label(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each text beside its point, where it covers no point and no other text."""
    figure_of(ax).draw_without_rendering()  # so that positions are final
    dots = [tuple(ax.transData.transform(point)) for point in points.values()]
    taken: list[Bbox] = []
    for text, point in points.items():
        note = ax.annotate(
            text,
            point,
            (0, 0),
            textcoords="offset points",
            fontsize=SMALL + 1,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )
        note.set_in_layout(False)
        for reach, right, up in _PLACES:
            note.set_position((reach * right, reach * up))
            note.set_horizontalalignment(
                "left" if right > 0 else "right" if right < 0 else "center"
            )
            note.set_verticalalignment("bottom" if up > 0 else "top" if up < 0 else "center")
            box = note.get_window_extent()
            if _is_free(box, ax, taken, dots):
                break
        taken.append(box)
        if reach > _NEAR:
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            ax.annotate(
                "", point, (reach * right, reach * up), textcoords="offset points", arrowprops=line
            )


def _is_free(box: Bbox, ax: Axes, taken: list[Bbox], dots: list[tuple[float, ...]]) -> bool:
    inside = all(ax.bbox.contains(*corner) for corner in box.corners())
    covers = any(box.padded(4).contains(x, y) for x, y in dots)
    return inside and not covers and not any(box.padded(1).overlaps(other) for other in taken)


def losses(
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]] = (),
    *,
    unit: str = "nats per token",
    ax: Axes | None = None,
) -> Figure:
    """A training run: the loss against the step.

    train, held_out: (step, loss) pairs, as a TrainingReport has them. unit: of the losses. A loss
    that is NaN or Inf leaves a gap, and the label says how many there are. ax: where to draw, a new
    figure otherwise.
    Raises PlotError (nothing to draw, matplotlib is missing).
    """
    if not train:
        raise PlotError(
            "train=[] has no losses; pass (step, loss) pairs, as a report's .losses has"
        )
    ax = ax or new_axes(6.4, 3.6)
    series = (("training", train, SKY, ""), ("held out", held_out, RED, "o"))
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
            linewidth=1.3,
            label=f"{label} ({broken} not finite)" if broken else label,
        )
    tidy(ax, "Loss while training", "step", f"loss ({unit})", grid="y")
    ax.legend(frameon=False)
    return figure_of(ax)
