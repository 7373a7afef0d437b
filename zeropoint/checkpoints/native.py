"""The native format: safetensors + config.json + a manifest.
`docs/checkpoint-format.md` is its specification.

    model.safetensors   x.weight (packed, 1-D), its scale, zero_point and levels, the rest as it is;
                        in the header of each file the manifest: every tensor's scheme and shape
    config.json         the model's configuration, with quantization_config
    zeropoint.json      the manifest again, with every file's size and hash

zeropoint.json is missing where transformers wrote the files (`save_pretrained`); the header then
holds a hash of every tensor instead.

Packed codes never have the shape of the float weight whose name they carry, so a loader that does
not know the format fails on the shape instead of running codes as weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zeropoint.checkpoints.atomic import replace_directory
from zeropoint.checkpoints.shard import as_bytes, layout, write_file
from zeropoint.errors import CheckpointError, ZeropointError
from zeropoint.progress import OnStep, no_progress
from zeropoint.qtensor import PARTS, QTensor, check_parts, empty, part_specs
from zeropoint.scheme import Recipe, Scheme

FORMAT_VERSION = 1
MANIFEST = "zeropoint.json"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QUANT_METHOD = "zeropoint"
HEADER = "zeropoint"  # the manifest's key in the metadata of safetensors files
LIVE_HEADER = {"zeropoint_state": "live"}  # of files that transformers writes while training
MAX_SHARD_BYTES = 1_000_000_000  # a file is hashed while the next one is written
SLACK_BYTES = 32_000_000  # headers, configuration, tokenizer: what is beside the tensors
SHA256_DIGITS = 64
_HASHERS = 4  # threads


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint's tensors. qweights, tensors: by their full names. tied: other name -> name it
    shares storage with. inputs: by layer, where the static range of its input comes from. carried:
    those of `tensors` that the model does not have; they were in its float checkpoint. algorithm:
    how all codes were chosen, None where that is not known.
    """

    qweights: Mapping[str, QTensor]
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str]
    recipe: Recipe
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    algorithm: str | None = None


# --- writing ---


@contextmanager
def write(path: Path, contents: Contents, *, overwrite: bool) -> Iterator[Path]:
    """Write a checkpoint, atomically.
    Yields the folder, for other files (tokenizer ...) that belong to it.

    Raises CheckpointError: the folder exists (and `overwrite` is not set, or it is not a
    checkpoint), no space, read-only.
    """
    tensors = stored_tensors(contents)
    needed = sum(t.nbytes for t in tensors.values()) + SLACK_BYTES

    def may_replace(existing: Path) -> str | None:
        return why_not_replace(existing, overwrite)

    with replace_directory(path, may_replace=may_replace, needed_bytes=needed) as folder:
        files = shards(tensors)
        for file, group in files.items():
            write_file(folder / file, group, metadata(contents))
        write_index(folder, files)
        write_config(folder, contents)
        yield folder
        write_manifest(folder, contents)


def stored_tensors(contents: Contents) -> dict[str, Tensor]:
    """Every tensor of the checkpoint's files by the name it has there."""
    tensors = dict(contents.tensors)
    for name, weight in contents.qweights.items():
        tensors |= {name + suffix: part for suffix, part in weight.parts.items()}
    return tensors


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """What config.json says of the quantization."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.to_dict(),
    }


def header(contents: Contents) -> dict[str, str]:
    """The metadata of safetensors files that somebody else writes, with a hash of every tensor."""
    stored = stored_tensors(contents)
    hashes = {name: _tensor_sha256(tensor) for name, tensor in stored.items()}
    return _header(_manifest(contents) | {"hashes": hashes})


def why_not_replace(existing: Path, overwrite: bool) -> str | None:
    """Why a non-empty folder must not be replaced by a checkpoint, or None."""
    if not is_checkpoint(existing):
        return (
            f"it holds no {MANIFEST}, so it is not a checkpoint and is not replaced; "
            "choose another folder"
        )
    return None if overwrite else "use overwrite=True (--overwrite) to replace the checkpoint in it"


def shards(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors, which may be on the meta device, by the files they belong to."""
    groups: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.nbytes > MAX_SHARD_BYTES:
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    of = f"of-{len(groups):05d}"
    return {f"model-{i:05d}-{of}.safetensors": group for i, group in enumerate(groups, 1)}


def metadata(contents: Contents) -> dict[str, str]:
    """Of every safetensors file of a checkpoint. The tensors may be on the meta device."""
    return {"format": "pt"} | _header(_manifest(contents))


def write_index(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Which file holds which tensor, where there are several."""
    if len(files) > 1:
        _write_json(folder / INDEX, _index(files))


def _index(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    total = sum(t.nbytes for group in files.values() for t in group.values())
    weight_map = {name: file for file, group in files.items() for name in group}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_config(folder: Path, contents: Contents) -> None:
    """config.json."""
    _write_json(folder / CONFIG, _config(contents))


def _config(contents: Contents) -> dict[str, Any]:
    return dict(contents.config) | {"quantization_config": quantization_config(contents.recipe)}


def write_manifest(
    folder: Path, contents: Contents, hashes: Mapping[str, str] | None = None
) -> None:
    """The manifest, with the SHA-256 of all files that are in the folder: the last to be written.

    hashes: of files for which it is known already.
    """
    files = _files(folder, hashes or {})
    _write_json(folder / MANIFEST, _signed(_manifest(contents) | {"files": files}))


def disk_bytes(contents: Contents, others: Mapping[str, int]) -> int:
    """What `write` would write. The tensors may be on the meta device.

    others: sizes of the files beside the tensors, by their names in the folder.
    """
    files = shards(stored_tensors(contents))
    sizes = {name: layout(group, metadata(contents)).size for name, group in files.items()}
    if len(files) > 1:
        sizes[INDEX] = len(_json(_index(files)))
    sizes |= {**others, CONFIG: len(_json(_config(contents)))}
    listed = {name: {"bytes": size, "sha256": "0" * SHA256_DIGITS} for name, size in sizes.items()}
    return sum(sizes.values()) + len(_json(_signed(_manifest(contents) | {"files": listed})))


def _files(folder: Path, known: Mapping[str, str]) -> dict[str, Any]:
    paths = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    unknown = [file for file in paths if file not in known]
    with ThreadPoolExecutor(_HASHERS) as pool:
        hashes = zip(unknown, pool.map(lambda file: _sha256(paths[file]), unknown), strict=True)
        found = {**known, **dict(hashes)}
    return {
        file: {"bytes": path.stat().st_size, "sha256": found[file]} for file, path in paths.items()
    }


def _manifest(contents: Contents) -> dict[str, Any]:
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
    }
    if contents.inputs:
        manifest["inputs"] = {name: dict(row) for name, row in contents.inputs.items()}
    if contents.carried:
        manifest["carried"] = list(contents.carried)
    if contents.algorithm is not None:
        manifest["algorithm"] = contents.algorithm
    return manifest


def _signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {**manifest, "digest": _digest(manifest)}


def _header(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {HEADER: json.dumps(_signed(manifest), separators=(",", ":"))}


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, data: Any) -> None:
    path.write_text(_json(data), encoding="utf-8")


def _json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"  # ASCII: as many bytes


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- reading ---


def is_checkpoint(path: Path) -> bool:
    """Whether the folder holds a checkpoint of this format, whoever wrote it."""
    if (path / MANIFEST).is_file():
        return True
    try:
        quantization = _read_json(path / CONFIG).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read(path: Path) -> Contents:
    """Everything in a checkpoint, after checking every file's hash, every tensor's shape and dtype.

    Tensors are memory-mapped: reading costs no memory beyond them. Raises CheckpointError.
    """
    manifest = _read_manifest(path)
    with ThreadPoolExecutor(_HASHERS) as pool:
        files = manifest["files"]
        problems = list(pool.map(lambda file: _file_problem(path, file, files[file]), files))
    return _contents(path, manifest, _checked(path, problems, manifest))


def read_verified(path: Path) -> Contents:
    """As `read`, of a checkpoint whose hashes `verify` has just computed."""
    manifest = _read_manifest(path)
    return _contents(path, manifest, _read_tensors(path, _tensor_files(path, manifest)))


def _contents(path: Path, manifest: Mapping[str, Any], stored: dict[str, Tensor]) -> Contents:
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
        carried=tuple(manifest.get("carried", ())),
        algorithm=manifest.get("algorithm"),
    )


def _checked(
    path: Path, problems: Sequence[str | None], manifest: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The stored tensors, once files and tensors have the hashes they had when written."""
    advice = f"`zeropoint verify {path}` lists all damage"
    for problem in problems:
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}; {advice}")
    stored = _read_tensors(path, _tensor_files(path, manifest))
    for problem in _hash_problems(stored, manifest):
        raise CheckpointError(f"{path}: {problem}; {advice}")
    return stored


def _tensor_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of the safetensors files: those the manifest lists, or all there are."""
    listed = manifest["files"] if (path / MANIFEST).is_file() else (p.name for p in path.iterdir())
    return sorted(f for f in listed if f.endswith(".safetensors"))


def _hash_problems(stored: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, expected in manifest["hashes"].items():
        if name in stored and _tensor_sha256(stored[name]) != expected:
            yield f"{name} has another SHA-256 than when written: a bit flipped, or it was replaced"


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
    """The manifest: the file, or where there is none, the headers."""
    if (path / MANIFEST).is_file():
        return _parsed(path / MANIFEST, _read_json(path / MANIFEST), ("hashes",))
    manifest = read_header(sorted(path.glob("*.safetensors")))
    if not manifest["hashes"]:  # transformers writes them; whoever writes none writes the file
        raise CheckpointError(
            f"{path} lacks {MANIFEST}, which has the hashes of its files; copy the folder again"
        )
    return manifest


def read_header(files: Sequence[Path]) -> dict[str, Any]:
    """The manifest in the headers of a checkpoint's safetensors files. Raises CheckpointError."""
    texts: dict[str | None, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                texts[metadata.get(HEADER)] = file
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file} cannot be read: {e}") from e
        if metadata.items() >= LIVE_HEADER.items():
            raise CheckpointError(
                f"{file} holds the float weights of a model that was being trained; load its "
                "original, call zp.quantize with the recipe in config.json, and go on with "
                "Trainer.train(resume_from_checkpoint=...) or model.load_state_dict(...)"
            )
    if None in texts or not texts:
        raise CheckpointError(
            f"{texts.get(None, 'the folder')} has no {HEADER!r} in the header of its safetensors; "
            "the model was not saved as a zeropoint checkpoint"
        )
    if len(texts) > 1:
        first, other = list(texts.values())[:2]
        raise CheckpointError(f"{first} and {other} are shards of different checkpoints")
    text, file = texts.popitem()
    assert text is not None
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: the {HEADER!r} in its header cannot be read: {e}") from e
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file}: the {HEADER!r} in its header is not a JSON object")
    return _parsed(file, manifest, ("files", "hashes"))


def empty_weights(manifest: Mapping[str, Any]) -> dict[str, QTensor]:
    """The quantized weights of a manifest on the meta device. Raises CheckpointError."""
    weights = {}
    for name, row in manifest["weights"].items():
        scheme, shape, dtype = _weight_row(name, row)
        weights[name] = empty(shape, scheme, dtype)
    return weights


def _parsed(path: Path, manifest: dict[str, Any], optional: tuple[str, ...]) -> dict[str, Any]:
    """The manifest after its checks; what is optional is empty where it is not there."""
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer zeropoint (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); "
            "upgrade: pip install -U zeropoint"
        )
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(f"{path}: the manifest was changed or damaged after it was written")
    manifest = {key: {} for key in optional} | manifest
    for key, kind in _SECTIONS.items():
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{path}: the manifest has no {key!r}")
        odd = next((n for n, row in manifest[key].items() if not isinstance(row, kind)), None)
        if odd is not None:
            raise CheckpointError(f"{path}: {key!r} has {odd!r}: {manifest[key][odd]!r}")
    for file, row in manifest["files"].items():
        if Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file:
            raise CheckpointError(f"{path} names {file!r}, which is outside the folder")
        if row.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{path}: 'files' has {file!r}: {row!r}")
    carried = manifest.get("carried", [])
    if not isinstance(carried, list) or not {*map(str, carried)} <= manifest["tensors"].keys():
        raise CheckpointError(f"{path}: 'carried' names what is not among its tensors")
    problem = _inputs_problem(manifest.get("inputs", {}))
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    algorithm = manifest.get("algorithm", "")
    if not isinstance(algorithm, str):
        raise CheckpointError(f"{path}: its 'algorithm' is {algorithm!r}, which is no name")
    return manifest


_SECTIONS: dict[str, type] = {
    "weights": dict,
    "tensors": dict,
    "tied": str,
    "files": dict,
    "hashes": str,
}
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
    parts = {s: stored.pop(name + s) for s in PARTS if name + s in stored}
    scheme, shape, dtype = _weight_row(name, row)
    check_parts(name, parts, shape, scheme)
    return QTensor.from_parts(parts, scheme=scheme, shape=shape, dtype=dtype)


def _weight_row(name: str, row: Any) -> tuple[Scheme, torch.Size, torch.dtype]:
    """Scheme, shape and dtype of a weight, after checking that they can be one."""
    try:
        scheme = Scheme(**row["scheme"])
        shape = torch.Size(row["shape"])
        dtype = getattr(torch, row["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{row['dtype']!r} is not a dtype")
        part_specs(shape, scheme)
    except (ZeropointError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{name}: its manifest entry makes no sense: {e}") from e
    return scheme, shape, dtype


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
    shape and dtype, scales, zero points and other floats finite, scales positive, the
    configuration's recipe.
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
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    if files:
        unlisted = sorted(present - {*files, MANIFEST})
        problems += [f"{file} is not in the manifest" for file in unlisted]
    return problems + _content_problems(path, manifest)


def verify_contents(path: Path) -> list[str]:
    """What `verify` finds besides the hashes of files, when those have just been computed.

    Raises CheckpointError when there is no manifest that can be read.
    """
    return _content_problems(path, _read_manifest(path))


def _content_problems(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    present = (str(p.relative_to(path)) for p in path.rglob("*.safetensors") if p.is_file())
    problems = _tensor_problems(path, manifest, sorted(present))
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
    problems = list(_hash_problems(stored, manifest))
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
            signed = weight.scheme.symmetric and weight.scheme.fmt.signed_scale
            scale = weight.scale.abs() if signed else weight.scale
            problems += _float_problems(f"{name}_scale", scale, positive=True)
        for suffix in ("_zero_point", "_levels"):
            if suffix in weight.parts:
                part = weight.parts[suffix]
                problems += _float_problems(f"{name}{suffix}", part, positive=False)
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
