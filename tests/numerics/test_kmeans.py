"""Levels of a row: as good as an exact dynamic programme over all values, and no step goes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY
from zeropoint.numerics import get_format, kmeans, levels_for
from zeropoint.numerics.kmeans import Sorted, best_cut, learned_levels, lloyd

LEVELS = 16


def loss(values, weights, levels):
    """sum weight min_l (value - level)^2 of each row. values, weights: (R, K); levels: (R, L)."""
    distance = (values.double().unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    return (weights.double() * distance.square()).sum(1)


def least(values, weights, count):
    """The loss of the best levels: every cut of the sorted values is tried. O(count K^2) a row."""
    values, order = values.double().sort(dim=1)
    weights = weights.double().gather(1, order)
    found = []
    for x, w in zip(values, weights, strict=True):
        k = len(x)
        cost = torch.full((k + 1, k + 1), torch.inf, dtype=torch.float64)
        for i in range(k + 1):
            cost[i, i] = 0.0
            mass, moment, square = (p[i:].cumsum(0) for p in (w, w * x, w * x * x))
            cost[i, i + 1 :] = (square - moment.square() / mass).clamp_min(0)
        best = cost[0]
        for _ in range(count - 1):
            best = (best.unsqueeze(1) + cost).amin(0)
        found.append(best[-1])
    return torch.stack(found)


def rows(seed, n=4, k=200):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator)
    return values, torch.exp(torch.randn(n, k, generator=generator))


SHAPES = {
    "gaussian": lambda v: v,
    "uniform": lambda v: torch.special.ndtr(v),
    "long tails": lambda v: v**5,
    "two heaps": lambda v: v + 8 * v.sign(),
    "an outlier": lambda v: torch.where(v == v.amax(1, keepdim=True), 1e4, v),
    "steps": lambda v: (3 * v).round(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, LEVELS])
def test_levels_lose_hardly_more_than_the_best_there_are(shape, count):
    values, weights = rows(0)
    values = SHAPES[shape](values)
    found = loss(values, weights, learned_levels(values, weights, count))
    best = least(values, weights, count)
    assert (found >= best * (1 - 1e-9)).all(), "the oracle is a lower bound"
    # Measured over 16 rows: 1.6 % at most; 19 % in one row with an outlier, which takes most bins.
    limit = 1.25 if shape == "an outlier" else 1.03
    assert (found <= best * limit + 1e-20).all(), (found / best).tolist()


@PROPERTY
@given(seed=st.integers(0, 2**31), count=st.integers(2, LEVELS))
def test_no_step_of_lloyd_raises_the_loss(seed, count):
    values, weights = rows(seed, k=60)
    start = values[:, :count].double().sort(dim=1).values
    losses = [loss(values, weights, lloyd(Sorted.of(values, weights), start, n)) for n in range(6)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before * (1 + 1e-12)).all()


@PROPERTY
@given(seed=st.integers(0, 2**31))
def test_levels_ascend_and_are_the_means_of_their_values(seed):
    values, weights = rows(seed)
    levels = learned_levels(values, weights, LEVELS)
    assert (levels.diff(dim=1) >= 0).all()
    moved = lloyd(Sorted.of(values, weights), levels, 1)
    assert (loss(values, weights, moved) >= 0.995 * loss(values, weights, levels)).all()


@PROPERTY
@given(
    values=st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=LEVELS, unique=True),
    repeats=st.integers(1, 5),
)
def test_no_more_distinct_values_than_levels_are_all_levels(values, repeats):
    row = torch.tensor(values * repeats).view(1, -1)
    levels = learned_levels(row, torch.ones_like(row), LEVELS)
    # A mean of equal values, taken from running sums in float64 of up to 80 values below 1.
    assert (loss(row, torch.ones_like(row), levels) <= 80 * (80 * 2.0**-52) ** 2).all()


def test_a_level_that_no_value_is_nearest_to_stays():
    values = torch.tensor([[0.0, 0.1, 1.0]])
    start = torch.tensor([[0.05, 0.5, 1.0, 7.0]], dtype=torch.float64)
    found = lloyd(Sorted.of(values, torch.ones(1, 3)), start, 3)
    torch.testing.assert_close(found, start, rtol=0, atol=1e-8)


def test_a_second_round_never_loses_more_than_the_first(monkeypatch):
    values, weights = rows(4, n=12)
    losses = []
    for rounds in (1, 2, 3):
        monkeypatch.setattr(kmeans, "ROUNDS", rounds)
        losses.append(loss(values**5, weights, learned_levels(values**5, weights, LEVELS)))
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all() and (
        losses[2] <= losses[1] * (1 + 1e-6)
    ).all()
    assert losses[1].sum() < losses[0].sum()


def test_values_without_weight_do_not_count():
    values, weights = rows(1)
    weights[:, ::2] = 0.0
    some = learned_levels(values[:, 1::2], weights[:, 1::2], LEVELS)
    best = loss(values[:, 1::2], weights[:, 1::2], some)
    assert (loss(values, weights, learned_levels(values, weights, LEVELS)) < 1.03 * best).all()


def test_the_best_cut_beats_quantiles_and_equal_steps_as_a_start():
    values, weights = rows(2, k=576)
    data = Sorted.of(values, weights)
    share = (torch.arange(LEVELS) + 0.5) / LEVELS
    low, high = data.values[:, :1], data.values[:, -1:]
    starts = (data.values[:, (share * 576).long()], low + (high - low) * share)
    whole = data.runs(low)
    cut = loss(values, weights, lloyd(data, best_cut(data, whole, LEVELS), 20))
    for start in starts:
        assert (cut < 0.98 * loss(values, weights, lloyd(data, start.contiguous(), 20))).all()


def test_rows_do_not_know_of_each_other():
    """Whichever rows share a chunk: a checkpoint that is quantized in parts has the same bytes."""
    values, weights = rows(3, n=70)
    whole = learned_levels(values, weights, LEVELS)
    assert torch.equal(learned_levels(values[40:43], weights[40:43], LEVELS), whole[40:43])


def test_errors_count_by_the_scale_of_their_group():
    """Levels are for the group of the larger scale where the other's hardly counts."""
    generator = torch.Generator().manual_seed(0)
    normalised = torch.rand(1, 2, 64, generator=generator) * 2 - 1
    normalised[0, 1] = normalised[0, 1].abs()  # the small group needs other levels
    scale = torch.tensor([[1.0, 1e-3]])
    levels = levels_for(normalised * scale.unsqueeze(-1), scale, get_format("any4"))
    alone = levels_for(normalised[:, :1], scale[:, :1], get_format("any4"))
    assert levels.dtype == torch.float16
    torch.testing.assert_close(levels, alone, rtol=0, atol=2e-3)
