"""A report of quantization as a table, for the verbs that have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zeropoint.cli.screen import Screen, megabytes, table

if TYPE_CHECKING:
    from zeropoint.flows.report import Report


def show_report(screen: Screen, report: Report) -> None:
    """One row for all modules that share a fate."""
    rows: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for module in report.modules:
        fate = module.scheme or "kept"
        row = rows.setdefault((fate, module.reason or ""), [])
        row.append((module.name, module.bytes_before, module.bytes_after))
    result = table("weights", ">modules", ">before", ">after", "which")
    for (fate, reason), members in rows.items():
        names = [name for name, _, _ in members]
        which = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        result.add_row(
            fate,
            f"{len(members):,}",
            megabytes(sum(before for _, before, _ in members)),
            megabytes(sum(after for _, _, after in members)),
            f"{which}: {reason}" if reason else which,
            style="yellow" if fate == "kept" else "",
        )
    screen.results.print(result)
