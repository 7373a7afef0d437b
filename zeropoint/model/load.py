"""From a source to (model, tokenizer)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zeropoint.checkpoints import native
from zeropoint.errors import CheckpointError, SourceError, StreamError, UnknownNameError, nearest
from zeropoint.model.gguf import check_file, lazy_state_dict, load_config
from zeropoint.model.gguf import load_tokenizer as gguf_tokenizer
from zeropoint.model.heads import restore_pruned
from zeropoint.model.lazy_rows import make_whole
from zeropoint.model.pages import collect
from zeropoint.model.replace import replace_module
from zeropoint.model.save import remember_algorithm, remember_recipe
from zeropoint.model.source import Source, resolve
from zeropoint.model.walk import named_modules, quantized_modules
from zeropoint.nn import QLinear, QModule, quantized_type
from zeropoint.nn.inputs import INPUT_PARTS, InputRange
from zeropoint.numerics import get_format
from zeropoint.qtensor import QTensor

# What transformers and torch make of configurations that nobody meant.
NONSENSE = (
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# The pipeline task names of transformers, and the class that serves each.
TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "feature-extraction": "AutoModel",
}


def load(
    source: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    *,
    task: str | None = None,
    model: nn.Module | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, in evaluation mode.
    The tokenizer is None when the source has none.

    source: a folder (zeropoint or float checkpoint), a hub id, a .gguf file, or package:NAME.
    dtype: of float weights and activations; "auto" keeps the stored one. device_map: as
    transformers takes it, with offload_folder; a zeropoint checkpoint takes one device. task: a
    transformers pipeline task ("text-generation" ...) to choose the class; by default the class
    that the configuration names. model: for a zeropoint checkpoint of a module that is not a
    transformers model, a float module of the same structure; it is filled in place and returned.
    Raises SourceError, CheckpointError, UnknownNameError.
    """
    if task is not None and task not in TASKS:
        raise UnknownNameError(f"{task!r} is not a task; {nearest(task, TASKS)}")
    torch_dtype = float_dtype(dtype)
    found = resolve(source)
    if found.kind == "native":
        loaded = _load_native(Path(found.location), task, model)
        _cast(loaded, torch_dtype)
        loaded.to(device_map)
    elif model is not None:
        raise SourceError(
            "model= is for zeropoint checkpoints; a float checkpoint loads into its own class"
        )
    else:
        how = {} if offload_folder is None else {"offload_folder": str(offload_folder)}
        loaded = load_float(found, torch_dtype, device_map, task, **how)
    return loaded.eval(), load_tokenizer(found)


def float_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype of a name, None for "auto". Raises UnknownNameError."""
    if dtype == "auto":
        return None
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise UnknownNameError(
            f"dtype={dtype!r} is not one of auto, float32, bfloat16, float16, float64"
        )
    return value


# --- float checkpoints ---


def load_float(
    found: Source,
    dtype: torch.dtype | None,
    device_map: Any,
    task: str | None,
    **how: Any,
) -> nn.Module:
    """The model of a float checkpoint. how: more arguments of transformers' `from_pretrained`; they
    are not passed on for a .gguf file that has to be read as a whole. Raises SourceError.
    """
    from transformers import AutoConfig

    try:
        if found.kind == "gguf":
            return _load_gguf(Path(found.location), dtype, device_map, task, **how)
        config = AutoConfig.from_pretrained(found.location)
        kind = _model_class(config, task)
        if getattr(config, "pruned_heads", None):
            kind = _pruning(kind, config)
        loaded: nn.Module = kind.from_pretrained(
            found.location, config=config, dtype=dtype or "auto", device_map=device_map, **how
        )
        if getattr(config, "pruned_heads", None):
            loaded.__class__ = kind.__base__
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise SourceError(f"{found.location!r} cannot be loaded: {e}") from e
    return loaded


def _load_gguf(
    file: Path, dtype: torch.dtype | None, device_map: Any, task: str | None, **how: Any
) -> nn.Module:
    """Weight by weight where that is possible, else as transformers does it."""
    check_file(file)
    config = load_config(file)
    kind = _model_class(config, task)
    skeleton = empty_model(kind, config)
    state = lazy_state_dict(file, skeleton, config)
    if state is None:
        loaded = kind.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            config=config,
            dtype=dtype or "auto",
            device_map=device_map,
        )
        return _plain(loaded)
    collect()  # what building the skeleton and reading the configuration left
    streamed: nn.Module = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
        None,
        config=config,
        state_dict=state,
        dtype=dtype or torch.float32,
        device_map=device_map,
        **how,
    )
    make_whole(streamed)
    return streamed


def float_skeleton(where: str | Path, task: str | None = None) -> nn.Module:
    """The model of a float checkpoint, its parameters on the meta device.

    where: a folder, a .gguf file or a hub id. Raises SourceError.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if isinstance(where, Path) and where.is_file():
            check_file(where)
            config = load_config(where)
        else:
            config = AutoConfig.from_pretrained(where)
        return empty_model(_model_class(config, task), config)
    except (*NONSENSE, StrictDataclassError) as e:
        raise SourceError(f"{str(where)!r} cannot be loaded: {e!r}") from e


def model_names(model: Any, stored: Iterable[str], ours: Collection[str]) -> dict[str, str]:
    """The names that transformers gives a checkpoint's tensors when it loads it, by those in its
    files; names of which it makes nothing in the model as they are.

    stored: names in the files. ours: names in the model. Raises StreamError where it would merge or
    split tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = dict.fromkeys(ours, True)
    names: dict[str, str] = {}
    for name in stored:
        new, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, known
        )
        if new not in known and name in known:
            new, converted = name, None
        if converted is not None:
            raise StreamError(
                f"transformers makes {new} of {name} and others while it loads a "
                f"{type(model).__name__}; quantize it by zp.load(source, weights=...)"
            )
        names[name] = new if new in known else name
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise StreamError(f"several tensors of the files are {twice[0]} in the model")
    return names


def empty_model(kind: Any, config: Any) -> nn.Module:
    """A model of a class of transformers, its parameters on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        skeleton: Any = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    skeleton.tie_weights()  # each had got a parameter of its own
    restore_pruned(skeleton)
    model: nn.Module = skeleton
    return model


def _pruning(kind: Any, config: Any) -> Any:
    """The class of the model, except that its models prune themselves as their configuration says,
    before their weights are loaded.
    """
    base: Any = type(empty_model(kind, config))

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        restore_pruned(self)

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _model_class(config: Any, task: str | None) -> Any:
    """The class for a task; else the one the configuration names; else by what the configuration
    can be.
    """
    import transformers

    if task is not None:
        return getattr(transformers, TASKS[task])
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not _is_encoder(config):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _is_encoder(config: Any) -> bool:
    """Encoders with a causal variant (BERT) say so only by not being decoders."""
    return not getattr(config, "is_decoder", True)


def _plain(loaded: Any) -> nn.Module:
    """The same weights in a model that transformers does not mark as GGUF-quantized: they have been
    dequantized.
    """
    config = loaded.config
    with suppress(AttributeError):
        del config.quantization_config
    plain: Any = empty_model(type(loaded), config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    module: nn.Module = plain
    return module


def load_tokenizer(found: Source) -> Any:
    from transformers import AutoTokenizer

    where = found.location
    if found.kind in ("native", "directory") and not any(
        (Path(where) / file).is_file()
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
    ):
        return None
    try:
        if found.kind == "gguf":
            check_file(Path(where))
            return gguf_tokenizer(Path(where))
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as e:
        if found.kind == "hub":
            return None  # vision and audio models have none
        raise SourceError(f"the tokenizer of {found.location!r} cannot be loaded: {e}") from e


# --- zeropoint checkpoints ---


def _load_native(path: Path, task: str | None, model: nn.Module | None) -> nn.Module:
    """Build the model without memory, put quantized modules where the manifest says, and fill in
    the stored tensors.
    """
    contents = native.read(path)
    skeleton = float_counterpart(path, contents.config, task) if model is None else model
    install(path, skeleton, contents.qweights, contents.tied)
    _fill(path, skeleton, contents)
    remember_recipe(skeleton, contents.recipe)
    remember_algorithm(skeleton, contents.algorithm)
    return skeleton


def install(
    path: Path, model: nn.Module, qweights: Mapping[str, QTensor], tied: Mapping[str, str]
) -> None:
    """Put frozen modules in the places of float ones. In place.

    path: of the checkpoint, for messages. qweights: by their full names. tied: other name -> name
    that holds the weight; names of other tensors are passed over. Raises CheckpointError.
    """
    names_of = named_modules(model)
    modules = {name: m for m, names in names_of.items() for name in names}
    frozen: dict[str, QModule] = {}
    for weight_name, qweight in qweights.items():
        name = weight_name.removesuffix(".weight")
        new = _quantized(path, name, modules.get(name), qweight.scheme, tuple(qweight.shape))
        new.freeze(qweight)
        frozen[name] = new
        replace_module(model, names_of[modules[name]], new)
    for alias, owner in tied.items():
        name, owner_name = alias.removesuffix(".weight"), owner.removesuffix(".weight")
        if owner_name in frozen and name not in names_of[modules[owner_name]]:
            source = frozen[owner_name]
            new = _quantized(path, name, modules.get(name), source.scheme, source.shape)
            new.freeze_tied(source)
            replace_module(model, names_of[modules[name]], new)


def expect_inputs(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Make room for the static ranges that a manifest lists, on the meta device. In place."""
    tensors = manifest["tensors"]
    scale_leaf, zero_leaf = INPUT_PARTS
    for name, module in quantized_modules(model).items():
        if isinstance(module, QLinear) and f"{name}.{scale_leaf}" in tensors:
            scale = torch.empty((), device="meta")
            zero_point = None
            if f"{name}.{zero_leaf}" in tensors:
                zero_point = torch.empty((), dtype=torch.int8, device="meta")
            source = manifest.get("inputs", {}).get(name)
            module.fix_input(scale, zero_point, InputRange(**source) if source else None)


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Change what was loaded to `dtype`, and leave what a model computes for itself: rotary
    frequencies, which are not stored, keep their precision. As transformers does. In place.
    """
    if dtype is None:
        return
    for module in model.modules():
        if isinstance(module, QModule):
            module.to(dtype)
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype


def float_counterpart(path: Path, config: Any, task: str | None) -> nn.Module:
    """The float model of a zeropoint checkpoint, its parameters on the meta device.

    config: what its config.json holds. Raises SourceError.
    """
    from transformers import AutoConfig

    if "model_type" not in config:
        raise SourceError(
            f"{path} holds a module that is not a transformers model; pass model= with a float "
            "module of its structure"
        )
    data = {k: v for k, v in config.items() if k != "quantization_config"}
    parsed = AutoConfig.for_model(**data)
    skeleton: Any = empty_model(_model_class(parsed, task), parsed)
    if (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        skeleton.generation_config = GenerationConfig.from_pretrained(path)
    loaded: nn.Module = skeleton
    return loaded


def _quantized(
    path: Path, name: str, module: nn.Module | None, scheme: Any, shape: tuple[int, ...]
) -> QModule:
    kind = None if module is None else quantized_type(module)
    if module is None or kind is None:
        what = "is not in the model" if module is None else f"is a {type(module).__name__}"
        raise CheckpointError(
            f"{path} holds a quantized {name}, which {what}; is this the right model?"
        )
    if kind.weight_shape(module) != shape:
        raise CheckpointError(
            f"{path}: {name}.weight is {shape}, but the model has {kind.weight_shape(module)}; is "
            "this the right model?"
        )
    return kind.from_float(module, scheme)


def _fill(path: Path, model: nn.Module, contents: native.Contents) -> None:
    """Put every stored float tensor where it belongs, tied ones as one parameter.

    Raises CheckpointError.
    """
    left = dict(contents.tensors)
    made: dict[str, nn.Parameter] = {}
    for module, names in named_modules(model).items():
        prefix = f"{names[0]}." if names[0] else ""
        _assign(path, module._parameters, prefix, contents, left, made)
        if isinstance(module, QModule):  # its other buffers are the weight's parts
            _fix_input(path, module, prefix, contents, left)
            continue
        for leaf in module._buffers.keys() - module._non_persistent_buffers_set:
            old = module._buffers[leaf]
            if old is not None:
                new = _take(path, prefix + leaf, contents, left)
                _check_shape(path, prefix + leaf, new, old)
                module._buffers[leaf] = new
    left_over = left.keys() - {*contents.carried}
    if left_over:
        raise CheckpointError(f"{path} holds {sorted(left_over)[0]}, which the model does not have")


def _fix_input(
    path: Path, module: QModule, prefix: str, contents: native.Contents, left: dict[str, Tensor]
) -> None:
    """Give a layer the static range that is stored for its input, if there is one. In place."""
    scale_name, zero_name = (prefix + name for name in INPUT_PARTS)
    if contents.tied.get(scale_name, scale_name) not in contents.tensors:
        return
    scheme = module.scheme
    if not isinstance(module, QLinear) or not scheme.activations or scheme.outlier_threshold:
        raise CheckpointError(
            f"{path} holds {scale_name}, but {scheme} has no static range for its input"
        )
    scale, zero_point = _take(path, scale_name, contents, left), None
    parts = [(scale_name, scale, torch.float32)]
    if get_format(scheme.activations).kind == "integer":
        zero_point = _take(path, zero_name, contents, left)
        parts.append((zero_name, zero_point, torch.int8))
    for name, part, dtype in parts:
        if part.dim() or part.dtype != dtype:
            raise CheckpointError(
                f"{path}: {name} is {tuple(part.shape)} {part.dtype}, but one {dtype} is needed"
            )
    source = contents.inputs.get(prefix.removesuffix("."))
    module.fix_input(scale, zero_point, InputRange(**source) if source else None)


def _assign(
    path: Path,
    parameters: dict[str, nn.Parameter | None],
    prefix: str,
    contents: native.Contents,
    left: dict[str, Tensor],
    made: dict[str, nn.Parameter],
) -> None:
    for leaf, old in parameters.items():
        if old is None:
            continue
        owner = contents.tied.get(prefix + leaf, prefix + leaf)
        if owner not in made:
            tensor = _take(path, owner, contents, left)
            _check_shape(path, owner, tensor, old)
            made[owner] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        parameters[leaf] = made[owner]


def _check_shape(path: Path, name: str, stored: Tensor, wanted: Tensor) -> None:
    if stored.shape != wanted.shape:
        raise CheckpointError(
            f"{path}: {name} is {tuple(stored.shape)}, but the model has {tuple(wanted.shape)}"
        )


def _take(path: Path, name: str, contents: native.Contents, left: dict[str, Tensor]) -> Tensor:
    name = contents.tied.get(name, name)
    if name not in contents.tensors:
        raise CheckpointError(f"{path} lacks {name}, which the model has")
    left.pop(name, None)
    return contents.tensors[name]
