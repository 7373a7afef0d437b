"""Balance of activations and weights, and weights that make up for the drift of their inputs."""

from __future__ import annotations

import torch

from zeropoint.algorithms.fold import LARGEST_FACTOR, balance, propagated
from zeropoint.algorithms.gptq import DAMPING, gptq
from zeropoint.algorithms.rtn import rtn
from zeropoint.algorithms.search import search_grid
from zeropoint.scheme import Scheme

from .cases import hessian, problem


def test_balanced_channels_are_left_alone():
    torch.testing.assert_close(balance(torch.full((8,), 3.0), torch.full((8,), 0.2)).max(),
                               torch.tensor(1.0, dtype=torch.float64))  # fmt: skip


def test_a_large_activation_gets_a_large_weight():
    """16 times the rms: a factor of 4 in relation to the others, of geometric mean 1."""
    activations = torch.tensor([256.0, 1, 1, 1])
    factors = balance(activations, torch.ones(4))
    torch.testing.assert_close(factors[0] / factors[1], torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(factors.log().sum(), torch.tensor(0.0, dtype=torch.float64))


def test_dead_channels_and_giants_stay_within_bounds():
    for activations in (torch.tensor([0.0, 1, 1e12]), torch.zeros(3)):
        factors = balance(activations, torch.tensor([1.0, 0.0, 1.0]))
        assert factors.isfinite().all()
        assert factors.min() >= 1 / LARGEST_FACTOR and factors.max() <= LARGEST_FACTOR


def drifted():
    weight, x = problem()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    y = x + 0.2 * x.std(0) * noise + 0.1 * x.roll(1, dims=1)
    return weight, x.double(), y.double()


def test_without_drift_or_share_nothing_is_propagated():
    weight, x, y = drifted()
    cross = (x - y).T @ y
    assert torch.equal(propagated(weight, hessian(x), torch.zeros(64, 64), 1.0), weight)
    assert torch.equal(propagated(weight, hessian(y), cross, 0.0), weight)


def test_weights_move_towards_the_least_squares_solution():
    """alpha = 1 but for damping: what the original layer gave is nearest to what it now gives."""
    weight, x, y = drifted()
    h, cross = y.T @ y, (x - y).T @ y

    def miss(share):
        moved = propagated(weight, h, cross, share).double()
        return float((x @ weight.double().T - y @ moved.T).square().sum())

    best = torch.linalg.lstsq(y, x @ weight.double().T).solution
    least = float((x @ weight.double().T - y @ best).square().sum())
    assert miss(0) > miss(0.5) > miss(1) > least
    assert miss(1) - least < 0.3 * (miss(0) - least), "the damping of 1 % keeps the rest"


def test_what_is_left_of_the_drift_is_orthogonal_to_the_inputs_but_for_damping():
    """W* (H + dI) = W (G + dI) with G = mean x y^T, so (W x - W* y) y^T = d (W* - W)."""
    weight, x, y = drifted()
    h, cross = y.T @ y, (x - y).T @ y
    moved = propagated(weight, h, cross, 1.0).double()
    left = (x @ weight.double().T - y @ moved.T).T @ y
    damping = 0.01 * h.diagonal().mean()
    # moved was rounded to float32
    torch.testing.assert_close(left, damping * (moved - weight), rtol=1e-3, atol=1e-3)


def test_propagating_everything_and_gptq_is_qronos_but_for_its_first_column():
    """The recursion of arXiv:2505.11695 in float64: column 0 is rounded from what is best while the
    others are W, the rest becomes what is best for that, and then GPTQ. It rounds W* = W G H^-1 by
    GPTQ where column 0 is correlated with no other, which is when its rule makes no difference.
    """
    weight, x, y = drifted()
    h, cross = y.T @ y, (x - y).T @ y
    for matrix in (h, cross):
        matrix[0, 1:] = matrix[1:, 0] = 0.0
    scheme = Scheme.of("int3", group_size=16)
    target = propagated(weight, h, cross, 1.0)
    found = gptq(target, h, scheme, order=False, sweeps=0)
    assert found.algorithm == "gptq"

    damped = h + DAMPING[0] * h.diagonal().mean() * torch.eye(64)
    both = damped + cross  # X X^^T, and the same damping
    grid = search_grid(target, scheme, h.diagonal(), start=rtn(target, scheme))
    scale = grid.scale.double().repeat_interleave(16, 1)
    zero = grid.zero_point.double().repeat_interleave(16, 1)
    w = weight.double()
    codes = torch.empty_like(w)

    def error(k, value):
        """Round column k and return what its value loses."""
        codes[:, k] = (value / scale[:, k]).round().add(zero[:, k]).clamp(-4, 3)
        return value - scale[:, k] * (codes[:, k] - zero[:, k])

    first = (w @ both[:, 0] - w[:, 1:] @ damped[1:, 0]) / damped[0, 0]
    q = first - error(0, first)
    inverse = torch.linalg.inv(damped[1:, 1:])
    rest = (w @ both[:, 1:] - q[:, None] * damped[0, 1:]) @ inverse
    r = torch.linalg.cholesky(inverse, upper=True)
    for k in range(63):
        rest[:, k:] -= (error(k + 1, rest[:, k].clone()) / r[k, k])[:, None] * r[k, k:]
    # What lies within float32's rounding of a midpoint may go either way.
    assert (found.weight.codes != codes).double().mean() < 2e-3


def test_a_hessian_or_drift_that_is_unusable_leaves_the_weight():
    weight, x, y = drifted()
    cross = (x - y).T @ y
    assert propagated(weight, -hessian(y), cross, 1.0) is weight
    assert propagated(weight, hessian(y), cross * float("nan"), 1.0) is weight
