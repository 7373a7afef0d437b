"""Versions of the native library beside each other, in one process, on the same weights.

    git worktree add ../before HEAD~1
    cmake -S ../before -B ../before/build && cmake --build ../before/build
    python bench/versions.py ../before/zeropoint/lib/libzeropoint.so zeropoint/lib/libzeropoint.so
    python bench/versions.py A.so B.so --schemes nf4 --double-quant --shape 1536 576 --isa avx2

Memory that one process got is read up to a tenth faster than what another got, so versions are not
compared by two runs of bench/kernels.py. The libraries must have the C ABI of this tree. One JSON
line a scheme and number of threads is appended to bench/results/versions.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from _answers import check_linear
from _common import (
    RESULTS,
    Figure,
    Watch,
    append,
    circumstances,
    progress,
    show,
    speedup,
    summary,
    take_turns,
)
from _sides import CEILINGS, copies, count_for, noise, operations, our_calls, quantized, walk

from zeropoint import native
from zeropoint.scheme import Scheme

FILE = RESULTS / "versions.jsonl"


def opened(path: str, isa: str | None) -> ctypes.CDLL:
    """The library at `path`, using this instruction set, or the fastest."""
    library = native._open(Path(path).resolve())
    if isinstance(library, str):
        sys.exit(library)
    if isa is not None:
        native._use_isa(library, isa)
    return library


def using(library: ctypes.CDLL) -> AbstractContextManager[object]:
    """What `zeropoint.native` binds inside is this library's."""
    return patch.object(native, "_library", lambda: library)


def measure(
    libraries: dict[str, ctypes.CDLL], scheme: Scheme, threads: int, args: argparse.Namespace
) -> Figure:
    """Answers first, then samples by turns; each walks over all copies of the weight."""
    torch.set_num_threads(threads)
    n, k = args.shape
    weight, x = quantized(scheme, n, k), noise(args.tokens, k, torch.bfloat16)
    weights, _ = copies(weight, 1 if args.warm else count_for(weight.nbytes, args.megabytes << 20))
    turns = {}
    for path, library in libraries.items():
        with using(library):
            calls = our_calls(weights)
            tiles = bool(operations(CEILINGS.index("bfloat16"), 1, 1))
        check_linear(f"{path}, {scheme}", calls[0](x), x, weight, as_bfloat16=tiles)
        turns[path] = partial(walk, calls * (50 if args.warm else 1), x, time.perf_counter)
    samples = take_turns(turns, args.rounds)
    first = samples[next(iter(libraries))]
    return {
        "scheme": str(scheme),
        "n": n,
        "k": k,
        "m": args.tokens,
        "threads": threads,
        "warm": args.warm,
        "seconds": {path: summary(s) for path, s in samples.items()},
        "speedup_over_first": {path: speedup(s, first) for path, s in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="+", help="files; the first is what others are beside")
    parser.add_argument("--schemes", nargs="+", default=["int4", "int8", "nf4", "float8_e4m3fn"])
    parser.add_argument("--group-size", type=int, help="of all of them")
    parser.add_argument("--double-quant", action="store_true", default=None)
    parser.add_argument("--activations", choices=["int8"])
    parser.add_argument("--shape", nargs=2, type=int, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, default=1, metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count()])
    parser.add_argument("--isa", help="instruction set, as zeropoint doctor names it")
    parser.add_argument("--megabytes", type=int, default=512, help="of copies of each weight")
    parser.add_argument("--warm", action="store_true", help="one copy, over and over")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    libraries = {path: opened(path, args.isa) for path in args.libraries}
    isa = {}
    for path, library in libraries.items():
        with using(library):
            isa[path] = native.instruction_set()
    fields = {name: getattr(args, name) for name in ("group_size", "double_quant", "activations")}
    fields = {name: value for name, value in fields.items() if value is not None}
    figures = []
    with torch.no_grad(), Watch() as watch:
        for threads in args.threads:
            for name in args.schemes:
                scheme = Scheme.of(name, **fields)
                progress(f"{scheme}, {threads} threads")
                figures.append(measure(libraries, scheme, threads, args))
    about = circumstances(("torch",)) | {"isa": isa} | watch.figures
    append(FILE, figures, about)
    columns = ["scheme", "threads"]
    for path in libraries:
        columns += [f"{path}: ms", "times as fast"]
    rows = []
    for figure in figures:
        row = [figure["scheme"], figure["threads"]]
        for path in libraries:
            row.append(f"{figure['seconds'][path]['median'] * 1e3:.3f}")
            row.append(f"{figure['speedup_over_first'][path]:.3f}")
        rows.append(row)
    n, k = args.shape
    place = "from the cache" if args.warm else "from memory"
    show(f"{n} x {k}, {args.tokens} tokens, {place}", columns, rows)
    print(watch)


if __name__ == "__main__":
    main()
