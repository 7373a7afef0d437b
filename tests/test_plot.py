"""Pictures show the numbers they are given; asserted on what is drawn, not on pixels."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

import zeropoint as zp
from zeropoint.errors import PlotError


def texts(ax):
    return [text.get_text() for text in ax.texts]


# --- losses ---


def test_losses_are_drawn_at_their_steps():
    figure = zp.plot.losses([(0, 3.0), (1, 2.5), (2, 2.0)], held_out=[(0, 3.1), (2, 2.2)])
    train, held_out = figure.axes[0].lines
    assert train.get_xydata().tolist() == [[0, 3.0], [1, 2.5], [2, 2.0]]
    assert held_out.get_xydata().tolist() == [[0, 3.1], [2, 2.2]]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["training", "held out"]
    assert figure.axes[0].get_ylabel() == "loss (nats per token)"


def test_a_loss_that_is_not_finite_is_a_gap_that_is_counted():
    figure = zp.plot.losses([(0, 3.0), (1, math.inf), (2, math.nan)])
    (line,) = figure.axes[0].lines
    assert line.get_label() == "training (2 not finite)"
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True, True]


def test_a_single_loss_is_visible():
    figure = zp.plot.losses([(7, 3.0)])
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_no_losses_are_refused():
    with pytest.raises(PlotError, match=r"train=\[\] has no losses; pass \(step, loss\) pairs"):
        zp.plot.losses([])


# --- every picture ---


def test_axes_that_are_given_are_drawn_on():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert zp.plot.losses([(0, 1.0), (1, 0.5)], ax=right) is figure
    assert right.lines and not left.lines


def test_a_notebook_shows_the_figure_that_a_call_returns():
    assert zp.plot.losses([(0, 1.0)])._repr_png_().startswith(b"\x89PNG")


def test_pyplot_is_not_touched():
    code = (
        "import sys, zeropoint as zp; zp.plot.losses([(0, 1.0)])._repr_png_(); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import zeropoint as zp\n"
        "try: zp.plot.losses([(0, 1.0)])\n"
        "except zp.ZeropointError as e: print(e)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib, which is not installed; pip install 'zeropoint[plot]'" in shown.stdout
