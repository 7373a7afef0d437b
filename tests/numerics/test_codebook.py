import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import CODEBOOKS, PROPERTY, TABLES, assert_nearest
from zeropoint.numerics import Grid, get_format, grid_codes, grid_values, quantize
from zeropoint.numerics.codebook import codebook_codes, codebook_values

codebooks = pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)
tables = pytest.mark.parametrize("fmt", TABLES, ids=lambda f: f.name)
UNIT = torch.ones(1, 1)


@tables
def test_every_level_is_its_own_code(fmt):
    levels = torch.tensor(fmt.levels).view(1, 1, -1)
    codes = codebook_codes(levels, UNIT, fmt)
    assert codes.dtype == torch.uint8
    assert torch.equal(codebook_values(codes, UNIT, fmt), levels)
    in_order = torch.arange(len(fmt.levels), dtype=torch.uint8).view(1, 1, -1)
    assert torch.equal(codebook_values(in_order, UNIT, fmt), levels)


@tables
@PROPERTY
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12))
def test_the_nearest_level_is_chosen(fmt, values):
    blocks = torch.tensor(values).view(1, 1, -1)
    image = codebook_values(codebook_codes(blocks, UNIT, fmt), UNIT, fmt)
    assert_nearest(blocks, image, Grid(UNIT), fmt)


@tables
@PROPERTY
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12))
def test_quantizing_the_image_with_the_stored_scale_gives_the_same_codes(fmt, values):
    blocks = torch.tensor(values).view(1, 1, -1)
    scale = (blocks.abs().amax(-1) + 1).half()
    codes = codebook_codes(blocks, scale, fmt)
    image = codebook_values(codes, scale, fmt)
    again = codebook_codes(image, scale, fmt)
    same_level = {code: fmt.levels.index(level) for code, level in enumerate(fmt.levels)}
    assert [same_level[c] for c in again.flatten().tolist()] == [
        same_level[c] for c in codes.flatten().tolist()
    ]


@tables
def test_zero_is_stored_as_the_code_of_plus_zero_or_of_the_least_level(fmt):
    codes = codebook_codes(torch.zeros(1, 1, 3), UNIT, fmt)
    assert codes.flatten().tolist() == [fmt.levels.index(min(fmt.levels, key=abs))] * 3
    assert not codebook_values(codes, UNIT, fmt).signbit().any()


@tables
def test_each_block_has_its_own_scale(fmt):
    scale = torch.tensor([[1.0, 4.0], [0.5, 2.0]], dtype=torch.float16)
    codes = torch.full((2, 2, 3), fmt.levels.index(max(fmt.levels)), dtype=torch.uint8)
    values = codebook_values(codes, scale, fmt)
    assert values.dtype == torch.float32
    expected = scale.float().unsqueeze(-1) * fmt.reach[1]
    assert torch.equal(values, expected.expand(2, 2, 3))


@codebooks
def test_codes_do_not_depend_on_the_default_dtype(fmt):
    values = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    expected = quantize(values, fmt.name)
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
    try:
        found = quantize(values, fmt.name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


def test_levels_of_a_row_are_for_all_its_blocks():
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(3, 16, generator=generator).half().sort(dim=1).values
    blocks = torch.randn(3, 2, 40, generator=generator)
    grid = Grid(torch.tensor([[0.5, 2.0]]).expand(3, 2), None, levels)
    fmt = get_format("any4")
    codes = grid_codes(blocks, grid, fmt)
    assert codes.dtype == torch.uint8 and codes.shape == blocks.shape
    assert_nearest(blocks, grid_values(codes, grid, fmt), grid, fmt)
    for row in range(3):
        alone = grid.rows(slice(row, row + 1))
        assert torch.equal(grid_codes(blocks[row : row + 1], alone, fmt), codes[row : row + 1])


def test_a_value_between_two_levels_of_a_row_has_the_lower_one():
    levels = torch.arange(16).view(1, 16).half()
    codes = grid_codes(
        torch.tensor([[[0.5, 0.75, 14.5, 99.0, -1.0]]]),
        Grid(UNIT, None, levels),
        get_format("any4"),
    )
    assert codes.flatten().tolist() == [0, 1, 14, 15, 0]
