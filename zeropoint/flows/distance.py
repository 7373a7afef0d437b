"""How far a model's answer is from another's, as a loss to train by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zeropoint.errors import StateError
from zeropoint.model.capture import Batch, kept_tokens, tokens_of

CHUNK_ELEMENTS = 1 << 24  # of logits at a time: 64 MB of float32


def distance(answer: Any, target: Any, batch: Batch) -> Tensor:
    """Mean Kullback-Leibler divergence of the answer's distribution from the target's, in nats; of
    answers without logits |answer - target|^2 / |target|^2. Padding does not count. Returns ().

    answer, target: outputs of a model for the batch. Raises StateError when their shapes differ.
    """
    (ours, logits), (theirs, _) = answer_of(answer), answer_of(target)
    if ours.shape != theirs.shape:
        raise StateError(
            f"the model answers {tuple(ours.shape)} and its teacher {tuple(theirs.shape)}; they "
            "have to be of one kind and vocabulary"
        )
    keep = kept_tokens(batch)
    ours, theirs = tokens_of(ours, keep), tokens_of(theirs, keep)
    if logits:
        divergence: Tensor = _Divergence.apply(ours, theirs)  # type: ignore[no-untyped-call]
        return divergence
    theirs = theirs.float()
    return (ours.float() - theirs).square().sum() / theirs.square().sum()


def answer_of(output: Any) -> tuple[Tensor, bool]:
    """The tensor of an output that is compared, and whether it holds logits."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, True
    if isinstance(output, Tensor):
        return output, False
    first: Tensor = output[0]
    return first, False


class _Divergence(torch.autograd.Function):
    """mean over tokens of sum_v q_v (log q_v - log p_v); its gradient with respect to the logits is
    (p - q) / tokens. A few tokens at a time: distributions take as much memory as the logits.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        total = ours.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(ours) if ours.requires_grad else None
        rows = max(1, CHUNK_ELEMENTS // ours.shape[-1])
        for start in range(0, len(ours), rows):
            part = slice(start, start + rows)
            log_p = torch.log_softmax(ours[part].float(), dim=-1)
            log_q = torch.log_softmax(theirs[part].float(), dim=-1)
            q = log_q.exp()
            total += (q * (log_q - log_p)).sum()
            if gradient is not None:
                gradient[part] = (log_p.exp_() - q) / len(ours)
        ctx.save_for_backward(gradient)
        return total / len(ours)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None
