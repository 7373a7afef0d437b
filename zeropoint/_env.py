"""The only place where environment variables are read."""

from __future__ import annotations

import os
from pathlib import Path


def forced_kernel() -> str | None:
    """`ZEROPOINT_KERNEL`: name of the one kernel to use, or None to choose by rank."""
    return os.environ.get("ZEROPOINT_KERNEL") or None


def forced_isa() -> str | None:
    """`ZEROPOINT_ISA`: name of the instruction set that native kernels use, or None for the
    fastest.
    """
    return os.environ.get("ZEROPOINT_ISA") or None


def library() -> Path | None:
    """`ZEROPOINT_LIBRARY`: the native library to load, which must work, or None for the installed
    one.
    """
    path = os.environ.get("ZEROPOINT_LIBRARY")
    return Path(path) if path else None
