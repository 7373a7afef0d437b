import pytest
import torch

from zeropoint.errors import GroupSizeError, RecipeError
from zeropoint.numerics import rows_and_columns, scale_shape
from zeropoint.numerics.granularity import GRANULARITIES, blocked


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((3, 5), (3, 5)),
        ((3, 5, 2), (3, 10)),
        ((8, 4, 3, 3), (8, 36)),
        ((0, 5), (0, 5)),
    ],
)
def test_axis_0_is_the_rows_and_the_rest_the_columns(shape, expected):
    assert rows_and_columns(shape) == expected


@pytest.mark.parametrize(
    ("granularity", "group_size", "expected"),
    [
        ("tensor", None, (1, 1)),
        ("channel", None, (6, 1)),
        ("group", 4, (6, 3)),
        ("group", 12, (6, 1)),
    ],
)
def test_scale_shape_counts_rows_and_groups(granularity, group_size, expected):
    assert scale_shape((6, 12), granularity, group_size) == expected
    assert scale_shape((6, 3, 4), granularity, group_size) == expected


def test_blocks_hold_consecutive_columns_of_one_row():
    values = torch.arange(24.0).view(2, 3, 4)
    assert blocked(values, "tensor", None).tolist() == [[list(range(24))]]
    assert blocked(values, "channel", None).tolist() == [[list(range(12))], [list(range(12, 24))]]
    groups = blocked(values, "group", 6)
    assert groups.shape == (2, 2, 6)
    assert groups[1, 0].tolist() == [12, 13, 14, 15, 16, 17]


def test_blocks_follow_the_columns_of_a_transposed_view():
    values = torch.arange(12.0).view(4, 3).t()
    assert blocked(values, "group", 2)[0].tolist() == [[0, 3], [6, 9]]


@pytest.mark.parametrize("group_size", [None, 0, -1])
def test_per_group_needs_a_positive_group_size(group_size):
    with pytest.raises(GroupSizeError, match=rf"group_size={group_size} is not a positive number"):
        scale_shape((2, 8), "group", group_size)


def test_a_group_size_that_does_not_divide_names_both_numbers_and_the_largest_that_does():
    with pytest.raises(
        GroupSizeError,
        match=r"K=4095 is not a multiple of group_size=128; use group_size=117, group_size=-1 ",
    ):
        scale_shape((2, 4095), "group", 128)


def test_without_a_smaller_divisor_only_per_channel_is_offered():
    with pytest.raises(GroupSizeError, match=r"K=37 .* group_size=32; use group_size=-1 \(per"):
        scale_shape((2, 37), "group", 32)


def test_an_unknown_granularity_names_the_known_ones():
    with pytest.raises(
        RecipeError, match=f"granularity='row' is not one of {', '.join(GRANULARITIES)}"
    ):
        blocked(torch.ones(2, 2), "row", None)
