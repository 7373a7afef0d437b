"""Memory of this process, and giving it back."""

from __future__ import annotations

import gc
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from zeropoint.model.pages import process_status, resident_bytes, trim
from zeropoint.model.release import empty

_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Of one CUDA device, what this process uses, in bytes. allocated: by tensors. reserved: taken
    from the device, those included and what torch keeps for the next ones.
    """

    device: str
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of this process, in bytes. resident: in RAM now, pages of mapped files included. peak: the
    largest that resident has been since the program began. devices: its CUDA devices, if any.
    """

    resident_bytes: int
    peak_bytes: int
    devices: tuple[DeviceMemory, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"devices": [asdict(d) for d in self.devices]}

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.resident_bytes / 1e6:,.1f} MB resident, {self.peak_bytes / 1e6:,.1f} MB at "
                "the peak",
                *(
                    f"{d.device}: {d.allocated_bytes / 1e6:,.1f} MB allocated, "
                    f"{d.reserved_bytes / 1e6:,.1f} MB reserved"
                    for d in self.devices
                ),
            )
        )


def memory() -> Memory:
    """What this process uses now, and the most it has used.

    >>> held = torch.ones(25_000_000)
    >>> memory().resident_bytes > held.nbytes
    True
    """
    devices = tuple(
        DeviceMemory(
            device=f"cuda:{index}",
            allocated_bytes=torch.cuda.memory_allocated(index),
            reserved_bytes=torch.cuda.memory_reserved(index),
        )
        for index in range(torch.cuda.device_count())
    )
    resident = resident_bytes()
    # The kernel notes the peak now and then, and the current figure may be ahead of it.
    return Memory(
        resident_bytes=resident, peak_bytes=max(peak_rss_bytes(), resident), devices=devices
    )


def release(model: nn.Module) -> int:
    """Give back the memory of a model, also while variables still refer to it. Returns the bytes by
    which the process has shrunk.

    Parameters, buffers, gradients, hooks and caches are dropped, on all devices; afterwards every
    use of the model, or of a module of it, raises StateError. A tensor that is held elsewhere too
    keeps its values and its memory. In place.
    Raises StateError: released already, not a module, or a TorchScript module.
    """
    before = resident_bytes()
    empty(model)
    gc.collect()
    trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return before - resident_bytes()


def peak_rss_bytes() -> int:
    """Largest resident set this program has had, bytes.

    Linux: VmHWM, which starts anew with the program. getrusage's figure, used elsewhere, does not:
    a child process inherits the peak of the parent that started it.
    """
    peak_now = process_status("VmHWM")
    if peak_now is not None:
        return peak_now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB  # macOS counts bytes, others KiB
