"""What the benchmarks share: circumstances, idleness, turns, statistics, files.

A figure is a dict of plain data; `append` writes one JSON line for each, with the circumstances.
Sides that are compared take turns (ours, torch, ours, torch ...), so that what else the machine
does meets all of them, and a ratio is the median of the ratios of one round.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Figure = dict[str, Any]


# --- circumstances: what a figure depends on ---


def cpu_name() -> str:
    """As /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def instruction_sets() -> list[str]:
    """Those of the CPU that decide how fast torch's and our bfloat16 and int8 are."""
    known = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in known if name in flags]


def commit() -> str:
    """Short hash of HEAD, with "-dirty" when the working tree differs from it (results aside)."""
    head = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip()


def circumstances(packages: Sequence[str]) -> Figure:
    """Commit, date, CPU, versions."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "instruction_sets": instruction_sets(),
        "versions": versions,
    }


def append(path: Path, figures: Iterable[Figure], about: Figure) -> None:
    """One JSON line a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for figure in figures:
            file.write(json.dumps(figure | about) + "\n")


# --- idleness ---


@dataclass(frozen=True, kw_only=True)
class CpuSeconds:
    """CPU seconds of all cores together. stolen: what the host gave to other machines."""

    total: float
    busy: float
    stolen: float


def parse_cpu_seconds(stat: str, ticks_per_second: float) -> CpuSeconds:
    """The first line of /proc/stat: user nice system idle iowait irq softirq steal guest ..."""
    fields = [int(value) / ticks_per_second for value in stat.splitlines()[0].split()[1:9]]
    idle, stolen = fields[3] + fields[4], fields[7]
    return CpuSeconds(total=sum(fields), busy=sum(fields) - idle - stolen, stolen=stolen)


def _cpu_seconds() -> CpuSeconds:
    return parse_cpu_seconds(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK"))


def _own_seconds(children: Sequence[int]) -> float:
    """CPU seconds of this process, of children that have ended, and of the living `children`."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Watch:
    """How busy the machine is with other things, as shares of all its cores (0 to 1).

    `with Watch() as watch: ...` looks for `seconds` before and after, and at everything between.
    """

    def __init__(self, seconds: float = 1.0, children: Sequence[int] = ()) -> None:
        self.seconds, self.children = seconds, children
        self.figures: dict[str, float] = {}

    def __enter__(self) -> Watch:
        self.figures["others_busy_before"] = self._window()
        self._begin = (_cpu_seconds(), _own_seconds(self.children))
        return self

    def __exit__(self, *_: object) -> None:
        own = _own_seconds(self.children) - self._begin[1]
        begin, end = self._begin[0], _cpu_seconds()
        total = max(end.total - begin.total, 1e-9)
        self.figures["others_busy_during"] = max(0.0, end.busy - begin.busy - own) / total
        self.figures["stolen_during"] = (end.stolen - begin.stolen) / total
        self.figures["others_busy_after"] = self._window()

    def _window(self) -> float:
        begin, own = _cpu_seconds(), _own_seconds(self.children)
        time.sleep(self.seconds)
        end, own = _cpu_seconds(), _own_seconds(self.children) - own
        return max(0.0, end.busy - begin.busy - own) / max(end.total - begin.total, 1e-9)

    def __str__(self) -> str:
        shares = (f"{name.replace('_', ' ')} {value:.0%}" for name, value in self.figures.items())
        return ", ".join(shares)


# --- turns ---


def take_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every side once a round; each call returns its sample, in seconds."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            samples[name].append(turn())
    return samples


def seconds_of(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes."""
    start = clock()
    call()
    return clock() - start


# --- statistics ---


def quantile(samples: Sequence[float], share: float) -> float:
    """Linear between the sorted samples: 0 is the smallest, 1 the largest."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Seconds: median, best, and spread = (third quartile - first quartile) / median."""
    median = statistics.median(samples)
    return {
        "median": median,
        "best": min(samples),
        "spread": (quantile(samples, 0.75) - quantile(samples, 0.25)) / median,
        "samples": len(samples),
    }


def speedup(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times faster than the baseline: median over rounds of baseline / seconds."""
    return statistics.median(b / s for s, b in zip(seconds, baseline, strict=True))


# --- tables ---


def progress(text: str) -> None:
    """What is being measured now, on stderr."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on the terminal; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row))
    console = Console()
    if not console.is_terminal:  # a log file: never cut
        console = Console(width=200)
    console.print(table)
