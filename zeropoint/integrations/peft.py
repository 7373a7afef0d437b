"""peft's LoRA on quantized layers: plain peft code trains, saves, loads and merges adapters.

    y = x @ (dequantize(weight) + scaling * B @ A).T + bias

The codes stay as they are and only A and B are trained. peft makes a LoRA layer by the type of the
layer below it and does not know ours; importing this file puts a tuner that does into peft's table
of tuners (docs/decisions/0009-peft.md), and `zeropoint/__init__.py` does so as soon as peft is
imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import lora
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, PeftType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from zeropoint.algorithms.absorb import absorb
from zeropoint.checkpoints.floats import Stored, read_headers
from zeropoint.errors import NonFiniteError, RecipeError, SourceError, StateError
from zeropoint.flows.job import local_folder
from zeropoint.model.load import float_skeleton, model_names
from zeropoint.model.source import resolve
from zeropoint.nn import PART_NAMES, QConv1D, QEmbedding, QLinear, QModule
from zeropoint.qtensor import QTensor

INITIAL = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not look at the base weight."""

_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)


class _Adapted(lora.LoraLayer):  # type: ignore[misc]
    """What LoRA on a quantized layer does in its own way: it merges by quantizing again."""

    _unmerged: QTensor | Tensor | None = None  # the base weight, while adapters are merged into it
    _sharing: tuple[str, ...] = ()  # other modules that read the base weight
    _moment: Tensor | None = None  # sum of x x^T over the inputs seen by `watching`

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs: Any) -> None:
        _check_config(kwargs["config"])
        super().update_layer(adapter_name, r, lora_alpha, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight: to its codes, by `algorithms.absorb`, or to the float
        weight of a live layer. In place; `unmerge` undoes it.

        safe_merge: raise NonFiniteError, and change nothing, where the sum has NaN or Inf. Raises
        StateError for a weight that another module reads too.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or () if self._has(n)]
        if not names:
            return
        base = self.get_base_layer()
        if self._sharing:
            raise StateError(
                f"the weight is also that of {', '.join(self._sharing)}, which merging would "
                "change, too; keep the adapter beside the model, or leave the layer out of "
                "target_modules"
            )
        start = _weight_of(base) if self._unmerged is None else self._unmerged
        together = [*self.merged_adapters, *names]
        change = self._change(together)
        if safe_merge and not bool(torch.isfinite(change).all()):
            raise NonFiniteError(
                f"merging {', '.join(names)} would give NaN or Inf: the adapter is broken"
            )
        if isinstance(start, QTensor):
            reads = torch.cat([self._reads(name) for name in together])
            _set_weight(base, absorb(start, change, reads, self._moment))
        else:
            _set_weight(base, start + change)
        self._unmerged = start
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Back to the weight before the first merge, bit for bit. In place."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        _set_weight(self.get_base_layer(), self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, keep the second moment of the inputs, (K, K), which merging then goes by; forget
        it after. An embedding's inputs have none.
        """

        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if x.is_floating_point():
                x = x.reshape(-1, x.shape[-1]).float()
                self._moment = x.T @ x if self._moment is None else self._moment.addmm_(x.T, x)

        hook = self.register_forward_pre_hook(see)
        try:
            yield
        finally:
            hook.remove()
            self._moment = None

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """The layer as it was before merging, inside; merged again, with the same codes, after."""
        base, start, names = self.get_base_layer(), self._unmerged, list(self.merged_adapters)
        if start is None:
            yield
            return
        merged = _weight_of(base)
        self.unmerge()
        try:
            yield
        finally:
            _set_weight(base, merged)
            self._unmerged = start
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def merged_error(self) -> tuple[float, float]:
        """|scaling B A| / |W|, and |W + scaling B A - Q| / |W + scaling B A|, of a merged layer."""
        assert self._unmerged is not None
        start, change = _float(self._unmerged), self._change(self.merged_adapters)
        wanted = start + change
        error = wanted - _float(_weight_of(self.get_base_layer()))
        return float(change.norm() / start.norm()), float(error.norm() / wanted.norm())

    def _change(self, names: list[str]) -> Tensor:
        """Sum of scaling * B A, (N, K) float32."""
        return torch.stack([self.get_delta_weight(name).float() for name in names]).sum(0)

    def _reads(self, name: str) -> Tensor:
        """The rows that span those of scaling * B A. (r, K)."""
        linear = name in self.lora_A
        reads: Tensor = self.lora_A[name].weight if linear else self.lora_embedding_B[name].T
        return reads

    def _has(self, name: str) -> bool:
        return name in self.lora_A or name in self.lora_embedding_A


class QLoraLinear(_Adapted, lora.Linear):  # type: ignore[misc]
    """LoRA on a QLinear or QConv1D. peft counts it among the linear layers by its name."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = False  # codes are (N, K), Conv1D's too

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


class QLoraEmbedding(_Adapted, lora.Embedding):  # type: ignore[misc]
    """LoRA on a QEmbedding."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def _embed(self, input: Tensor, weight: Tensor, *functions: Any, **hooks: Any) -> Tensor:
        padding: int | None = self.get_base_layer().padding_idx
        return nn.functional.embedding(input, weight, padding)


LAYERS: dict[type[QModule], type[_Adapted]] = {
    QLinear: QLoraLinear,
    QConv1D: QLoraLinear,
    QEmbedding: QLoraEmbedding,
}


class LoraModel(lora.LoraModel):  # type: ignore[misc]
    """peft's own tuner, which also knows quantized layers."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            ours = _linear_names(model, peft_config.task_type)
            peft_config = _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= ours

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = LAYERS.get(type(base))  # type: ignore[arg-type]
        if kind is None:
            new: nn.Module = lora.LoraModel._create_new_module(
                lora_config, adapter_name, target, **kwargs
            )
            return new
        if kwargs.pop("parameter_name", None) is not None:
            raise RecipeError(
                f"target_parameters names {kwargs['target_name']}, which is quantized; name the "
                "module in target_modules"
            )
        return kind(target, adapter_name, config=lora_config, **kwargs)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(new_module, _Adapted):
            new_module._sharing = _sharing(self.model, new_module.get_base_layer())


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel


# --- what layers and tuner need ---


def _check_config(config: Any) -> None:
    """Raises RecipeError for an option that needs the float weight."""
    if config.init_lora_weights not in INITIAL:
        remedy = "True"
        if config.init_lora_weights == "loftq":
            remedy = "True, then call zp.loftq_init(model, source of the float weights)"
        raise RecipeError(
            f"init_lora_weights={config.init_lora_weights!r} reads or changes the float weight, "
            f"and quantized layers have codes; use {remedy}"
        )
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise RecipeError(
                f"{name}={getattr(config, name)!r} is not supported on quantized layers; leave it "
                "out, or call zp.dequantize(model) first"
            )


def _linear_names(model: Any, task_type: Any) -> set[str]:
    """Quantized linear layers that are not heads, as peft chooses among float ones."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {head}
    if head is None and task_type == "SEQ_CLS":
        heads = {getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, QLinear) and module not in heads and not name.endswith("base_layer")
    }


def _sharing(model: nn.Module, base: nn.Module) -> tuple[str, ...]:
    """Names of other quantized modules that hold the weight of `base`, or read it."""

    def owner(module: QModule) -> Any:
        if not module.frozen:
            return module._parameters["weight"]
        return module.tied_to or module

    assert isinstance(base, QModule)
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, QModule) and module is not base and owner(module) is owner(base)
    )


def _weight_of(base: QModule) -> QTensor | Tensor:
    """Codes, or the live float weight, (N, K)."""
    return base.qweight if base.frozen else base.float_weight().detach()


def _set_weight(base: QModule, weight: QTensor | Tensor) -> None:
    """In place. The weight may come from another device: the model may have moved meanwhile."""
    if isinstance(weight, QTensor):
        parts = weight.to(base.qweight.device).parts
        base._buffers.update({PART_NAMES[suffix]: part for suffix, part in parts.items()})
        base.loaded()
    else:
        parameter = base._parameters["weight"]
        assert parameter is not None
        parameter.data = base.from_layout(weight).contiguous().to(parameter)


def _float(weight: QTensor | Tensor) -> Tensor:
    if isinstance(weight, QTensor):
        return weight.dequantize(torch.promote_types(weight.dtype, torch.float32))
    return weight


# --- LoftQ ---


@dataclass(frozen=True, kw_only=True)
class LoftQLayer:
    """How far a layer's weight is from the float one: before = |W - Q| / |W|, after =
    |W - (Q + scaling B A)| / |W|. rank: of B A.
    """

    name: str
    rank: int
    before: float
    after: float


@torch.no_grad()
def loftq_init(
    model: nn.Module, source: str | Path | nn.Module, *, adapter_name: str = "default"
) -> tuple[LoftQLayer, ...]:
    """Start an adapter at the rounding error: at the product of its rank that is nearest to it.

    scaling * B A = U_r S_r V_r, where U S V = W - dequantize(codes). This is the first iteration of
    LoftQ (arXiv:2310.08659); nothing of that rank is nearer (Eckart and Young). The codes stay as
    they are, so the adapter fits every copy of the base. In place.

    model: one with a LoRA adapter on frozen layers. source: where the float weights are: a folder
    of safetensors, a hub id or package:NAME, read weight by weight, or the float model itself.
    Raises StateError (no such adapter, a layer that is live, or merged), SourceError (a weight is
    missing or has another shape), StreamError (files that cannot be read weight by weight: pass the
    float model).
    """
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, _Adapted) and module._has(adapter_name)
    }
    if not layers:
        raise StateError(
            f"no quantized layer has an adapter called {adapter_name!r}; quantize, freeze, and "
            "call peft.get_peft_model first"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise StateError(f"{name} is merged; call model.unmerge_adapter() first")
        if not layer.get_base_layer().frozen:
            raise StateError(f"{name} is live and has no codes yet; call zp.freeze(model) first")
    read = _reader(source)
    return tuple(
        _start_at_error(name, layer, adapter_name, read(name)) for name, layer in layers.items()
    )


def _reader(source: str | Path | nn.Module) -> Callable[[str], Tensor]:
    """A function from a module's name to its float weight."""
    weights: Mapping[str, Tensor | Stored]
    if isinstance(source, nn.Module):
        where, weights = (
            type(source).__name__,
            dict(source.named_parameters(remove_duplicate=False)),
        )
    else:
        folder = local_folder(resolve(source))
        where, stored, skeleton = str(folder), read_headers(folder), float_skeleton(folder)
        names = model_names(skeleton, stored, skeleton.state_dict().keys())
        weights = {names[name]: tensor for name, tensor in stored.items()}

    def read(name: str) -> Tensor:
        weight = weights.get(f"{name}.weight")
        if weight is None:
            raise SourceError(f"{where} has no {name}.weight; pass the float model as the source")
        return weight if isinstance(weight, Tensor) else weight.read()

    return read


def _start_at_error(name: str, layer: Any, adapter: str, weight: Tensor) -> LoftQLayer:
    """Set B and A of one layer. In place."""
    base = layer.get_base_layer()
    weight = base.from_layout(weight)
    if tuple(weight.shape) != base.shape:
        raise SourceError(
            f"{name}.weight is {tuple(weight.shape)} in the source, but the model has {base.shape}"
        )
    weight = weight.to(base.qweight.device, torch.float32)
    error = weight - _float(base.qweight)
    left, singular, right = torch.linalg.svd(error, full_matrices=False)
    rank = min(layer.r[adapter], len(singular))
    root = (singular[:rank] / layer.scaling[adapter]).sqrt()
    left, right = left[:, :rank] * root, root[:, None] * right[:rank]
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:  # an embedding has them the other way round: weight = (B A).T
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        left, right = right.T, left.T
    a.zero_(), b.zero_()  # ranks that the weight does not have
    a[:rank], b[:, :rank] = right, left
    after = error - layer.get_delta_weight(adapter).float()
    norm = weight.norm()
    return LoftQLayer(
        name=name,
        rank=rank,
        before=float(error.norm() / norm),
        after=float(after.norm() / norm),
    )
