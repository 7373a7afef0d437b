"""Another number of tokens: `zp.resize_token_embeddings`.

What a model has for each of its tokens - embeddings, a head, their biases, numbers in its
configuration - is transformers' knowledge, and transformers resizes them. Quantized modules are
float ones while it does so; the codes of the rows that stay are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zeropoint.errors import RecipeError, StateError
from zeropoint.model.replace import replace_module
from zeropoint.model.surgery import Snapshot, SurgeryReport
from zeropoint.model.walk import named_modules
from zeropoint.nn import QEmbedding, QLinear, QModule
from zeropoint.nn.exchange import exchange


def resize_token_embeddings(
    model: nn.Module,
    n: int,
    mean_resizing: bool = True,
    pad_to_multiple_of: int | None = None,
) -> SurgeryReport:
    """Give a transformers model `n` tokens: rows are added after the old ones, or cut off. In
    place.

    The model may be float, live or frozen. Rows of a frozen weight keep their codes, scales and
    zero points bit for bit; new ones are rounded to nearest by the same scheme, with a scale per
    tensor on the grid that is there. Tied weights stay tied, and others not.

    n: number of tokens, `len(tokenizer)`. mean_resizing: draw new rows, and biases of a head, from
    the normal distribution that the old ones have (a 1e-9 of their covariance); False: as the model
    initialises its weights. torch's generator draws them. pad_to_multiple_of: round n up to a
    multiple of this. Memory: the embeddings and the head as floats, twice.

    Raises RecipeError (n or pad_to_multiple_of is no positive integer), StateError (no token
    embeddings, learned scales, or transformers cannot resize this model's). Method: transformers'
    `PreTrainedModel.resize_token_embeddings`, after
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    _check_count("n", n, "give the number of tokens, len(tokenizer)")
    if pad_to_multiple_of is not None:
        _check_count("pad_to_multiple_of", pad_to_multiple_of, "use 64 or 128, or leave it out")
    owner: Any = model
    embeddings = _token_embeddings(owner)
    before = Snapshot.of(model)
    swapped = _vocabulary(model, embeddings)
    learned = [names[0] for module, names in swapped.items() if module.grid is not None]
    if learned:
        raise StateError(
            f"{learned[0]} learns its scales, one for each row; resize before zp.quantize(model, "
            "learned_scale=True), or after zp.freeze(model)"
        )
    floats = _floats(list(swapped))
    for module, names in swapped.items():
        replace_module(model, names, floats[module])
    try:
        with _tied_as_it_is(owner):
            owner.resize_token_embeddings(n, pad_to_multiple_of, mean_resizing)
        resized = {module: model.get_submodule(names[0]) for module, names in swapped.items()}
    except NotImplementedError as e:
        raise StateError(f"the tokens of a {type(model).__name__} cannot be resized: {e}") from e
    finally:
        for module, names in swapped.items():
            replace_module(model, names, module)
    for module in sorted(resized, key=lambda m: m.tied_to is not None):  # owners first
        _take_size(module, resized[module])
    return before.compared(model)


def _check_count(name: str, value: Any, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{name}={value!r} is not a positive integer; {remedy}")


def _token_embeddings(model: Any) -> nn.Module:
    """The model's embedding of tokens, float or quantized. Raises StateError."""
    kind = type(model).__name__
    if not hasattr(model, "resize_token_embeddings"):
        raise StateError(
            f"{kind} is not a transformers model, so what it has for each token is not known; "
            "resize its modules before zp.quantize(model)"
        )
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        found = None
    if not isinstance(found, (nn.Embedding, QEmbedding)):
        has = "none" if found is None else f"a {type(found).__name__}"
        raise StateError(f"{kind} has no token embeddings: its input embedding is {has}")
    return found


def _vocabulary(model: Any, embeddings: nn.Module) -> dict[QModule, tuple[str, ...]]:
    """Quantized modules that may have a row for each token: the embeddings, the head, and all that
    is tied to one of them; by all their names.
    """
    names = {m: n for m, n in named_modules(model).items() if isinstance(m, QModule)}
    ends = {embeddings, model.get_output_embeddings()}
    weights = {_weight_id(m) for m in names if isinstance(m, QEmbedding) or m in ends}
    return {m: n for m, n in names.items() if _weight_id(m) in weights}


def _weight_id(module: QModule) -> int:
    """The same for modules that share a weight."""
    return id(module.tied_to or module) if module.frozen else id(module.weight)


def _floats(modules: list[QModule]) -> dict[QModule, nn.Module]:
    """The float module for each, those of tied ones with one parameter."""
    floats = {m: m.to_float() for m in modules if m.tied_to is None}
    for module in modules:
        if module.tied_to is not None:
            floats[module] = module.to_float()
            floats[module].weight = floats[module.tied_to].weight
    return floats


@contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """A head with weights of its own keeps them, whatever the configuration says: transformers goes
    by the files when it loads a model, and by the configuration when it resizes one.
    """
    head, config = model.get_output_embeddings(), model.config
    says = getattr(config, "tie_word_embeddings", False)
    own = head is not None and head.weight is not model.get_input_embeddings().weight
    if not (says and own):
        yield
        return
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        config.tie_word_embeddings = says


def _take_size(module: QModule, resized: Any) -> None:
    """Give a quantized module the size of its float counterpart. In place."""
    rows, old = len(resized.weight), module.shape[0]
    if rows == old:
        return
    if not module.frozen:
        exchange(module, resized.weight)
    elif module.tied_to is not None:
        exchange(module, module.tied_to.qweight)
    elif rows < old:
        exchange(module, module.qweight.first_rows(rows))
    else:
        with torch.no_grad():
            exchange(module, module.qweight.with_rows(resized.weight[old:]))
    if isinstance(module, QEmbedding):
        module.padding_idx = resized.padding_idx
    elif isinstance(module, QLinear):
        module._parameters["bias"] = resized.bias
