"""Pictures of one weight: asserted on what is drawn where, not on pixels."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import zeropoint as zp
from tests.helpers import defaults, example_weight, rtn
from zeropoint.errors import PlotError
from zeropoint.evaluate.histogram import histogram
from zeropoint.numerics import FORMATS
from zeropoint.qtensor import empty
from zeropoint.scheme import Scheme

NINE = torch.tensor([[1.2, -0.4, 0.3], [0.5, 2.6, -1.3], [-0.1, 0.8, 6.1]])
PER_TENSOR = Scheme(format="int4", granularity="tensor", symmetric=False)
PER_CHANNEL = Scheme(format="int4", granularity="channel", symmetric=False)


def cells(ax):
    return [text.get_text() for text in ax.texts]


# --- heat maps ---


def test_heat_maps_show_original_codes_dequantized_and_error():
    weight = rtn(NINE, PER_TENSOR)
    figure = zp.plot.tensor(weight, original=NINE)
    assert [ax.get_title() for ax in figure.axes] == ["original", "codes", "dequantized", "error"]
    wanted = (NINE, weight.codes, weight.dequantize(), weight.dequantize() - NINE)
    for ax, values in zip(figure.axes, wanted, strict=True):
        numpy.testing.assert_allclose(ax.images[0].get_array(), values.double(), atol=1e-6)
    assert cells(figure.axes[0]) == [
        "1.2",
        "-0.4",
        "0.3",
        "0.5",
        "2.6",
        "-1.3",
        "-0.1",
        "0.8",
        "6.1",
    ]
    assert cells(figure.axes[1]) == [str(code) for code in weight.codes.flatten().tolist()]
    assert "-0" not in cells(figure.axes[3])
    assert (
        figure.axes[1].get_xlabel()
        == f"scale {weight.scale.item():.3g} (z {weight.zero_point.item()})"
    )
    assert figure.axes[3].get_xlabel() == f"at most {(weight.dequantize() - NINE).abs().max():.3g}"
    assert figure.get_suptitle() == "int4 per tensor asymmetric"


def test_original_and_dequantized_share_their_colours():
    figure = zp.plot.tensor(rtn(NINE, PER_TENSOR), original=NINE)
    limits = [ax.images[0].get_clim() for ax in (figure.axes[0], figure.axes[2])]
    assert limits[0] == limits[1] and limits[0][0] == -limits[0][1]


def test_values_that_share_a_scale_are_enclosed_and_have_it_beside_them():
    weight = rtn(NINE, PER_CHANNEL)
    codes = zp.plot.tensor(weight).axes[0]
    assert [line.get_ydata()[0] for line in codes.lines] == [0.5, 1.5]
    assert [label.get_text() for label in codes.get_yticklabels()] == [
        f"{scale:.3g} (z {zero})"
        for scale, zero in zip(weight.scale.flatten(), weight.zero_point.flatten(), strict=True)
    ]
    grouped = rtn(torch.randn(2, 8), Scheme.of("int8", group_size=4))
    codes = zp.plot.tensor(grouped).axes[0]
    assert [line.get_xdata()[0] for line in codes.lines if line.get_xdata()[0] != 0] == [3.5]
    assert all("," in label.get_text() for label in codes.get_yticklabels())


@pytest.mark.parametrize("scheme", defaults(), ids=str)
def test_every_format_can_be_drawn(scheme):
    weight = example_weight(4, 64)
    figure = zp.plot.tensor(rtn(weight, scheme), original=weight)
    maps = [ax for ax in figure.axes if ax.images]
    assert len(maps) == (3 if scheme.fmt.kind == "downcast" else 4)


def test_a_large_weight_has_colour_bars_and_one_outlier_does_not_take_all_colours():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 1000.0
    figure = zp.plot.tensor(rtn(weight, Scheme.of("int4")), original=weight)
    maps = [ax for ax in figure.axes if ax.images and ax.get_title()]
    assert len(maps) == 4 and not any(ax.texts for ax in maps)
    assert maps[0].images[0].get_clim()[1] < 10
    assert maps[0].get_xlabel() == "64 x 96"


@pytest.mark.parametrize(("columns", "stacked"), [(3, False), (16, True)])
def test_wide_heat_maps_stand_below_each_other(columns, stacked):
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    figure = zp.plot.tensor(rtn(weight, Scheme.of("int8")), original=weight)
    figure.draw_without_rendering()
    tops = [ax.get_position().y1 for ax in figure.axes]
    assert (tops[0] > tops[1] > tops[2] > tops[3]) == stacked
    assert len(set(tops)) == (4 if stacked else 1)


def test_a_weight_that_loses_nothing_has_an_error_of_zero():
    weight = torch.ones(2, 2)
    error = zp.plot.tensor(rtn(weight, Scheme.of("int8")), original=weight).axes[-1]
    assert cells(error) == ["0"] * 4 and error.images[0].get_clim() == (-1, 1)


def test_heat_maps_refuse_what_they_cannot_draw():
    weight = rtn(NINE, PER_TENSOR)
    with pytest.raises(PlotError, match=r"original has shape \(3, 2\), the quantized .*\(3, 3\)"):
        zp.plot.tensor(weight, original=NINE[:, :2])
    with pytest.raises(PlotError, match="on the meta device has no values to draw"):
        zp.plot.tensor(empty((3, 3), Scheme.of("int8"), torch.float32))
    with pytest.raises(PlotError, match=r"shape \(0, 3\) has no values to draw"):
        zp.plot.tensor(empty((0, 3), Scheme.of("int8"), torch.float32))


# --- number lines ---


def drawn(ax):
    """{label: (x, y) of its points} of the first line."""
    return {c.get_label(): c.get_offsets() for c in ax.collections if c.get_label()[0] != "_"}


def test_a_number_line_has_values_their_images_and_the_grid():
    weight = rtn(NINE, PER_TENSOR)
    points = drawn(zp.plot.number_line(NINE, weight).axes[0])
    scale, zero = weight.scale.item(), weight.zero_point.item()
    numpy.testing.assert_allclose(
        points["grid"][:, 0], scale * (numpy.arange(-8, 8) - zero), rtol=1e-6
    )
    numpy.testing.assert_allclose(points["value"][:, 0], NINE.flatten(), rtol=1e-6)
    numpy.testing.assert_allclose(points["rounded to"][:, 0], weight.dequantize().flatten())


def test_codes_stand_below_their_grid_points_and_do_not_touch():
    weight = rtn(NINE, Scheme(format="int8", granularity="channel"))
    figure = zp.plot.number_line(NINE, weight)
    ax = figure.axes[0]
    scales = weight.scale.flatten().tolist()
    for text in ax.texts:
        x, y = text.get_position()
        assert x == pytest.approx(int(text.get_text()) * scales[round(-y - 0.22)], rel=1e-5)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) > 20
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    "name", [f.name for f in FORMATS.values() if f.kind != "downcast" and f.width == 1]
)
def test_every_grid_holds_the_images_of_its_values(name):
    weight = rtn(NINE, Scheme(format=name, granularity="tensor"))
    points = drawn(zp.plot.number_line(NINE, weight).axes[0])
    grid = points["grid"][:, 0]
    assert all(numpy.abs(grid - image).min() == 0 for image in points["rounded to"][:, 0])


def test_number_lines_refuse_what_they_cannot_draw():
    with pytest.raises(PlotError, match=r"values have shape \(3, 2\), .*\(3, 3\)"):
        zp.plot.number_line(NINE[:, :2], rtn(NINE, PER_TENSOR))
    with pytest.raises(
        PlotError, match="bfloat16 has no scale and no grid to draw; use plot.tensor"
    ):
        zp.plot.number_line(NINE, rtn(NINE, Scheme.of("bfloat16")))
    tall = torch.randn(9, 4)
    with pytest.raises(PlotError, match="9 blocks of 4 values are more than 8 lines of 64"):
        zp.plot.number_line(tall, rtn(tall, Scheme.of("int8")))
    wide = torch.randn(1, 65)
    with pytest.raises(PlotError, match="1 blocks of 65 values"):
        zp.plot.number_line(wide, rtn(wide, Scheme.of("int8")))


# --- histograms ---


@pytest.mark.parametrize(
    "scheme", [s for s in defaults() if s.fmt.kind != "downcast" and s.fmt.width == 1], ids=str
)
def test_a_histogram_counts_values_in_units_of_their_grid(scheme):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    ax = zp.plot.histogram(weight, scheme).axes[0]
    counts, edges, _ = ax.patches[0].get_data()
    assert counts.sum() == weight.numel()
    levels = [path.vertices[0, 0] for path in ax.collections[0].get_paths()]
    half_step = numpy.diff(numpy.sort(levels)).max() / 2
    if scheme.scale_dtype == "float8_e8m0fnu":  # what lies beyond the largest level is cut off
        half_step = 2 ** math.frexp(max(levels))[1] - max(levels)
    assert min(levels) - half_step <= edges[0] < edges[-1] <= max(levels) + half_step
    assert ax.get_title(loc="left").startswith(f"On the grid of {scheme}: ")


def test_a_histogram_of_one_block_is_that_of_its_values():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(format="int4", granularity="tensor")
    counts, edges, _ = zp.plot.histogram(weight, scheme).axes[0].patches[0].get_data()
    scale = rtn(weight, scheme).scale.item()
    wanted = histogram(weight / scale, bins=128)
    assert tuple(counts) == wanted.counts
    numpy.testing.assert_allclose(edges, wanted.edges, rtol=1e-5)


def test_vectors_have_no_grid_of_one_value():
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.of("e8p", group_size=-1)
    with pytest.raises(PlotError, match="e8p has points of 8 values and no .* use an integer"):
        zp.plot.histogram(weight, scheme)
    with pytest.raises(PlotError, match="e8p has points of 8 values and no .* use plot.tensor"):
        zp.plot.number_line(weight, rtn(weight, scheme))


def test_a_downcast_has_no_grid():
    with pytest.raises(PlotError, match="float16 has no scale and no grid to draw; use an integer"):
        zp.plot.histogram(torch.randn(4, 4), "float16")
