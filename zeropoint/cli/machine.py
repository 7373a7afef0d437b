"""What this machine and this installation are: the facts that `zeropoint doctor` prints."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "gguf",
)
CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)  # fmt: skip
KERNEL_SIZE = 4096  # rows and columns of the weight that kernels are asked about


def versions() -> dict[str, str | None]:
    """Of Python, of zeropoint and of what it stands on; None: not installed."""
    import zeropoint

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "zeropoint": zeropoint.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu() -> dict[str, Any]:
    """name, cores, threads and capability that torch uses, instruction sets by name.

    An instruction set is None where the system does not tell (no /proc/cpuinfo).
    """
    import torch

    rows = _cpuinfo()
    flags = rows["flags"].split() if "flags" in rows else None
    return {
        "name": rows.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": {flag: None if flags is None else flag in flags for flag in CPU_FLAGS},
    }


def cuda() -> dict[str, Any]:
    """available, and the names of the devices."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"available": torch.cuda.is_available(), "devices": names}


def native() -> dict[str, Any]:
    """reason there are no native kernels, or None; instruction sets and the one in use."""
    from zeropoint import native

    reason = native.why_not()
    return {
        "reason": reason,
        "instruction_set": None if reason else native.instruction_set(),
        "instruction_sets": {} if reason else native.instruction_sets(),
    }


def kernels() -> list[dict[str, Any]]:
    """Every kernel's answer to a linear layer of every format's default scheme, on every device.

    Rows {kernel, scheme, device, reason}; reason None: usable.
    """
    import torch

    from zeropoint.kernels.select import KERNELS
    from zeropoint.kernels.spec import Spec
    from zeropoint.numerics import FORMATS
    from zeropoint.scheme import Scheme

    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in FORMATS:
            scheme = Scheme.of(name)
            spec = Spec(op="linear", scheme=scheme, shape=(KERNEL_SIZE, KERNEL_SIZE), device=device)
            for kernel_name, kernel in KERNELS.items():
                reason = kernel.why_not(spec)
                row = {"kernel": kernel_name, "scheme": str(scheme), "device": device}
                rows.append({**row, "reason": reason})
    return rows


def _cpuinfo() -> dict[str, str]:
    """The first processor's rows of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
