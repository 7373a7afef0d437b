"""The native CPU kernels beside what this machine can do and beside torch.

    python bench/kernels.py [--quick] [--only SECTION ...] [--threads N ...]

ceilings  bandwidth and operations per second that no kernel can exceed, measured now
cold      M = 1, weights from memory: GB/s and share of the read bandwidth
layers    the same for the layers of SmolLM2-135M
shapes    every format and M: time, ratio to torch's bfloat16 and float32, share of the ceilings
eager     what a QLinear of 64 x 64 costs beside an nn.Linear
quantize  round to nearest: GB/s of float32 read
busy      M = 1 while another process wants every core
avx2      cold and shapes again, zeropoint and torch both held to AVX2
avx_vnni  the same with AVX-VNNI, where the CPU has it

Every answer is checked against the float64 oracle before it is timed. Sides take turns; a figure is
the median over rounds, ratios are medians of the ratios of one round. Appends a JSON line a figure
to bench/results/kernels.jsonl (--quick: only where --output says so).

On a busy machine, --cpu-clock counts the CPU seconds of one thread instead of the time that passes:
ratios then hardly depend on the others, who still take their share of caches and bandwidth.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _answers import check_linear
from _common import (
    RESULTS,
    Figure,
    Watch,
    append,
    circumstances,
    progress,
    quantile,
    seconds_of,
    show,
    speedup,
    summary,
    take_turns,
)
from _sides import (
    FEW_TOKENS,
    G64,
    QUICK,
    SMOLLM2,
    W8A8,
    Clock,
    Plan,
    Rates,
    ceilings,
    copies,
    count_for,
    noise,
    our_calls,
    peaks,
    quantized,
    reader,
    readers,
    shares,
    torch_calls,
    walk,
    why_no_kernel,
)
from _tables import COLUMNS
from torch import Tensor, nn

from zeropoint import native
from zeropoint.algorithms.rtn import rtn
from zeropoint.nn import QLinear
from zeropoint.numerics import FORMATS, quantize
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

TORCH_ON_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
HELD_TO = {
    "avx2": TORCH_ON_AVX2 | {"ZEROPOINT_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx_vnni": TORCH_ON_AVX2 | {"ZEROPOINT_ISA": "avx_vnni", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
}

# --- cold weights, one token ---


def cold(plan: Plan, rates: Rates) -> list[Figure]:
    """One weight of 4096 x 4096, every format that reads less than bfloat16."""
    return _cold(plan, rates, plan.cold, (plan.side, plan.side), plan.rounds)


def layers(plan: Plan, rates: Rates) -> list[Figure]:
    """The weights of SmolLM2-135M, where what a row and a call cost is no longer small."""
    figures = []
    for shape in SMOLLM2:
        for figure in _cold(plan, rates, plan.layers, shape, plan.few_rounds):
            figures.append(figure | {"n": shape[0], "k": shape[1]})
    return figures


def _rounds(x: Tensor, rates: Rates, threads: int) -> bool:
    """Whether weights may be rounded to bfloat16: x is, and there are instructions for it."""
    return x.dtype == torch.bfloat16 and bool(rates["bfloat16", threads])


def _cold(
    plan: Plan, rates: Rates, schemes: Sequence[Scheme], shape: tuple[int, int], rounds: int
) -> list[Figure]:
    """A sample is one walk over cold_bytes of weights, or one read of the same memory: on a
    virtual machine, two buffers of one size were read at speeds that differ by a third.
    """
    figures = []
    n, k = shape
    x, dense_x = noise(1, k, plan.dtype), noise(1, k, torch.bfloat16)
    dense_bytes = 2 * n * k
    dense = torch_calls(n, k, torch.bfloat16, count_for(dense_bytes, plan.cold_bytes))
    for threads in plan.threads:
        torch.set_num_threads(threads)
        for scheme in schemes:
            progress(f"cold: {scheme}, {n} x {k}, {threads} threads")
            weight = quantized(scheme, n, k)
            weights, memory = copies(weight, count_for(weight.nbytes, plan.cold_bytes))
            calls = our_calls(weights)
            as_bfloat16 = _rounds(x, rates, threads)
            error = check_linear(str(scheme), calls[0](x), x, weight, as_bfloat16=as_bfloat16)
            turns = {
                "read": reader(memory, threads, plan.clock),
                "ours": partial(walk, calls, x, plan.clock),
                "torch": partial(walk, dense, dense_x, plan.clock),
            }
            samples = take_turns(turns, rounds)
            limit = [memory.nbytes / seconds for seconds in samples["read"]]
            ours = [weight.nbytes / seconds for seconds in samples["ours"]]
            share = statistics.median(a / b for a, b in zip(ours, limit, strict=True))
            torch_seconds = statistics.median(samples["torch"])
            figures.append(
                {
                    "scheme": str(scheme),
                    "threads": threads,
                    "m": 1,
                    "error_over_bound": error,
                    "seconds": summary(samples["ours"]),
                    "bytes": weight.nbytes,
                    "gb_s": statistics.median(ours) / 1e9,
                    "gb_s_best": max(ours) / 1e9,
                    "read_gb_s": statistics.median(limit) / 1e9,
                    "read_gb_s_best": max(limit) / 1e9,
                    "share_of_read": share,
                    "share_of_read_best": max(ours) / max(limit),
                    "torch_bfloat16_gb_s": dense_bytes / torch_seconds / 1e9,
                    "speedup_over_bfloat16": speedup(samples["ours"], samples["torch"]),
                }
            )
    return figures


# --- every format and number of tokens ---


def shapes(plan: Plan, rates: Rates) -> list[Figure]:
    """All formats and torch's two dtypes take turns. Few tokens: a round walks over cold_bytes, so
    every call finds its weight in memory only; a sample is the mean over copies.
    """
    threads = max(plan.threads)
    torch.set_num_threads(threads)
    weights = {}
    for scheme in plan.shapes:
        why = why_no_kernel(scheme, plan.side, plan.side)
        if why is None:
            weights[str(scheme)] = quantized(scheme, plan.side, plan.side)
        else:
            print(f"{scheme} is not measured: {why}")
    round_bytes = sum(w.nbytes for w in weights.values()) + 6 * plan.side**2
    count = count_for(round_bytes, plan.cold_bytes)
    sides = {name: our_calls(copies(weight, count)[0]) for name, weight in weights.items()}
    dense = {"torch bfloat16": torch.bfloat16, "torch float32": torch.float32}
    sides |= {
        name: torch_calls(plan.side, plan.side, dtype, count) for name, dtype in dense.items()
    }
    nbytes = {name: w.nbytes for name, w in weights.items()}
    nbytes |= {name: dtype.itemsize * plan.side**2 for name, dtype in dense.items()}
    units = peaks(plan, threads)  # the machine may change between sections, less so in a round
    amounts = {name: amount for name, (amount, _) in units.items()}
    figures = []
    for m in plan.tokens:
        progress(f"shapes: M={m}")
        inputs = {name: noise(m, plan.side, dense.get(name, plan.dtype)) for name in sides}
        errors: dict[str, float] = {}
        for name, calls in sides.items():
            y = calls[0](inputs[name])  # the warm-up, too
            if name in weights:
                x = inputs[name]
                as_bfloat16 = _rounds(x, rates, threads)
                errors[name] = check_linear(name, y, x, weights[name], as_bfloat16=as_bfloat16)
        used = count if m <= FEW_TOKENS else 1
        turns = {
            name: partial(walk, calls[:used], inputs[name], plan.clock)
            for name, calls in sides.items()
        }
        turns |= {name: turn for name, (_, turn) in units.items()}
        samples = take_turns(turns, plan.rounds if m <= FEW_TOKENS else plan.few_rounds)
        for name in sides:
            seconds = summary(samples[name])
            figures.append(
                {
                    "scheme": name,
                    "threads": threads,
                    "m": m,
                    "error_over_bound": errors.get(name),
                    "seconds": seconds,
                    "bytes": nbytes[name],
                    "gb_s": nbytes[name] / seconds["median"] / 1e9,
                    **shares(2 * m * plan.side**2, name, samples, amounts),
                    "speedup_over_bfloat16": speedup(samples[name], samples["torch bfloat16"]),
                    "speedup_over_float32": speedup(samples[name], samples["torch float32"]),
                }
            )
    return figures


# --- overhead in eager mode ---

TRIVIAL, CALLS = 64, 1000


def eager(plan: Plan, rates: Rates) -> list[Figure]:
    """Microseconds of a call of the module, one token, under no_grad."""
    figures = []
    for threads, dtype in product(plan.threads, (torch.float32, torch.bfloat16)):
        torch.set_num_threads(threads)
        float_module = nn.Linear(TRIVIAL, TRIVIAL, dtype=dtype)
        x = noise(1, TRIVIAL, dtype)
        modules: dict[str, nn.Module] = {"nn.Linear": float_module}
        for scheme in (Scheme.of("int8"), Scheme.of("int4"), Scheme.of("nf4"), W8A8):
            module = QLinear.from_float(nn.Linear(TRIVIAL, TRIVIAL, dtype=dtype), scheme)
            module.freeze(rtn(module.float_weight().detach(), scheme))
            bias = module.bias
            assert bias is not None
            y = module(x) - bias
            if dtype == torch.float32:  # the difference is exact enough to check
                check_linear(f"QLinear {scheme}", y, x, module.qweight)
            modules[str(scheme)] = module
        turns = {name: partial(_loop, module, x, plan.clock) for name, module in modules.items()}
        samples = take_turns(turns, plan.rounds)
        floats = samples["nn.Linear"]
        for name, seconds in samples.items():
            added = [a - b for a, b in zip(seconds, floats, strict=True)]
            figures.append(
                {
                    "module": name,
                    "x": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    "seconds": summary(seconds),
                    "microseconds": statistics.median(seconds) * 1e6,
                    "microseconds_best": min(seconds) * 1e6,
                    "added_microseconds": statistics.median(added) * 1e6,
                    "added_microseconds_best": (min(seconds) - min(floats)) * 1e6,
                }
            )
    return figures


def _loop(module: nn.Module, x: Tensor, clock: Clock) -> float:
    """Seconds of a call."""
    start = clock()
    for _ in range(CALLS):
        module(x)
    return (clock() - start) / CALLS


# --- quantizing ---


def quantizing(plan: Plan, rates: Rates) -> list[Figure]:
    """algorithms.rtn on float32 weights that come from memory."""
    weight = noise(plan.side, plan.side, torch.float32)
    weights = [weight.clone() for _ in range(count_for(weight.nbytes, plan.cold_bytes))]
    figures = []
    for threads in plan.threads:
        torch.set_num_threads(threads)
        reads = readers(plan, threads)
        for scheme in (G64, Scheme.of("int4"), Scheme.of("int8"), Scheme.of("nf4")):
            _check_rtn(weight[:64], scheme)
            progress(f"quantize: {scheme}, {threads} threads")
            turns = {**reads, "rtn": partial(_quantize_all, weights, scheme, plan.clock)}
            samples = take_turns(turns, plan.few_rounds)
            limit = [min(both) for both in zip(*(samples[r] for r in reads), strict=True)]
            seconds = summary(samples["rtn"])
            gb_s = plan.side**2 * 4 / seconds["median"] / 1e9
            read_gb_s = plan.cold_bytes / statistics.median(limit) / 1e9
            figures.append(
                {
                    "scheme": str(scheme),
                    "threads": threads,
                    "native": native.can_quantize(weight, scheme),
                    "seconds": seconds,
                    "gb_s": gb_s,
                    "gb_s_per_thread": gb_s / threads,
                    "read_gb_s": read_gb_s,
                    "share_of_read": gb_s / read_gb_s,
                }
            )
    return figures


def _quantize_all(weights: list[Tensor], scheme: Scheme, clock: Clock) -> float:
    """Seconds of one weight."""
    start = clock()
    for weight in weights:
        rtn(weight, scheme)
    return (clock() - start) / len(weights)


def _check_rtn(weight: Tensor, scheme: Scheme) -> None:
    """Bit for bit what the torch path computes."""
    expected = QTensor.from_codes(
        quantize(
            weight,
            scheme.format,
            granularity=scheme.granularity,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
        ),
        scheme,
        weight.dtype,
    ).parts
    got = rtn(weight, scheme).parts
    same = expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in got)
    assert same, f"{scheme}: rtn differs from numerics.quantize"


# --- a busy machine ---


class Spinners:
    """One process on every core that wants all of it; stopped until `go`."""

    def __enter__(self) -> Spinners:
        program = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
        self.processes = []
        for core in sorted(os.sched_getaffinity(0)):
            process = subprocess.Popen([sys.executable, "-c", program, str(core)])
            self.processes.append(process)
        time.sleep(0.5)
        self.stop()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def go(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)


def busy(plan: Plan, rates: Rates) -> list[Figure]:
    """Seconds of single calls, idle and busy in turns."""
    figures = []
    weight = quantized(G64, plan.side, plan.side)
    ours = our_calls(copies(weight, count_for(weight.nbytes, plan.cold_bytes))[0])
    sides = {str(G64): (ours, noise(1, plan.side, plan.dtype))}
    for dtype in (torch.bfloat16, torch.float32):
        count = count_for(dtype.itemsize * plan.side**2, plan.cold_bytes)
        calls = torch_calls(plan.side, plan.side, dtype, count)
        sides[f"torch {str(dtype).removeprefix('torch.')}"] = (calls, noise(1, plan.side, dtype))
    for threads in plan.threads:
        progress(f"busy: {threads} threads")
        torch.set_num_threads(threads)
        idle: dict[str, list[float]] = {name: [] for name in sides}
        loaded: dict[str, list[float]] = {name: [] for name in sides}
        with Spinners() as spinners:
            for _ in range(plan.few_rounds):
                for samples, switch in ((idle, spinners.stop), (loaded, spinners.go)):
                    switch()
                    for name, (calls, x) in sides.items():
                        calls[-1](x)
                        samples[name] += [seconds_of(partial(c, x)) for c in calls]
        for name in sides:
            a, b = idle[name], loaded[name]
            figures.append(
                {
                    "operator": name,
                    "threads": threads,
                    "m": 1,
                    "idle_seconds": summary(a),
                    "busy_seconds": summary(b),
                    "ratio": statistics.median(b) / statistics.median(a),
                    "ratio_of_means": statistics.fmean(b) / statistics.fmean(a),
                    "ratio_of_p95": quantile(b, 0.95) / quantile(a, 0.95),
                }
            )
    return figures


# --- held to fewer instructions ---


def held_to(isa: str, plan: Plan, rates: Rates) -> list[Figure]:
    """In a process of its own, which writes its own figures and tables: instruction sets are chosen
    once.
    """
    reason = native.instruction_sets().get(isa, f"the library was built without {isa}")
    if reason is not None:
        print(f"{isa}: {reason}")
        return []
    only = ["--only", "cold", "shapes", "--schemes", "int4", "int8", "nf4", "--tokens", "1", "512"]
    command = [sys.executable, __file__, *sys.argv[1:], *only]
    subprocess.run(command, env=os.environ | HELD_TO[isa], check=True)
    return []


SECTIONS: dict[str, Callable[[Plan, Rates], list[Figure]]] = {
    "ceilings": ceilings,
    "cold": cold,
    "layers": layers,
    "shapes": shapes,
    "eager": eager,
    "quantize": quantizing,
    "busy": busy,
    **{isa: partial(held_to, isa) for isa in HELD_TO},
}


# --- the command ---


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the options ask for."""
    plan = QUICK if args.quick else Plan()
    cores = len(os.sched_getaffinity(0))
    plan = replace(
        plan,
        threads=tuple(args.threads or sorted({1, cores})),
        dtype=getattr(torch, args.dtype),
        tokens=tuple(args.tokens) if args.tokens else plan.tokens,
    )
    if args.cpu_clock:
        plan = replace(plan, threads=(1,), clock=time.thread_time)
    if args.schemes:
        plan = replace(
            plan,
            cold=tuple(s for s in plan.cold if s.format in args.schemes),
            layers=tuple(s for s in plan.layers if s.format in args.schemes),
            shapes=tuple(s for s in plan.shapes if s.format in args.schemes),
        )
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small weights, few rounds: seconds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=SECTIONS)
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and all cores")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="of shapes")
    parser.add_argument("--schemes", nargs="+", choices=FORMATS, metavar="FORMAT")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--cpu-clock", action="store_true", help="one thread; without busy")
    parser.add_argument("--output", type=Path, help="default: bench/results/kernels.jsonl")
    args = parser.parse_args()
    reason = native.why_not()
    if reason is not None:
        sys.exit(reason)
    plan = make_plan(args)
    output = args.output or (None if args.quick else RESULTS / "kernels.jsonl")
    about = circumstances(("torch",)) | {
        "isa": native.instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "clock": "cpu" if args.cpu_clock else "wall",
        "x": args.dtype,
        "side": plan.side,
    }
    rates: Rates = {}
    with torch.no_grad():
        for name in dict.fromkeys(("ceilings", *(s for s in SECTIONS if s in args.only))):
            if name == "busy" and args.cpu_clock:
                continue
            with Watch() as watch:
                figures = SECTIONS[name](plan, rates)
            if not figures:
                continue
            if output is not None:
                lines = [{"section": name} | figure | watch.figures for figure in figures]
                append(output, lines, about)
            columns = COLUMNS[name]
            title = f"{name} ({about['isa']}, torch {about['torch_isa']})"
            rows = [[column(figure) for column in columns.values()] for figure in figures]
            show(title, list(columns), rows)
            print(f"{watch}\n", flush=True)


if __name__ == "__main__":
    main()
