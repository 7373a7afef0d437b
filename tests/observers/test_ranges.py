"""Observers of ranges: what each promises, on distributions whose answer is known."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY
from zeropoint.errors import RecipeError, UnknownNameError
from zeropoint.numerics import FORMATS
from zeropoint.numerics.activations import round_static, static_parameters
from zeropoint.observers import OBSERVERS, Range, make_observer
from zeropoint.observers.histogram import Histogram
from zeropoint.observers.mse import float8_error, int8_errors

every_observer = pytest.mark.parametrize("name", OBSERVERS)
BIN = 2.0**-6  # width of a bin, relative to its values


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(name, *pieces, format="int8", **options):
    observer = make_observer(name, format, **options)
    for x in pieces:
        observer.update(x)
    return observer.result()


def error(x, seen, format="int8"):
    """Mean of (x - round(x))^2 with this range."""
    rounded = round_static(x, *static_parameters(seen.low, seen.high, format), format)
    return (rounded - x).double().square().mean().item()


values = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    min_size=1,
    max_size=40,
)


# --- all of them ----------------------------------------------------------------------------------


@every_observer
def test_nothing_seen_is_a_range_of_nothing(name):
    assert observed(name) == observed(name, torch.empty(0, 3)) == Range(0.0, 0.0, 0)


@every_observer
@PROPERTY
@given(data=values)
def test_the_range_lies_in_what_was_seen(name, data):
    x = torch.tensor(data).view(-1, 1)
    seen = observed(name, x)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    slack = 1e-12 * (high - low)
    assert low - slack <= seen.low <= seen.high <= high + slack
    assert seen.samples == len(x)


@every_observer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_float_dtype_and_zeros(name, dtype):
    x = noise(50, 4).to(dtype)
    assert observed(name, x) == observed(name, x.float())
    assert observed(name, torch.zeros(3, 2, dtype=dtype)) == Range(0.0, 0.0, 3)
    assert observed(name, torch.full((3, 2), -2.0, dtype=dtype)).low == pytest.approx(-2.0)


@pytest.mark.parametrize("name", [n for n in OBSERVERS if n != "moving_average"])
def test_how_the_data_is_cut_and_ordered_makes_no_difference(name):
    x = noise(60, 7)
    x[3, 2] = 500.0
    whole = observed(name, x)
    assert observed(name, *x.split(11)) == whole
    assert observed(name, *reversed(x.split(7))) == whole
    assert (
        observed(name, x[torch.randperm(60, generator=torch.Generator().manual_seed(1))]) == whole
    )


@every_observer
def test_the_argument_is_not_changed_and_a_gradient_is_no_obstacle(name):
    x = noise(5, 3).requires_grad_()
    before = x.detach().clone()
    observed(name, x)
    assert torch.equal(x, before) and x.grad is None


@every_observer
def test_a_name_to_print(name):
    assert str(make_observer(name, "int8")).split()[0] == name


def test_unknown_observers_and_options_are_refused():
    with pytest.raises(UnknownNameError, match="'minmx' is not an observer; close: 'minmax'"):
        make_observer("minmx", "int8")
    with pytest.raises(RecipeError, match="observer='mse' has no percentile; leave it out"):
        make_observer("mse", "int8", percentile=99.0, momentum=None)
    for percentile in (50, 101, float("nan")):
        with pytest.raises(RecipeError, match=f"percentile={percentile} is not above 50"):
            make_observer("percentile", "int8", percentile=percentile)
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(RecipeError, match=rf"momentum={momentum} is not in \[0, 1\)"):
            make_observer("moving_average", "int8", momentum=momentum)
    with pytest.raises(RecipeError, match="observer='kl' compares the steps of int8, not of float"):
        make_observer("kl", "float8_e4m3fn")


# --- one by one -----------------------------------------------------------------------------------


@PROPERTY
@given(data=values)
def test_minmax_clips_nothing(data):
    x = torch.tensor(data).view(-1, 1)
    assert observed("minmax", x) == Range(float(x.min()), float(x.max()), len(x))


def test_a_moving_average_starts_with_the_first_batch_and_forgets():
    first, second = torch.tensor([[-1.0, 3.0]]), torch.tensor([[-5.0, 103.0]])
    assert observed("moving_average", first) == Range(-1.0, 3.0, 1)
    seen = observed("moving_average", first, second)
    assert (seen.low, seen.high) == pytest.approx((-1.4, 13.0)) and seen.samples == 2
    assert observed("moving_average", first, second, momentum=0.0) == Range(-5.0, 103.0, 2)
    many = observed("moving_average", first, *[second] * 200)
    assert (many.low, many.high) == pytest.approx((-5.0, 103.0))


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.99])
@pytest.mark.parametrize("kind", ["normal", "uniform", "exponential", "with outliers"])
def test_a_percentile_is_that_of_the_values_to_a_bin(kind, percentile):
    generator = torch.Generator().manual_seed(0)
    x = {
        "normal": noise(500, 200),
        "uniform": torch.rand(500, 200, generator=generator) * 2 - 0.5,
        "exponential": torch.empty(500, 200).exponential_(generator=generator),
        "with outliers": noise(500, 200).index_fill(1, torch.tensor([3]), 1e4),
    }[kind]
    seen = observed("percentile", x, percentile=percentile)
    ordered = x.double().flatten().sort().values
    share = percentile / 100
    for found, wanted in ((seen.low, 1 - share), (seen.high, share)):
        place = wanted * len(ordered)
        below, above = (
            ordered[max(0, int(place) - 1)],
            ordered[min(len(ordered) - 1, int(place) + 1)],
        )
        assert below - BIN * abs(below) <= found <= above + BIN * abs(above)
    assert str(make_observer("percentile", "int8", percentile=percentile)).endswith(
        f"{percentile:g}"
    )


def test_the_hundredth_percentile_is_minmax():
    x = noise(40, 9)
    assert observed("percentile", x, percentile=100.0) == observed("minmax", x)


HEAVY = {
    "normal": noise(400, 100),
    "gelu": torch.nn.functional.gelu(noise(400, 100) * 3),
    "outliers": noise(400, 100).index_fill(0, torch.tensor([7]), 40.0),
    "cubed": noise(400, 100) ** 3,
    "shifted": noise(400, 100) + 20,
    "negative": -(noise(400, 100).abs() ** 3),
}
every_shape = pytest.mark.parametrize("kind", HEAVY)


@every_shape
def test_the_expected_error_is_what_rounding_costs(kind):
    """To the unevenness of values inside a bin; 40000 values, so a few percent."""
    x = HEAVY[kind]
    histogram = Histogram()
    histogram.update(x)
    for share in (1.0, 0.5, 0.1):
        low, high = min(0.0, histogram.low * share), max(0.0, histogram.high * share)
        ends = (torch.tensor([v], dtype=torch.float64) for v in (low, high))
        expected = int8_errors(histogram.bins(), *ends).item()
        assert expected == pytest.approx(error(x, Range(low, high, 0)), rel=0.1)
        largest = torch.tensor(max(-low, high), dtype=torch.float64)
        format = "float8_e4m3fn"
        expected = float8_error(histogram.bins(), largest, FORMATS[format]).item()
        assert expected == pytest.approx(error(x, Range(low, high, 0), format), rel=0.1)


@every_shape
@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_mse_is_never_worse_than_minmax(kind, format):
    x = HEAVY[kind]
    best, all_of_it = (observed(n, x, format=format) for n in ("mse", "minmax"))
    assert error(x, best, format) <= 1.02 * error(x, all_of_it, format)


@PROPERTY
@given(data=values)
def test_mse_is_never_worse_than_minmax_in_expected_error(data):
    x = torch.tensor(data).view(-1, 1)
    histogram = Histogram()
    histogram.update(x)
    seen = observed("mse", x)
    spans = [(seen.low, seen.high), (min(0.0, histogram.low), max(0.0, histogram.high))]
    if max(-spans[1][0], spans[1][1]) > 0:
        lows, highs = (torch.tensor(v, dtype=torch.float64) for v in zip(*spans, strict=True))
        found, of_minmax = int8_errors(histogram.bins(), lows, highs).tolist()
        assert found <= of_minmax * (1 + 1e-9)


@every_shape
def test_mse_finds_what_trying_every_range_finds(kind):
    x = HEAVY[kind]
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    shares = torch.linspace(0.02, 1, 25).tolist()
    best = min(error(x, Range(low * a, high * b, 0)) for a in shares for b in shares)
    assert error(x, observed("mse", x)) <= 1.05 * best


def test_where_few_values_are_far_out_clipping_wins():
    x = noise(2000, 500)
    x[0, :3] = 7.0  # 3 in a million
    of_minmax = error(x, observed("minmax", x))
    for name in ("mse", "percentile"):
        assert error(x, observed(name, x)) < 0.75 * of_minmax


def test_kl_keeps_a_normal_distribution_and_clips_outliers():
    x = noise(2000, 100)
    plain = observed("kl", x)
    assert 3.0 < plain.high <= 5.0 and -5.0 <= plain.low < -3.0
    x[:2, :5] = 1000.0  # 1 in 20000
    clipped = observed("kl", x)
    assert 3.0 < clipped.high < 10.0
    one_sided = observed("kl", torch.nn.functional.gelu(noise(2000, 100)))
    assert -0.18 < one_sided.low < -0.16 and 2.0 < one_sided.high <= 5.0


# --- the histogram --------------------------------------------------------------------------------


@PROPERTY
@given(data=values)
def test_every_value_is_counted_in_the_bin_that_holds_it(data):
    x = torch.tensor(data).view(-1, 1)
    histogram = Histogram()
    histogram.update(x)
    start, end, mass = histogram.bins()
    assert mass.sum() == len(data)
    assert (start <= end).all() and (start.diff() >= 0).all() and (end[:-1] <= start[1:]).all()
    for i in range(len(mass)):
        inside = (x.double() >= start[i]) & (x.double() <= end[i])
        assert inside.sum() >= mass[i]
    wide = (end - start) > BIN * torch.maximum(start.abs(), end.abs()) * (1 + 1e-9)
    assert (torch.maximum(start.abs(), end.abs())[wide] < 2.0**-125).all(), "only around zero"


def test_counts_below_a_point():
    histogram = Histogram()
    histogram.update(torch.rand(1000, 100, generator=torch.Generator().manual_seed(0)))
    at = torch.tensor([-1.0, 0.0, 0.1, 0.5, 0.903, 1.0, 7.0], dtype=torch.float64)
    found = histogram.bins().below(at) / 100_000
    assert torch.allclose(found, at.clamp(0, 1), atol=0.005)  # 100000 draws: 3 sigma of a share
    assert found[0] == 0.0 and found[-1] == 1.0


def test_every_observer_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert OBSERVERS.keys() <= rows
