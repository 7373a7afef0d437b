"""`zeropoint doctor`: versions, instruction sets, and which kernels can run here."""

from __future__ import annotations

import platform
from typing import Any

from rich.text import Text

from zeropoint.cli import machine
from zeropoint.cli.options import Debug, Json
from zeropoint.cli.screen import Screen, table


def doctor(json_to: Json = None, debug: Debug = False) -> None:
    """Show versions, the machine, and for every kernel whether it can run here or why not."""
    screen = Screen(json_to)
    with screen.spinner("looking around"):
        from zeropoint import _env

        facts: dict[str, Any] = {
            "versions": machine.versions(),
            "platform": platform.platform(),
            "cpu": machine.cpu(),
            "cuda": machine.cuda(),
            "native": machine.native(),
            "forced_kernel": _env.forced_kernel(),
            "kernels": machine.kernels(),
        }
    screen.json(facts)
    _show_machine(screen, facts)
    _show_kernels(screen, facts["kernels"])


def _show_machine(screen: Screen, facts: dict[str, Any]) -> None:
    cpu, cuda = facts["cpu"], facts["cuda"]
    sets = cpu["instruction_sets"]
    there = [name for name, has in sets.items() if has] or ["none of those known here"]
    absent = [name for name, has in sets.items() if has is False]
    rows = {name: version or "not installed" for name, version in facts["versions"].items()}
    rows |= {
        "platform": facts["platform"],
        "CPU": f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads in use",
        "instruction sets": ", ".join(there) + f" (torch uses {cpu['capability']})",
        "not on this CPU": ", ".join(absent),
        "CUDA": ", ".join(cuda["devices"]) if cuda["available"] else "no",
    }
    native = facts["native"]
    rows["native kernels"] = native["reason"] or f"{native['instruction_set']} in use"
    for name, reason in native["instruction_sets"].items():
        if reason is not None:
            rows[f"{name} kernels"] = reason
    if facts["forced_kernel"]:
        rows["forced kernel"] = f"{facts['forced_kernel']} (ZEROPOINT_KERNEL)"
    result = table("", "")
    result.show_header = False
    for name, value in rows.items():
        if value:
            result.add_row(name, value)
    screen.results.print(result)


def _show_kernels(screen: Screen, answers: list[dict[str, Any]]) -> None:
    """One row for all schemes to which a kernel gives the same answer."""
    rows: dict[tuple[str, str, str | None], list[str]] = {}
    for answer in answers:
        key = (answer["kernel"], answer["device"], answer["reason"])
        rows.setdefault(key, []).append(answer["scheme"])
    asked = len({answer["scheme"] for answer in answers})
    size = f"{machine.KERNEL_SIZE:,} x {machine.KERNEL_SIZE:,}"
    title = f"\nkernels for a {size} linear layer, fastest first"
    result = table("kernel", "device", "schemes", "answer", title=title)
    for (kernel, device, reason), schemes in rows.items():
        listed = f"all {asked} formats" if len(schemes) == asked else ", ".join(schemes)
        result.add_row(kernel, device, listed, Text(reason or "usable", "" if reason else "green"))
    screen.results.print(result)
