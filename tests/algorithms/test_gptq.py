"""GPTQ: the identities of the mathematics, and inputs that break it elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY
from zeropoint.algorithms import gptq as module
from zeropoint.algorithms.choice import output_error
from zeropoint.algorithms.gptq import DAMPING, gptq, ldl
from zeropoint.algorithms.rtn import rtn
from zeropoint.algorithms.search import search, search_grid
from zeropoint.errors import GroupSizeError, NonFiniteError
from zeropoint.numerics import Grid
from zeropoint.scheme import Scheme

from .cases import CALIBRATED, hessian, problem

INT3 = Scheme.of("int3", group_size=16)


def codes(weight, h, scheme=INT3, **options):
    return gptq(weight, h, scheme, **options).weight.codes


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", CALIBRATED, ids=str)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_uncorrelated_inputs_leave_nothing_to_feed_forward(scheme, sweeps):
    """Diagonal H: GPTQ is rounding on the grid of least weighted error."""
    weight, x = problem()
    importance = x.double().square().mean(0)
    found = gptq(weight, torch.diag(importance), scheme, sweeps=sweeps)
    expected = search(weight, scheme, importance)
    if sweeps == 0:
        assert torch.equal(found.weight.dequantize(), expected.dequantize())  # fp4 has two zeros
    assert found.hessian_gain == pytest.approx(1 / (1 + DAMPING[0]))


@pytest.mark.parametrize("order", [False, True])
def test_it_is_textbook_gptq(order):
    """The recursion of arXiv:2210.17323 (inverse, upper Cholesky, running weights), in float64."""
    weight, x = problem(k=48)
    h = hessian(x)
    found = gptq(weight, h, INT3, order=order, sweeps=0).weight
    perm = torch.argsort(h.diagonal(), descending=True, stable=True) if order else torch.arange(48)
    damped = h + DAMPING[0] * h.diagonal().mean() * torch.eye(48)
    r = torch.linalg.cholesky(torch.linalg.inv(damped[perm][:, perm]), upper=True)
    grid = search_grid(weight, INT3, h.diagonal(), start=rtn(weight, INT3))
    scale = grid.scale.double().repeat_interleave(16, 1)[:, perm]
    zero = grid.zero_point.double().repeat_interleave(16, 1)[:, perm]
    w = weight.double()[:, perm]
    q = torch.empty_like(w)
    for i in range(48):
        q[:, i] = (w[:, i] / scale[:, i]).round().add(zero[:, i]).clamp(-4, 3)
        error = (w[:, i] - scale[:, i] * (q[:, i] - zero[:, i])) / r[i, i]
        w[:, i:] -= error[:, None] * r[i, i:]
    expected = torch.empty_like(q)
    expected[:, perm] = q
    assert torch.equal(found.codes.double(), expected)


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_the_block_size_changes_nothing(block, sweeps, monkeypatch):
    """Catches grids and errors that are stale inside a block."""
    weight, x = problem()
    expected = codes(weight, hessian(x), sweeps=sweeps)
    monkeypatch.setattr(module, "BLOCK", block)
    found = codes(weight, hessian(x), sweeps=sweeps)
    # float32 sums in another order flip what lies within 1e-6 of a midpoint
    assert (found != expected).double().mean() < 2e-3


def test_without_a_bound_the_loss_is_what_theory_says():
    """step^2 / 12 * tr(D) per row, and tr(H) for plain rounding (3 %: 4000 rows)."""
    _, x = problem(k=48)
    h = hessian(x) / len(x)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4000, 48, generator=generator) * 15  # in steps: the grid ends at 127
    factors = ldl(h, (1e-6,))
    grid = Grid(torch.ones(4000, 1), None)
    order = torch.arange(48)
    found = module.feedback(weight, grid, Scheme.of("int8"), factors, order)
    assert found.abs().max() < 127
    error = weight.double() - found
    loss = ((error @ h) * error).sum(1).mean()
    assert loss == pytest.approx(float(factors.pivots.sum() / 12), rel=0.03)
    error = weight.double() - weight.double().round()
    rounding = ((error @ h) * error).sum(1).mean()
    assert rounding == pytest.approx(float(h.diagonal().sum() / 12), rel=0.03)


def test_factors_multiply_back_to_the_hessian():
    _, x = problem(k=32)
    h = hessian(x)
    factors = ldl(h)
    unit = factors.upper + torch.eye(32, dtype=torch.float64)
    damped = h + DAMPING[0] * h.diagonal().mean() * torch.eye(32)
    product = unit.double() @ torch.diag(factors.pivots) @ unit.double().T
    torch.testing.assert_close(product, damped, rtol=1e-5, atol=1e-6 * float(damped.max()))
    assert torch.equal(factors.upper, factors.upper.triu(1))
    # arithmetic mean of the pivots >= geometric mean = det(H)^(1/n)
    assert factors.pivots.mean() >= factors.pivots.log().mean().exp()


@PROPERTY
@given(seed=st.integers(0, 2**31), scheme=st.sampled_from(CALIBRATED))
def test_it_never_loses_more_of_the_output_than_rounding(seed, scheme):
    weight, x = problem(n=6, k=32, tokens=80, seed=seed)
    found = gptq(weight, hessian(x), scheme)
    rounded = output_error(weight, rtn(weight, scheme).dequantize(), hessian(x))
    assert found.output_error <= rounded
    error = (weight - found.weight.dequantize()).double() @ x.double().T
    exact = error.square().sum() / (weight.double() @ x.double().T).square().sum()
    assert found.output_error == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize("scheme", CALIBRATED, ids=str)
def test_it_beats_rounding_clearly_where_inputs_are_correlated(scheme):
    weight, x = problem(n=48)
    found = gptq(weight, hessian(x), scheme)
    rounded = output_error(weight, rtn(weight, scheme).dequantize(), hessian(x))
    assert found.algorithm == "gptq" and found.reason is None
    assert found.output_error < 0.7 * rounded
    assert found.hessian_gain > 1.5


@pytest.mark.parametrize("scheme", CALIBRATED, ids=str)
def test_sweeps_do_not_raise_the_damped_loss(scheme):
    weight, x = problem()
    h = hessian(x)
    damped = h + DAMPING[0] * h.diagonal().mean() * torch.eye(len(h))
    losses = [
        output_error(weight, gptq(weight, h, scheme, sweeps=n).weight.dequantize(), damped)
        for n in (0, 1, 2, 4)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:], strict=False))
    assert losses[2] < losses[0]


def test_levels_are_refitted_to_their_codes_and_stay_in_order():
    weight, x = problem(n=48)
    h = hessian(x).float() / len(x)
    scheme = Scheme.of("any4", group_size=16)
    grid = search_grid(weight, scheme, start=rtn(weight, scheme))  # not for these inputs
    codes = module._codes(weight, grid, scheme)
    before = module._values(codes, grid, scheme)
    codes, grid = module._refit_levels(weight @ h, codes, grid, scheme, h)
    after = module._values(codes, grid, scheme)
    assert grid.levels.dtype == torch.float16 and (grid.levels.diff(dim=1) >= 0).all()
    for row in range(48):  # of each row
        losses = [output_error(weight[row : row + 1], q[row : row + 1], h) for q in (before, after)]
        assert losses[1] <= losses[0] * (1 + 1e-5)
    assert output_error(weight, after, h) < 0.95 * output_error(weight, before, h)


def test_one_table_for_a_whole_weight_stays():
    weight, x = problem()
    scheme = Scheme(format="any4", granularity="tensor")
    grid = rtn(weight, scheme).grid
    codes = module._codes(weight, grid, scheme)
    h = hessian(x).float()
    same, kept = module._refit_levels(weight @ h, codes, grid, scheme, h)
    assert same is codes and kept is grid
    assert gptq(weight, hessian(x), scheme).algorithm == "gptq"


# --- codes for eight columns ---

VECTORS = Scheme.of("e8p", group_size=16)


def test_the_factor_of_blocks_is_that_of_columns_with_the_blocks_taken_out():
    """(I + U) = (I + V) B, so tr(E H E^T) is a sum over blocks of |(e_k + sum e_i V_ik) B_k|^2."""
    _, x = problem()
    upper = ldl(hessian(x)).upper.double()
    between = module._between(upper, 8)
    inside = module._diagonal_blocks(upper, 8) + torch.eye(8)
    outside = torch.eye(64).double() + between
    for k in range(0, 64, 8):  # what the blocks on the diagonal hold is not read
        outside[k : k + 8, k : k + 8] = torch.eye(8)
    product = outside @ torch.block_diag(*inside)
    torch.testing.assert_close(product, torch.eye(64) + upper, rtol=0, atol=1e-10)
    assert module._between(upper, 1) is upper


def test_inputs_correlated_within_eight_columns_leave_nothing_to_feed_forward():
    """BlockLDLQ rounds a block in the plain norm, whatever happens inside it."""
    weight, x = problem()
    whole = hessian(x) / len(x)
    h = torch.block_diag(*(whole[k : k + 8, k : k + 8] for k in range(0, 64, 8)))
    found = gptq(weight, h, VECTORS, sweeps=0)
    assert torch.equal(found.weight.codes, search(weight, VECTORS, h.diagonal()).codes)
    assert found.output_error > gptq(weight, h, VECTORS).output_error, "the sweeps know better"


def test_columns_go_in_order_of_their_inputs_eight_together():
    h = torch.diag(torch.tensor([1.0] * 8 + [9.0] + [0.0] * 7 + [3.0] * 8))
    order = module._order(h, True, 8)
    assert order.tolist() == [*range(16, 24), *range(8, 16), *range(8)]
    assert module._order(h, True, 1)[0] == 8


# --- symmetries -----------------------------------------------------------------------------------


def test_a_hessian_of_another_scale_changes_nothing():
    weight, x = problem()
    assert torch.equal(codes(weight, hessian(x)), codes(weight, hessian(x) * 2.0**-9))


def test_inputs_in_another_order_give_the_same_columns():
    weight, x = problem()
    scheme = Scheme.of("int4", group_size=-1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    found = codes(weight[:, order], hessian(x[:, order]), scheme)
    assert (found != codes(weight, hessian(x), scheme)[:, order]).double().mean() < 2e-3


def test_rows_do_not_know_of_each_other():
    weight, x = problem(n=24)
    whole, some = codes(weight, hessian(x)), codes(weight[5:9], hessian(x))
    assert (whole[5:9] != some).double().mean() < 4e-3  # float32 sums depend on the shape


def test_the_same_call_gives_the_same_bits():
    weight, x = problem()
    one, two = gptq(weight, hessian(x), INT3), gptq(weight, hessian(x), INT3)
    assert one.output_error == two.output_error
    for suffix, part in one.weight.parts.items():
        assert torch.equal(part, two.weight.parts[suffix])


def test_arguments_are_left_as_they_are():
    weight, x = problem()
    h = hessian(x)
    before = weight.clone(), h.clone()
    gptq(weight, h, INT3)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])


# --- what breaks it elsewhere ---------------------------------------------------------------------


def test_fewer_tokens_than_columns_are_damped():
    weight, x = problem(tokens=5)
    found = gptq(weight, hessian(x), INT3)
    assert found.algorithm == "gptq" and found.damping == DAMPING[0]
    rounded = output_error(weight, rtn(weight, INT3).dequantize(), hessian(x))
    assert found.output_error < rounded / 4


def test_dead_and_duplicate_channels_keep_their_weights():
    weight, x = problem()
    x[:, 3] = 0.0
    x[:, 9] = x[:, 10]
    found = gptq(weight, hessian(x), INT3)
    assert found.algorithm == "gptq"
    dead = found.weight.dequantize()[:, 3]
    step = found.weight.scale.float().repeat_interleave(16, 1)[:, 3]
    low, high = -4 - 3, 3 + 4
    inside = (weight[:, 3] > low * step) & (weight[:, 3] < high * step)
    assert inside.any() and not (dead == 0).all(), "a dead channel is rounded, not deleted"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_means_a_searched_grid(value):
    weight, x = problem()
    h = hessian(x)
    h[3, 4] = value
    found = gptq(weight, h, INT3)
    assert found.algorithm == "mse"
    assert found.reason == "the Hessian has NaN or Inf: an activation is not finite"
    assert torch.equal(found.weight.codes, search(weight, INT3).codes)


def test_inputs_that_are_all_zero_mean_a_searched_grid():
    weight, _ = problem()
    found = gptq(weight, torch.zeros(64, 64), INT3)
    assert found.algorithm == "mse"
    assert found.reason == "the Hessian is zero: every calibration input is zero"


def test_a_hessian_of_negative_eigenvalues_climbs_the_ladder():
    weight, x = problem()
    values, vectors = torch.linalg.eigh(hessian(x))
    mean = values.mean()

    def dented(depth):
        """The Hessian with its least eigenvalue at -depth * mean(diag H)."""
        changed = torch.cat([-depth * mean[None], values[1:]])
        return vectors @ torch.diag(changed) @ vectors.T

    found = gptq(weight, dented(0.02), INT3)
    assert found.damping == 0.03
    assert found.reason == "damping raised to 0.03 * mean(diag H)"
    assert ldl(dented(2.0)) is None
    hopeless = gptq(weight, dented(2.0), INT3)
    assert hopeless.damping is None and hopeless.algorithm in ("mse", "rtn")
    if hopeless.algorithm == "mse":
        assert hopeless.reason == (
            "the Hessian is not positive definite, even with damping of 1 * mean(diag H)"
        )


def test_a_downcast_has_nothing_to_choose():
    weight, x = problem()
    found = gptq(weight, hessian(x), Scheme.of("bfloat16"))
    assert found.algorithm == "rtn"
    assert found.reason == "bfloat16 has no grid to choose: every value has one nearest code"


def test_a_bfloat16_weight_is_quantized_as_its_values():
    weight, x = problem()
    narrow = gptq(weight.bfloat16(), hessian(x), INT3).weight
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.codes, codes(weight.bfloat16().float(), hessian(x)))


def test_what_rounding_refuses_is_refused():
    weight, x = problem()
    with pytest.raises(GroupSizeError, match="K=64 is not a multiple of group_size=48"):
        gptq(weight, hessian(x), Scheme.of("int4", group_size=48))
    weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="1 NaN and 0 Inf"):
        gptq(weight, hessian(x), INT3)


# --- how far from the limit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "symmetric", "gap"), [("int4", False, 4.58), ("int3", False, 4.36)]
)
def test_on_gaussian_weights_and_white_inputs_the_gap_is_that_of_the_format(
    weights, symmetric, gap
):
    """gap: of a searched grid on N(0, 1) to D(R), groups of 128, zero points of 4 and 3 bits. Here
    they take 8, which is up to 5 / 128 bits or 0.24 dB more; the damping is worth 0.04 dB.
    """
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    scheme = Scheme.of(weights, group_size=128, symmetric=symmetric)
    found = gptq(weight, torch.eye(512).double(), scheme)
    assert found.hessian_gain == pytest.approx(1 / 1.01)  # of the damping
    assert found.limit_gain == pytest.approx(1 / 1.01)
    assert found.gap_db == pytest.approx(gap + 0.2, abs=0.2)


def test_correlated_inputs_leave_more_to_win_than_feedback_takes():
    torch.manual_seed(0)
    x = torch.randn(2048, 64) @ torch.randn(64, 64)
    weight = torch.randn(96, 64)
    found = gptq(weight, (x.T @ x).double(), Scheme.of("int4", group_size=64))
    rounded = output_error(
        weight, rtn(weight, Scheme.of("int4", group_size=64)).dequantize(), x.T @ x
    )
    assert 1 < found.hessian_gain < found.limit_gain
    assert 0 < found.gap_db < 10 * math.log10(found.limit_gain) + 7  # 7 dB: int4 by plain rounding
    assert found.output_error < rounded
