"""The native format: safetensors + config.json + a manifest.
`docs/checkpoint-format.md` is its specification.

    model.safetensors   x.weight (packed, 1-D), its scale and zero_point, the rest as it is
    config.json         the model's configuration, with quantization_config
    zeropoint.json      the manifest: every tensor's scheme and shape, every file's size and hash

Packed codes never have the shape of the float weight whose name they carry, so a loader that does
not know the format fails on the shape instead of running codes as weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zeropoint.checkpoints.atomic import replace_directory
from zeropoint.errors import CheckpointError, ZeropointError
from zeropoint.progress import OnStep, no_progress
from zeropoint.qtensor import QTensor, check_parts
from zeropoint.scheme import Recipe, Scheme

FORMAT_VERSION = 1
MANIFEST = "zeropoint.json"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QUANT_METHOD = "zeropoint"
MAX_SHARD_BYTES = 5_000_000_000
_SLACK_BYTES = (
    32_000_000  # headers, configuration, tokenizer: what a checkpoint holds beside its tensors
)
_SUFFIXES = ("", "_scale", "_zero_point")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint's tensors. qweights, tensors: by their full names. tied: other name -> name it
    shares storage with. inputs: by layer, where the static range of its input comes from.
    """

    qweights: Mapping[str, QTensor]
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str]
    recipe: Recipe
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# --- writing ---


@contextmanager
def write(path: Path, contents: Contents, *, overwrite: bool) -> Iterator[Path]:
    """Write a checkpoint, atomically.
    Yields the folder, for other files (tokenizer ...) that belong to it.

    Raises CheckpointError: the folder exists (and `overwrite` is not set, or it is not a
    checkpoint), no space, read-only.
    """
    tensors = dict(contents.tensors)
    for name, weight in contents.qweights.items():
        tensors |= {name + suffix: part for suffix, part in weight.parts.items()}
    needed = sum(t.nbytes for t in tensors.values()) + _SLACK_BYTES

    def may_replace(existing: Path) -> str | None:
        return why_not_replace(existing, overwrite)

    with replace_directory(path, may_replace=may_replace, needed_bytes=needed) as folder:
        _write_shards(folder, tensors)
        quantization = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        config = dict(contents.config) | {
            "quantization_config": quantization | {"recipe": contents.recipe.to_dict()}
        }
        _write_json(folder / CONFIG, config)
        yield folder
        _write_json(folder / MANIFEST, _manifest(folder, contents))


def why_not_replace(existing: Path, overwrite: bool) -> str | None:
    """Why a non-empty folder must not be replaced by a checkpoint, or None."""
    if not (existing / MANIFEST).is_file():
        return (
            f"it holds no {MANIFEST}, so it is not a checkpoint and is not replaced; "
            "choose another folder"
        )
    return None if overwrite else "use overwrite=True (--overwrite) to replace the checkpoint in it"


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and held + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.detach().contiguous().cpu()
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _manifest(folder: Path, contents: Contents) -> dict[str, Any]:
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "weights": {
            name: {
                "scheme": w.scheme.to_dict(),
                "shape": list(w.shape),
                "dtype": _dtype_name(w.dtype),
            }
            for name, w in contents.qweights.items()
        },
        "tensors": {
            name: {"shape": list(t.shape), "dtype": _dtype_name(t.dtype)}
            for name, t in contents.tensors.items()
        },
        "tied": dict(contents.tied),
        "files": files,
    }
    if contents.inputs:
        manifest["inputs"] = {name: dict(row) for name, row in contents.inputs.items()}
    return manifest | {"digest": _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- reading ---


def is_checkpoint(path: Path) -> bool:
    """Whether the folder holds a manifest of this format."""
    return (path / MANIFEST).is_file()


def read(path: Path) -> Contents:
    """Everything in a checkpoint, after checking every file's hash, every tensor's shape and dtype.

    Tensors are memory-mapped: reading costs no memory beyond them. Raises CheckpointError.
    """
    manifest = _read_manifest(path)
    files = [f for f in manifest["files"] if f.endswith(".safetensors")]
    for file, row in manifest["files"].items():
        problem = _file_problem(path, file, row)
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}; `zeropoint verify {path}` lists all damage")
    stored = _read_tensors(path, files)
    try:
        qweights = {name: _qtensor(name, row, stored) for name, row in manifest["weights"].items()}
        tensors = {name: _tensor(name, row, stored) for name, row in manifest["tensors"].items()}
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    if stored:
        raise CheckpointError(f"{path}: {', '.join(sorted(stored)[:3])} is in no manifest entry")
    config = _read_json(path / CONFIG)
    return Contents(
        qweights=qweights,
        tensors=tensors,
        tied=manifest["tied"],
        recipe=_recipe(path, config),
        config=config,
        inputs=manifest.get("inputs", {}),
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint."""
    return _read_json(path / CONFIG)


def _recipe(path: Path, config: Mapping[str, Any]) -> Recipe:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{path}/{CONFIG} has no quantization_config of quant_method {QUANT_METHOD!r}"
        )
    try:
        return Recipe.from_dict(quantization.get("recipe"))
    except ZeropointError as e:
        raise CheckpointError(f"{path}/{CONFIG}: {e}") from e


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path / MANIFEST)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer zeropoint (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); "
            "upgrade: pip install -U zeropoint"
        )
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(f"{path}/{MANIFEST} was changed or damaged after it was written")
    for key in ("weights", "tensors", "tied", "files"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{path}/{MANIFEST} has no {key!r}")
    for file in manifest["files"]:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{path}/{MANIFEST} names {file!r}, which is outside the folder")
    problem = _inputs_problem(manifest.get("inputs", {}))
    if problem is not None:
        raise CheckpointError(f"{path}/{MANIFEST}: {problem}")
    return manifest


_INPUT_FIELDS: dict[str, tuple[type, ...]] = {
    "observer": (str,),
    "samples": (int,),
    "low": (int, float),
    "high": (int, float),
}


def _inputs_problem(inputs: Any) -> str | None:
    """Why what is said about the ranges of inputs makes no sense, or None."""
    if not isinstance(inputs, dict):
        return "its 'inputs' is not an object"
    for name, row in inputs.items():
        if not isinstance(row, dict) or row.keys() != _INPUT_FIELDS.keys():
            return f"the input of {name} has not the keys {', '.join(_INPUT_FIELDS)}"
        for key, kind in _INPUT_FIELDS.items():
            if not isinstance(row[key], kind):
                return f"the input of {name} has {key}={row[key]!r}"
    return None


def _file_problem(path: Path, file: str, row: Mapping[str, Any]) -> str | None:
    if not (path / file).is_file():
        return f"{file} is missing"
    size = (path / file).stat().st_size
    if size != row["bytes"]:
        return f"{file} has {size} bytes, not {row['bytes']}: truncated or replaced"
    if _sha256(path / file) != row["sha256"]:
        return f"{file} has another SHA-256 than when written: a bit flipped, or it was replaced"
    return None


def _read_tensors(path: Path, files: list[str]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(path / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if name in stored:
                        raise CheckpointError(f"{path}: {name} is in two files")
                    stored[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{path}/{file} cannot be read: {e}") from e
    return stored


def _qtensor(name: str, row: Any, stored: dict[str, Tensor]) -> QTensor:
    """Take a weight's parts out of `stored`."""
    parts = {s: stored.pop(name + s) for s in _SUFFIXES if name + s in stored}
    try:
        scheme = Scheme(**row["scheme"])
        shape = torch.Size(row["shape"])
        dtype = getattr(torch, row["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{row['dtype']!r} is not a dtype")
        check_parts(name, parts, shape, scheme)
    except CheckpointError:
        raise
    except (ZeropointError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{name}: its manifest entry makes no sense: {e}") from e
    return QTensor(
        packed=parts[""],
        scale=parts.get("_scale"),
        zero_point=parts.get("_zero_point"),
        scheme=scheme,
        shape=shape,
        dtype=dtype,
    )


def _tensor(name: str, row: Any, stored: dict[str, Tensor]) -> Tensor:
    if name not in stored:
        raise CheckpointError(f"{name} is missing")
    tensor = stored.pop(name)
    found = {"shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype)}
    if found != row:
        raise CheckpointError(f"{name} is {found}, but the manifest says {row}")
    return tensor


# --- verifying ---


def verify(path: str | Path, *, on_step: OnStep = no_progress) -> list[str]:
    """Every problem of a checkpoint, in words; an empty list when it is sound.

    Checks: manifest, sizes and SHA-256 of all files, files nobody listed, every tensor's presence,
    shape and dtype, scales and other floats finite, scales positive, the configuration's recipe.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if not is_checkpoint(path):
        raise CheckpointError(
            f"{path} holds no {MANIFEST}; only zeropoint checkpoints can be verified"
        )
    try:
        manifest = _read_manifest(path)
    except CheckpointError as e:
        return [str(e)]
    problems = []
    files: dict[str, Any] = manifest["files"]
    for done, (file, row) in enumerate(files.items()):
        on_step(file, done, len(files))
        problem = _file_problem(path, file, row)
        if problem is not None:
            problems.append(problem)
    listed = {*files, MANIFEST}
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    problems += [f"{file} is not in the manifest" for file in sorted(present - listed)]
    problems += _tensor_problems(
        path, manifest, sorted(f for f in present if f.endswith(".safetensors"))
    )
    try:
        _recipe(path, _read_json(path / CONFIG))
    except CheckpointError as e:
        problems.append(str(e))
    return problems


def _tensor_problems(path: Path, manifest: Mapping[str, Any], files: list[str]) -> list[str]:
    try:
        stored = _read_tensors(path, files)
    except CheckpointError as e:
        return [str(e)]
    problems = []
    for name, row in manifest["weights"].items():
        try:
            weight = _qtensor(name, row, stored)
        except CheckpointError as e:
            problems.append(str(e))
            continue
        if weight.scale is None:
            problems += _float_problems(name, weight.packed, positive=False)
        elif weight.scheme.double_quant:
            assert weight.scales is not None
            problems += _float_problems(f"{name}_scale", weight.scales, positive=False)
        else:
            problems += _float_problems(f"{name}_scale", weight.scale, positive=True)
    for name, row in manifest["tensors"].items():
        try:
            is_scale = _is_input_scale(name, manifest)
            problems += _float_problems(name, _tensor(name, row, stored), positive=is_scale)
        except CheckpointError as e:
            problems.append(str(e))
    for alias, owner in manifest["tied"].items():
        if owner not in manifest["weights"] and owner not in manifest["tensors"]:
            problems.append(f"{alias} is tied to {owner}, which is missing")
    return problems + [f"{name} is in no manifest entry" for name in sorted(stored)]


def _is_input_scale(name: str, manifest: Mapping[str, Any]) -> bool:
    """Whether this is the scale of a quantized layer's input."""
    weight = name.removesuffix("input_scale") + "weight"
    return name.endswith("input_scale") and (
        weight in manifest["weights"] or manifest["tied"].get(weight) in manifest["weights"]
    )


def _float_problems(name: str, tensor: Tensor, *, positive: bool) -> list[str]:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return []
    low, high = (float(v) for v in tensor.double().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return [f"{name} holds NaN or Inf"]
    if positive and low <= 0:
        return [f"{name} holds {low}, but scales are positive"]
    return []
