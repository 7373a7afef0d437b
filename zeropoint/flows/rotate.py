"""Rotate a float model before it is quantized: `zp.rotate`.

It computes the same function, and is saved and loaded like any other of its class; its outliers are
spread over all channels, which coarse grids round better (`zeropoint.model.rotation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import NonFiniteError, StateError
from zeropoint.flows.distance import answer_of
from zeropoint.flows.generate import context_length
from zeropoint.model.capture import Batch, run_model
from zeropoint.model.residual import find_residual
from zeropoint.model.rotation import rotate_stream, rotate_values, stream_rotation, untie
from zeropoint.model.walk import is_quantized, owned_tensors

TOLERANCE = 1e-4  # of the answer; float32 noise of a rotated model is 10 times smaller
EXAMPLE = (2, 32)  # sequences, tokens


@dataclass(frozen=True, kw_only=True, repr=False)
class RotationReport:
    """What `zp.rotate` did, by names of modules. `print(report)` shows it.

    rotation: of the residual stream of `width` channels. norms: whose weights went into their
    readers. readers, writers: linear layers and embeddings at the stream. values: (values, output
    projection, rotation) of each attention whose heads were rotated. untied: heads that have got a
    weight of their own. bytes_before, bytes_after: of the whole model. error: of the answer to the
    example, |after - before| / |before| in float32.
    """

    width: int
    rotation: str
    norms: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    values: tuple[tuple[str, str, str], ...]
    untied: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    error: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the command line's JSON has it under `rotation`."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = ", ".join(dict.fromkeys(turn for _, _, turn in self.values))
        lines = [
            f"residual stream of {self.width} channels: {self.rotation}; {len(self.norms)} norms "
            f"fused, {len(self.readers)} readers, {len(self.writers)} writers",
            f"  values of {len(self.values)} attentions" + (f": {kinds}" if kinds else ""),
        ]
        for name in self.untied:
            before, after = (f"{n / 1e6:.2f}" for n in (self.bytes_before, self.bytes_after))
            lines.append(f"  {name} has got a weight of its own: {before} -> {after} MB")
        lines.append(f"  answers differ by {self.error:.1e}")
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    __repr__ = __str__  # what a bare call shows in a notebook


def rotate(model: nn.Module, *, seed: int = 0, example: Batch | None = None) -> RotationReport:
    """Rotate the residual stream of a float model, and the values of its attention heads. In place.

    Rotations are Hadamard matrices with random signs, or random orthogonal ones where no Hadamard
    matrix of the size is known. They go into the weights, and the weights of the norms into the
    layers behind them, so the model stays what it was: only a head that is tied to the embedding
    becomes a matrix of its own. Writers and readers of the stream are found by running the model,
    which then has to answer as before.

    seed: draws the signs; same seed, same weights. example: what to run, keyword arguments of the
    model or its only positional one; by default random tokens. Memory: the weights once more in
    float32. Those of 16 bits are rounded to their dtype again, which a warning says.

    Raises StateError (quantized already, on the meta device, no example for a model that takes
    other things than tokens, or a stream that cannot be rotated, with the reason) and
    NonFiniteError. The model is unchanged, bit for bit, when it raises.
    """
    if is_quantized(model):
        raise StateError("the model is quantized; rotate the float model, then quantize it")
    if any(p.is_meta for p in model.parameters()):
        raise StateError("the model is on the meta device, without values; load the weights first")
    embedding = _embedding(model)
    batch = _tokens(model, embedding, seed) if example is None else example
    names = {m: n for n, m in model.named_modules()}
    bytes_before = _bytes(model)
    with _unchanged_on_error(model) as narrow:
        try:
            expected = _answer(model, batch)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            if example is not None:
                raise
            raise StateError(
                f"{type(model).__name__} does not run on token ids alone ({e}); give an example= "
                "of what it takes"
            ) from e
        residual = find_residual(model, embedding, lambda: answer_of(run_model(model, batch))[0])
        if isinstance(residual, str):
            raise StateError(f"{type(model).__name__} cannot be rotated: {residual}")
        found, gains = stream_rotation(model, residual, seed)
        untied = untie(model, residual, gains)
        rotate_stream(residual, found, gains)
        values, warnings = rotate_values(model, batch, seed)
        error = float((_answer(model, batch) - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise StateError(
                f"{type(model).__name__} cannot be rotated: its answers would change by "
                f"{error:.1e}, and {TOLERANCE:.0e} is the limit; something reads or writes the "
                "residual stream in a way that was not seen"
            )
    if narrow:
        warnings.append(
            f"weights are rounded to {', '.join(narrow)} again; rotate a model in float32 to avoid "
            "that: model.float()"
        )
    return RotationReport(
        width=found.n,
        rotation=str(found),
        norms=tuple(names[m] for m in gains),
        readers=tuple(names[m] for m in residual.readers),
        writers=tuple(names[m] for m in residual.writers),
        values=tuple(values),
        untied=tuple(untied),
        bytes_before=bytes_before,
        bytes_after=_bytes(model),
        error=error,
        warnings=tuple(warnings),
    )


def _embedding(model: Any) -> nn.Embedding:
    """Where the residual stream begins. Raises StateError."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if not isinstance(found, nn.Embedding):
        raise StateError(f"{type(model).__name__} cannot be rotated: it has no token embeddings")
    return found


def _tokens(model: Any, embedding: nn.Embedding, seed: int) -> Batch:
    """Random tokens, as the model takes them."""
    sequences, tokens = EXAMPLE
    shape = (sequences, min(tokens, context_length(model) or tokens))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(embedding.weight), shape, generator=generator)
    ids = ids.to(embedding.weight.device)
    config = getattr(model, "config", None)
    if config is None:
        return ids
    two = getattr(config, "is_encoder_decoder", False)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if two else {})


@torch.no_grad()
def _answer(model: nn.Module, batch: Batch) -> Tensor:
    answer = answer_of(run_model(model, batch))[0].double()
    if not torch.isfinite(answer).all():
        raise NonFiniteError("the model answers NaN or Inf, so it cannot be checked by running")
    return answer


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for _, t in owned_tensors(model))


@contextmanager
def _unchanged_on_error(model: Any) -> Iterator[list[str]]:
    """The model in float32 and evaluation mode, in copies of its tensors; what it was when there is
    an error, and else in its own dtypes. Yields the narrower ones among these.
    """
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [(t, t.data) for t in floats]
    narrow = {d for t in floats if (d := t.dtype).itemsize < torch.float32.itemsize}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    weight: Any = getattr(head, "weight", None)
    configs = [model.config, model.config.get_text_config()] if hasattr(model, "config") else []
    ties = [(c, getattr(c, "tie_word_embeddings", None)) for c in configs]
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        for tensor, data in before:
            tensor.data = data.to(torch.promote_types(data.dtype, torch.float32), copy=True)
        yield sorted(str(d).removeprefix("torch.") for d in narrow)
        for tensor, data in before:
            tensor.data = tensor.data.to(data.dtype)
        if weight is not None:
            head.weight.data = head.weight.data.to(weight.dtype)
    except BaseException:
        for tensor, data in before:
            tensor.data = data
        if weight is not None:
            head.weight = weight
        for config, tied in ties:
            if tied is not None:
                config.tie_word_embeddings = tied
        raise
    finally:
        for module, was_training in training:
            module.training = was_training
