"""Taking a low-rank change into codes, so that the codes do what the change does.

minimise over codes:  tr(E H E^T),  E = W + D - Q

W: the weight as its codes say. D = B A: the change. Q: the new weight. H: the second moment of the
inputs, or without data I + PULL V V^T, where V is an orthonormal basis of the rows of A, the only
directions of the input that D reads.

Changes by fine-tuning are small beside the step of the grid. Rounding W + D to the nearest code, on
this grid or one that fits better, gives W again: E is D, all that was learned. With H errors of one
column are made up for by the next ones (`gptq.feedback`, `gptq.descend`), so that what the change
does to the output stays, and what is left of E lies where inputs are small.

Grids stay, but where a block's range has grown so much that a new one is nearer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zeropoint.algorithms.gptq import SWEEPS, descend, feedback, ldl
from zeropoint.algorithms.rtn import rtn
from zeropoint.numerics import Grid, Quantized, blocked, check_image, grid_codes, grid_values
from zeropoint.qtensor import QTensor

PULL = 300.0  # how much more an error along V counts without data
DAMPING = 0.1  # of mean(diag H): errors that the inputs seen do not show count so much


def absorb(weight: QTensor, change: Tensor, reads: Tensor, moment: Tensor | None = None) -> QTensor:
    """Codes of the same scheme for weight + change. weight: (N, K); change: (N, K) float.

    reads: (r, K) float, whose rows span those of `change`. moment: (K, K) float, sum or mean of
    x x^T over inputs, any scale. A change of zero gives the same codes.
    Raises NonFiniteError, ScaleRangeError.
    """
    scheme = weight.scheme.with_float_scales
    wanted = weight.dequantize(torch.float32) + change.float()
    start = replace(rtn(wanted, scheme), dtype=weight.dtype)  # checks the values
    if not bool(change.any()):
        return weight
    if scheme.fmt.kind == "downcast":
        return start
    grid = _grid(weight, wanted, start)
    hessian = _hessian(reads, moment)
    order = torch.arange(len(hessian), device=wanted.device)
    factors = ldl(hessian, (0.0,))
    assert factors is not None
    codes = feedback(wanted, grid, scheme, factors, order)
    for _ in range(SWEEPS):
        codes = descend(wanted, codes, grid, scheme, hessian, order)
    quantized = Quantized(codes, *grid)
    check_image(wanted, quantized, scheme.format)
    new = QTensor.from_codes(quantized, scheme, weight.dtype)
    if weight.scheme.double_quant:
        return replace(new, scheme=weight.scheme, scale=weight.scale)
    return new


def _hessian(reads: Tensor, moment: Tensor | None) -> Tensor:
    """Which errors count how much. (K, K) float64, positive definite."""
    if moment is not None and bool((moment.diagonal() > 0).any()):
        hessian = moment.to(torch.float64) / moment.diagonal().mean()
        hessian.diagonal().add_(DAMPING)
        return hessian
    basis: Tensor = torch.linalg.qr(reads.to(torch.float64).T).Q
    hessian = PULL * basis @ basis.T
    hessian.diagonal().add_(1.0)
    return hessian


def _grid(weight: QTensor, wanted: Tensor, start: QTensor) -> Grid:
    """The grid of the weight; for blocks where rounding on it loses more, the one that spans the
    range: for rows, where they have levels of their own. Scales in 8 bits are kept.
    """
    old, scheme = weight.grid, weight.scheme
    if scheme.double_quant:
        return old
    blocks = blocked(wanted, scheme.granularity, scheme.group_size)
    new = start.grid

    def error(grid: Grid) -> Tensor:
        codes = grid_codes(blocks, grid, scheme.fmt)
        of_blocks = (grid_values(codes, grid, scheme.fmt) - blocks).square_().sum(-1)
        return of_blocks if grid.levels is None else of_blocks.sum(1, keepdim=True)

    return old.where(error(new) < error(old), new)
