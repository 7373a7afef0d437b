"""Is a checkpoint the quantization of this float model? Tensor by tensor, in the memory of one.

    |W - image| <= factor * |W - nearest|

nearest: W rounded to nearest by the same scheme, on the grid that spans its range. Algorithms
without data are judged block by block (the values that share a scale), those that feed errors
forward by whole weights; what they balance is undone first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zeropoint.algorithms.rtn import rtn
from zeropoint.checkpoints import native
from zeropoint.checkpoints.floats import Stored, read_headers
from zeropoint.errors import SourceError, StreamError, ZeropointError
from zeropoint.flows.job import Job, local_folder, outline
from zeropoint.model.load import float_counterpart
from zeropoint.model.pages import drop_pages
from zeropoint.model.source import resolve
from zeropoint.nn.inputs import INPUT_PARTS
from zeropoint.numerics import blocked
from zeropoint.progress import OnStep, no_progress
from zeropoint.qtensor import QTensor

CHUNK_ELEMENTS = 1 << 24  # of a weight at a time: 64 MB of float32
FITS = 4  # rows and columns hardly depend on each other: each halves what is left many times
FLOAT_ERROR = 2.0**-20  # of sums of squares in float32, and of an image rounded to float32


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How far an algorithm's codes may be from the source. factor: of the error of rounding to
    nearest. blocks: in every block, not only over the whole weight. balanced: channels may have
    been scaled and the modules before them by the inverse, so a positive factor for every row and
    every column is fitted first, and vectors (norms, biases) may differ.
    """

    factor: float
    blocks: bool
    balanced: bool


# A block by `rtn` is what it is compared with, and `mse` has the least squared error of several
# grids, that one among them: 1, and a hundredth for what other machines round differently. `hqq`
# moves float zero points, counts outliers less than squares do, and so loses more in some blocks:
# up to 1.08 on weights of MiniLM and SmolLM2, 1.12 on random ones with heavy tails in groups of 16.
# Whole weights of MiniLM in int8, int4 and int2: `gptq` 0.99 to 1.67, `auto` 0.99 to 1.82.
FED_FORWARD = Limit(factor=3.0, blocks=False, balanced=True)
LIMITS = {
    "rtn": Limit(factor=1.01, blocks=True, balanced=False),
    "mse": Limit(factor=1.01, blocks=True, balanced=False),
    "hqq": Limit(factor=1.25, blocks=True, balanced=False),
    "gptq": FED_FORWARD,
    "auto": FED_FORWARD,
}


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """What a comparison with the source found. compared: weights and tensors. largest_error:
    |W - image| / |W| of the weight where it is largest, and its name; 0 and None when nothing is
    quantized. balanced: vectors that differ because channels were balanced; they are not judged.
    """

    problems: tuple[str, ...]
    compared: int
    largest_error: float
    largest_error_of: str | None
    balanced: tuple[str, ...]


def likeness(path: Path, source: str | Path, *, on_step: OnStep = no_progress) -> Likeness:
    """Compare a native checkpoint, which has been verified, with the float model it was made of.

    Raises SourceError (no such source), StreamError (its tensors have other names or shapes in the
    files than in the model), CheckpointError.
    """
    folder = local_folder(resolve(source))
    stored = read_headers(folder)
    contents = native.read_verified(path)
    skeleton = float_counterpart(path, contents.config, None)
    try:
        job = outline(folder, skeleton, stored, {}, recipe=contents.recipe, strict=False)
    except StreamError as e:
        raise StreamError(f"{path} cannot be compared tensor by tensor: {e}") from e
    except SourceError as e:
        return Likeness(
            problems=(f"{path} is not of {source}: {e}",),
            compared=0,
            largest_error=0.0,
            largest_error_of=None,
            balanced=(),
        )
    return _compare(contents, job, on_step)


def _compare(contents: native.Contents, job: Job, on_step: OnStep) -> Likeness:
    limit = limit_of(contents.algorithm)
    problems = list(_unpaired(contents, job))
    errors: dict[str, float] = {}
    balanced = []
    names = (*contents.qweights, *contents.tensors)
    compared = 0
    for done, name in enumerate(names):
        on_step(name, done, len(names))
        values = _source_of(name, job)
        if values is None:
            continue
        compared += 1
        weight = contents.qweights.get(name)
        if weight is not None:
            matrix = values.t() if name in job.transposed else values
            errors[name], problem = _judged(name, weight, matrix, limit)
            problems += [] if problem is None else [problem]
        elif not _equal(contents.tensors[name], values):
            if limit.balanced and values.dim() == 1:
                balanced.append(name)
            else:
                problems.append(f"{name} was not quantized, and differs from the source's")
        for tensor in (values, *_parts(contents, name)):
            drop_pages(tensor)
    worst = max(errors, key=errors.__getitem__, default=None)
    return Likeness(
        problems=tuple(problems),
        compared=compared,
        largest_error=errors[worst] if worst is not None else 0.0,
        largest_error_of=worst,
        balanced=tuple(balanced),
    )


def limit_of(algorithm: str | None) -> Limit:
    """The limit for codes that were chosen by an algorithm; None or another library's: any."""
    return LIMITS.get(algorithm or "", FED_FORWARD)


def _unpaired(contents: native.Contents, job: Job) -> Iterator[str]:
    """What one has and the other has not. Tensors of the source that the model does not have may be
    missing: a model that was quantized in memory never saw them.
    """
    there = {*contents.qweights, *contents.tensors, *contents.tied}
    expected = {*job.contents.qweights, *job.contents.tensors, *job.contents.tied}
    ranges = {
        f"{name.removesuffix('weight')}{part}"
        for name in (*contents.qweights, *contents.tied)
        for part in INPUT_PARTS
    }
    for name in sorted(expected - there - {*job.contents.carried}):
        yield f"{name} is in the source, but not in the checkpoint"
    for name in sorted(there - expected - ranges):
        yield f"{name} is in the checkpoint, but not in the source"


def _source_of(name: str, job: Job) -> Tensor | None:
    """The tensor of the source, or that the model computes; None where there is neither."""
    stored: Stored | None = job.sources.get(job.contents.tied.get(name, name))
    if stored is not None:
        return stored.read()
    computed = job.contents.tensors.get(name)
    return None if computed is None or computed.is_meta else computed


def _parts(contents: native.Contents, name: str) -> list[Tensor]:
    weight = contents.qweights.get(name)
    return [contents.tensors[name]] if weight is None else list(weight.parts.values())


def _equal(ours: Tensor, values: Tensor) -> bool:
    """Bit by bit, in the dtype of ours."""
    if ours.shape != values.shape:
        return False
    pair = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, values.to(ours.dtype)))
    return torch.equal(*pair)


# --- one weight ---


def _judged(name: str, weight: QTensor, values: Tensor, limit: Limit) -> tuple[float, str | None]:
    """|W - image| / |W|, and what is wrong with it, or None. values: W, (N, K) float."""
    if values.shape != weight.shape:
        return math.inf, f"{name} is {tuple(weight.shape)}, in the source {tuple(values.shape)}"
    cast = values.to(weight.dtype)
    # Whether codes are chosen before or after a cast of the model is up to whoever made it.
    starts = (values,) if cast.dtype == values.dtype else (values, cast)
    try:
        judged = [_distance(weight, start, limit) for start in starts]
    except ZeropointError as e:
        return math.inf, f"{name}: the source's cannot be quantized: {e}"
    relative, where = min(judged, key=lambda found: found[1] is not None)
    if where is None:
        return relative, None
    return relative, (
        f"{where}{name} is further from the source's than {weight.scheme} brings it: "
        f"{relative:.2%} of the weight is lost"
    )


def _distance(weight: QTensor, values: Tensor, limit: Limit) -> tuple[float, str | None]:
    """|W - image| / |W|, and which block is too far away, empty for all of it; None: none is."""
    # Which blocks gain and which lose when scales are rounded to 8 bits afterwards is chance.
    by_blocks = limit.blocks and not weight.scheme.double_quant
    total = torch.zeros(3, dtype=torch.float64)
    worst: tuple[float, str | None] = (0.0, None)
    for start, squares in _squares(weight, values, limit):
        total += squares.double().flatten(1).sum(1)
        excess = _excess(squares, limit.factor)
        if by_blocks and excess.max() > worst[0]:
            row, group = divmod(int(excess.argmax()), excess.shape[1])
            worst = float(excess.max()), f"block [{start + row}, {group}] of "
    if not by_blocks and _excess(total, limit.factor) > 0:
        worst = float(_excess(total, limit.factor)), ""
    error, _, size = total.sqrt().tolist()
    return error / size if size else float(error > 0), worst[1]


def _excess(squares: Tensor, factor: float) -> Tensor:
    """How much of an error is not allowed; positive is too much. squares: (3, ...) as `_squares`
    has them.
    """
    error, nearest, size = squares.sqrt().unbind()
    return error - factor * nearest - FLOAT_ERROR * size


def _squares(weight: QTensor, values: Tensor, limit: Limit) -> Iterator[tuple[int, Tensor]]:
    """Sums of squares over blocks, for some rows of blocks at a time: (3, R, G) of W - image,
    W - nearest and W. Yields the first row with them.
    """
    scheme = weight.scheme
    n = weight.shape[0]
    w = _balanced_as(weight, values) if limit.balanced else values
    nearest = rtn(w, scheme.stored)
    rows = max(1, CHUNK_ELEMENTS * n // max(1, weight.shape.numel()))
    if scheme.granularity == "tensor" or len(weight.shape) != 2 or rows >= n:
        yield 0, _sums(weight, nearest, w)
        return
    for indices in torch.arange(n).split(rows):
        some = w[indices[0] : indices[-1] + 1]
        yield int(indices[0]), _sums(weight.rows(indices), nearest.rows(indices), some)


def _sums(weight: QTensor, nearest: QTensor, values: Tensor) -> Tensor:
    w, scheme = values.float(), weight.scheme
    images = (image.dequantize(torch.float32) for image in (weight, nearest))
    differences = (*(w - image for image in images), w)
    blocks = (blocked(d, scheme.granularity, scheme.group_size) for d in differences)
    return torch.stack([b.square().sum(-1) for b in blocks])


def _balanced_as(weight: QTensor, values: Tensor) -> Tensor:
    """W with every column and row times the factor >= 0 with which it is nearest to the image, by
    alternating least squares: f = <image, W> / <W, W>.
    """
    image = weight.dequantize(torch.float32).flatten(1)
    w = values.float().flatten(1)
    for _ in range(FITS):
        for axis in (0, 1):
            norm = w.square().sum(axis, keepdim=True)
            factor = (image * w).sum(axis, keepdim=True) / norm.clamp_min(1e-30)
            w = w * factor.clamp_min(0)
    return w.view(values.shape)
