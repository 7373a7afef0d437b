"""Pictures of quantized weights, of ranges, of errors and of what a size costs.

Every function returns a matplotlib Figure: a notebook shows it, `figure.savefig(path)` writes it.
pyplot and its settings are never touched. matplotlib comes with `pip install 'zeropoint[plot]'`.
"""

from zeropoint.plot.models import activations, layers, losses, tradeoff
from zeropoint.plot.tensors import histogram, number_line, tensor

__all__ = [
    "activations",
    "histogram",
    "layers",
    "losses",
    "number_line",
    "tensor",
    "tradeoff",
]
