"""A model whose blocks are in memory one at a time: read when they are worked on or run, written
when they have their codes, and let go.

    float files --enter--> block, calibrated --leave--> the output's files --whole--> block, run

What is in no block (embeddings, the last norm, a head) is in memory all the time. An earlier run's
codes are read instead of chosen again, and the calibration data passes them as it passed then: no
hidden state has to survive.
"""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeropoint.algorithms import Algorithm
from zeropoint.checkpoints import native
from zeropoint.checkpoints.floats import Stored
from zeropoint.checkpoints.journal import Journal
from zeropoint.checkpoints.shard import Shard, as_bytes
from zeropoint.errors import StreamError, ZeropointError
from zeropoint.flows.calibrate import calibrate
from zeropoint.flows.data import (
    SELF,
    Calibration,
    Data,
    Prepared,
    is_self,
    of_written,
    prepare,
    write,
)
from zeropoint.flows.report import FreezeReport, LayerReport
from zeropoint.flows.residence import Passed, Residence
from zeropoint.model.capture import Batch
from zeropoint.model.graph import Fold
from zeropoint.model.load import load_float, load_tokenizer
from zeropoint.model.pages import collect, drop_pages, trim
from zeropoint.model.replace import give_values
from zeropoint.model.shelf import Shelf
from zeropoint.model.source import resolve
from zeropoint.model.walk import named_modules
from zeropoint.nn import PART_NAMES, QModule
from zeropoint.numerics import check_finite, check_range
from zeropoint.progress import OnStep, OnUnit, Unit
from zeropoint.qtensor import QTensor

RECORDS = "blocks"  # folder beside the journal: what is known of each block beside its tensors
HIDDEN = "hidden"  # the same, for hidden states that are not in memory
ORIGINAL = "original"  # inside it: those of the model before it was quantized
TEXT = "text.safetensors"  # beside it: what the model has written to be calibrated by
REPORT = "report"  # a note in the journal: how all codes were chosen


class Calibrated:
    """The part of a run in which weights get their codes by what they see of calibration data.

    model: live, its parameters on the meta device. folder, task: where its weights are, and as what
    they are loaded. offload, memory_bytes: of hidden states, which folder they are in when they are
    not in memory, and how much may be. identity: what has to be equal for a run to go on with
    another's work.
    Raises StreamError for options that want the whole model, TextError for unusable data.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        options: Calibration,
        data: Data | None,
        tokenizer: Any,
        folder: Path,
        task: str | None,
        offload: Path | None,
        memory_bytes: int | None,
    ) -> None:
        check_streams(options)
        self._model, self._algorithm, self._options = model, algorithm, options
        self._folder, self._task = folder, task
        self._offload, self._memory_bytes = offload, memory_bytes
        self._given: Prepared | None = None
        if data is not None and not is_self(data):
            words = tokenizer or load_tokenizer(resolve(folder))
            self._given = prepare(model, data, words, options)
        self.identity = {
            "calibration": asdict(options),
            "data": SELF if self._given is None else _checksum(self._given.batches),
        }
        self.report: FreezeReport | None = None

    def run(
        self,
        sources: Mapping[str, Stored],
        contents: native.Contents,
        homes: Mapping[str, Shard],
        journal: Journal,
        working: Path,
        cluster: Executor | None,
        on_step: OnStep,
        on_unit: OnUnit,
    ) -> None:
        """Choose and write the codes of all weights, but for those that an earlier run has.
        cluster: as `calibrate` takes it.
        """
        shelves = self._shelves(working)
        residence = OnDisk(
            self._model, sources, contents, homes, journal, working, shelves, on_unit
        )
        try:
            layers, prepared, warnings = calibrate(
                self._model,
                self._algorithm,
                self._options,
                lambda: self._given or self._written(journal, working / TEXT, on_step),
                on_step,
                residence,
                cluster,
            )
        finally:
            for shelf in shelves.values():
                shelf.clear()
        residence.finish()
        self.report = FreezeReport(
            algorithm=self._algorithm.name,
            layers=tuple(layers),
            calibration=prepared.source,
            tokens=prepared.tokens,
            warnings=tuple(warnings),
        )
        journal.note(REPORT, asdict(self.report))

    def _shelves(self, working: Path) -> dict[bool, Shelf]:
        """For the hidden states of the model quantized (False) and original, if not in memory."""
        if self._offload is None and self._memory_bytes is None:
            return {}
        folder, limit = self._offload or working / HIDDEN, self._memory_bytes or 0
        if not self._options.propagate:
            return {False: Shelf(folder, limit)}
        original = Shelf(folder / ORIGINAL, limit // 2)
        return {True: original, False: Shelf(folder, limit - limit // 2)}

    def recall(self, journal: Journal) -> None:
        """Report what an earlier run did, which chose all codes."""
        known = journal.notes[REPORT]
        lists = {
            "layers": tuple(LayerReport(**layer) for layer in known["layers"]),
            "warnings": tuple(known["warnings"]),
        }
        self.report = FreezeReport(**known | lists)

    def _written(self, journal: Journal, file: Path, on_step: OnStep) -> Prepared:
        """Text that the model writes, or wrote for an earlier run."""
        if not file.is_file() or journal.done.get(TEXT) != zlib.crc32(file.read_bytes()):
            whole = load_float(resolve(self._folder), None, None, self._task).eval()
            save_file({"ids": write(whole, self._options, on_step)}, file)
            del whole
            collect()
            journal.add(TEXT, zlib.crc32(file.read_bytes()))
        return of_written(self._model, load_file(file)["ids"], self._options)

    @staticmethod
    def forget(working: Path) -> None:
        """Remove what a run that has come to its end leaves."""
        for folder in (RECORDS, HIDDEN):
            shutil.rmtree(working / folder, ignore_errors=True)
        (working / TEXT).unlink(missing_ok=True)


def check_streams(options: Calibration) -> None:
    """Raises StreamError for options that want the whole model."""
    if options.tune_steps:
        raise StreamError(
            'effort "high" (tune_steps) needs the whole model, and its float weights as well, in '
            "memory; use zp.load(source), zp.quantize, zp.freeze and zp.save"
        )


def _checksum(batches: list[Batch]) -> int:
    """Of everything the model will be given."""
    total = 0
    for batch in batches:
        named = batch.items() if isinstance(batch, dict) else [("", batch)]
        for name, tensor in sorted(named):
            about = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            total = zlib.crc32(as_bytes(tensor), zlib.crc32(about, total))
    return total


class OnDisk(Residence):
    """Blocks in files: float ones of `sources`, by their names in `contents`; finished ones in the
    shards that hold `contents`' parts.

    model: live, its parameters on the meta device. homes: the shard of each part. folder: for the
    records of blocks. shelves: for hidden states, empty for memory; True: those of the original
    model. on_unit: called for every layer that is finished.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Stored],
        contents: native.Contents,
        homes: Mapping[str, Shard],
        journal: Journal,
        folder: Path,
        shelves: Mapping[bool, Shelf],
        on_unit: OnUnit,
    ) -> None:
        self._model = model
        self._shelves = shelves
        self._sources = sources
        self._contents = contents
        self._parts = native.stored_tensors(contents)
        self._homes = homes
        self._journal = journal
        self._folder = folder / RECORDS
        self._on_unit = on_unit
        self._names: dict[nn.Module, str] = {}
        self._earlier: set[nn.Module] = set()
        self._done: set[nn.Module] = set()
        self._here: set[nn.Module] = set()

    def begin(self, blocks: Sequence[nn.Module]) -> None:
        """Read what is in no block. Raises StreamError where blocks cannot be had one by one."""
        names = named_modules(self._model)
        self._names = {block: names[block][0] for block in blocks}
        self._folder.mkdir(exist_ok=True)
        if not blocks:
            self.hold_all(f"a {type(self._model).__name__} has no blocks that run one by one")
        owners: dict[Tensor, nn.Module | None] = {}
        inside = {module: block for block in blocks for module in block.modules()}
        for module in names:
            for parameter in module._parameters.values():
                block = inside.get(module)
                if parameter is not None and owners.setdefault(parameter, block) is not block:
                    self.hold_all(f"{names[module][0]} shares a parameter with another block")
        with torch.no_grad():
            for module, (name, *_) in names.items():
                # Embeddings, wherever they are, get their codes first of all.
                if module not in inside or isinstance(module, nn.Embedding):
                    self._fill(module, name, own=False)
                self._fill_buffers(module, name)

    def hold_all(self, why: str) -> None:
        raise StreamError(
            f"{why}; calibrate it in memory by zp.load(source), zp.quantize and zp.freeze"
        )

    @contextmanager
    def whole(self) -> Iterator[None]:
        hooks: list[Any] = []
        for block in self._names:
            hooks.append(block.register_forward_pre_hook(lambda b, _: self._load(b)))
            hooks.append(block.register_forward_hook(lambda b, _, __: self._release(b)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block in tuple(self._here):  # in which the run ended
                self._release(block)

    def hidden(self, *, original: bool = False) -> list[Tensor] | Shelf:
        shelf = self._shelves.get(original)
        if shelf is None:
            return []
        shelf.clear()
        return shelf

    def enter(self, block: nn.Module) -> Passed | None:
        passed = self._passed(block)
        if passed is None:
            self._load(block)
        else:
            self._earlier.add(block)
            self._load_kept(block)
        self._here.add(block)
        return passed

    def original(self, block: nn.Module) -> nn.Module:
        twin = copy.deepcopy(block)
        if block in self._earlier:  # what it has are an earlier run's values
            for parameter in twin.parameters():
                give_values(parameter, torch.empty_like(parameter, device="meta"))
            for inner, module in twin.named_modules():
                self._fill(module, _join(self._names[block], inner))
        return twin

    def chosen(self, live: QModule) -> None:
        weight = live._parameters["weight"]
        assert weight is not None
        give_values(weight, torch.empty_like(weight, device="meta"))
        trim()

    def leave(self, block: nn.Module, passed: Passed) -> None:
        if block not in self._earlier:
            name = self._names[block]
            for part, tensor in block.state_dict(prefix=f"{name}.").items():
                self._write(part, tensor)
            record = json.dumps(
                {
                    "layers": [asdict(layer) for layer in passed.layers],
                    "folds": [
                        asdict(fold) | {"channel": fold.channel.tolist()} for fold in passed.folds
                    ],
                }
            ).encode()
            self._record(block).write_bytes(record)
            self._journal.add(f"{RECORDS}/{name}", zlib.crc32(record))
        for layer in passed.layers:
            self._on_unit(Unit(name=layer.name, output_error=layer.output_error))
        self._done.add(block)
        self._release(block)
        trim()

    def finish(self) -> None:
        """Write what is in no block, when the whole model is frozen."""
        for name, tensor in self._model.state_dict().items():
            if not tensor.is_meta:
                self._write(name, tensor)

    # --- from files ---

    def _load(self, block: nn.Module) -> None:
        if block in self._here:
            return
        self._here.add(block)
        with torch.no_grad():
            if block in self._done:
                self._load_kept(block)
                self._load_codes(block)
                return
            for inner, module in block.named_modules():
                self._fill(module, _join(self._names[block], inner))

    def _fill(self, module: nn.Module, name: str, *, own: bool = True) -> None:
        """Float values for a module's own parameters. In place. own: in memory of their own; else
        those of the file where that is possible, which must not be changed then.
        """
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            full = _join(name, leaf)
            values = self._read(full, parameter.dtype, own=own)
            weight = self._contents.qweights.get(self._owner(full))
            if weight is not None:
                try:
                    check_finite(values)
                    check_range(values, weight.scheme.format)
                except ZeropointError as e:
                    raise type(e)(f"{full}: {e}") from e
            give_values(parameter, values)

    def _fill_buffers(self, module: nn.Module, name: str) -> None:
        for leaf, buffer in module._buffers.items():
            if buffer is not None and self._owner(_join(name, leaf)) in self._sources:
                module._buffers[leaf] = self._read(_join(name, leaf), buffer.dtype)

    def _read(self, name: str, dtype: torch.dtype, *, own: bool = True) -> Tensor:
        mapped = self._sources[self._owner(name)].read()
        values = mapped.to(dtype, copy=own)
        if values is not mapped:
            drop_pages(mapped)
        return values

    def _load_kept(self, block: nn.Module) -> None:
        """What of a finished block is not quantized. In place."""
        for inner, parameter in block.named_parameters():
            part = self._owner(f"{self._names[block]}.{inner}")
            if part in self._homes and part not in self._contents.qweights:
                give_values(parameter, self._written(part))

    def _load_codes(self, block: nn.Module) -> None:
        """The codes of a finished block. In place."""
        for inner, module in block.named_modules():
            if not isinstance(module, QModule):
                continue
            if module.tied_to is None:
                codes = self._codes(_join(self._names[block], f"{inner}.weight"))
                for suffix, part in codes.parts.items():
                    module._buffers[PART_NAMES[suffix]] = part
            module.loaded()

    def _codes(self, name: str) -> QTensor:
        weight = self._contents.qweights[name]
        parts = {suffix: self._written(name + suffix) for suffix in weight.parts}
        return QTensor.from_parts(
            parts, scheme=weight.scheme, shape=weight.shape, dtype=weight.dtype
        )

    def _written(self, part: str) -> Tensor:
        like = self._parts[part]
        data = bytearray(self._homes[part].get(part))
        if not data:
            return torch.empty(like.shape, dtype=like.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(like.dtype).view(like.shape)

    def _owner(self, name: str) -> str:
        return self._contents.tied.get(name, name)

    # --- to files ---

    def _write(self, part: str, tensor: Tensor) -> None:
        if part in self._homes:  # another name of a tied tensor has no home
            self._homes[part].put(part, tensor)
            self._journal.add(part, zlib.crc32(as_bytes(tensor)))

    def _release(self, block: nn.Module) -> None:
        """Let go of what can be read again. In place."""
        self._here.discard(block)
        for parameter in block.parameters():
            give_values(parameter, torch.empty_like(parameter, device="meta"))
        if block not in self._done:
            return
        for module in block.modules():
            if isinstance(module, QModule) and module.tied_to is None:
                for leaf in PART_NAMES.values():
                    part = module._buffers.get(leaf)
                    if part is not None:
                        module._buffers[leaf] = part.to("meta")
                module.loaded()

    # --- earlier runs ---

    def _record(self, block: nn.Module) -> Path:
        return self._folder / f"{self._names[block]}.json"

    def _passed(self, block: nn.Module) -> Passed | None:
        """What an earlier run made of a block, if all of it is there as it was written."""
        name, record = self._names[block], self._record(block)
        data = record.read_bytes() if record.is_file() else b""
        known = self._journal.done
        if known.get(f"{RECORDS}/{name}") != zlib.crc32(data):
            return None
        parts = [part for part in self._homes if part.startswith(f"{name}.")]
        if any(known.get(part) != zlib.crc32(self._homes[part].get(part)) for part in parts):
            return None
        saved = json.loads(data)
        weights = [w for w in self._contents.qweights if w.startswith(f"{name}.")]
        return Passed(
            layers=[LayerReport(**layer) for layer in saved["layers"]],
            folds=[
                Fold(
                    **{
                        **fold,
                        "channel": torch.tensor(fold["channel"]),
                        "consumers": tuple(fold["consumers"]),
                    }
                )
                for fold in saved["folds"]
            ],
            weights={
                w.removeprefix(f"{name}.").removesuffix(".weight"): self._codes(w) for w in weights
            },
        )


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name and leaf else name or leaf
