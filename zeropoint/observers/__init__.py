"""What collects statistics of activations: `update(x)`, then `result()`. One file per observer."""

from __future__ import annotations

from zeropoint.observers.cross import CrossObserver
from zeropoint.observers.hessian import Hessian, HessianObserver
from zeropoint.observers.mean_square import MeanSquareObserver

__all__ = ["CrossObserver", "Hessian", "HessianObserver", "MeanSquareObserver"]
