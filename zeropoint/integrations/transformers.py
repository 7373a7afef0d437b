"""zeropoint inside transformers: `from_pretrained(..., quantization_config=ZeropointConfig(...))`,
`save_pretrained`, and `from_pretrained` again.

Weights are quantized one by one as transformers reads them, so memory holds the quantized model and
one float weight. Importing this file registers the method "zeropoint"; `zeropoint/__init__.py` does
so as soon as transformers loads its quantizers.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from zeropoint.algorithms import Algorithm, get_algorithm
from zeropoint.checkpoints import native
from zeropoint.errors import CheckpointError, ZeropointError
from zeropoint.flows.dequantize import dequantize
from zeropoint.flows.planned import Patterns, planned
from zeropoint.flows.report import Report
from zeropoint.integrations.config import ZeropointConfig
from zeropoint.integrations.placement import place, several_devices
from zeropoint.model.frameworks import FRAMEWORKS
from zeropoint.model.heads import restore_pruned
from zeropoint.model.lazy_rows import LazyRows
from zeropoint.model.load import expect_inputs, install
from zeropoint.model.pages import collect, drop_pages, own_memory, trim
from zeropoint.model.save import contents_of, remember_algorithm, remember_recipe
from zeropoint.model.walk import named_modules, quantized_modules, weight_sites
from zeropoint.nn import QModule, quantized_type
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Recipe

GARBAGE_BYTES = 1 << 20  # freed memory that may still count as the process's while loading

register_quantization_config(native.QUANT_METHOD)(ZeropointConfig)


@register_quantizer(native.QUANT_METHOD)
class ZeropointQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads, saves and trains a model of ours."""

    quantization_config: ZeropointConfig

    def __init__(self, quantization_config: ZeropointConfig, **kwargs: Any) -> None:
        # A copy learns the recipe of this model; the caller's may be used for another one.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.asked = quantization_config
        self.report: Report | None = None
        self._device_map: Any = None
        self._garbage = 0
        self._dtype: torch.dtype | None = None
        self._chosen_by: str | None = quantization_config.algorithm

    # --- loading ---

    def update_device_map(self, device_map: Any) -> Any:
        """Several devices: weights are quantized on the CPU, then dispatched by their real size."""
        if not several_devices(device_map):
            return device_map
        self._device_map = device_map
        return {"": "cpu"}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Frozen modules without values in the places of the float ones. model: on meta."""
        restore_pruned(model)
        tied = model.all_tied_weights_keys
        if self.pre_quantized:
            self._expect_checkpoint(model, kwargs["checkpoint_files"])
        else:
            for target, source in list(tied.items()):  # transformers does so after loading only
                if _differ(kwargs["checkpoint_files"], target, source):
                    del tied[target]
                    continue
                module, _, leaf = target.rpartition(".")
                setattr(model.get_submodule(module), leaf, model.get_parameter(source))
            self._expect_floats(model)
        inside = set(quantized_modules(model))
        for target, source in list(tied.items()):
            if {t.removesuffix(".weight") for t in (target, source)} & inside:
                del tied[target]  # the modules are tied, there is no parameter to tie

    def _expect_checkpoint(self, model: Any, files: list[str]) -> None:
        manifest = native.read_header([Path(f) for f in files])
        folder = Path(files[0]).parent
        self._chosen_by = manifest.get("algorithm")
        weights = native.empty_weights(manifest)
        if self._dtype is not None:
            weights = {name: replace(w, dtype=self._dtype) for name, w in weights.items()}
        install(folder, model, weights, manifest["tied"])
        expect_inputs(model, manifest)

    def _expect_floats(self, model: Any) -> None:
        config = self.quantization_config
        options = config.options | {"exclude": _excluded(model, config)}
        plan = planned(model, options, recipe=config.recipe, strict=config.strict)
        self.report = plan.report
        config.recipe = plan.report.recipe
        owners: dict[int, QModule] = {}
        names_of = named_modules(model)
        for site, scheme in plan.schemes.items():
            kind = quantized_type(site.module)
            assert kind is not None
            new = kind.from_float(site.module, scheme)
            owner = owners.setdefault(site.tied, new)
            if owner is not new:
                new.follow(owner)
                # A file may hold the tied weight under its second name, too.
                ignored = set(model._keys_to_ignore_on_load_unexpected or ())
                names = {f"^{name}.weight$".replace(".", r"\.") for name in names_of[site.module]}
                model._keys_to_ignore_on_load_unexpected = ignored | names
            for name in site.names:
                model.set_submodule(name, new)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(name), QModule)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """A quantized checkpoint has the names of the model itself. model: from 5.21 on."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        collect()
        for module in quantized_modules(model).values():
            if not module.frozen:  # a weight that no file has
                self._freeze_random(model, module)
            module.loaded()
        if not self.pre_quantized:
            for module in model.modules():
                own_memory(module)
        model._weight_conversions = []  # codes cannot be split or merged: saved as they are named
        remember_recipe(model, self.quantization_config.recipe)
        remember_algorithm(model, self._chosen_by)
        if self._device_map is not None:
            place(model, self._device_map)
        return model

    def passed(self, nbytes: int) -> None:
        """So much of float weights is garbage: from time to time the system gets it back."""
        self._garbage += nbytes
        if self._garbage > GARBAGE_BYTES:
            trim()
            self._garbage = 0

    def _freeze_random(self, model: Any, module: QModule) -> None:
        """transformers reports a missing weight and fills it with random numbers, which it knows
        how to draw for float layers only.
        """
        model._init_weights(module.to_float())
        algorithm = get_algorithm(self.quantization_config.algorithm)
        module.freeze(algorithm.choose(module.float_weight().detach(), None, module.scheme).weight)

    # --- saving, and everything after ---

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: of a live model its parameters, so that training can be
        resumed, and a word that nothing is frozen.
        """
        if any(not m.frozen for m in quantized_modules(model).values()):
            return model.state_dict(), dict(native.LIVE_HEADER)
        contents = contents_of(model)
        return native.stored_tensors(contents), native.header(contents)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """A live model trains its float weights; of a frozen one, what stayed float."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize(model)
        return model if dtype is None else model.to(dtype)


def _excluded(model: nn.Module, config: ZeropointConfig) -> Patterns:
    """The patterns to exclude, and of the advised ones those that decide about a module."""
    if not config.advised:
        return config.exclude
    exclude = [config.exclude] if isinstance(config.exclude, str) else list(config.exclude or ())
    free = [site.names for site in weight_sites(model)]
    for pattern in (*exclude, *config.advised):
        matched = [names for names in free if any(fnmatchcase(n, pattern) for n in names)]
        free = [names for names in free if names not in matched]
        if matched and pattern not in exclude:
            exclude.append(pattern)
    return exclude or None


def _differ(files: list[str] | None, target: str, source: str) -> bool:
    """Whether the files hold two weights that the configuration calls one."""
    homes: dict[str, str] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                homes |= dict.fromkeys({target, source} & set(tensors.keys()), file)
    if len(homes) < 2:
        return False
    weights = []
    for name, file in homes.items():
        with safe_open(file, framework="pt") as tensors:
            weights.append(tensors.get_tensor(name))
    return weights[0].shape != weights[1].shape or not torch.equal(*weights)


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A float weight as it is read -> codes, which its module takes; nothing is left to assign."""

    def __init__(self, quantizer: ZeropointQuantizer) -> None:
        self._quantizer = quantizer
        self._algorithm: Algorithm = get_algorithm(quantizer.quantization_config.algorithm)

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        for target, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = target if target.endswith(".weight") else full_layer_name
            module = model.get_submodule(name.rpartition(".")[0])
            try:
                module.freeze(self._codes(module, weight))
            except ZeropointError as e:
                self._quantizer.asked.error = type(e)(f"{name}: {e}")
                raise
            if not isinstance(weight, LazyRows):
                drop_pages(weight)
                self._quantizer.passed(weight.nbytes)
            kwargs["missing_keys"].discard(name)
        return {}

    def _codes(self, module: QModule, weight: Tensor) -> QTensor:
        rows = module.from_layout(weight)
        if tuple(rows.shape) != module.shape:
            raise CheckpointError(f"is {tuple(rows.shape)}, but the model has {module.shape}")
        scheme = module.scheme.of_some_rows
        if not isinstance(rows, LazyRows) or scheme is None:
            return self._algorithm.choose(rows, None, module.scheme).weight
        parts = []
        for part in rows.parts():
            parts.append(self._algorithm.choose(part, None, scheme).weight)
            self._quantizer.passed(part.nbytes)
        return QTensor.concatenate(parts).with_scheme(module.scheme)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("codes are saved as they are")


# --- models that were quantized by zp.quantize ---


class _Transformers:
    """Gives a model of transformers that zeropoint quantized what transformers wants to find."""

    def adopt(self, model: nn.Module, recipe: Recipe) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            return
        config = ZeropointConfig(recipe=recipe)
        if getattr(model, "hf_quantizer", None) is None:
            model.hf_quantizer = ZeropointQuantizer(config, pre_quantized=True)
        model.is_quantized = True
        model.quantization_method = native.QUANT_METHOD
        model.config.quantization_config = config
        model._weight_conversions = []

    def release(self, model: nn.Module) -> None:
        quantizer = getattr(model, "hf_quantizer", None)
        if isinstance(quantizer, ZeropointQuantizer):
            quantizer.remove_quantization_config(model)
            setattr(model, "_weight_conversions", None)  # noqa: B010 - transformers finds its own


FRAMEWORKS.append(_Transformers())

# What transformers looks for on a weight before it fills it with random numbers: some models reach
# into their layers, and find a QTensor there.
setattr(QTensor, "_is_hf_initialized", True)  # noqa: B010 - not a field of a QTensor
