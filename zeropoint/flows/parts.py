"""The parts of a job: the blocks of its model, and what is in none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from zeropoint.flows.job import Job
from zeropoint.model import capture
from zeropoint.nn import QModule


def chains_of(job: Job, skeleton: nn.Module) -> list[dict[str, list[str]]]:
    """Of each chain, the names of the weights and tensors in each block, by the block's name.

    skeleton: the frozen model of the job.
    """
    quantized = [m for m in skeleton.modules() if isinstance(m, QModule)]
    names = (*job.contents.qweights, *job.contents.tensors)
    return [
        {block: [n for n in names if n.startswith(f"{block}.")] for block in blocks}
        for blocks in capture.chains(skeleton, quantized).values()
    ]


def is_embedding(skeleton: nn.Module, name: str) -> bool:
    """Whether a quantized weight is looked up, not multiplied."""
    module = skeleton.get_submodule(name.removesuffix(".weight"))
    return isinstance(module, QModule) and module.role == "embedding"


def elements_of(job: Job, names: Iterable[str]) -> int:
    """As many as the files hold of these."""
    sources = (job.sources.get(name) for name in names)
    return sum(torch.Size(s.shape).numel() for s in sources if s is not None)
