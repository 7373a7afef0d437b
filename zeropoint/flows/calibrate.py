"""Calibrated post-training quantization: layer by layer, each seeing what the layers before it,
quantized already, make of the calibration data.

    embeddings -> block 1 -> block 2 ... -> what is in no block

Inside a block the layers go in the order in which they run; those that read one tensor share its
Hessian. A `Passage` shows each its inputs, for little more than the cost of one pass. In memory at
any time: one block, the hidden states between two blocks, one Hessian (when errors are propagated:
the block and the hidden states as they were before, too), and up to 256 MiB of what goes through
the parts of each block that is there. Where the other blocks are meanwhile, and hidden states, is a
`Residence`'s business.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.algorithms import Algorithm
from zeropoint.algorithms.choice import Choice, Moments, measured
from zeropoint.algorithms.fold import helps, propagated
from zeropoint.algorithms.search import search
from zeropoint.errors import ZeropointError
from zeropoint.flows.balance import Balanced, balance_block
from zeropoint.flows.data import Calibration, Prepared
from zeropoint.flows.report import LayerReport
from zeropoint.flows.residence import Passed, Residence
from zeropoint.model import capture, graph
from zeropoint.model.capture import Batch, Stream, tokens_of
from zeropoint.model.passage import Passage, find_parts
from zeropoint.model.replace import replace_module
from zeropoint.model.walk import named_modules
from zeropoint.nn import QModule
from zeropoint.observers import CrossObserver, HessianObserver
from zeropoint.progress import OnStep
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

TOGETHER_ELEMENTS = 1 << 22  # of weights so small that several at a time are faster than each alone
KEPT_BACK = 1 / 8  # of the batches, where an algorithm judges codes by inputs it has not seen
DRIFT_EVERY = 2  # batch: what drift is measured on, for half the cost of all and no more error


@dataclass
class _Work:
    """The model while it is being quantized: its live modules swapped for float ones.

    live: float stand-in -> the live module and its names. tie: stand-ins of one number share a
    weight. layers: what was done so far. chosen: by number, the module that holds the codes, and
    these while it does not yet.
    shared: modules a parameter of which others use, too. cluster: as `calibrate` has it.
    """

    model: nn.Module
    algorithm: Algorithm
    options: Calibration
    prepared: Prepared
    on_step: OnStep
    residence: Residence
    cluster: Executor | None = None
    live: dict[nn.Module, tuple[QModule, tuple[str, ...]]] = field(default_factory=dict)
    tie: dict[nn.Module, int] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    chosen: dict[int, tuple[QModule, QTensor | None]] = field(default_factory=dict)
    shared: set[nn.Module] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def report(self, module: nn.Module, choice: Choice, tokens: int, folded: str | None) -> None:
        name = self.live[module][1][0]
        layer = LayerReport(
            name=name,
            algorithm=choice.algorithm,
            reason=choice.reason,
            output_error=choice.output_error,
            hessian_gain=choice.hessian_gain,
            limit_gain=choice.limit_gain,
            gap_db=choice.gap_db,
            damping=choice.damping,
            tokens=tokens,
            folded_into=folded,
        )
        self.note(layer)

    def codes(self, module: nn.Module) -> QTensor:
        """Those chosen for a stand-in's weight."""
        owner, codes = self.chosen[self.tie[module]]
        return owner.qweight if codes is None else codes

    def note(self, layer: LayerReport) -> None:
        self.layers[layer.name] = layer
        self.on_step(layer.name, len(self.layers), len(self.live))


@torch.no_grad()
def calibrate(
    model: nn.Module,
    algorithm: Algorithm,
    options: Calibration,
    prepare: Callable[[], Prepared],
    on_step: OnStep,
    residence: Residence | None = None,
    cluster: Executor | None = None,
) -> tuple[list[LayerReport], Prepared, list[str]]:
    """Freeze all live modules of a model by an algorithm that needs Hessians. In place.

    prepare: makes the batches; called when the model computes with its float weights. residence:
    of blocks that are not in memory all the time. cluster: where the codes of weights that read the
    same inputs are found, at the same time; None: here, one after the other. A call that fails
    leaves frozen what is frozen and live what is not, with the weights it had.
    Returns a report for each live module, the data used, and warnings.
    """
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    none = Prepared(batches=[], tokens=0, source="")
    work = _Work(model, algorithm, options, none, on_step, residence or Residence(), cluster)
    try:
        _swap_in_floats(work)
        looked_up = {work.tie[m] for m, (live, _) in work.live.items() if live.role == "embedding"}
        wanted = {m for m in work.live if work.tie[m] not in looked_up}
        chains = {
            name: [model.get_submodule(n) for n in names]
            for name, names in capture.chains(model, wanted).items()
        }
        work.residence.begin([block for blocks in chains.values() for block in blocks])
        work.prepared = prepare()
        work.warnings += work.prepared.warnings
        _embeddings(work)
        for name, blocks in chains.items():
            with work.residence.whole():
                hidden = work.residence.hidden()
                stream = capture.enter(model, blocks, work.prepared.batches, hidden)
            if isinstance(stream, str):
                problem = f"{name} is not run block by block: {stream}"
                work.residence.hold_all(problem)
                work.warnings.append(problem)
            else:
                _chain(work, blocks, stream)
        with work.residence.whole():
            _rest(work)
    finally:
        for live, own_names in work.live.values():
            if not live.frozen:
                replace_module(model, own_names, live)
        for module, was_training in training:
            module.training = was_training
    return list(work.layers.values()), work.prepared, work.warnings


def _swap_in_floats(work: _Work) -> None:
    numbers: dict[int, int] = {}
    for module, names in named_modules(work.model).items():
        if isinstance(module, QModule) and not module.frozen:
            stand_in = module.to_float()
            work.live[stand_in] = (module, names)
            parameter = id(module._parameters["weight"])
            work.tie[stand_in] = numbers.setdefault(parameter, len(numbers))
            replace_module(work.model, names, stand_in)
    own = {
        m: [id(p) for p in m._parameters.values() if p is not None] for m in work.model.modules()
    }
    users = Counter(p for parameters in own.values() for p in parameters)
    work.shared = {m for m, parameters in own.items() if any(users[p] > 1 for p in parameters)}


def _install(work: _Work, module: nn.Module) -> None:
    """Put the live module back in the place of its stand-in, frozen with the codes chosen."""
    live, names = work.live[module]
    owner, codes = work.chosen[work.tie[module]]
    if codes is None:
        live.freeze_tied(owner)
    else:
        live.freeze(codes)
        work.chosen[work.tie[module]] = (live, None)
    replace_module(work.model, names, live)
    module._parameters.clear()  # the image: `work` still knows the stand-in


def _choose(
    work: _Work, sets: list[list[nn.Module]], moments: Moments | None
) -> Iterator[list[Choice]]:
    """One choice for each module, for one set after the other. All modules read the same inputs;
    those of a set have one scheme.
    """

    def weights_of(modules: list[nn.Module]) -> list[Tensor]:
        return [work.live[m][0].float_weight().detach().float() for m in modules]

    def about(modules: list[nn.Module]) -> tuple[list[str], Scheme]:
        # Scales become 8-bit when a module takes its rows: those of all modules are no one's.
        scheme = work.live[modules[0]][0].scheme
        return [work.live[m][1][0] for m in modules], scheme.of_some_rows or scheme

    find = partial(_find, work.algorithm, moments, work.options.propagate)
    if work.cluster is None:
        yield from (find(weights_of(modules), *about(modules)) for modules in sets)
    else:
        tasks = [work.cluster.submit(find, weights_of(ms), *about(ms)) for ms in sets]
        yield from (task.result() for task in tasks)


def _find(
    algorithm: Algorithm,
    moments: Moments | None,
    propagate: float,
    weights: list[Tensor],
    names: list[str],
    scheme: Scheme,
) -> list[Choice]:
    """Several weights are chosen as one of all their rows: rows do not know of each other, and a
    column of 3072 rows costs little more than one of 192.
    """
    whole = torch.cat(weights)
    if moments is not None and moments.drift is not None:
        whole = propagated(whole, moments.seen, moments.drift, propagate)
    try:
        choice = algorithm.choose(whole, moments, scheme)
    except ZeropointError as e:
        raise type(e)(f"{' + '.join(f'{name}.weight' for name in names)}: {e}") from e
    if len(weights) == 1:
        return [choice]
    choices = []
    sizes = [len(w) for w in weights]
    for rows, weight in zip(torch.arange(len(whole)).split(sizes), whole.split(sizes), strict=True):
        part = replace(choice, weight=choice.weight.rows(rows.to(weight.device)))
        judge = (
            None if moments is None else moments.seen if moments.unseen is None else moments.unseen
        )
        choices.append(part if judge is None else measured(part, weight, judge))
    return choices


def _alike(work: _Work, modules: list[nn.Module]) -> list[list[nn.Module]]:
    """Modules whose weights can be chosen together: of one scheme with scales for each row."""
    groups: dict[Any, list[nn.Module]] = {}
    for module in modules:
        live = work.live[module][0]
        together = (
            live.scheme.of_some_rows is not None
            and live.scheme.fmt.kind != "downcast"
            and live.float_weight().numel() <= TOGETHER_ELEMENTS
        )
        groups.setdefault((live.scheme, None if together else module), []).append(module)
    return list(groups.values())


def _embeddings(work: _Work) -> None:
    """Embeddings, and heads tied to them: no inputs to weigh columns by, so their grids are
    searched.
    """
    for module, (live, names) in work.live.items():
        if live.role != "embedding":
            continue
        number = work.tie[module]
        reason = "tied to another embedding"
        if number not in work.chosen:
            try:
                qweight = search(live.float_weight().detach(), live.scheme)
            except ZeropointError as e:
                raise type(e)(f"{names[0]}.weight: {e}") from e
            work.chosen[number] = (live, qweight)
            reason = "an embedding is looked up, not multiplied: no inputs to calibrate by"
        choice = Choice(weight=work.codes(module), algorithm="mse", reason=reason)
        work.report(module, choice, 0, None)
        _install(work, module)
    for module, (live, _) in work.live.items():
        if live.role != "embedding" and not _pending(work, module):
            choice = Choice(
                weight=work.codes(module),
                algorithm="mse",
                reason="tied to an embedding, which is looked up, not multiplied",
            )
            work.report(module, choice, 0, None)
            _install(work, module)


# --- block by block ---


def _chain(work: _Work, blocks: list[nn.Module], stream: Stream) -> None:
    dtypes = {p.dtype for b in blocks for p in b.parameters() if p.is_floating_point()}
    narrow = dtypes - {torch.float32}
    if narrow:
        _widen(stream)
    floats: Stream | None = None
    if work.options.propagate:
        hidden = work.residence.hidden(original=True)
        for i in range(0, len(stream.hidden), DRIFT_EVERY):
            hidden.append(stream.hidden[i])
        floats = Stream(hidden, stream.calls[::DRIFT_EVERY], stream.keep[::DRIFT_EVERY])
    folds: Sequence[graph.Fold] = []
    busy = [any(m in work.live and _pending(work, m) for m in b.modules()) for b in blocks]
    while busy and not busy[-1]:
        busy.pop()  # nothing behind the last layer to quantize needs to run
    for index, block in enumerate(blocks[: len(busy)]):
        passage, original = Passage(block, index, stream), None  # those of the block before go
        earlier = work.residence.enter(block)
        kept = {k: t.dtype for k, t in (*block.named_parameters(), *block.named_buffers())}
        block.float()
        if floats is not None:
            original = Passage(work.residence.original(block), index, floats)
        try:
            if earlier is not None:
                passed = _again(work, passage, earlier)
            elif busy[index]:
                passed = _block(work, passage, original, folds, kept)
            else:
                passage.advance()
                passed = Passed(layers=(), folds=())
            if original is not None:
                original.advance()
        finally:
            _narrow(block, kept)
        folds = passed.folds or folds
        work.residence.leave(block, passed)


def _again(work: _Work, passage: Passage, earlier: Passed) -> Passed:
    """Move the stream behind a block that an earlier run has quantized. In place."""
    modules = {n: m for n, m in passage.block.named_modules() if m in work.live}
    for name, module in modules.items():
        if name in earlier.weights:
            work.chosen[work.tie[module]] = (work.live[module][0], earlier.weights[name])
    for module in modules.values():
        _use_image(module, work.codes(module))
    passage.advance()
    for layer in earlier.layers:
        work.note(layer)
    for module in modules.values():
        _install(work, module)
    return earlier


def _block(
    work: _Work,
    passage: Passage,
    original: Passage | None,
    known: Sequence[graph.Fold],
    dtypes: dict[str, torch.dtype],
) -> Passed:
    """Quantize one block and move the stream behind it. In place.

    original: the block and its inputs before anything was quantized, every `DRIFT_EVERY`th batch.
    known: edges of the block before.
    """
    block = passage.block
    before = len(work.layers)
    names = {m: n for n, m in block.named_modules()}
    for module in block.modules():
        if module in work.live and not _pending(work, module):  # tied to an earlier layer
            _use_image(module, work.codes(module))
    groups = capture.sharing(block, passage.run_example)
    targets = [m for g in groups for m in g if m in work.live and _pending(work, m)]
    balanced: list[Balanced] = []
    if work.options.fold:
        balanced = balance_block(
            passage,
            groups,
            known,
            dtypes,
            may_change=partial(_may_change, work),
            helped=lambda m: helps(work.live[m][0].scheme.fmt),
            seed=work.options.seed,
        )
    _round_kept(work, block, dtypes)
    passage.parts = find_parts(block, groups, passage.run_example)
    if original is not None:
        original.parts = passage.parts
    folds = {c: one for one in balanced for c in one.fold.consumers}
    for group in groups:
        mine = [m for m in group if m in targets]
        if not mine:
            continue
        drifting = None if group is groups[-1] else original  # the last drift is not worth its cost
        moments, tokens = _statistics(
            work, names[group[0]], passage, drifting, folds.get(names[group[0]])
        )
        sets = _alike(work, mine)
        for alike, choices in zip(sets, _choose(work, sets, moments), strict=True):
            for module, choice in zip(alike, choices, strict=True):
                dtype = dtypes[f"{names[module]}.weight"]
                choice = replace(choice, weight=replace(choice.weight, dtype=dtype))
                work.chosen[work.tie[module]] = (work.live[module][0], choice.weight)
                _use_image(module, choice.weight)
                work.residence.chosen(work.live[module][0])
                into = folds.get(names[module])
                work.report(module, choice, tokens, into and into.fold.producer)
    passage.advance()
    for module in block.modules():
        if module in work.live:
            _report_tied(work, module)
            _install(work, module)
    return Passed(layers=list(work.layers.values())[before:], folds=[one.fold for one in balanced])


def _may_change(work: _Work, module: nn.Module) -> bool:
    """Only what will be quantized anyway changes, and nothing that is also used elsewhere."""
    known = (module in work.live and _pending(work, module)) or graph.is_norm(module)
    return known and module not in work.shared


def _pending(work: _Work, module: nn.Module) -> bool:
    return work.tie[module] not in work.chosen


def _use_image(module: nn.Module, qweight: QTensor) -> None:
    """Let a float stand-in compute with the quantized weight; the live module keeps its own."""
    image = qweight.dequantize(torch.float32)
    weight: Any = module.weight
    layout = image if graph.matrix(module) is weight else image.t().contiguous()
    module.weight = nn.Parameter(layout, requires_grad=False)


def _kept_back(work: _Work, batches: int) -> int:
    """How many of the batches, the last ones, only judge codes and are not fitted to."""
    if work.algorithm.needs != "unseen inputs":
        return 0
    return min(batches - 1, math.ceil(KEPT_BACK * batches))


def _statistics(
    work: _Work,
    name: str,
    passage: Passage,
    original: Passage | None,
    balanced: Balanced | None,
) -> tuple[Moments | None, int]:
    """Moments of a layer's inputs, and their number. None where no token reached the layer.

    name: inside the block. original: as `_block` has it. balanced: how the layer's inputs differ
    from the original's otherwise.
    """
    matrix = graph.matrix(passage.block.get_submodule(name))
    columns, device = matrix.shape[1], matrix.device
    observers = HessianObserver(columns, device), HessianObserver(columns, device)
    cross = CrossObserver(columns, device) if original is not None else None
    fitted_to = len(passage) - _kept_back(work, len(passage))
    for i in range(len(passage)):
        x = passage.input_of(name, i)
        if x is None:
            continue
        keep = passage.stream.keep[i]
        observers[i >= fitted_to].update(tokens_of(x, keep))
        kept_back = i >= fitted_to  # propagation would fit weights to these, too
        if not (cross is None or original is None or kept_back or i % DRIFT_EVERY):
            before = original.input_of(name, i // DRIFT_EVERY)
            if before is not None and before.shape == x.shape:
                if balanced is not None:
                    before = before / balanced.columns
                cross.update(tokens_of(before, keep), tokens_of(x, keep))
    (seen, tokens), (unseen, others) = (observer.result() for observer in observers)
    if tokens == 0:
        return None, 0
    drift = None if cross is None else cross.result()
    return Moments(seen, unseen if others else None, drift), tokens + others


def _widen(stream: Stream) -> None:
    """Hidden states and masks of 16 bits as float32. In place."""

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.float()
        if isinstance(value, tuple):
            return tuple(widened(v) for v in value)
        return value

    for i, hidden in enumerate(stream.hidden):
        stream.hidden[i] = hidden.float()
    cache: dict[int, capture.Call] = {}
    for calls in stream.calls:
        for i, call in enumerate(calls):
            if id(call) not in cache:
                args = tuple(widened(a) for a in call.args)
                cache[id(call)] = capture.Call(
                    args, {k: widened(v) for k, v in call.kwargs.items()}
                )
            calls[i] = cache[id(call)]


def _round_kept(work: _Work, block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Round what is not quantized, and may have been balanced, to what will be stored: the next
    block is to see what it will see. In place.
    """
    images = {f"{name}.weight" for name, module in block.named_modules() if module in work.live}
    for name, parameter in block.named_parameters():
        if name not in images and parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name]).to(parameter.dtype)


def _narrow(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters and buffers of the block the dtype they had. In place."""
    for module_name, module in block.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            want = dtypes.get(prefix + name)
            if (
                tensor is None
                or want is None
                or isinstance(module, QModule)
                and name in module._buffers
            ):
                continue
            if tensor.dtype != want:
                tensor.data = tensor.data.to(want)


# --- what is in no block ---


def _rest(work: _Work) -> None:
    """Modules outside all chains, calibrated by hooks on the whole model, all in one pass."""
    left = [m for m, (live, _) in work.live.items() if not live.frozen]
    linears = [m for m in left if _pending(work, m)]
    batches = work.prepared.batches
    fitted_to = len(batches) - _kept_back(work, len(batches))
    seen, unseen = (_observed(work, linears, b) for b in (batches[:fitted_to], batches[fitted_to:]))
    for module in linears:
        hessian, tokens = seen.pop(module).result()
        judge, others = unseen.pop(module).result()
        live, _ = work.live[module]
        if _pending(work, module):
            moments = Moments(hessian, judge if others else None) if tokens else None
            ((choice,),) = _choose(work, [[module]], moments)
            codes = replace(choice.weight, dtype=live.float_weight().dtype)
            choice = replace(choice, weight=codes)
            work.chosen[work.tie[module]] = (live, choice.weight)
            work.report(module, choice, tokens + others, None)
    for module in left:
        _report_tied(work, module)
        _install(work, module)


def _observed(
    work: _Work, linears: list[nn.Module], batches: list[Batch]
) -> dict[nn.Module, HessianObserver]:
    """Observers of the layers' inputs in runs of the whole model."""
    observers = {
        m: HessianObserver(graph.matrix(m).shape[1], graph.matrix(m).device) for m in linears
    }
    if linears:
        capture.observe(work.model, linears, batches, lambda m, x: observers[m].update(x))
    return observers


def _report_tied(work: _Work, module: nn.Module) -> None:
    """A layer whose codes were chosen for another that it shares its weight with."""
    name = work.live[module][1][0]
    if name in work.layers:
        return
    owner, _ = work.chosen[work.tie[module]]
    owner_name = next(names[0] for live, names in work.live.values() if live is owner)
    found = work.layers[owner_name].algorithm
    choice = Choice(weight=work.codes(module), algorithm=found, reason=f"tied to {owner_name}")
    work.report(module, choice, 0, None)
