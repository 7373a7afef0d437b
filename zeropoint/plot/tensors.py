"""One weight: as heat maps, on its number line, against its grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import PlotError
from zeropoint.evaluate.histogram import histogram as count
from zeropoint.numerics import Format, quantization_error, rows_and_columns
from zeropoint.numerics.granularity import blocked
from zeropoint.numerics.grid import Grid, grid_values
from zeropoint.plot.canvas import (
    BLUE,
    GREY,
    PALE,
    RED,
    SMALL,
    figure_of,
    legend_above,
    new_axes,
    new_figure,
    numbers,
    tidy,
)
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_WIDTH = 16  # inches; wider heat maps stand below each other
MAX_NUMBERED = 16  # rows and columns of a heat map with its numbers in the cells
INSIDE_COLORS = 0.999  # share of a large heat map's values that have a color of their own
MAX_LINES = 8  # blocks of a number line
MAX_ON_LINE = 64  # values in a block of it
MAX_LEVELS = 64  # grid points that a histogram draws as lines from top to bottom


def tensor(weight: QTensor, *, original: Tensor | None = None) -> Figure:
    """A quantized weight as heat maps: original, codes, dequantized, error.

    weight: of shape (N, K), or any, drawn as N rows. original: the float weight of that shape;
    without it only codes and dequantized values are drawn. Up to 16 x 16 the numbers are in the
    cells, lines enclose the values that share a scale, and the scale is written beside them.
    Raises PlotError (shapes differ, nothing to draw, matplotlib is missing), NonFiniteError.
    """
    if original is not None and original.shape != weight.shape:
        raise PlotError(
            f"original has shape {tuple(original.shape)}, the quantized weight "
            f"{tuple(weight.shape)}; pass the weight that was quantized"
        )
    if not weight.shape.numel():
        raise PlotError(f"a weight of shape {tuple(weight.shape)} has no values to draw")
    n, k = rows_and_columns(weight.shape)
    numbers(weight.packed)  # refuses the meta device
    real = numbers(weight.dequantize(torch.float32)).reshape(n, k)
    has_codes = weight.scheme.fmt.kind != "downcast"
    before = None if original is None else numbers(original).reshape(n, k)
    panels = 1 + has_codes + 2 * (before is not None)

    small = max(n, k) <= MAX_NUMBERED
    width = max(1.9, 0.55 * k) if small else 3.0
    height = max(0.8, 0.45 * n) if small else min(max(n / k, 0.4), 1.5) * width
    scales = _written_scales(weight) if small and has_codes else []
    beside = max((len(line) for line in scales[1:]), default=0) * 0.07
    width, height = width + 0.2 + 0.6 * (not small), height + 0.6
    columns = panels if panels * width < MAX_WIDTH else 1
    figure = new_figure(columns * width + beside, panels // columns * height + 0.5)
    axes = iter(figure.subplots(panels // columns, columns, squeeze=False).flatten())
    limit = max(_limit(t, small) for t in (real, before) if t is not None)
    if before is not None:
        _heat_map(next(axes), before, "original", "RdBu_r", limit)
    if has_codes:
        ax = next(axes)
        _heat_map(ax, numbers(weight.codes.float()).reshape(n, k), "codes", "cividis")
        if scales:
            _enclose_blocks(ax, weight, scales)
    _heat_map(next(axes), real, "dequantized", "RdBu_r", limit)
    if before is not None:
        error, ax = real - before, next(axes)
        _heat_map(ax, error, "error", "PuOr_r", _limit(error, small))
        ax.set_xlabel(f"at most {quantization_error(before, real).max:.3g}", fontsize=SMALL)
    figure.suptitle(str(weight.scheme), x=0.01, ha="left", fontsize=11)
    return figure


def _limit(values: Tensor, small: bool) -> float:
    """Where colours end: the largest magnitude; of many, one that outliers do not stretch."""
    magnitudes = values.abs().flatten()
    if small:
        return float(magnitudes.max())
    return float(magnitudes.kthvalue(math.ceil(INSIDE_COLORS * len(magnitudes))).values)


def _heat_map(
    ax: Axes, values: Tensor, title: str, colors: str, limit: float | None = None
) -> None:
    """values: (N, K). limit: colours reach from -limit to limit; None: from least to largest."""
    n, k = values.shape
    low, high = (float(values.min()), float(values.max())) if limit is None else (-limit, limit)
    if low == high:
        low, high = low - 1, high + 1
    image = ax.imshow(values.numpy(), cmap=colors, vmin=low, vmax=high, aspect="auto")
    ax.set_title(title, fontsize=10)
    if max(n, k) > MAX_NUMBERED:
        ax.set_xlabel(f"{n:,} x {k:,}", fontsize=SMALL)
        ax.tick_params(labelsize=SMALL)
        bar = figure_of(ax).colorbar(image, ax=ax, extend="neither" if limit is None else "both")
        bar.ax.tick_params(labelsize=SMALL)
        return
    ax.set_xticks([])
    ax.set_yticks([])
    largest = float(values.abs().max())
    decimals = 2 - math.floor(math.log10(largest)) if largest else 0  # three digits of the largest
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # luma of ITU-R BT.601
            ax.text(
                column,
                row,
                f"{round(value, decimals) + 0.0:g}",  # + 0.0: no -0
                ha="center",
                va="center",
                fontsize=SMALL,
                color="white" if dark else "black",
            )


def _written_scales(weight: QTensor) -> list[str]:
    """A heading, then the scales and zero points of each row of blocks."""
    assert weight.scales is not None
    zeros = None if weight.zero_point is None else weight.zero_point.tolist()
    lines = []
    for r, scales in enumerate(weight.scales.tolist()):
        cells = [f"{scale:.3g}" for scale in scales]
        if zeros is not None:
            cells = [f"{cell} (z {zero})" for cell, zero in zip(cells, zeros[r], strict=True)]
        lines.append(", ".join(cells))
    if weight.scheme.granularity == "tensor":
        return [f"scale {lines[0]}"]
    return ["at the right: scale" + ("" if zeros is None else " (z: zero point)"), *lines]


def _enclose_blocks(ax: Axes, weight: QTensor, scales: list[str]) -> None:
    """Lines around the values that share a scale, and the scales of each row at its right."""
    assert weight.scales is not None
    n, k = rows_and_columns(weight.shape)
    rows, groups = weight.scales.shape
    for row in range(1, rows):
        ax.axhline(row * n / rows - 0.5, color="white", linewidth=3)
    for group in range(1, groups):
        ax.axvline(group * k / groups - 0.5, color="white", linewidth=3)
    heading, *lines = scales
    ax.set_xlabel(heading, fontsize=SMALL)
    if lines:
        ax.yaxis.tick_right()
        ax.set_yticks(range(rows), lines, fontsize=SMALL)
        ax.tick_params(length=0)


def number_line(values: Tensor, weight: QTensor, *, ax: Axes | None = None) -> Figure:
    """Values above the grid points that they are rounded to; a line for each block.

    values: float, of the shape of `weight`, which they were quantized to. The numbers under a line
    are codes. ax: where to draw, a new figure otherwise.
    Raises PlotError (shapes differ, more than 8 blocks or 64 values in one, a downcast or vectors,
    which have no grid, matplotlib is missing), NonFiniteError.
    """
    if values.shape != weight.shape:
        raise PlotError(
            f"values have shape {tuple(values.shape)}, the quantized weight "
            f"{tuple(weight.shape)}; pass the weight that was quantized"
        )
    fmt = weight.scheme.fmt
    _check_grid(fmt, "use plot.tensor")
    assert weight.scales is not None
    rows, groups = weight.scales.shape
    blocks = numbers(values).reshape(rows * groups, -1)
    if len(blocks) > MAX_LINES or blocks.shape[1] > MAX_ON_LINE:
        raise PlotError(
            f"{len(blocks)} blocks of {blocks.shape[1]} values are more than {MAX_LINES} lines of "
            f"{MAX_ON_LINE}; draw a part of the weight, or use plot.histogram"
        )
    codes = _all_codes(fmt)
    of_each = codes.expand(rows, groups, -1)
    points = numbers(grid_values(of_each, weight.grid, fmt)).reshape(len(blocks), -1)
    images = numbers(weight.dequantize(torch.float32)).reshape(blocks.shape)

    height = 1.0 + 0.75 * len(blocks)
    ax = ax or new_axes(8, height)
    everything = torch.cat([points.flatten(), blocks.flatten()])
    span = float(everything.max() - everything.min())
    for line, (block, image, grid) in enumerate(zip(blocks, images, points, strict=True)):
        ax.hlines(-line, float(grid.min()), float(grid.max()), color=PALE, linewidth=1, zorder=1)
        ax.scatter(
            grid, [-line] * len(grid), marker="|", s=70, color=GREY, linewidths=1, zorder=2,
            label="" if line else "grid",
        )  # fmt: skip
        ax.plot(
            torch.stack([block, image]).numpy(),
            torch.tensor([[0.4 - line], [-line]]).expand(2, len(block)).numpy(),
            color=BLUE, linewidth=0.8, zorder=2,
        )  # fmt: skip
        ax.scatter(
            block, [0.4 - line] * len(block), s=22, color=BLUE, zorder=3,
            label="" if line else "value",
        )  # fmt: skip
        ax.scatter(
            image, [-line] * len(image), marker="|", s=110, color=RED, linewidths=2, zorder=3,
            label="" if line else "rounded to",
        )  # fmt: skip
        for at, code in _spread(grid.tolist(), codes.float().tolist(), span / 24):
            ax.text(
                at, -line - 0.22, f"{code:g}",
                ha="center", va="top", fontsize=SMALL - 1, color=GREY,
            )  # fmt: skip
    ax.set_ylim(0.3 - len(blocks), 0.65)
    ax.set_yticks([])
    tidy(ax, f"On the grid of {weight.scheme}", "real value; below each line: codes")
    ax.spines["left"].set_visible(False)
    legend_above(ax)
    return figure_of(ax)


def _check_grid(fmt: Format, remedy: str) -> None:
    if fmt.kind == "downcast":
        raise PlotError(f"{fmt.name} has no scale and no grid to draw; {remedy}")
    if fmt.width > 1:
        raise PlotError(
            f"{fmt.name} has points of {fmt.width} values and no grid of one to draw; {remedy}"
        )


def _all_codes(fmt: Format) -> Tensor:
    """Every finite code of a format with scales, 1-D, in the dtype that `QTensor.codes` has."""
    if fmt.kind == "integer":
        return torch.arange(fmt.q_min, fmt.q_max + 1, dtype=torch.int8)
    if fmt.kind == "codebook":
        return torch.arange(1 << fmt.bits, dtype=torch.uint8)
    assert fmt.dtype is not None
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype)
    return codes[codes.float().isfinite()]


def _spread(points: list[float], codes: list[float], apart: float) -> list[tuple[float, float]]:
    """(point, code) from left to right, those left out that are closer than `apart` to one kept."""
    kept: list[tuple[float, float]] = []
    for point, code in sorted(zip(points, codes, strict=True)):
        if not kept or point - kept[-1][0] >= apart:
            kept.append((point, code))
    return kept


def histogram(weight: Tensor, scheme: Scheme | str, *, ax: Axes | None = None) -> Figure:
    """Where the values of a weight lie on the grid that a scheme would give them.

    weight: (N, K) float. scheme: or the name of a format, for its default scheme. Every block has a
    grid of its own, so values are drawn in units of it: value / scale, + zero point where there is
    one. Vertical lines are the grid points, of all rows where each learns its own. ax: where to
    draw, a new figure otherwise.
    Raises PlotError (a downcast or vectors, which have no grid, matplotlib is missing), and what
    `zp.numerics.quantize` raises.
    """
    scheme = Scheme.of(scheme) if isinstance(scheme, str) else scheme
    fmt = scheme.fmt
    _check_grid(fmt, "use an integer format")
    weight = numbers(weight).float()
    quantized = rtn(weight, scheme)
    assert quantized.scales is not None
    blocks = blocked(weight, scheme.granularity, scheme.group_size)
    units = blocks / quantized.scales.float().unsqueeze(-1)
    if quantized.zero_point is not None:
        units += quantized.zero_point.unsqueeze(-1)
    rows = 1 if quantized.levels is None else len(quantized.levels)
    unscaled = Grid(torch.ones(rows, 1), None, quantized.levels)
    levels = grid_values(_all_codes(fmt).expand(rows, 1, -1), unscaled, fmt).flatten()

    ax = ax or new_axes(6.4, 3.4)
    counted = count(units, bins=128)
    ax.stairs(counted.counts, counted.edges, fill=True, color=BLUE, alpha=0.75, label="values")
    few = len(levels) <= MAX_LEVELS
    ax.vlines(
        levels.tolist(),
        0,
        1 if few else 0.04,
        transform=ax.get_xaxis_transform(),
        color=RED,
        linewidth=0.7,
        label="grid points",
    )
    lost = quantization_error(weight, quantized.dequantize(torch.float32))
    title = f"On the grid of {scheme}: {lost.sqnr_db:.1f} dB signal to noise"
    unit = "value / scale" if quantized.zero_point is None else "value / scale + zero point"
    tidy(ax, title, f"{unit}, each block with its own", f"of {weight.numel():,} values")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.legend(framealpha=1, edgecolor="none", fontsize=SMALL + 1)
    return figure_of(ax)
