"""The only place where environment variables are read."""

from __future__ import annotations

import os


def forced_kernel() -> str | None:
    """`ZEROPOINT_KERNEL`: name of the one kernel to use, or None to choose by rank."""
    return os.environ.get("ZEROPOINT_KERNEL") or None
