"""What bench/kernels.py compares: random weights, calls on copies of them, and the ceilings."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from _common import Figure, seconds_of, speedup, summary, take_turns
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from zeropoint import native
from zeropoint.algorithms.rtn import rtn
from zeropoint.kernels.select import choose
from zeropoint.kernels.spec import Spec
from zeropoint.numerics import FORMATS
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

G64 = Scheme.of("int4", group_size=64, symmetric=True)
W8A8 = Scheme.of("int8", activations="int8")
W4A8 = Scheme.of("int4", activations="int8")
COLD = (
    G64,
    Scheme.of("int4", group_size=64, symmetric=False),
    Scheme.of("int4", group_size=32),
    Scheme.of("int8"),
    Scheme.of("nf4"),
    Scheme.of("float8_e4m3fn"),
    Scheme.of("int2", group_size=32),
    Scheme.of("int3", group_size=64),
    Scheme.of("int5"),
    Scheme.of("int6"),
)
LAYERS = (Scheme.of("int4"), Scheme.of("int8"), Scheme.of("nf4"))
SMOLLM2 = ((192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576))  # (N, K)
SHAPES = (*(Scheme.of(name) for name in FORMATS), G64, W8A8, W4A8)  # but for what torch multiplies
CEILINGS = ("float32", "int8", "bfloat16")  # zp_peak_operations counts them from 0
PEAK_SECONDS = 0.03  # that one sample of a ceiling takes
FEW_TOKENS = 16  # up to here a weight is read faster than it is used, so it must come from memory
Call = Callable[[Tensor], Any]
Clock = Callable[[], float]
Rates = dict[tuple[str, int], float]  # (ceiling, threads) -> bytes or operations a second


@dataclass(frozen=True, kw_only=True)
class Plan:
    """side: N = K of every weight. cold_bytes: of weights walked over before one is used again.
    rounds: of what takes milliseconds; few_rounds: of what takes longer. clock: seconds.
    """

    side: int = 4096
    cold_bytes: int = 512 << 20
    rounds: int = 20
    few_rounds: int = 5
    threads: tuple[int, ...] = (1, 2)
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 512, 1024)
    cold: tuple[Scheme, ...] = COLD
    layers: tuple[Scheme, ...] = LAYERS
    shapes: tuple[Scheme, ...] = SHAPES
    dtype: torch.dtype = torch.bfloat16  # of our x; torch's x has the dtype of its weight
    clock: Clock = time.perf_counter


QUICK = Plan(
    side=2048,
    cold_bytes=64 << 20,
    rounds=5,
    few_rounds=3,
    tokens=(1, 8, 128),
    cold=COLD[:5],
    shapes=(*COLD[:5], W8A8),
)


# --- sides ---


def noise(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def why_no_kernel(scheme: Scheme, n: int, k: int) -> str | None:
    """Why the native kernel does not multiply such a weight (n, k), or None."""
    choice = choose(Spec(op="linear", scheme=scheme, shape=(n, k), device="cpu"))
    return None if choice.kernel == "native" else choice.refused["native"]


def quantized(scheme: Scheme, n: int, k: int) -> QTensor:
    """A random weight (n, k) that the native kernel takes. It has outliers, as models have: beside
    them a few weights in 10000 are subnormal float8.
    """
    why = why_no_kernel(scheme, n, k)
    if why is not None:
        sys.exit(f"{scheme}: {why}")
    weight = noise(n, k, torch.float32)
    weight[:, ::512] *= 8
    return rtn(weight, scheme)


def copies(weight: QTensor, count: int) -> tuple[list[QTensor], Tensor]:
    """The same weight at `count` places of one stretch of memory, and that stretch as bytes."""
    sizes = [-part.nbytes // 64 * -64 for part in weight.parts.values()]
    memory = torch.zeros(count * sum(sizes), dtype=torch.uint8)
    places = iter(memory.split(sizes * count))

    def placed(part: Tensor) -> Tensor:
        return next(places)[: part.nbytes].view(part.dtype).view(part.shape).copy_(part)

    names = [suffix.lstrip("_") or "packed" for suffix in weight.parts]
    made = []
    for _ in range(count):
        parts = map(placed, weight.parts.values())
        made.append(replace(weight, **dict(zip(names, parts, strict=True))))
    return made, memory


def our_calls(weights: Sequence[QTensor]) -> list[Call]:
    """x -> y for each weight."""
    bound = [native.bind_linear(weight) for weight in weights]
    return [lambda x, call=call: call(x, None) for call in bound]


def torch_calls(n: int, k: int, dtype: torch.dtype, count: int) -> list[Call]:
    """x -> y of F.linear for `count` copies of a weight (n, k)."""
    weight = noise(n, k, dtype)
    weights = [weight.clone() for _ in range(count)]
    return [lambda x, w=w: dense_linear(x, w) for w in weights]


def walk(calls: Sequence[Call], x: Tensor, clock: Clock) -> float:
    """Seconds of a call, each on the next copy. Where there are copies, the first is used only to
    wake the threads, and does not count.
    """
    if len(calls) > 1:
        calls[0](x)
        calls = calls[1:]
    start = clock()
    for call in calls:
        call(x)
    return (clock() - start) / len(calls)


def count_for(nbytes: int, cold_bytes: int) -> int:
    """Copies of `nbytes` that fill `cold_bytes`, and one to wake the threads with (`walk`)."""
    return math.ceil(cold_bytes / nbytes) + 1


# --- ceilings ---


def reader(memory: Tensor, threads: int, clock: Clock) -> Callable[[], float]:
    """Seconds to read it the library's own way."""
    read = partial(native._library().zp_read_bytes, memory.data_ptr(), memory.nbytes, threads)
    return partial(seconds_of, read, clock)


def readers(plan: Plan, threads: int) -> dict[str, Callable[[], float]]:
    """Seconds to read cold_bytes: the library's own way, and torch's."""
    buffer = torch.ones(plan.cold_bytes // 4)
    return {
        "read": reader(buffer, threads, plan.clock),
        "read by torch.sum": partial(seconds_of, buffer.sum, plan.clock),
    }


def operations(what: int, repeats: int, threads: int) -> float:
    """Operations that zp_peak_operations does; 0 where this instruction set has none."""
    done: float = native._library().zp_peak_operations(what, repeats, threads)
    return done


def peaks(plan: Plan, threads: int) -> dict[str, tuple[float, Callable[[], float]]]:
    """Of each kind that there are units for: so many operations, and the seconds that they take."""
    found = {}
    for what, name in enumerate(CEILINGS):
        if operations(what, 1, 1):
            trial = seconds_of(partial(operations, what, 100_000, 1), plan.clock)
            repeats = int(100_000 * PEAK_SECONDS / trial)
            work = partial(operations, what, repeats, threads)
            found[name] = (work(), partial(seconds_of, work, plan.clock))
    return found


def ceilings(plan: Plan, rates: Rates) -> list[Figure]:
    """Fills `rates`."""
    figures = []
    for threads in plan.threads:
        torch.set_num_threads(threads)
        turns = readers(plan, threads)
        amounts: dict[str, float] = dict.fromkeys(turns, plan.cold_bytes)
        rates |= {(name, threads): 0.0 for name in CEILINGS}
        for name, (amount, turn) in peaks(plan, threads).items():
            amounts[name], turns[name] = amount, turn
        for name, samples in take_turns(turns, plan.rounds).items():
            rate = amounts[name] / statistics.median(samples)
            rates[name, threads] = rate
            figures.append(
                {
                    "ceiling": name,
                    "threads": threads,
                    "seconds": summary(samples),
                    "giga_per_second": rate / 1e9,
                    "giga_per_second_best": amounts[name] / min(samples) / 1e9,
                }
            )
    return figures


def shares(
    done: float, name: str, samples: Mapping[str, Sequence[float]], amounts: Mapping[str, float]
) -> Figure:
    """GFLOP/s of a side that does so many operations, and what part of each ceiling that is, which
    took turns with it and does `amounts` (None: no such units).
    """
    row: Figure = {"gflops": done / statistics.median(samples[name]) / 1e9}
    for ceiling in CEILINGS:
        row[f"share_of_{ceiling}"] = (
            done / amounts[ceiling] * speedup(samples[name], samples[ceiling])
            if ceiling in amounts
            else None
        )
    return row
