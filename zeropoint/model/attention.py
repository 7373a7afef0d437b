"""Where a model's attention heads are: which rows and columns of which projections are a head's.

Attention modules are found by the names of their projections. To support others: a row in LAYOUTS.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from zeropoint.model.walk import named_modules
from zeropoint.nn import QLinear, QModule, quantized_type
from zeropoint.nn.fused import as_written


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an attention module holds its heads.

    inputs: the projections of queries, keys and values, or one of all three. rows: of that one:
    "thirds", all queries, then all keys, then all values; "heads", the three of each head together.
    output: the projection back; "../" leads to a sibling of the module. classes: of the attention
    modules, where others with these names differ. shares_bias: a module that one layer holds for
    all of them.
    """

    inputs: tuple[str, ...]
    output: str
    rows: Literal["apart", "thirds", "heads"] = "apart"
    classes: tuple[str, ...] = ()
    shares_bias: str | None = None

    def __str__(self) -> str:
        names = f"{', '.join(self.inputs)} and {self.output.removeprefix('../')}"
        return f"{names} ({', '.join(self.classes)})" if self.classes else names


LAYOUTS = (
    Layout(inputs=("q_proj", "k_proj", "v_proj"), output="o_proj"),
    Layout(inputs=("q_proj", "k_proj", "v_proj"), output="out_proj"),
    Layout(inputs=("q_proj", "k_proj", "v_proj"), output="dense"),
    Layout(inputs=("query", "key", "value"), output="../output.dense"),
    Layout(inputs=("q_lin", "k_lin", "v_lin"), output="out_lin"),
    Layout(
        inputs=("q", "k", "v"),
        output="o",
        classes=("T5Attention", "MT5Attention"),
        shares_bias="relative_attention_bias",
    ),
    Layout(inputs=("c_attn",), output="c_proj", rows="thirds", classes=("GPT2Attention",)),
    Layout(
        inputs=("query_key_value",), output="dense", rows="heads", classes=("GPTNeoXAttention",)
    ),
)
# The attributes by which attention modules know their sizes.
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEADS = ("num_heads", "num_attention_heads", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("all_head_size", "inner_dim", "split_size")
_MODEL_WIDTHS = ("embed_dim", "hidden_size", "dim", "d_model")  # not those of the heads


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention module. names: all of its names in the model.

    label: the number in its name where no two attention modules have the same, else its name in the
    base model. head_dim: rows of a head. heads: query heads it has now. shared: query heads that
    share a key and value head. pruned: numbers of the heads it had, counted from 0 in the model as
    it was. obstacle: why its heads cannot be pruned, or None.
    """

    label: int | str
    names: tuple[str, ...]
    module: nn.Module
    layout: Layout
    inputs: tuple[nn.Module, ...]
    output: nn.Module
    head_dim: int
    heads: int
    shared: int
    pruned: tuple[int, ...]
    obstacle: str | None

    @property
    def kept(self) -> tuple[int, ...]:
        """The original numbers of the heads it has, in their order."""
        everything = range(self.heads + len(self.pruned))
        return tuple(head for head in everything if head not in self.pruned)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The original numbers of the heads that share a key and value head."""
        kept, size = self.kept, self.shared
        return tuple(kept[i : i + size] for i in range(0, len(kept), size))


def attentions(model: nn.Module) -> list[Attention]:
    """The attention modules of a model whose heads can be told apart, in tree order."""
    base = getattr(model, "base_model", model)
    names_in_base = {as_written(m): n[0] for m, n in named_modules(base).items()}
    found = []
    modules = {as_written(m): names for m, names in named_modules(model).items()}
    for module, names in modules.items():
        for layout in LAYOUTS:
            projections = _projections(model, module, names[0], layout)
            if projections is not None:
                found.append((module, names, layout, projections))
                break
    labels = [names_in_base.get(module, names[0]) for module, names, _, _ in found]
    return [
        _described(label, names, module, layout, projections)
        for label, (module, names, layout, projections) in zip(
            _numbered(labels), found, strict=True
        )
    ]


def _numbered(names: list[str]) -> list[int | str]:
    """The one number in each name, if no two have the same; the names otherwise."""
    numbers = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in names]
    counted = Counter(tuple(n) for n in numbers)
    if all(len(n) == 1 for n in numbers) and set(counted.values()) <= {1}:
        return [int(n[0]) for n in numbers]
    return list(names)


def _projections(
    model: nn.Module, module: nn.Module, name: str, layout: Layout
) -> list[nn.Module] | None:
    if layout.classes and type(module).__name__.removeprefix("Pruned") not in layout.classes:
        return None
    inputs = [module._modules.get(leaf) for leaf in layout.inputs]
    if layout.output.startswith("../"):
        home: nn.Module = model.get_submodule(name.rpartition(".")[0])
    else:
        home = module
    output: nn.Module | None = home
    for leaf in layout.output.removeprefix("../").split("."):
        output = None if output is None else output._modules.get(leaf)
    projections = [p for p in (*inputs, output) if p is not None]
    return projections if len(projections) == len(layout.inputs) + 1 else None


def _described(
    label: int | str,
    names: tuple[str, ...],
    module: nn.Module,
    layout: Layout,
    projections: list[nn.Module],
) -> Attention:
    *inputs, output = projections
    head_dim = next((int(getattr(module, a)) for a in HEAD_DIM if hasattr(module, a)), None)
    shapes = [linear_shape(p) for p in projections]
    heads = shared = 1
    if None in shapes:
        strange = projections[shapes.index(None)]
        obstacle: str | None = f"a projection is a {type(strange).__name__}"
    elif head_dim is None:
        obstacle = f"it does not say how wide a head is: none of {', '.join(HEAD_DIM)}"
    else:
        sizes = [shape for shape in shapes if shape is not None]
        parts = 1 if layout.rows == "apart" else 3
        heads, rest = divmod(sizes[0][0], parts * head_dim)
        key_value_heads = sizes[-2][0] // (parts * head_dim)
        shared = heads // max(1, key_value_heads)
        whole = not rest and heads == shared * key_value_heads
        if whole and heads * head_dim == sizes[-1][1]:
            obstacle = _peculiarity(module, layout, projections, head_dim)
        else:
            obstacle = "its projections are not of whole heads"
    return Attention(
        label=label,
        names=names,
        module=module,
        layout=layout,
        inputs=tuple(inputs),
        output=output,
        head_dim=head_dim or 1,
        heads=heads,
        shared=shared,
        pruned=tuple(getattr(module, "pruned_heads", ())),
        obstacle=obstacle,
    )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(N, K) of a float or quantized linear layer; None for any other module."""
    if isinstance(module, QLinear):
        return module.shape
    kind = quantized_type(module)
    if kind is None or not issubclass(kind, QLinear):
        return None
    return kind.weight_shape(module)


def _peculiarity(
    module: nn.Module, layout: Layout, projections: list[nn.Module], head_dim: int
) -> str | None:
    """What an attention module has or does that this file does not know, or None."""
    for name, child in module.named_children():
        if child in projections or name == layout.shares_bias:
            continue
        quantized = any(isinstance(m, QModule) for m in child.modules())
        if quantized or any(p.numel() != head_dim for p in child.parameters()):
            return f"it holds {name}, whose weights may belong to heads"
    if own := next(iter(module._parameters), None):
        return f"it holds {own}, which may belong to heads"
    if any(isinstance(p, QModule) and p.grid is not None for p in projections):
        return "its scales are learned; prune before zp.quantize, or after zp.freeze(model)"
    widths = (p.scheme.fmt.width for p in projections if isinstance(p, QModule))
    if parted := next((width for width in widths if head_dim % width), None):
        return f"codes stand for {parted} values together, and heads have {head_dim}"
    read: Any = inspect.unwrap(type(module).forward)
    names = set(read.__code__.co_names)
    for name in sorted(names & {*_MODEL_WIDTHS}):
        return f"its forward reads {name}, the width of all heads there were"
    for name in sorted(names & {*HEADS, *KEY_VALUE_HEADS}):
        if name not in vars(module):
            return f"its forward reads {name} from the configuration, which all layers share"
    return None
