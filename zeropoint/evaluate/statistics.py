"""Statistics on paired per-token measurements. Pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 128  # neighbouring tokens are correlated: resample runs of this many
RESAMPLES = 2000
ROWS_AT_ONCE = 64  # rows of logits widened to float64 at a time


class Interval(NamedTuple):
    """A mean with its 95 % interval; low and high are None when there are too few blocks to
    resample.
    """

    mean: float
    low: float | None
    high: float | None


def block_bootstrap(values: Tensor, *, block: int = BLOCK_TOKENS, seed: int = 0) -> Interval:
    """Mean and 95 % interval by resampling blocks of consecutive values (Kuensch 1989).

    values: (T,) float, in text order. Fewer than 2 blocks give no interval.
    """
    values = values.double().cpu()
    mean = float(values.mean())
    blocks = list(values.split(block))
    if len(blocks) < 2:
        return Interval(mean, None, None)
    sums = torch.stack([b.sum() for b in blocks])
    sizes = torch.tensor([len(b) for b in blocks], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


class TokenDistances(NamedTuple):
    """Per token, (T,) float64 unless said: negative log likelihoods, KL(reference || candidate),
    same top token (bool).
    """

    reference_nll: Tensor
    candidate_nll: Tensor
    kl: Tensor
    same_top: Tensor


def token_distances(reference: Tensor, candidate: Tensor, targets: Tensor) -> TokenDistances:
    """Compare two models' logits for the same tokens. reference, candidate: (T, V) float; targets:
    (T,) int.

    KL = sum_v p_v (log p_v - log q_v), in float64, a few rows at a time.
    """
    parts = [
        _distances(r, c, t)
        for r, c, t in zip(
            reference.split(ROWS_AT_ONCE),
            candidate.split(ROWS_AT_ONCE),
            targets.split(ROWS_AT_ONCE),
            strict=True,
        )
    ]
    return TokenDistances(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _distances(reference: Tensor, candidate: Tensor, targets: Tensor) -> TokenDistances:
    p = reference.double().log_softmax(-1)
    q = candidate.double().log_softmax(-1)
    index = targets.unsqueeze(-1)
    return TokenDistances(
        reference_nll=-p.gather(-1, index).squeeze(-1),
        candidate_nll=-q.gather(-1, index).squeeze(-1),
        kl=(p.exp() * (p - q)).sum(-1),
        same_top=reference.argmax(-1) == candidate.argmax(-1),
    )


def rank_agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation: Pearson's, of the ranks (ties share their mean rank). a, b: (n,)
    float, n >= 2.
    """
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[inverse]
    return ranks
