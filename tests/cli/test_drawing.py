"""Histograms in unicode blocks."""

from __future__ import annotations

from zeropoint.cli.drawing import bars


def test_heights_are_proportional() -> None:
    assert bars([8, 4, 1, 0], width=4, height=1) == ["█▄▁"]


def test_what_is_not_zero_shows() -> None:
    assert bars([10**9, 1, 0, 1], width=4, height=1) == ["█▁ ▁"]


def test_many_bins_are_joined_and_few_repeated() -> None:
    assert bars([1] * 8, width=4, height=1) == ["████"]
    assert bars([1, 1, 2, 2], width=2, height=1) == ["▄█"]
    assert bars([2, 1], width=4, height=1) == ["██▄▄"]


def test_nothing_to_draw() -> None:
    assert bars([]) == []
    assert bars([0, 0]) == []
