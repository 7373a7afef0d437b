"""What every picture shares: whose figure it is, who shows it, and what needs matplotlib."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import zeropoint as zp
from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import NonFiniteError, PlotError

DRAWN_ON = {
    "histogram": lambda ax: zp.plot.histogram(torch.randn(4, 32), "int4", ax=ax),
    "losses": lambda ax: zp.plot.losses([(0, 1.0), (1, 0.5)], ax=ax),
    "number_line": lambda ax: zp.plot.number_line(
        torch.ones(2, 2), rtn(torch.ones(2, 2), zp.Scheme.of("int8")), ax=ax
    ),
}


@pytest.mark.parametrize("name", DRAWN_ON)
def test_axes_that_are_given_are_drawn_on(name):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert DRAWN_ON[name](right) is figure
    assert right.has_data() and not left.has_data()


def test_a_notebook_shows_the_figure_that_a_call_returns():
    assert zp.plot.losses([(0, 1.0)])._repr_png_().startswith(b"\x89PNG")


def test_pyplot_and_its_settings_are_not_touched():
    code = (
        "import sys, zeropoint as zp\n"
        "from matplotlib import rcParams as r\n"
        "settings = lambda: [r[k] for k in r if k != 'backend']\n"
        "before = settings()\n"
        "zp.plot.losses([(0, 1.0)])._repr_png_()\n"
        "print('matplotlib.pyplot' in sys.modules, before == settings())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "True"]


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import zeropoint as zp\n"
        "try: zp.plot.losses([(0, 1.0)])\n"
        "except zp.ZeropointError as e: print(e)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib, which is not installed; pip install 'zeropoint[plot]'" in shown.stdout


def test_a_tensor_without_values_is_refused():
    with pytest.raises(PlotError, match=r"\(4, 32\) on the meta device has no values"):
        zp.plot.histogram(torch.empty(4, 32, device="meta"), "int8")


def test_values_that_are_not_finite_are_refused():
    values = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    weight = rtn(torch.ones(2, 2), zp.Scheme.of("int8"))
    for draw in (
        lambda: zp.plot.tensor(weight, original=values),
        lambda: zp.plot.number_line(values, weight),
        lambda: zp.plot.histogram(values, "int8"),
    ):
        with pytest.raises(NonFiniteError, match="1 NaN and 1 Inf among 4 values"):
            draw()
