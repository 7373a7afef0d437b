"""What it takes to load a model: memory and time, as float and quantized, each in a new process.

A process that has imported everything and loaded nothing is the zero of these figures, so they are
what the model adds.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from zeropoint import errors
from zeropoint.errors import UnknownNameError, ZeropointError, nearest
from zeropoint.evaluate.footprint import footprint
from zeropoint.evaluate.memory import peak_rss_bytes
from zeropoint.model.pages import resident_bytes
from zeropoint.progress import OnStep, no_progress

# To add a row: a line here, with the arguments of `zp.load`.
LOADS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"weights": "int8"},
    "nf4": {"weights": "nf4"},
    "int4": {"weights": "int4"},
}
IMPORTED_BY_LOADING = (
    "accelerate",
    "gguf",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
PAGE = 4096  # bytes; the least that a mapped file occupies


@dataclass(frozen=True, kw_only=True)
class Loading:
    """One row. All in bytes above an idle process, but for tensor_bytes, which the model's tensors
    have.

    loaded_as: a name of `LOADS`. resident_bytes: after loading, every weight read once, so that
    those in mapped files count. peak_bytes: the most until then. seconds: of `zp.load`, reading
    aside. refused: why it could not be loaded so; the figures are then None.
    """

    loaded_as: str
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    tensor_bytes: int | None = None
    seconds: float | None = None
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loadings:
    """Result of `bench_loading`. idle_bytes: resident set of a process that has loaded nothing."""

    rows: tuple[Loading, ...]
    idle_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint bench --load --json` writes it."""
        return {"idle_bytes": self.idle_bytes, "rows": [asdict(row) for row in self.rows]}


def bench_loading(
    source: str,
    *,
    kinds: tuple[str, ...] = tuple(LOADS),
    threads: int | None = None,
    on_step: OnStep = no_progress,
) -> Loadings:
    """Load `source` once in each of the ways of `LOADS`, every time in a process of its own.

    threads: for torch.set_num_threads there; None leaves it. A way in which it cannot be loaded is
    a row with the reason.
    Raises UnknownNameError, and what `zp.load` raised when no row could be loaded.
    """
    for kind in kinds:
        if kind not in LOADS:
            raise UnknownNameError(f"{kind!r} is not a way to load; {nearest(kind, LOADS)}")
    rows, idle, failed = [], [], []
    for done, kind in enumerate(kinds):
        on_step(kind, done, len(kinds))
        answer = _in_a_new_process({"source": str(source), "kind": kind, "threads": threads})
        rows.append(Loading(loaded_as=kind, **answer["row"]))
        idle += [answer["idle_bytes"]] if "idle_bytes" in answer else []
        failed += [answer] if rows[-1].refused else []
    on_step("", len(kinds), len(kinds))
    if not idle:
        error = getattr(errors, str(failed[0].get("error")), ZeropointError)
        raise error(failed[0]["row"]["refused"])
    return Loadings(rows=tuple(rows), idle_bytes=min(idle))


def _in_a_new_process(job: dict[str, Any]) -> dict[str, Any]:
    """What `measure` prints there; where it printed nothing, why it ended."""
    # The process is a user of the public surface, whose `load` is beyond this room's reach.
    code = (
        "import zeropoint; from zeropoint.evaluate.loading import measure as m; m(zeropoint.load)"
    )
    run = [sys.executable, "-c", code, json.dumps(job)]
    ended = subprocess.run(run, capture_output=True, text=True)
    if ended.returncode == 0:
        answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return answer
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        hint = ", as it does when memory runs out" if name == "SIGKILL" else ""
        return {"row": {"refused": f"the process ended by {name}{hint}"}}
    last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
    return {"row": {"refused": last[0]}}


def measure(load: Callable[..., tuple[Any, Any]]) -> None:
    """Load as sys.argv says and print the figures as JSON: what runs in the new process.

    load: `zp.load`.
    """
    job = json.loads(sys.argv[1])
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    for name in IMPORTED_BY_LOADING:
        importlib.import_module(name)
    idle = resident_bytes()
    start = time.perf_counter()
    try:
        model, _tokenizer = load(job["source"], **LOADS[job["kind"]])
    except ZeropointError as e:
        print(json.dumps({"error": type(e).__name__, "row": {"refused": str(e)}}))
        return
    seconds = time.perf_counter() - start
    read(model)
    row = {
        "resident_bytes": resident_bytes() - idle,
        "peak_bytes": max(peak_rss_bytes(), resident_bytes()) - idle,
        "tensor_bytes": footprint(model).total_bytes,
        "seconds": seconds,
    }
    print(json.dumps({"idle_bytes": idle, "row": row}))


def read(model: nn.Module) -> None:
    """Touch every page of the model's parameters and buffers that are on the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            stored = torch.empty(0, dtype=torch.uint8)
            _ = stored.set_(tensor.untyped_storage())[::PAGE].sum()
