"""Learned grids: the image is what is stored, the gradients are those of LSQ and LSQ+."""

import math

import pytest
import torch

from tests.helpers import GRIDS, INTEGERS
from zeropoint.numerics import Grid, get_format, quantize
from zeropoint.numerics.learned import grid_gradients, on_grid, stored_grid

every_grid = pytest.mark.parametrize(
    ("name", "options"),
    [(n, {"symmetric": symmetric}) for n, symmetric in GRIDS if not get_format(n).learns_levels]
    + [(f.name, {"symmetric": False, "float_zero_point": True}) for f in INTEGERS],
    ids=str,
)


def case(name, options):
    """Blocks (3, 2, 16) on a grid two thirds as wide as they are, so that some are clamped."""
    fmt = get_format(name)
    blocks = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    q = quantize(blocks.view(3, 32), name, group_size=16, **options)
    zero_point = None if q.zero_point is None else q.zero_point.float()
    scale = q.scale.float() * 0.66
    if fmt.signed_scale and zero_point is None:
        scale[:, 1] *= -1
    return blocks, scale, zero_point, fmt


def straight_through(rounded, x):
    return x + (rounded - x).detach()


def spelled_out(blocks, scale, zero_point, fmt, float_zero_point=False):
    """The image as the papers write it, for torch to differentiate. All float64."""
    steps = blocks / scale.unsqueeze(-1)
    if fmt.kind == "integer":
        zero = 0.0
        if zero_point is not None:
            stored = zero_point.half().double() if float_zero_point else zero_point.round()
            zero = straight_through(stored, zero_point).unsqueeze(-1)
        shifted = (steps + zero).clamp(fmt.q_min, fmt.q_max)
        # The code is clamped after rounding: what rounds to the last code is inside.
        codes = torch.round(steps + zero)
        inside = ((codes >= fmt.q_min) & (codes <= fmt.q_max)).detach()
        codes = torch.where(inside, straight_through(codes, steps + zero), shifted)
        return scale.unsqueeze(-1) * (codes - zero)
    unit = torch.ones_like(scale, dtype=torch.float32)
    levels = on_grid(steps.detach().float(), Grid(unit, None), fmt).double()
    below, above = fmt.reach
    inside = (steps >= -below) & (steps <= above)
    return scale.unsqueeze(-1) * torch.where(inside, straight_through(levels, steps), levels)


@every_grid
def test_gradients_are_those_of_the_papers(name, options):
    blocks, scale, zero_point, fmt = case(name, options)
    floats = options.get("float_zero_point", False)
    upstream = torch.randn(blocks.shape, generator=torch.Generator().manual_seed(1))
    grid = stored_grid(scale, zero_point, fmt, torch.float32, float_zero_point=floats)
    found = grid_gradients(upstream, blocks, grid, fmt)

    inputs = [t.double().requires_grad_() for t in (blocks, scale, zero_point) if t is not None]
    image = spelled_out(*inputs[:2], inputs[2] if zero_point is not None else None, fmt, floats)
    assert torch.allclose(image.float(), on_grid(blocks, grid, fmt), atol=1e-6)
    (image * upstream).sum().backward()
    share = 1 / math.sqrt(16 * fmt.real_max)
    expected = [inputs[0].grad, *(share * t.grad for t in inputs[1:])]
    assert (found[0] == 0).any() and not (found[0] == 0).all(), "some are clamped, some are not"
    for ours, theirs in zip([t for t in found if t is not None], expected, strict=True):
        # Sums of 16 terms, each rounded in float32 a few times.
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())


def test_the_scale_goes_down_where_a_wide_grid_rounds_and_up_where_a_narrow_one_clamps():
    weight = torch.randn(1, 1, 4096, generator=torch.Generator().manual_seed(0))
    fmt = get_format("int4")
    signs = []
    for scale in (2.0, 0.05):
        grid = stored_grid(torch.tensor([[scale]]), None, fmt, torch.float32)
        error = 2 * (on_grid(weight, grid, fmt) - weight)
        signs.append(grid_gradients(error, weight, grid, fmt)[1].sign().item())
    assert signs == [1.0, -1.0]


def test_a_grid_is_stored_in_the_dtype_of_the_scheme_and_in_codes():
    scale = torch.tensor([[0.1, -3.0, 1e9]])
    zero_point = torch.tensor([[1.6, -40.0, 40.0]])
    grid = stored_grid(scale, zero_point, get_format("int4"), torch.float16)
    assert grid.scale.tolist() == [[torch.tensor(0.1).half().item(), 2.0**-24, 65504.0]]
    assert grid.zero_point.tolist() == [[2, -8, 7]] and grid.zero_point.dtype == torch.int8
    far = torch.tensor([[1.6, -40.0, 1e9]])
    grid = stored_grid(scale, far, get_format("int4"), torch.float16, float_zero_point=True)
    assert grid.zero_point.dtype == torch.float16
    assert grid.zero_point.tolist() == [[torch.tensor(1.6).half().item(), -40.0, 2048.0]]
