"""Properties 29 to 32 of an allocation: within the budget, monotone, near the optimum, fair."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint.algorithms import allocate as module
from zeropoint.algorithms.allocate import Option, allocate, totals
from zeropoint.errors import RecipeError

options = st.builds(
    Option, bytes=st.integers(1, 40), loss=st.integers(0, 1000).map(lambda n: n / 16)
)  # sixteenths: sums are exact
items = st.lists(st.lists(options, min_size=1, max_size=3), min_size=1, max_size=6)


@pytest.fixture(params=["exact", "by price"])
def way(request, monkeypatch):
    """Both solvers."""
    monkeypatch.setattr(module, "EXACT_STATES", 4096 if request.param == "exact" else 0)
    return request.param


def least(items):
    return sum(min(o.bytes for o in options) for options in items)


def best(items, budget):
    """The least loss, by trying everything."""
    choices = product(*(range(len(options)) for options in items))
    found = [totals(items, choice) for choice in choices]
    return min(total.loss for total in found if total.bytes <= budget)


@settings(max_examples=30)
@given(items=items, more=st.integers(0, 100))
def test_a_few_items_are_solved_exactly(items, more):
    budget = least(items) + more
    total = totals(items, allocate(items, budget))
    assert total.bytes <= budget
    assert total.loss == best(items, budget)


@settings(max_examples=30)
@given(items=items, more=st.integers(0, 100))
def test_the_price_of_a_byte_is_within_one_item_of_the_optimum(items, more):
    budget = least(items) + more
    total = totals(items, module._by_price(items, budget))
    assert total.bytes <= budget
    dearest = max(max(o.loss for o in x) - min(o.loss for o in x) for x in items)
    assert best(items, budget) <= total.loss <= best(items, budget) + dearest


@given(items=items, more=st.lists(st.integers(0, 150), min_size=2, max_size=2))
def test_more_budget_never_loses_more(items, more):
    small, large = (least(items) + m for m in sorted(more))
    for solve in (allocate, module._by_price):
        at_small, at_large = (totals(items, solve(items, b)) for b in (small, large))
        assert at_large.loss <= at_small.loss


def test_equal_items_get_equal_options_up_to_one_step(way):
    """Loss as of rounding: a quarter with every bit."""
    item = [Option(bytes=bits * 8, loss=4.0**-bits) for bits in range(2, 9)]
    for budget in range(5 * 16, 5 * 64 + 8, 8):
        choice = allocate([item] * 5, budget)
        assert max(choice) - min(choice) <= 1
        assert totals([item] * 5, choice).bytes == min(budget, 5 * 64), "it is spent"


def test_bytes_go_where_they_save_most(way):
    steep = [Option(bytes=10, loss=9.0), Option(bytes=20, loss=1.0)]
    flat = [Option(bytes=10, loss=2.0), Option(bytes=20, loss=1.0)]
    assert allocate([flat, steep], 30) == (0, 1)
    assert allocate([flat, steep], 29) == (0, 0)
    assert allocate([flat, steep], 40) == (1, 1)


def test_an_option_that_another_one_beats_is_never_taken(way):
    item = [Option(bytes=20, loss=1.0), Option(bytes=10, loss=1.0), Option(bytes=30, loss=2.0)]
    assert allocate([item], 100) == (1,)


def test_what_is_left_is_filled(way):
    """The steepest edge does not fit, a flatter and shorter one does."""
    long = [Option(bytes=10, loss=100.0), Option(bytes=60, loss=0.0)]
    short = [Option(bytes=10, loss=2.0), Option(bytes=20, loss=1.0)]
    assert allocate([long, short], 30) == (0, 1)


def test_many_items_are_solved_at_once():
    """Too many partial choices for the exact solver: 200 items of sizes without a common step."""
    items = [
        [Option(bytes=(17 + 31 * i % 101) * b, loss=(1 + i % 7) * 4.0**-b) for b in range(2, 9)]
        for i in range(200)
    ]
    assert module._exact(items, 10**9) is None
    budget = 2 * least(items)
    total = totals(items, allocate(items, budget))
    assert 0.999 * budget < total.bytes <= budget


def test_a_budget_below_the_smallest_choice_is_refused():
    item = [Option(bytes=1500, loss=1.0), Option(bytes=3000, loss=0.0)]
    with pytest.raises(RecipeError, match="fits in 2,999 bytes: the smallest choice takes 3,000"):
        allocate([item, item], 2999)
    assert allocate([item, item], 3000) == (0, 0)
