"""What is left of a model that was emptied."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import build, example_inputs, outputs
from zeropoint.errors import StateError
from zeropoint.model.release import Released, empty
from zeropoint.nn import QModule


def tensors(model: nn.Module) -> list[weakref.ref[torch.Tensor]]:
    """All that the model holds: parameters, buffers, gradients, the parts of quantized weights."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, QModule) and module.frozen:
            held += module.qweight.parts.values()
    return [weakref.ref(t) for t in held] + [
        weakref.ref(t.grad) for t in held if t.grad is not None
    ]


def alive(references: list[weakref.ref[torch.Tensor]]) -> int:
    gc.collect()
    return sum(r() is not None for r in references)


def plain() -> nn.Module:
    return build("llama-tied")


def trained() -> nn.Module:
    model = build("llama-tied")
    model(**example_inputs(model)).logits.sum().backward()
    return model


def generated() -> nn.Module:
    model = build("llama")
    model._cache = model(**example_inputs(model), use_cache=True).past_key_values
    return model


def live() -> nn.Module:
    model = build("llama-tied")
    zp.quantize(model, "int8")
    return model


def frozen() -> nn.Module:
    model = live()
    zp.freeze(model)
    outputs(model)
    return model


def hooked() -> nn.Module:
    """Modules that hold each other in their hooks, as a caller's closures do."""
    model = build("bert")
    for module in model.modules():
        module.register_forward_hook(lambda *_: model)
        module.register_full_backward_hook(lambda *_: model)
    return model


def dispatched() -> nn.Module:
    """Hooks of accelerate, with weights that lie elsewhere."""
    from accelerate import cpu_offload

    return cpu_offload(build("llama"), torch.device("cpu"), offload_buffers=True)


def compiled() -> nn.Module:
    model = build("llama")
    model.compile(backend="eager")
    outputs(model)
    return model


def optimized() -> Any:
    """torch.compile's wrapper around the model."""
    model = torch.compile(build("llama"), backend="eager")
    outputs(model)
    return model


def parametrized() -> nn.Module:
    """Modules whose class torch made up."""
    model = build("bert")
    for layer in model.encoder.layer:
        torch.nn.utils.parametrizations.weight_norm(layer.intermediate.dense)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        plain,
        trained,
        generated,
        live,
        frozen,
        hooked,
        dispatched,
        compiled,
        optimized,
        parametrized,
    )
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_let_go_while_the_model_is_still_held(name: str) -> None:
    model = MODELS[name]()
    child = next(model.children())
    references = tensors(model)
    assert alive(references) == len(references) > 20
    empty(model)
    assert alive(references) == 0
    assert isinstance(model, Released) and isinstance(child, Released)


def test_a_key_value_cache_is_let_go() -> None:
    model: Any = generated()
    references = [weakref.ref(layer.keys) for layer in model._cache.layers]
    assert alive(references) == 2
    empty(model)
    assert alive(references) == 0


USES: dict[str, Callable[[Any], Any]] = {
    "call": lambda m: m(torch.tensor([[1]])),
    "generate": lambda m: m.generate(),
    "parameters": lambda m: list(m.parameters()),
    "attribute": lambda m: m.config,
    "assignment": lambda m: setattr(m, "x", 1),
    "index": lambda m: m[0],
    "length": lambda m: len(m),
    "iteration": lambda m: list(m),
    "release": empty,
    "quantize": zp.quantize,
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_what_is_left_is_an_error(use: str) -> None:
    model: Any = build("llama")
    layers = model.model.layers
    empty(model)
    with pytest.raises(
        StateError, match="this LlamaForCausalLM was given back by zp.release; load"
    ):
        USES[use](model)
    with pytest.raises(StateError, match="this ModuleList was given back by zp.release"):
        USES[use](layers)


def test_it_can_still_be_shown_and_tested() -> None:
    model = build("llama")
    empty(model)
    assert repr(model) == "Released(LlamaForCausalLM)"
    assert model and isinstance(model, nn.Module)


def test_a_tensor_held_elsewhere_keeps_its_values() -> None:
    model, other = build("llama"), build("llama", seed=1)
    alias = model.model.embed_tokens.weight
    expected = alias.detach().clone()
    other.lm_head.weight = model.lm_head.weight
    before = outputs(other)
    empty(model)
    assert torch.equal(alias, expected)
    assert torch.equal(outputs(other), before)


def test_a_part_can_go_before_the_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    references = tensors(model)
    empty(model[0])
    assert alive(references) == 2
    empty(model)
    assert alive(references) == 0


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(StateError, match=r"takes a model, a torch.nn.Module, not a tuple"):
        empty((build("llama"), None))  # what zp.load returns


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_before_anything_is_dropped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(StateError, match="belong to TorchScript, .* delete every reference"):
        empty(model)
    assert model(torch.ones(1, 2)).shape == (1, 2)
