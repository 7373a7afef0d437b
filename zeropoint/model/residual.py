"""The residual stream of a model: who writes to it, which norms read it, and who reads those.

    x_0 = embeddings,   x_(i+1) = x_i + writer(...),   readers see norm(x_i)

Found in the graph that autograd records of one forward pass, with marks where modules begin and
end: what is added to a sum that starts at the embeddings is a writer, and what a sum goes into has
to be a norm or a linear layer. No architecture is listed. Anything else on the way is a reason to
say no, and so is a parameter that the pass did not use: what it does to other inputs is unknown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.model.capture import is_linear
from zeropoint.model.graph import is_norm, matrix, restored
from zeropoint.numerics.hadamard import Rotation

# What autograd calls operations that map vectors of the last axis one by one and linearly, all
# in the same way. Where one cuts that axis, the check by running finds it.
SUMS = {"AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0"}
SCALES = {"MulBackward0", "DivBackward0"}
SHAPES = {
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0"),
    *("AliasBackward0", "ToCopyBackward0", "ExpandBackward0", "TransposeBackward0"),
    *("PermuteBackward0", "UnsqueezeBackward0", "SqueezeBackward1", "SliceBackward0"),
    *("SelectBackward0", "IndexBackward0", "IndexSelectBackward0", "RepeatBackward0"),
}
LINEAR = SUMS | SCALES | SHAPES

NORM_TOLERANCE = 1e-4  # float32 noise of a norm of some thousand channels is 100 times smaller


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Modules around the residual stream of a model.

    writers: linear layers and embeddings whose output is added to it. parameters: added to it as
    they are, (..., n). norms: that read it, with the linear layers that read each; None for linear
    layers that read the stream itself.
    """

    writers: list[Any]
    parameters: list[nn.Parameter]
    norms: dict[nn.Module | None, list[Any]]

    @property
    def readers(self) -> list[nn.Module]:
        """All linear layers that read it, by way of a norm or not."""
        return [m for readers in self.norms.values() for m in readers]


def find_residual(
    model: nn.Module, embedding: nn.Module, run: Callable[[], Tensor]
) -> Residual | str:
    """The stream that starts at an embedding and those that share its weight, or why it cannot be
    told apart from the rest.

    run: a forward pass; returns the answer, any shape. Nothing is changed.
    """
    names = {m: n for n, m in model.named_modules()}
    with _recorded(model) as marks:
        answer = run()
    if answer.grad_fn is None:
        return "its forward pass leaves no graph of what was computed from what"
    graph = _Graph(answer.grad_fn, marks, names)
    tied = [m for m in names if isinstance(m, nn.Embedding) and m.weight is embedding.weight]
    found = _walk(graph, [n for m in tied for n in graph.marks[m, "output"]])
    if isinstance(found, str):
        return found
    unused = [n for n, p in model.named_parameters() if id(p) not in graph.parameters]
    if unused:
        return f"{unused[0]} has no part in the answer to this example; give one in which it has"
    return found


class _Mark(torch.autograd.Function):
    """The identity; its node in the graph says of which module it is the "input" or "output"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, end: str) -> Tensor:
        ctx.module, ctx.end = module, end
        return x.clone()  # not a view, which could not be changed in place


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Any]]:
    """Every parameter in the graph, and marks around linear layers, norms and embeddings. Yields
    the marks' nodes, which are made while the model runs.
    """
    marks: list[Any] = []

    def mark(x: Any, module: nn.Module, end: str) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        marked = _Mark.apply(x, module, end)  # type: ignore[no-untyped-call]
        marks.append(marked.grad_fn)
        return marked

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (mark(args[0], module, "input"), *args[1:]), kwargs
        return args, {k: mark(v, module, "input") for k, v in kwargs.items()}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return mark(output, module, "output")

    handles: list[Any] = []
    kept = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for module in model.modules():
            if is_linear(module) or is_norm(module) or isinstance(module, nn.Embedding):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
        for parameter, _ in kept:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield marks
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in kept:
            parameter.requires_grad_(required)


class _Graph:
    """Nodes of a recorded pass. consumers: of what each node computes. marks: by module and end.
    parameters: ids of those that the answer depends on.
    """

    def __init__(self, answer: Any, marks: list[Any], names: dict[nn.Module, str]) -> None:
        self.answer, self.names = answer, names
        self.consumers: dict[Any, list[Any]] = {answer: []}
        waiting = [answer]
        while waiting:
            node = waiting.pop()
            for source in sources(node):
                if source not in self.consumers:
                    self.consumers[source] = []
                    waiting.append(source)
                self.consumers[source].append(node)
        self.parameters = {id(n.variable) for n in self.consumers if hasattr(n, "variable")}
        self.marks: dict[tuple[nn.Module, str], list[Any]] = defaultdict(list)
        for node in marks:
            if node in self.consumers:
                self.marks[node.module, node.end].append(node)

    def modules(self, marks: Iterable[Any]) -> list[Any]:
        """The modules of marks, in the model's order."""
        marked = {node.module for node in marks}
        return [module for module in self.names if module in marked]

    def where(self, node: Any) -> str:
        """An operation, and the module whose output it is nearest to."""
        seen, waiting = {node}, [node]
        for other in waiting:
            if isinstance(getattr(other, "module", None), nn.Module):
                return f"{_kind(node)} after {self.names[other.module]}"
            fresh = [s for s in reversed(sources(other)) if s not in seen]  # the last writer first
            seen.update(fresh)
            waiting.extend(fresh)
        return _kind(node)


def sources(node: Any) -> list[Any]:
    """The nodes whose results a node computes with."""
    return [source for source, _ in node.next_functions if source is not None]


def _kind(node: Any) -> str:
    return str(node.name()).rstrip("0123456789").removesuffix("Backward")


def _end(node: Any) -> str | None:
    """Of a mark, "input" or "output"."""
    return getattr(node, "end", None)


def _walk(graph: _Graph, start: list[Any]) -> Residual | str:
    """All that the sums reach which the embedding's vectors, `start`, go into."""
    stream: set[Any] = set()
    read: set[Any] = set()  # marks of inputs
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node in stream:
            continue
        stream.add(node)
        problem = _why_not_written(graph, node)
        if problem is not None:
            return problem
        if _end(node) is None:
            waiting += sources(node)
        for consumer in graph.consumers[node]:
            if _end(consumer) == "input":
                read.add(consumer)
            elif consumer.name() in LINEAR:
                waiting.append(consumer)
            else:
                return f"{graph.where(consumer)} reads the residual stream, and is no norm"
    directly = graph.modules(read)
    norms: dict[nn.Module | None, list[Any]] = {None: [m for m in directly if not is_norm(m)]}
    for norm in directly:
        if is_norm(norm):
            readers = _readers(graph, norm)
            if isinstance(readers, str):
                return readers
            read |= readers
            norms[norm] = graph.modules(readers)
    found = Residual(
        writers=graph.modules(n for n in stream if _end(n) == "output"),
        parameters=[n.variable for n in stream if hasattr(n, "variable")],
        norms=norms,
    )
    return _why_not_only(graph, found, stream, read) or found


def _why_not_written(graph: _Graph, node: Any) -> str | None:
    """Whether what a node computes may be a part of the stream."""
    name = node.name()
    if node is graph.answer:
        return "the residual stream is itself the answer"
    if _end(node) == "output":
        if is_norm(node.module):
            return f"{graph.names[node.module]}, a norm, writes to the residual stream"
    elif not hasattr(node, "variable"):
        if name not in LINEAR:
            return f"{graph.where(node)} writes to the residual stream"
        if name in SUMS and len(sources(node)) < len(node.next_functions):
            return f"{graph.where(node)} adds a constant to the residual stream"
        if name in SCALES and len(sources(node)) > 1:
            return f"{graph.where(node)} multiplies the residual stream by what was computed"
    return None


def _readers(graph: _Graph, norm: nn.Module) -> set[Any] | str:
    """Marks of the linear layers that a norm's output goes into."""
    name = graph.names[norm]
    found: set[Any] = set()
    waiting = list(graph.marks[norm, "output"])
    for node in waiting:
        if node is graph.answer:
            return f"what {name} gives is the answer; rotate the model with its head"
        for consumer in graph.consumers[node]:
            if _end(consumer) == "input" and is_linear(consumer.module):
                found.add(consumer)
            elif consumer.name() in SUMS:
                return f"{name}, a norm, writes to the residual stream"
            elif consumer.name() in LINEAR and len(sources(consumer)) == 1:
                waiting.append(consumer)
            else:
                return f"{graph.where(consumer)} reads {name}, and is no linear layer"
    return found


def _why_not_only(graph: _Graph, found: Residual, stream: set[Any], read: set[Any]) -> str | None:
    """Whether something is missing, or one of the modules found does something else as well."""
    norms = [m for m in found.norms if m is not None]
    if not norms:
        return "no norm reads what the embeddings write"
    if not any(is_linear(m) for m in found.writers):
        return f"no linear layer writes to the residual stream before {graph.names[norms[0]]}"
    for module in found.writers:
        if not stream.issuperset(graph.marks[module, "output"]):
            return f"{graph.names[module]} writes to the residual stream, and elsewhere"
    by: dict[nn.Module, nn.Module | None] = {}
    for norm, readers in found.norms.items():
        for module in readers:
            if by.setdefault(module, norm) is not norm:
                return f"{graph.names[module]} reads the residual stream by two ways"
    for module in [*norms, *found.readers]:
        if not read.issuperset(graph.marks[module, "input"]):
            return f"{graph.names[module]} reads the residual stream, and something else"
    inside = {*norms, *found.readers, *found.writers}
    changed = {id(p): m for m in inside for p in m.parameters(recurse=False)}
    for module, name in graph.names.items():
        shared = [id(p) for p in module.parameters(recurse=False) if id(p) in changed]
        if shared and module not in inside and graph.marks[module, "output"]:
            return f"{name} shares its weight with {graph.names[changed[shared[0]]]}"
    return _why_not_as_wide(graph, found, norms)


def _why_not_as_wide(graph: _Graph, found: Residual, norms: list[Any]) -> str | None:
    """Whether an axis that should be the stream's is another."""
    width = len(norms[0].weight)
    sizes = {m: len(m.weight) for m in norms}
    sizes |= {m: matrix(m).shape[1] for m in found.readers}
    rows = {m: matrix(m).shape[0] for m in found.writers if is_linear(m)}
    rows |= {m: m.weight.shape[1] for m in found.writers if not is_linear(m)}
    for module, size in [*sizes.items(), *rows.items()]:
        if size != width:
            return f"{graph.names[module]} has {size} channels, the residual stream {width}"
    if any(p.shape[-1:] != (width,) for p in found.parameters):
        return f"a parameter is added to the residual stream that has not its {width} channels"
    return None


# --- what a norm does with its weight ---


@dataclass(frozen=True, kw_only=True)
class Gain:
    """norm(x) = core(x) * gain + bias, core being the norm with every weight at `neutral`.

    gain: (n,) float64. neutral: 1, or 0 for a norm that multiplies by 1 + weight.
    """

    gain: Tensor
    neutral: float


@torch.no_grad()
def gain_of(norm: nn.Module) -> Gain | None:
    """What a norm multiplies by, found by running it; None where it does something else."""
    weight: Any = norm.weight
    bias: Any = getattr(norm, "bias", None)
    x = _probe(weight)
    expected = norm(x).double()
    for neutral in (1.0, 0.0):
        gain = weight.double() + (1 - neutral)
        with _at(norm, neutral):
            found = norm(x).double() * gain
        found += 0 if bias is None else bias.double()
        if _near(found, expected):
            return Gain(gain=gain, neutral=neutral)
    return None


@torch.no_grad()
def commutes(norm: nn.Module, gain: Gain, rotation: Rotation) -> bool:
    """Whether core(x R) = core(x) R."""
    x = _probe(norm.weight)
    with _at(norm, gain.neutral):
        return _near(norm(rotation(x)), rotation(norm(x)))


def _probe(weight: Any) -> Tensor:
    """16 vectors with a mean. (16, n) float32."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(16, len(weight), generator=generator) + 1).to(weight)


@contextmanager
def _at(norm: nn.Module, neutral: float) -> Iterator[None]:
    """The norm without gain and bias, for a while."""
    parameters: Iterable[Any] = (norm.weight, getattr(norm, "bias", None))
    with restored(parameters):
        for parameter, value in zip(parameters, (neutral, 0.0), strict=True):
            if parameter is not None:
                parameter.fill_(value)
        yield


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= NORM_TOLERANCE * expected.norm())
