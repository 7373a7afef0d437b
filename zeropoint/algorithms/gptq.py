"""GPTQ (arXiv:2210.17323) in its LDLQ form (arXiv:2307.13304): rounding errors are fed forward.

minimise over codes:  tr(E H E^T),  E = W - Q,  H = sum of x x^T over the calibration inputs

H = (I + U) D (I + U)^T with U strictly upper. Column k is rounded from its *target*
w_k + sum_{i<k} e_i U_ik, so that the loss is sum_k D_k |target_k - q_k|^2. With an unbounded grid
of step s it is expected to be s^2 / 12 tr(D), that of plain rounding s^2 / 12 tr(H).

Columns go in order of falling H_kk (static act-order): grids are fixed before, from the original
weights, so nothing has to be permuted at inference. Sweeps of coordinate descent follow, which can
only lower the loss: every column is rounded again with all the others where they are, and scales
are refitted to the codes by least squares in the same norm, as are levels that are learned.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zeropoint.algorithms.choice import Choice, Moments, energy, error_limit, measured
from zeropoint.algorithms.rtn import rtn
from zeropoint.algorithms.search import search, search_grid
from zeropoint.numerics import (
    Format,
    Grid,
    Quantized,
    check_image,
    get_scale_dtype,
    grid_codes,
    grid_values,
)
from zeropoint.numerics.affine import SCALE_FLOOR
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

BLOCK = 128  # columns between two matrix products; the result does not depend on it
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of mean(diag H), tried in this order
REFIT_ELEMENTS = 1 << 18  # of the largest temporary of a refit: a megabyte stays in the cache
ROW_ELEMENTS = 1 << 23  # of a large weight that are worked on at a time; some ten such tensors are
SWEEPS = 2  # of coordinate descent, each followed by a refit of the scales


class Pivots(NamedTuple):
    """H + damping * mean(diag H) * I = (I + upper) diag(pivots) (I + upper)^T.

    upper: (K, K) float32, strictly upper. pivots: (K,) float64 > 0.
    """

    upper: Tensor
    pivots: Tensor
    damping: float


def ldl(
    hessian: Tensor, damping: tuple[float, ...] = DAMPING, *, order: Tensor | None = None
) -> Pivots | None:
    """Factor H with the least damping of the ladder that works. hessian: (K, K) float, symmetric.

    order: (K,) int, of its columns; None for as they are. One Cholesky in float64, of the matrix
    reversed in both axes. None when no step of the ladder makes H positive definite, or H is not
    finite.
    """
    if not torch.isfinite(torch.stack(hessian.aminmax())).all():
        return None
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return None
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    for share in damping:
        # By columns, as LAPACK has it, so that it works in place: 537 MB of 8192 columns.
        lower = _permuted(hessian, order.flip(0)).to(torch.float64).mT
        lower.diagonal().add_(share * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        diagonal = lower.diagonal().clone()
        # A pivot below this is rounding error of the factorization, not information.
        floor = mean * torch.finfo(lower.dtype).eps * len(hessian)
        if int(info) == 0 and bool((diagonal.square() > floor).all()):
            upper = lower.div_(diagonal).float()
            del lower
            return Pivots(upper.flip(0, 1).triu_(1), diagonal.square().flip(0), share)
    return None


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, order: bool = True, sweeps: int = SWEEPS
) -> Choice:
    """The codes of least output error that feedback, rounding or a searched grid finds.

    weight: (N, K) float; hessian: (K, K) float, sum or mean of x x^T over calibration inputs, any
    scale. order: columns of large H_kk first. Codes of rounding to nearest are kept where they
    lose less, and a Hessian that cannot be factored means a searched grid; the Choice says so.
    Raises NonFiniteError, GroupSizeError, ScaleRangeError.
    """
    start = rtn(weight, scheme)
    if scheme.fmt.kind == "downcast":
        reason = f"{scheme.format} has no grid to choose: every value has one nearest code"
        return Choice(weight=start, algorithm="rtn", reason=reason)
    problem = _problem(hessian)
    if problem is not None:
        return Choice(weight=search(weight, scheme), algorithm="mse", reason=problem)
    permutation = _order(hessian, order, scheme.fmt.width)
    factors = ldl(hessian.detach(), order=permutation)
    h = hessian.detach().float()
    h = (h + h.T).div_(2)
    whole = energy(weight, h)
    rounded = measured(Choice(weight=start, algorithm="rtn"), weight, h, whole)
    grid = search_grid(weight, scheme, h.diagonal(), start=start)
    if factors is None:
        searched = Choice(
            weight=_stored(_codes(weight, grid, scheme), grid, weight, scheme),
            algorithm="mse",
            reason="the Hessian is not positive definite, even with damping of "
            f"{DAMPING[-1]:g} * mean(diag H)",
        )
        return _least(measured(searched, weight, h, whole), rounded)
    rows = _some_rows(weight, grid)
    fed = [feedback(w, g, scheme, factors, permutation) for w, g in rows]
    pivots, damping = factors.pivots, factors.damping
    del factors  # half a gigabyte where K is 8192, as every copy of H is
    diagonal = h.diagonal().clone()
    h.diagonal().add_(damping * diagonal.mean())
    swept = [
        _sweep(w, q, g, scheme, h, permutation, sweeps) for (w, g), q in zip(rows, fed, strict=True)
    ]
    h.diagonal().copy_(diagonal)
    codes, grid = torch.cat([q for q, _ in swept]), Grid.joined([g for _, g in swept])
    found = Choice(weight=_stored(codes, grid, weight, scheme), algorithm="gptq")
    found = _least(measured(found, weight, h, whole), rounded)
    limit = error_limit(found.weight, weight, pivots, whole)
    assert found.output_error is not None
    found = replace(
        found,
        hessian_gain=float(diagonal.sum() / pivots.sum()),
        limit_gain=float(diagonal.mean() / pivots.log().mean().exp()),
        gap_db=10 * math.log10(found.output_error / limit) if found.output_error > 0 else None,
        damping=damping,
    )
    if damping > DAMPING[0] and found.reason is None:
        return replace(found, reason=f"damping raised to {damping:g} * mean(diag H)")
    return found


def _some_rows(weight: Tensor, grid: Grid) -> list[tuple[Tensor, Grid]]:
    """Rows of a large weight, and their grids, some at a time: they do not know of each other."""
    n, k = weight.shape
    if len(grid.scale) != n:
        return [(weight, grid)]
    rows = torch.arange(n, device=weight.device).split(max(1, ROW_ELEMENTS // k))
    return [(weight[r], grid.rows(r)) for r in rows]


def _sweep(
    weight: Tensor,
    codes: Tensor,
    grid: Grid,
    scheme: Scheme,
    h: Tensor,
    permutation: Tensor,
    sweeps: int,
) -> tuple[Tensor, Grid]:
    """Better codes and grids in turn. h: damped. Returns codes (N, K) and the grid."""
    wh = weight.detach().float() @ h
    for _ in range(sweeps):
        grid = _refit(wh, codes, grid, scheme, h)
        if grid.levels is not None:
            codes, grid = _refit_levels(wh, codes, grid, scheme, h)
        codes = descend(weight, codes, grid, scheme, h, permutation)
    return codes, grid


def choose(weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
    """`gptq` as a row of the table; without a Hessian, a searched grid."""
    if moments is None:
        return Choice(
            weight=search(weight, scheme), algorithm="mse", reason="no calibration data reached it"
        )
    return gptq(weight, moments.seen, scheme)


def _problem(h: Tensor) -> str | None:
    if not torch.isfinite(torch.stack(h.aminmax())).all():
        return "the Hessian has NaN or Inf: an activation is not finite"
    if not bool((h.diagonal() > 0).any()):
        return "the Hessian is zero: every calibration input is zero"
    return None


def _least(found: Choice, rounded: Choice) -> Choice:
    assert found.output_error is not None and rounded.output_error is not None
    if found.output_error <= rounded.output_error:
        return found
    return replace(
        rounded,
        reason=f"{found.algorithm} loses {found.output_error:.3g} of the output on its calibration "
        f"inputs, rounding to nearest {rounded.output_error:.3g}",
    )


def _order(h: Tensor, by_diagonal: bool, width: int) -> Tensor:
    """Of the columns, `width` of them staying together. (K,) int."""
    columns = torch.arange(len(h), device=h.device)
    if not by_diagonal:
        return columns
    sums = h.diagonal().reshape(-1, width).sum(1)
    return columns.view(-1, width)[sums.argsort(descending=True, stable=True)].flatten()


def _permuted(h: Tensor, permutation: Tensor) -> Tensor:
    return h[permutation.unsqueeze(1), permutation]


class _Columns(NamedTuple):
    """A grid spread over the columns: for each of K columns a contiguous (N,).

    Integer formats count in levels l = code - zero_point, between low and high: value = scale * l.
    zero: a zero point with a fraction; levels are whole numbers less it. rows: (N, L), levels that
    are learned.
    """

    scale: tuple[Tensor, ...]
    low: tuple[Tensor, ...] | None
    high: tuple[Tensor, ...] | None
    zero: tuple[Tensor, ...] | None
    rows: Tensor | None
    fmt: Format

    @classmethod
    def of(cls, grid: Grid, shape: torch.Size, permutation: Tensor, fmt: Format) -> _Columns:
        def spread(part: Tensor) -> Tensor:
            rows, groups = part.shape
            full = part.float().repeat_interleave(shape[1] // groups, dim=1).expand(shape)
            return full.T[permutation].contiguous()

        scale = spread(grid.scale)
        if fmt.kind != "integer":
            rows = None if grid.levels is None else grid.levels.expand(shape[0], -1)
            return cls(scale.unbind(), None, None, None, rows, fmt)
        zero = torch.zeros_like(scale) if grid.zero_point is None else spread(grid.zero_point)
        fraction = grid.zero_point is not None and grid.zero_point.is_floating_point()
        low, high = (fmt.q_min - zero).unbind(), (fmt.q_max - zero).unbind()
        return cls(scale.unbind(), low, high, zero.unbind() if fraction else None, None, fmt)

    def round(self, k: int, target: Tensor) -> Tensor:
        """The values nearest to target on the grid of the columns from k. target: (width, N)
        float32, reused. Returns (width, N).
        """
        scale = self.scale[k]
        if self.low is not None and self.high is not None:
            levels = target.div_(scale)
            if self.zero is None:
                levels.round_()
            else:
                levels.add_(self.zero[k]).round_().sub_(self.zero[k])
            return torch.clamp(levels, self.low[k], self.high[k]).mul_(scale)
        grid = Grid(scale.unsqueeze(-1), None, self.rows)
        codes = grid_codes(target.T.unsqueeze(1), grid, self.fmt)
        return grid_values(codes, grid, self.fmt).squeeze(1).T


def feedback(
    weight: Tensor, grid: Grid, scheme: Scheme, factors: Pivots, permutation: Tensor
) -> Tensor:
    """Round column by column, each with the errors of those before it. Returns codes (N, K).

    `width` columns at a time where codes have a meaning together: BlockLDLQ of QuIP#
    (arXiv:2402.04396), nearest in the plain norm.
    """
    width = scheme.fmt.width
    columns = _Columns.of(grid, weight.shape, permutation, scheme.fmt)
    w = weight.detach().float().T[permutation].contiguous()  # (K, N): a column is a row here
    upper = _between(factors.upper, width)
    error = torch.zeros_like(w)
    for a in range(0, len(w), BLOCK):
        b = min(a + BLOCK, len(w))
        target = torch.addmm(w[a:b], upper[:a, a:b].T, error[:a])
        parts = (x.split(width) for x in (target, upper[a:b, a:b].T, w[a:b], error[a:b]))
        for k, (t, within, wk, ek) in zip(
            range(a, b, width), zip(*parts, strict=True), strict=True
        ):
            if k > a:
                t = torch.addmm(t, within[:, : k - a], error[a:k])
            torch.sub(wk, columns.round(k, t), out=ek)
    return _codes_of(w - error, grid, scheme, permutation)


def _between(upper: Tensor, width: int) -> Tensor:
    """The factor of blocks: (I + U) = (I + V) B with B block diagonal, V strictly upper by blocks.

    upper: U, (K, K). Returns V, whose blocks on the diagonal say nothing.
    """
    if width == 1:
        return upper
    columns = upper.view(len(upper), -1, width).transpose(0, 1)
    solved: Tensor = torch.linalg.solve_triangular(
        _diagonal_blocks(upper, width), columns, upper=True, left=False, unitriangular=True
    )
    return solved.transpose(0, 1).reshape(upper.shape)


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """(K / width, width, width) of (K, K)."""
    count = len(matrix) // width
    at = torch.arange(count, device=matrix.device)
    return matrix.view(count, width, count, width)[at, :, at]


def descend(
    weight: Tensor, codes: Tensor, grid: Grid, scheme: Scheme, h: Tensor, permutation: Tensor
) -> Tensor:
    """Round every column again with the others fixed: target_k = w_k + sum_{i!=k} e_i H_ik / H_kk.

    The rounded target is the best code there is for column k, so no step raises the loss. Of
    `width` columns together it is the nearest in the plain norm, kept where it loses less.
    codes: (N, K); returns (N, K).
    """
    width = scheme.fmt.width
    columns = _Columns.of(grid, weight.shape, permutation, scheme.fmt)
    off, metric = _coupling(_permuted(h.float(), permutation), width)
    w = weight.detach().float().T[permutation].contiguous()
    error = w - _values(codes, grid, scheme).T[permutation]
    for a in range(0, len(w), BLOCK):
        b = min(a + BLOCK, len(w))
        target = torch.addmm(w[a:b], off[a:b], error)
        moved = torch.empty_like(error[a:b])  # since the product
        parts = (x.split(width) for x in (target, off[a:b, a:b], w[a:b], error[a:b], moved))
        for k, (t, within, wk, ek, mk) in zip(
            range(a, b, width), zip(*parts, strict=True), strict=True
        ):
            if k > a:
                t = torch.addmm(t, within[:, : k - a], moved[: k - a])
            new = wk - columns.round(k, t.clone() if width > 1 else t)
            if width > 1:
                least = wk - t  # the error that loses nothing
                lost, before = (_norm(e - least, metric[k // width]) for e in (new, ek))
                new = torch.where(lost < before, new, ek)
            torch.sub(new, ek, out=mk)
            ek.copy_(new)
    return _codes_of(w - error, grid, scheme, permutation)


def _coupling(h: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """H_kk^-1 H_ki, (K, K), 0 where i = k; and H_kk, (K / width, width, width). h: reused."""
    metric = _diagonal_blocks(h, width)
    if width == 1:
        off = h.div_(metric.view(-1, 1))
    else:
        solved = torch.linalg.solve(metric, h.view(len(metric), width, -1))
        off = solved.contiguous().view(h.shape)
    at = torch.arange(len(metric), device=h.device)
    off.view(len(at), width, len(at), width)[at, :, at] = 0.0
    return off, metric


def _norm(x: Tensor, metric: Tensor) -> Tensor:
    """x^T metric x of every column. x: (width, N); metric: (width, width). Returns (N,)."""
    return (x * (metric @ x)).sum(0)


def _codes_of(image: Tensor, grid: Grid, scheme: Scheme, permutation: Tensor) -> Tensor:
    """Codes of values that lie on the grid up to rounding of float32. image: (K, N), permuted."""
    restored = torch.empty_like(image)
    restored[permutation] = image
    return _codes(restored.T.contiguous(), grid, scheme)


def _refit(wh: Tensor, codes: Tensor, grid: Grid, scheme: Scheme, h: Tensor) -> Grid:
    """Scales of least output error for these codes: per row, (C^T H C) s = C^T H w.

    wh: W H, (N, K) float32. C: (K, G) holds the levels q - z of a row, each in the column of its
    group. Kept per row only where the scales, rounded to their stored dtype, do lower the loss. Per
    tensor: unchanged.
    """
    n, k = wh.shape
    if len(grid.scale) != n:
        return grid
    levels = _values(codes, grid._replace(scale=torch.ones_like(grid.scale)), scheme)
    at_once = max(1, REFIT_ELEMENTS // k)
    dtype = get_scale_dtype(scheme.scale_dtype)
    parts = [
        _solved(*part, h, dtype)
        for part in zip(
            wh.split(at_once),
            levels.split(at_once),
            grid.scale.split(at_once),
            strict=True,
        )
    ]
    return grid._replace(scale=torch.cat(parts))


def _solved(wh: Tensor, levels: Tensor, scale: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """The refitted scales of some rows. wh, levels: (n, K); scale: (n, G), kept where better."""
    n, groups = scale.shape
    blocks = levels.view(n, groups, -1)
    right = (blocks * wh.view(blocks.shape)).sum(-1).double()
    system = torch.empty(n, groups, groups, dtype=torch.float64, device=scale.device)
    for g, rows in enumerate(h.view(groups, -1, len(h))):  # H is symmetric, so is the system
        after = blocks[:, g:]
        products = blocks[:, g] @ rows[:, -after[0].numel() :]
        system[:, g, g:] = products.view(after.shape).mul_(after).sum(-1)
        system[:, g:, g] = system[:, g, g:]
    old = scale.double()
    new = _least_squares(system, right, old)
    floor, limit = SCALE_FLOOR[dtype], torch.finfo(dtype).max
    usable = (new.abs() > floor) & (new.abs() < limit) & (new * old > 0)  # a scale keeps its sign
    stored = torch.where(usable, new, old).to(dtype)
    return torch.where(_loses_less(system, right, stored, scale), stored, scale)


def _least_squares(system: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """x of system x = right, else old. system: (n, P, P); right, old: (n, P), float64.

    Tikhonov towards the old: a group whose codes are all zero says nothing about its scale, nor
    does a row about a level that no code stands for.
    """
    tiny = torch.finfo(torch.float64).tiny
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(tiny)
    ridged = system + torch.diag_embed(ridge.expand(old.shape))
    solved, info = torch.linalg.solve_ex(ridged, (right + ridge * old).unsqueeze(-1))
    new = solved.squeeze(-1)
    return torch.where(torch.isfinite(new) & (info == 0)[:, None], new, old)


def _loses_less(system: Tensor, right: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Whether a row's loss is less with the new parameters, as they are stored. Returns (n, 1)."""

    def loss(parameters: Tensor) -> Tensor:  # but for w H w^T, which is the same for both
        x = parameters.double().unsqueeze(-1)
        return ((system @ x - 2 * right.unsqueeze(-1)) * x).sum((1, 2))

    return (loss(new) < loss(old))[:, None]


def _refit_levels(
    wh: Tensor, codes: Tensor, grid: Grid, scheme: Scheme, h: Tensor
) -> tuple[Tensor, Grid]:
    """Levels of least output error for these codes: per row, (C H C^T) l = C H w.

    wh: W H, (N, K) float32. C: (L, K) holds the scale of a column in the row of its code. Kept as
    `_refit` keeps scales, and in ascending order, which the codes follow. Returns codes (N, K) and
    the grid.
    """
    assert grid.levels is not None
    n, k = wh.shape
    if len(grid.levels) != n:
        return codes, grid
    count = grid.levels.shape[1]
    ones = torch.ones_like(grid.levels)
    scales = _values(codes, grid._replace(levels=ones), scheme)
    at_once = max(1, REFIT_ELEMENTS // (count * k))
    parts = []
    for right, s, q, old in zip(
        wh.split(at_once),
        scales.split(at_once),
        codes.split(at_once),
        grid.levels.split(at_once),
        strict=True,
    ):
        c = torch.zeros(len(q), count, k, device=wh.device).scatter_(
            1, q.long()[:, None], s[:, None]
        )
        system = ((c.view(-1, k) @ h).view(c.shape) @ c.mT).double()
        right = (c @ right.unsqueeze(-1)).squeeze(-1).double()
        new = _least_squares(system, right, old.double()).to(old.dtype)
        parts.append(torch.where(_loses_less(system, right, new, old), new, old))
    levels, order = torch.cat(parts).sort(dim=1)
    ranks = order.argsort(dim=1)
    return ranks.gather(1, codes.long()).to(codes.dtype), grid._replace(levels=levels)


def _codes(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    blocks = weight.detach().reshape(*grid.scale.shape, -1)
    return grid_codes(blocks, grid, scheme.fmt).view(weight.shape)


def _values(codes: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    blocks = codes.reshape(*grid.scale.shape, -1)
    return grid_values(blocks, grid, scheme.fmt).view(codes.shape)


def _stored(codes: Tensor, grid: Grid, weight: Tensor, scheme: Scheme) -> QTensor:
    quantized = Quantized(codes, *grid)
    check_image(weight, quantized, scheme.format)
    return QTensor.from_codes(quantized, scheme, weight.dtype)
