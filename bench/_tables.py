"""The tables of bench/kernels.py. Section -> header of a column -> what it shows of a figure."""

from __future__ import annotations

from collections.abc import Callable

from _common import Figure


def _ms(row: Figure) -> str:
    return f"{row['seconds']['median'] * 1e3:.3f}"


def _best(row: Figure) -> str:
    return f"{row['seconds']['best'] * 1e3:.3f}"


def _spread(row: Figure) -> str:
    return f"{row['seconds']['spread']:.0%}"


def _number(key: str, form: str) -> Callable[[Figure], str | None]:
    return lambda row: None if row[key] is None else format(row[key], form)


def _times(key: str) -> Callable[[Figure], str]:
    """A speedup; below 1 it stands out."""
    return lambda row: f"[red]{row[key]:.2f}[/red]" if row[key] < 1 else f"{row[key]:.2f}"


def _milliseconds(key: str) -> Callable[[Figure], str]:
    return lambda row: f"{row[key]['median'] * 1e3:.2f}"


TIME: dict[str, Callable[[Figure], str | None]] = {"ms": _ms, "best": _best, "spread": _spread}
THREADS = {"threads": _number("threads", "d")}
COLUMNS: dict[str, dict[str, Callable[[Figure], str | None]]] = {
    "ceilings": {
        "ceiling": _number("ceiling", ""),
        **THREADS,
        "G/s": _number("giga_per_second", ".1f"),
        "best": _number("giga_per_second_best", ".1f"),
        "spread": _spread,
    },
    "cold": {
        "scheme": _number("scheme", ""),
        **THREADS,
        **TIME,
        "GB/s": _number("gb_s", ".2f"),
        "read GB/s": _number("read_gb_s", ".2f"),
        "share": _number("share_of_read", ".0%"),
        "best/best": _number("share_of_read_best", ".0%"),
        "bf16 GB/s": _number("torch_bfloat16_gb_s", ".2f"),
        "x bf16": _times("speedup_over_bfloat16"),
    },
    "layers": {
        "scheme": _number("scheme", ""),
        "N": _number("n", "d"),
        "K": _number("k", "d"),
        **THREADS,
        **TIME,
        "GB/s": _number("gb_s", ".2f"),
        "read GB/s": _number("read_gb_s", ".2f"),
        "share": _number("share_of_read", ".0%"),
        "best/best": _number("share_of_read_best", ".0%"),
        "bf16 GB/s": _number("torch_bfloat16_gb_s", ".2f"),
        "x bf16": _times("speedup_over_bfloat16"),
    },
    "shapes": {
        "scheme": _number("scheme", ""),
        "M": _number("m", "d"),
        **TIME,
        "x bf16": _times("speedup_over_bfloat16"),
        "x f32": _times("speedup_over_float32"),
        "GB/s": _number("gb_s", ".1f"),
        "GFLOP/s": _number("gflops", ".1f"),
        "of f32": _number("share_of_float32", ".0%"),
        "of int8": _number("share_of_int8", ".0%"),
        "of bf16": _number("share_of_bfloat16", ".0%"),
    },
    "eager": {
        "module": _number("module", ""),
        "x": _number("x", ""),
        **THREADS,
        "us": _number("microseconds", ".2f"),
        "best": _number("microseconds_best", ".2f"),
        "spread": _spread,
        "added us": _number("added_microseconds", ".2f"),
        "added, best": _number("added_microseconds_best", ".2f"),
    },
    "quantize": {
        "scheme": _number("scheme", ""),
        **THREADS,
        **TIME,
        "GB/s": _number("gb_s", ".2f"),
        "a thread": _number("gb_s_per_thread", ".2f"),
        "read GB/s": _number("read_gb_s", ".2f"),
        "share": _number("share_of_read", ".0%"),
    },
    "busy": {
        "operator": _number("operator", ""),
        **THREADS,
        "idle ms": _milliseconds("idle_seconds"),
        "busy ms": _milliseconds("busy_seconds"),
        "ratio": _number("ratio", ".2f"),
        "of means": _number("ratio_of_means", ".2f"),
        "of p95": _number("ratio_of_p95", ".2f"),
    },
}
