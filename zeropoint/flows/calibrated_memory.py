"""The most memory that calibrating block by block takes, from shapes alone.

max over phases:  what lies there meanwhile + the search or solve of the largest weight
"""

from __future__ import annotations

from torch import nn

from zeropoint.algorithms import Algorithm
from zeropoint.algorithms.gptq import ROW_ELEMENTS
from zeropoint.algorithms.search import LARGE_ELEMENTS
from zeropoint.flows.calibrate import DRIFT_EVERY, TOGETHER_ELEMENTS
from zeropoint.flows.data import Calibration
from zeropoint.flows.job import Job
from zeropoint.flows.parts import chains_of, elements_of, is_embedding
from zeropoint.model.passage import KEPT_BYTES

FLOAT = 4  # bytes of float32, in which blocks, hidden states and solves are
# Measured on blocks of K = 1024 to 8192 columns: float32 copies of what they are of.
SEARCH_COPIES = 2.7  # of the rows that are searched at a time
CHUNK_COPIES = 17  # of the rows that are solved at a time
WEIGHT_COPIES = 1.5  # of the whole weight meanwhile
JUDGED_COPIES = 8.7  # of the whole weight when its error is measured, some of them in float64
HESSIAN_BYTES = 14  # for each of K * K: three copies in float32, and what a factorization leaves
UNSEEN_BYTES = 4  # the same of a Hessian to judge by
DRIFT_BYTES = 8  # the same of the drift of inputs, of all but the layers that run last in a block


def calibrated_bytes(
    job: Job, skeleton: nn.Module, algorithm: Algorithm, how: Calibration, others: int
) -> int:
    """Beside what the process has before it begins. skeleton: the frozen model of the job. others:
    bytes of weights and tensors that are read and written weight by weight in the end.
    """
    qweights = job.contents.qweights
    blocks = [names for chain in chains_of(job, skeleton) for names in chain.values()]
    inside = {name for names in blocks for name in names}
    outside = [name for name in job.sources if name not in inside]
    embeddings = [n for n in outside if n in qweights and is_embedding(skeleton, n)]
    heads = [n for n in outside if n in qweights and n not in embeddings]
    codes = sum(qweights[n].nbytes for n in embeddings)
    floats = sum(job.sources[n].nbytes for n in outside)
    later = floats - sum(job.sources[n].nbytes for n in embeddings)
    states = FLOAT * how.tokens * _width(skeleton)
    hessian = HESSIAN_BYTES + (UNSEEN_BYTES if algorithm.needs == "unseen inputs" else 0)

    def solve(weights: list[str]) -> float:
        by_columns: dict[int, list[int]] = {}
        for name in weights:
            n, k = qweights[name].shape
            by_columns.setdefault(k, []).append(n * k)
        last = max(by_columns, default=0)
        return max(
            (
                _solve(k, sizes, hessian + (DRIFT_BYTES if how.propagate and k < last else 0))
                for k, sizes in by_columns.items()
            ),
            default=0.0,
        )

    largest = max((elements_of(job, [n]) for n in embeddings), default=0)
    phases = [
        others,
        floats + codes + SEARCH_COPIES * FLOAT * min(largest, LARGE_ELEMENTS),
        codes + later + states + solve(heads),
    ]
    originals = bool(how.propagate)
    for names in blocks:
        block = FLOAT * elements_of(job, names) * (1 + originals)
        matrices = [n for n in names if n in qweights and len(qweights[n].shape) == 2]
        both = 2 * states + originals * states / DRIFT_EVERY
        widest = FLOAT * how.tokens * max((qweights[n].shape[1] for n in matrices), default=0)
        parts = min(KEPT_BYTES, states + widest)  # of an attention and a feed-forward network
        before = originals * min(KEPT_BYTES, states / DRIFT_EVERY)
        phases.append(codes + later + both + parts + before + block + solve(matrices))
    return int(max(phases))


def _solve(columns: int, sizes: list[int], hessian_bytes: int) -> float:
    """Of weights with as many columns. Small ones that share an input are solved together."""
    together = sum(size for size in sizes if size <= TOGETHER_ELEMENTS)
    largest = max(*sizes, min(together, ROW_ELEMENTS))
    working = WEIGHT_COPIES * largest + CHUNK_COPIES * min(largest, ROW_ELEMENTS)
    return hessian_bytes * columns**2 + FLOAT * max(working, JUDGED_COPIES * largest)


def _width(skeleton: nn.Module) -> int:
    """Of hidden states; 0 for a model whose configuration does not say."""
    config = getattr(skeleton, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    return int(getattr(text, "hidden_size", None) or 0)
