"""Taking a low-rank change into codes, so that the codes do what the change does.

minimise over codes:  |E|^2 + PULL |E V|^2,  E = W + D - Q

W: the weight as its codes say. D = B A: the change. V: an orthonormal basis of the rows of A, the
only directions of the input that D reads. Q: the new weight.

Changes by fine-tuning are small beside the step of the grid. Rounding W + D to the nearest code, on
this grid or one that fits better, gives W again: E is D, all that was learned. So codes are chosen
as if calibrated on inputs of second moment I + PULL V V^T: along V, errors of one column are made
up for by the next ones (`gptq.feedback`, `gptq.descend`), and what is left of E is spread over all
other directions. No data is needed.

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

PULL = 300.0  # how much more an error along V counts; docs/adapters.md has the measurement


def absorb(weight: QTensor, change: Tensor, reads: Tensor) -> QTensor:
    """Codes of the same scheme for weight + change. weight: (N, K); change: (N, K) float.

    reads: (r, K) float, whose rows span those of `change`. A change of zero gives the same codes.
    Raises NonFiniteError, ScaleRangeError.
    """
    scheme = replace(weight.scheme, double_quant=False)
    wanted = weight.dequantize(torch.float32) + change.float()
    start = replace(rtn(wanted, scheme), dtype=weight.dtype)  # checks the values
    if not bool(change.any()):
        return weight
    if scheme.fmt.kind == "downcast":
        return start
    grid = _grid(weight, wanted, start)
    basis = torch.linalg.qr(reads.to(torch.float64).T).Q
    hessian = PULL * basis @ basis.T
    hessian.diagonal().add_(1.0)
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


def _grid(weight: QTensor, wanted: Tensor, start: QTensor) -> Grid:
    """The grid of the weight; for blocks where rounding on it loses more, the one that spans the
    range. Scales in 8 bits are kept.
    """
    assert weight.scales is not None and start.scale is not None
    old = Grid(weight.scales, weight.zero_point)
    scheme = weight.scheme
    if scheme.double_quant:
        return old
    blocks = blocked(wanted, scheme.granularity, scheme.group_size)
    new = Grid(start.scale, start.zero_point)

    def error(grid: Grid) -> Tensor:
        codes = grid_codes(blocks, *grid, scheme.fmt)
        return (grid_values(codes, *grid, scheme.fmt) - blocks).square_().sum(-1)

    wins = error(new) < error(old)
    zero_point = old.zero_point
    if zero_point is not None and new.zero_point is not None:
        zero_point = torch.where(wins, new.zero_point, zero_point)
    return Grid(torch.where(wins, new.scale, old.scale), zero_point)
