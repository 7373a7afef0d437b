"""Bytes where they save most: one option for every item, within a budget.

    minimise  sum_i loss_i(choice_i)   where   sum_i bytes_i(choice_i) <= budget

A multiple-choice knapsack. It is solved exactly while the partial choices that no other one beats
are few. Otherwise by a Lagrange multiplier: at a price of lambda for a byte every item takes, by
itself, the option of least loss + lambda * bytes, a corner of the lower convex hull of its options.
Lowering lambda takes the edges of all hulls in the order of loss saved per byte; an edge too
long for what is left of the budget ends its hull, and shorter ones of others fill the rest.

Either way more budget never loses more. For the second: two budgets choose alike up to the first
edge that only the larger one can afford, and that edge saves more than the smaller budget can with
what it has left, since the later edges save less per byte. By the same reason the loss is above the
least by less than one edge saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeropoint.errors import RecipeError

EXACT_STATES = 4096  # partial choices kept


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store an item. loss: what that is predicted to cost, in any additive unit."""

    bytes: int
    loss: float


Items = Sequence[Sequence[Option]]
Choice = tuple[int, ...]
"""For every item the index of its option."""


def allocate(items: Items, budget: int) -> Choice:
    """The choice of least loss within the budget, in bytes; more budget never loses more.

    Every item has at least one option. Raises RecipeError when the smallest choice is too large.
    """
    least = sum(min(option.bytes for option in options) for options in items)
    if least > budget:
        raise RecipeError(
            f"nothing fits in {budget:,} bytes: the smallest choice takes {least:,} bytes "
            f"({least / 1e6:,.1f} MB); allow that much, or add a smaller format"
        )
    exact = _exact(items, budget)
    return _by_price(items, budget) if exact is None else exact


def totals(items: Items, choice: Choice) -> Option:
    """Bytes and loss of a choice."""
    taken = [options[i] for options, i in zip(items, choice, strict=True)]
    return Option(bytes=sum(o.bytes for o in taken), loss=sum(o.loss for o in taken))


def _exact(items: Items, budget: int) -> Choice | None:
    """By dynamic programming; None where it takes too many states, at whatever budget."""
    states: list[tuple[int, float, Choice]] = [(0, 0.0, ())]
    for options in items:
        grown = sorted(
            (size + option.bytes, loss + option.loss, (*choice, i))
            for size, loss, choice in states
            for i, option in enumerate(options)
        )
        states = []
        for state in grown:
            if not states or state[1] < states[-1][1]:
                states.append(state)
        if len(states) > EXACT_STATES:
            return None
    return next(choice for size, _, choice in reversed(states) if size <= budget)


def _by_price(items: Items, budget: int) -> Choice:
    hulls = [_hull(options) for options in items]
    edges = sorted(
        (-_saved_per_byte(items[i][a], items[i][b]), i, position)
        for i, hull in enumerate(hulls)
        for position, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    )
    at = [0] * len(items)
    left = budget - totals(items, tuple(hull[0] for hull in hulls)).bytes
    for _, i, position in edges:
        if at[i] != position:
            continue  # the edge before it was too long
        length = items[i][hulls[i][position + 1]].bytes - items[i][hulls[i][position]].bytes
        if length <= left:
            at[i] += 1
            left -= length
    return tuple(hull[position] for hull, position in zip(hulls, at, strict=True))


def _hull(options: Sequence[Option]) -> list[int]:
    """Corners of the lower convex hull, smallest first: every edge saves less per byte than the
    one before it.
    """
    corners: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].loss)):
        if corners and options[i].loss >= options[corners[-1]].loss:
            continue
        while len(corners) > 1 and _saved_per_byte(
            options[corners[-2]], options[corners[-1]]
        ) <= _saved_per_byte(options[corners[-2]], options[i]):
            corners.pop()
        corners.append(i)
    return corners


def _saved_per_byte(a: Option, b: Option) -> float:
    return (a.loss - b.loss) / (b.bytes - a.bytes)
