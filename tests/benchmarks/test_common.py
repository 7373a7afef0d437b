"""The statistics of the benchmarks."""

import json

import pytest

from bench._common import append, parse_cpu_seconds, quantile, speedup, summary, take_turns

STAT = "cpu  100 50 30 700 20 0 10 90 5 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


def test_cpu_seconds_are_those_of_all_cores_without_idle_and_stolen_ones():
    seconds = parse_cpu_seconds(STAT, 100)
    assert (seconds.total, seconds.busy, seconds.stolen) == (10.0, pytest.approx(1.9), 0.9)


def test_quantiles_are_linear_between_samples():
    assert [quantile([3, 1, 2, 5, 4], share) for share in (0, 0.25, 0.5, 1)] == [1, 2, 3, 5]
    assert quantile([1, 2], 0.75) == 1.75
    assert quantile([7], 0.3) == 7


def test_summary_has_median_best_and_spread():
    assert summary([1, 2, 3, 4, 5]) == {
        "median": 3,
        "best": 1,
        "spread": pytest.approx(2 / 3),
        "samples": 5,
    }


def test_speedup_is_the_median_of_the_ratios_of_each_round():
    # the machine was 10 x slower in the second round: the ratio does not see it
    assert speedup([1, 10, 1], [3, 30, 2]) == 3
    with pytest.raises(ValueError, match="longer"):
        speedup([1], [1, 2])


def test_sides_take_turns():
    order = []
    turns = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert take_turns(turns, 2) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]


def test_figures_are_appended_one_json_line_each(tmp_path):
    path = tmp_path / "results" / "x.jsonl"
    append(path, [{"a": 1}], {"cpu": "c"})
    append(path, [{"a": 2}, {"a": 3}], {"cpu": "c"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"a": a, "cpu": "c"} for a in (1, 2, 3)]
