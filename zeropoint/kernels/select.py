"""Which kernel does a job: the first of an ordered table that has no reason not to, asked once per
weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from zeropoint import _env
from zeropoint.errors import KernelError, UnknownNameError, nearest
from zeropoint.kernels import native, reference, torch_dense
from zeropoint.kernels.spec import Kernel, Spec

# Fastest first. To add a kernel: one file in this folder, one line here.
KERNELS: dict[str, Kernel] = {
    "native": native,
    "torch": torch_dense,
    "reference": reference,
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """kernel: the name chosen. refused: why each faster one was not."""

    kernel: str
    refused: dict[str, str]


def get_kernel(name: str) -> Kernel:
    """The kernel called `name`. Raises UnknownNameError."""
    if name not in KERNELS:
        raise UnknownNameError(f"{name!r} is not a kernel; {nearest(str(name), KERNELS)}")
    return KERNELS[name]


def choose(spec: Spec) -> Choice:
    """The kernel for this job, or the one that `ZEROPOINT_KERNEL` names.

    Raises UnknownNameError, and KernelError with every reason when no kernel can do it.
    """
    forced = _env.forced_kernel()
    if forced is not None:
        reason = get_kernel(forced).why_not(spec)
        if reason is not None and forced != "reference":
            raise KernelError(f"ZEROPOINT_KERNEL={forced} cannot do {spec}: {reason}")
        return Choice(kernel=forced, refused={})
    refused: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        reason = kernel.why_not(spec)
        if reason is None:
            return Choice(kernel=name, refused=refused)
        refused[name] = reason
    raise KernelError(f"no kernel can do {spec}: {refused}")
