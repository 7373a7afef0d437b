"""The proof: how far a model's answers are from the original's, on the same text.

Both models see one window at a time and nothing is stored but one number per token, so the cost in
memory is the two models. Distances are computed in float64 from each model's own logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import NonFiniteError, SourceError, TextError
from zeropoint.evaluate.footprint import footprint
from zeropoint.evaluate.statistics import (
    Interval,
    TokenDistances,
    block_bootstrap,
    rank_agreement,
    token_distances,
)
from zeropoint.evaluate.text import evaluation_text, fingerprint
from zeropoint.model.load import load
from zeropoint.progress import OnStep, no_progress

MAX_SENTENCES = 256
SENTENCE_TOKENS = 128  # longer paragraphs are cut


class Comparison(ABC):
    """Result of `compare`: a LanguageComparison or an EncoderComparison."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint compare --json` writes it."""


@dataclass(frozen=True, kw_only=True)
class LanguageComparison(Comparison):
    """Two language models on the same tokens.

    delta_nll: candidate's minus reference's negative log likelihood, nats per token, paired, 95 %
    block bootstrap. kl_*: KL(reference || candidate) over tokens, nats. top1_agreement: share of
    tokens with the same likeliest token.
    text: fingerprint of the text.
    """

    tokens: int
    text: str
    reference_perplexity: float
    reference_bytes: int
    candidate_perplexity: float
    candidate_bytes: int
    candidate_bits_per_weight: float
    delta_nll: Interval
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "language-model",
            "tokens": self.tokens,
            "text": self.text,
            "reference": {"perplexity": self.reference_perplexity, "bytes": self.reference_bytes},
            "candidate": {
                "perplexity": self.candidate_perplexity,
                "bytes": self.candidate_bytes,
                "bits_per_weight": self.candidate_bits_per_weight,
            },
            "delta_nll": self.delta_nll._asdict(),
            "kl": {
                "mean": self.kl_mean,
                "median": self.kl_median,
                "p99": self.kl_p99,
                "max": self.kl_max,
            },
            "top1_agreement": self.top1_agreement,
        }

    def __str__(self) -> str:
        d = self.delta_nll
        interval = (
            "" if d.low is None or d.high is None else f" (95 %: {d.low:+.4f} to {d.high:+.4f})"
        )
        return (
            f"{self.tokens} tokens: perplexity {self.reference_perplexity:.3f} -> "
            f"{self.candidate_perplexity:.3f}, delta NLL {d.mean:+.4f}{interval}\n"
            f"KL mean {self.kl_mean:.4f}, median {self.kl_median:.4f}, p99 {self.kl_p99:.4f}, "
            f"max {self.kl_max:.4f}; top-1 agreement {self.top1_agreement:.1%}\n"
            f"{self.reference_bytes / 1e6:,.1f} MB -> {self.candidate_bytes / 1e6:,.1f} MB, "
            f"{self.candidate_bits_per_weight:.2f} bits per weight"
        )


@dataclass(frozen=True, kw_only=True)
class EncoderComparison(Comparison):
    """Two encoders on the same sentences, by their mean-pooled embeddings.

    cosine_*: between the two embeddings of a sentence. rank_agreement: Spearman's correlation of
    the similarities of all pairs of sentences. text: fingerprint of the text.
    """

    sentences: int
    text: str
    reference_bytes: int
    candidate_bytes: int
    candidate_bits_per_weight: float
    cosine_mean: float
    cosine_p01: float
    rank_agreement: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "encoder",
            "sentences": self.sentences,
            "text": self.text,
            "reference": {"bytes": self.reference_bytes},
            "candidate": {
                "bytes": self.candidate_bytes,
                "bits_per_weight": self.candidate_bits_per_weight,
            },
            "cosine": {"mean": self.cosine_mean, "p01": self.cosine_p01},
            "rank_agreement": self.rank_agreement,
        }

    def __str__(self) -> str:
        return (
            f"{self.sentences} sentences: cosine mean {self.cosine_mean:.5f}, 1st percentile "
            f"{self.cosine_p01:.5f}; rank agreement of pairwise similarities "
            f"{self.rank_agreement:.5f}\n"
            f"{self.reference_bytes / 1e6:,.1f} MB -> {self.candidate_bytes / 1e6:,.1f} MB, "
            f"{self.candidate_bits_per_weight:.2f} bits per weight"
        )


def compare(
    reference: str | Path | nn.Module,
    candidate: str | Path | nn.Module,
    text: str | None = None,
    *,
    tokenizer: Any = None,
    tokens: int = 12288,
    window: int = 512,
    on_step: OnStep = no_progress,
) -> Comparison:
    """Measure what separates `candidate` from `reference` on `text`.

    reference, candidate: sources as `zp.load` takes them, or models in memory (then `tokenizer` is
    needed).
    text: by default the evaluation half of `pydoc_data.topics`. tokens: at most so many of its
    first tokens, in windows of `window` that do not overlap; a window of L tokens gives L - 1
    predictions. An encoder-decoder reads the first half of each window and predicts the second.
    Encoders are compared by the embeddings of the text's paragraphs.
    Raises SourceError (no tokenizer, vocabularies differ, a model that is neither), TextError (too
    little text), NonFiniteError (a model answers with NaN or Inf: its activations overflow).
    """
    if min(window, tokens) < 4:
        raise TextError(f"tokens={tokens}, window={window}: comparing needs at least 4 of each")
    on_step("loading the reference", 0, 2)
    first, tokenizer = _loaded(reference, tokenizer)
    on_step("loading the candidate", 1, 2)
    second, tokenizer = _loaded(candidate, tokenizer)
    if tokenizer is None:
        raise SourceError("neither model comes with a tokenizer; pass tokenizer=")
    text = evaluation_text() if text is None else text
    was_training = [(m, m.training) for m in (first, second)]
    try:
        first.eval(), second.eval()
        with torch.no_grad():
            if kind_of(first) == "encoder":
                return _compare_encoders(first, second, tokenizer, text, on_step)
            return _compare_language(first, second, tokenizer, text, tokens, window, on_step)
    finally:
        for model, training in was_training:
            model.train(training)


def _loaded(source: str | Path | nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    if isinstance(source, nn.Module):
        return source, tokenizer
    model, found = load(source)
    return model, tokenizer if tokenizer is not None else found


def kind_of(model: Any) -> str:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "encoder-decoder"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return "encoder" if head is None else "decoder"


# --- language models ---


def _compare_language(
    reference: nn.Module,
    candidate: nn.Module,
    tokenizer: Any,
    text: str,
    tokens: int,
    window: int,
    on_step: OnStep,
) -> LanguageComparison:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    windows = [w for w in ids[:tokens].split(window) if len(w) >= 4]
    if not windows:
        raise TextError(f"the text has {len(ids)} tokens; comparing needs at least 4")
    parts = []
    for done, piece in enumerate(windows):
        on_step("comparing", done, len(windows))
        a, targets = logits_of(reference, piece)
        b, _ = logits_of(candidate, piece)
        for role, logits in (("reference", a), ("candidate", b)):
            check_answer(role, "logits", logits, f"tokens from {done * window} on")
        if a.shape != b.shape:
            raise SourceError(
                f"vocabularies differ: the reference has {a.shape[-1]} logits, the candidate "
                f"{b.shape[-1]}"
            )
        parts.append(token_distances(a, b.to(a.device), targets.to(a.device)))
    on_step("comparing", len(windows), len(windows))
    d = TokenDistances(*(torch.cat(column) for column in zip(*parts, strict=True)))
    size = footprint(candidate)
    return LanguageComparison(
        tokens=len(d.kl),
        text=fingerprint(text),
        reference_perplexity=float(d.reference_nll.mean().exp()),
        reference_bytes=footprint(reference).total_bytes,
        candidate_perplexity=float(d.candidate_nll.mean().exp()),
        candidate_bytes=size.total_bytes,
        candidate_bits_per_weight=size.bits_per_weight,
        delta_nll=block_bootstrap(d.candidate_nll - d.reference_nll),
        kl_mean=float(d.kl.mean()),
        kl_median=float(d.kl.median()),
        kl_p99=float(d.kl.quantile(0.99)),
        kl_max=float(d.kl.max()),
        top1_agreement=float(d.same_top.double().mean()),
    )


def logits_of(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and the tokens they predict (T,)."""
    ids = ids.to(_device(model)).unsqueeze(0)
    if kind_of(model) == "encoder-decoder":
        half = ids.shape[1] // 2
        output = model(input_ids=ids[:, :half], decoder_input_ids=ids[:, half:])
        return output.logits[0, :-1], ids[0, half + 1 :]
    return model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]


def check_answer(role: str, what: str, values: Tensor, where: str) -> None:
    """Raises NonFiniteError. values: (T, ...), one row for each token."""
    broken = int((~torch.isfinite(values)).flatten(1).any(1).sum())
    if not broken:
        return
    limit = torch.finfo(values.dtype).max
    remedy = (
        "load it with dtype='bfloat16' or 'float32'"
        if values.dtype == torch.float16
        else "look for the module whose output overflows, or for a spoiled norm or bias"
    )
    raise NonFiniteError(
        f"the {role}'s {what} are NaN or Inf for {broken} of the {len(values)} {where}: something "
        f"it computes does not fit {str(values.dtype).removeprefix('torch.')}, whose largest value "
        f"is {limit:.6g}; {remedy}"
    )


def _device(model: nn.Module) -> torch.device:
    return next(t.device for t in (*model.parameters(), *model.buffers()))


# --- encoders ---


def _compare_encoders(
    reference: nn.Module, candidate: nn.Module, tokenizer: Any, text: str, on_step: OnStep
) -> EncoderComparison:
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    sentences = [p for p in dict.fromkeys(paragraphs) if len(p.split()) >= 4][:MAX_SENTENCES]
    if len(sentences) < 3:
        raise TextError(
            f"the text has {len(sentences)} paragraphs of four words or more; comparing encoders "
            "needs at least 3"
        )
    pairs = []
    for done, sentence in enumerate(sentences):
        on_step("comparing", done, len(sentences))
        models = (("reference", reference), ("candidate", candidate))
        pairs.append([_embedding(role, m, tokenizer, sentence) for role, m in models])
    on_step("comparing", len(sentences), len(sentences))
    a = torch.stack([pair[0] for pair in pairs])
    b = torch.stack([pair[1] for pair in pairs])
    cosine = (a * b).sum(-1)
    upper = torch.ones(len(a), len(a)).triu(1).bool()
    size = footprint(candidate)
    return EncoderComparison(
        sentences=len(sentences),
        text=fingerprint(text),
        reference_bytes=footprint(reference).total_bytes,
        candidate_bytes=size.total_bytes,
        candidate_bits_per_weight=size.bits_per_weight,
        cosine_mean=float(cosine.mean()),
        cosine_p01=float(cosine.quantile(0.01)),
        rank_agreement=rank_agreement((a @ a.T)[upper], (b @ b.T)[upper]),
    )


def _embedding(role: str, model: Any, tokenizer: Any, sentence: str) -> Tensor:
    """Mean of the last hidden states, normalised. Returns (K,) float64. Raises NonFiniteError."""
    inputs = tokenizer(sentence, truncation=True, max_length=SENTENCE_TOKENS, return_tensors="pt")
    output = model(**inputs.to(_device(model)))
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise SourceError(
            f"{type(model).__name__} gives neither token logits nor hidden states; compare "
            "supports language models, "
            "encoder-decoders and encoders"
        )
    check_answer(role, "hidden states", hidden[0], f"tokens of {sentence[:40]!r}")
    mean: Tensor = hidden[0].double().mean(0).cpu()
    unit: Tensor = mean / mean.norm()
    return unit
