"""What a quantized checkpoint of a float one will hold, from config.json and the headers alone.

headers + recipe --> contents of the output, and where each of its weights is read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeropoint.checkpoints import native
from zeropoint.checkpoints.floats import WEIGHT_SUFFIXES, Stored
from zeropoint.checkpoints.journal import NO_RECORD, Record
from zeropoint.errors import SourceError, StreamError
from zeropoint.flows import deleting
from zeropoint.flows.planned import planned
from zeropoint.flows.ptq import go_live
from zeropoint.flows.report import Report
from zeropoint.model.load import float_skeleton, install, model_names
from zeropoint.model.pages import drop_pages
from zeropoint.model.save import contents_of, remember_recipe
from zeropoint.model.source import Source
from zeropoint.model.walk import named_modules
from zeropoint.nn import QModule, quantized_type
from zeropoint.qtensor import QTensor, empty
from zeropoint.scheme import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint to be written. contents: of the output, its tensors without values where a file
    has them. sources: where each weight and tensor of it is read, by its name in the output.
    stored: all tensors of the files, by their names there. files: which weights and tensors each
    file has to be there for, those of which it holds another copy included. untied: the weights
    that the configuration ties, but of which the files hold two.
    """

    folder: Path
    contents: native.Contents
    sources: Mapping[str, Stored]
    stored: Mapping[str, Stored]
    files: Mapping[Path, Sequence[str]]
    untied: Sequence[str]
    transposed: frozenset[str]
    report: Report

    @property
    def bytes_to_read(self) -> int:
        """Of all tensors."""
        return sum(stored.nbytes for stored in self.sources.values())


def local_folder(found: Source) -> Path:
    """The folder of a float checkpoint, downloaded if it is on the hub.

    Raises SourceError; StreamError for a .gguf file.
    """
    if found.kind == "hub":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        skipped = [f"*{s}" for s in WEIGHT_SUFFIXES if "safetensors" not in s]
        try:
            return Path(snapshot_download(found.location, ignore_patterns=skipped))
        except (OSError, ValueError, HfHubHTTPError) as e:
            raise SourceError(f"{found.location!r} cannot be downloaded: {e}") from e
    if found.kind == "native":
        raise SourceError(f"{found.location} is quantized already; give the float model")
    if found.kind == "gguf":
        raise StreamError(
            f"{found.location} is a .gguf file; a folder of float safetensors is needed"
        )
    return Path(found.location)


def prepare(
    folder: Path,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    strict: bool = True,
    task: str | None = None,
    earlier: Record = NO_RECORD,
) -> Job:
    """What `compress` would write, from config.json and the headers alone. earlier: the unfinished
    run that it goes on with; files that run has deleted are known from it.

    Raises SourceError, CheckpointError, and what `zp.quantize` raises but for errors about values.
    """
    stored, untied = deleting.read_source(folder, earlier)
    skeleton = float_skeleton(folder, task)
    return outline(folder, skeleton, stored, options, recipe=recipe, strict=strict, untied=untied)


def outline(
    where: str | Path,
    skeleton: Any,
    stored: Mapping[str, Stored],
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    strict: bool = True,
    untied: Sequence[str] | None = None,
) -> Job:
    """As `prepare`, of headers that have been read. where: the folder, or a hub id, of which no
    tensor is read. skeleton: the float model on the meta device, which becomes the quantized one;
    not when StreamError is raised. untied: as `Job` has it; None to find out.
    """
    names = model_names(skeleton, stored, skeleton.state_dict().keys())
    files = _Files(where, stored, names)
    if untied is None:
        untied = _untied(skeleton, files) if isinstance(where, Path) else ()
    _untie(skeleton, untied)
    contents, report, transposed = without_values(
        where, skeleton, _dtype(skeleton, stored), options, recipe=recipe, strict=strict
    )
    copies: list[tuple[str, Stored]] = []
    for alias, owner in contents.tied.items():  # the files may hold it under any of its names
        if alias in files.left:
            copy = files.left.pop(alias)
            if files.left.setdefault(owner, copy) is not copy:
                copies.append((owner, copy))
    sources: dict[str, Stored] = {}
    for name, weight in contents.qweights.items():
        shape = weight.shape[::-1] if name in transposed else weight.shape
        sources[name] = files.take(name, tuple(shape))
    for name, tensor in contents.tensors.items():
        if tensor.is_meta or name in files.left:
            sources[name] = files.take(name, tuple(tensor.shape))
    carried = {
        name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in files.left.items()
    }
    sources |= files.left
    needs: dict[Path, list[str]] = {}
    for name, tensor_of_file in (*sources.items(), *copies):
        needs.setdefault(tensor_of_file.file, []).append(name)
    return Job(
        folder=Path(where),
        contents=replace(
            contents, tensors=dict(contents.tensors) | carried, carried=tuple(carried)
        ),
        sources=sources,
        stored=stored,
        files=needs,
        untied=untied,
        transposed=transposed,
        report=report,
    )


def without_values(
    where: str | Path,
    skeleton: nn.Module,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None,
    strict: bool,
) -> tuple[native.Contents, Report, frozenset[str]]:
    """Quantize and freeze a model that is on the meta device; in place. dtype: of its parameters,
    None to leave them. Returns what a checkpoint of it would hold, the report, and the names of
    weights that a float checkpoint holds as (K, N).
    """
    for parameter in skeleton.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    plan = planned(skeleton, options, recipe=recipe, strict=strict)
    transposed = _freeze_without_values(Path(where), skeleton, plan.schemes)
    remember_recipe(skeleton, plan.report.recipe)
    return contents_of(skeleton), plan.report, transposed


def live_model(
    job: Job,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None,
    strict: bool,
    task: str | None,
) -> nn.Module:
    """The model whose frozen state a job outlines: live, its parameters on the meta device."""
    model = float_skeleton(job.folder, task)
    _untie(model, job.untied)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_dtype(model, job.stored))
    go_live(model, planned(model, options, recipe=recipe, strict=strict))
    return model


def _dtype(skeleton: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """What transformers loads the float tensors in: the configuration's dtype, else the first."""
    dtype: torch.dtype | None = getattr(skeleton.config, "dtype", None)
    if dtype is None:
        floats = (s.dtype for s in stored.values() if s.dtype.is_floating_point)
        dtype = next(floats, torch.float32)
    wide = getattr(skeleton, "_keep_in_fp32_modules", None) or ()
    strict = getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ()
    if dtype != torch.float32 and (wide or strict):
        raise StreamError(
            f"transformers loads {', '.join([*wide, *strict])} of a {type(skeleton).__name__} in "
            f"float32 and the rest in {dtype}; quantize it by zp.load(source, weights=...)"
        )
    return dtype


def _freeze_without_values(
    folder: Path, skeleton: nn.Module, schemes: Mapping[Any, Any]
) -> frozenset[str]:
    """Frozen modules in the places of float ones, on the meta device. In place. Returns the names
    of weights whose files hold them as (K, N).
    """
    weights: dict[str, QTensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    transposed = set()
    for site, scheme in schemes.items():
        kind = quantized_type(site.module)
        assert kind is not None
        name = f"{site.name}.weight"
        owner = owners.setdefault(site.tied, name)
        if owner != name:
            tied[name] = owner
            continue
        shape = kind.weight_shape(site.module)
        weights[name] = empty(shape, scheme.stored, site.module.weight.dtype)
        marker = torch.empty((1, 2), device="meta")
        if kind.from_layout(marker).shape != marker.shape:
            transposed.add(name)
    install(folder, skeleton, weights, tied)
    names_of = named_modules(skeleton)
    first = {n: names[0] for m, names in names_of.items() for n in names if isinstance(m, QModule)}
    return frozenset(f"{first[n.removesuffix('.weight')]}.weight" for n in transposed)


class _Files:
    """The tensors of the files by the names they have in the model."""

    def __init__(
        self, folder: str | Path, stored: Mapping[str, Stored], names: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self.left = {names[name]: tensor for name, tensor in stored.items()}

    def take(self, name: str, shape: tuple[int, ...]) -> Stored:
        """The tensor of this name, which is not left then. Raises SourceError."""
        stored = self.left.pop(name, None)
        if stored is None:
            raise SourceError(f"{self._folder} is incomplete: it has no {name}")
        if stored.shape != shape:
            raise SourceError(
                f"{self._folder}: {stored.name} is {stored.shape}, but the model has {shape}; is "
                "config.json of this checkpoint?"
            )
        return stored


def _untied(model: Any, files: _Files) -> list[str]:
    """Weights that the configuration ties to others, of which the files hold different ones."""
    pairs = (
        (alias, files.left.get(alias), files.left.get(owner))
        for alias, owner in model.all_tied_weights_keys.items()
    )
    return [a for a, first, second in pairs if first and second and _differ(first, second)]


def _untie(model: Any, untied: Sequence[str]) -> None:
    """Give these weights a parameter each. In place. transformers does so while it loads."""
    for alias in untied:
        module, _, leaf = alias.rpartition(".")
        old = model.get_parameter(alias)
        setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty_like(old)))


def _differ(first: Stored, second: Stored) -> bool:
    if first.shape != second.shape:
        return True
    tensors = first.read(), second.read()
    equal = torch.equal(*tensors)
    for tensor in tensors:
        drop_pages(tensor)
    return not equal


def part_names(job: Job, name: str) -> list[str]:
    """Under which names the parts of a weight, or a tensor, are stored."""
    weight = job.contents.qweights.get(name)
    return [name] if weight is None else [name + suffix for suffix in weight.parts]
