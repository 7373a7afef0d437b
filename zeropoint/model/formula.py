"""What the forward of a small module computes, read from its trace: never from its class's name.

A trace is written as one nested expression, in which what is only spelled differently (`x.float()`
and `x.to(torch.float32)`, `a * b` and `b * a`) is the same. So a norm or a gated perceptron that
nobody listed is found, and one that computes something else under the same name is not taken.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from zeropoint.nn.fused import Activation, GateFormula, NormFormula

Expression = tuple[Any, ...]  # (operation, arguments...)

_X: Expression = ("input",)
_SPELLINGS: dict[Any, str] = {
    operator.add: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.multiply: "mul",
    torch.pow: "pow",
    operator.pow: "pow",
    torch.mean: "mean",
    torch.rsqrt: "rsqrt",
    getattr: "getattr",
    nn.functional.rms_norm: "rms_norm",
    nn.functional.silu: "silu",
    nn.functional.gelu: "gelu",
}
# What forwards raise when they are given a proxy, or noise in the place of their children.
UNTRACEABLE = (
    fx.proxy.TraceError,  # it depends on the input's values
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def norm_of(module: nn.Module) -> NormFormula | None:
    """What this module computes, if it is an RMS norm of its input. Zhang and Sennrich 2019."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1 or module._modules:
        return None
    found = expression(module)
    eps = next((e for e in _constants(found) if isinstance(e, float) and 0 < e < 1), None)
    if eps is None:
        return None
    wide, w = _cast(_X, "float32"), ("parameter", "weight")
    squares = ("mean", _multiplied(wide, wide))
    normal = _multiplied(wide, ("rsqrt", _commuting("add", squares, ("constant", eps))))
    wide_w = _cast(w, "float32")
    one_more = _commuting("add", ("constant", 1.0), wide_w)
    plain = NormFormula(eps=eps, shift=0, rounds_first=False)
    known = {
        _multiplied(w, _cast(normal, "of input")): replace(plain, rounds_first=True),
        _cast(_multiplied(w, normal), "of input"): plain,  # the product widens w
        _cast(_multiplied(wide_w, normal), "of input"): plain,
        _cast(_multiplied(one_more, normal), "of input"): replace(plain, shift=1),
        ("rms_norm", _X, w, ("constant", eps)): plain,
    }
    return known.get(found)


def gate_of(module: nn.Module) -> GateFormula | None:
    """What this module computes, if it is a perceptron with a gate. Shazeer 2020, equation 6."""
    if len(module._modules) < 4 or module._parameters:
        return None
    match expression(module):
        case ("module", down, ("mul", first, second)):
            for gated, plain in ((first, second), (second, first)):
                match gated, plain:
                    case (
                        ("module", act, ("module", gate, ("input",))),
                        ("module", up, ("input",)),
                    ) if (activation := _activation(module.get_submodule(act))) is not None:
                        return GateFormula(
                            gate=gate, up=up, down=down, gated_by=act, activation=activation
                        )
    return None


def _activation(module: nn.Module) -> Activation | None:
    known: dict[Expression, Activation] = {
        ("silu", _X): "silu",
        ("gelu", _X, ("constant", "tanh")): "gelu_tanh",
    }
    return known.get(expression(module))


# --- a trace as an expression ---


class _Leaves(fx.Tracer):
    """Children are called, not entered."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def expression(module: nn.Module) -> Expression:
    """What the forward computes of its one input; ("unknown",) where that cannot be said: it takes
    more, it cannot be traced, or it does something besides (in place, or to the module).
    """
    if len(inspect.signature(module.forward).parameters) != 1:
        return _UNKNOWN
    attributes = dict(vars(module))
    try:
        graph = _Leaves().trace(module)
    except UNTRACEABLE:
        return _UNKNOWN
    finally:
        same = vars(module).keys() == attributes.keys() and all(
            value is attributes[name] for name, value in vars(module).items()
        )
        vars(module).clear()
        vars(module).update(attributes)
    *steps, output = graph.nodes
    if not same or not all(node.users for node in steps):
        return _UNKNOWN
    values: dict[fx.Node, Expression] = {}
    for node in steps:
        values[node] = _value(node, values)
    return _argument(output.args[0], values)


_UNKNOWN: Expression = ("unknown",)


def _value(node: fx.Node, values: dict[fx.Node, Expression]) -> Expression:
    args = [_argument(a, values) for a in (*node.args, *node.kwargs.values())]
    if node.op == "placeholder":
        return _X
    if node.op == "get_attr":
        return ("parameter", str(node.target))
    if node.op == "call_module":
        return ("module", str(node.target), *args)
    name = str(node.target) if node.op == "call_method" else _SPELLINGS.get(node.target, "")
    match name, args:
        case "float", [x]:
            return _cast(x, "float32")
        case "to", [x, ("constant", torch.float32)]:
            return _cast(x, "float32")
        case "to", [x, ("getattr", ("input",), ("constant", "dtype"))]:
            return _cast(x, "of input")
        case "type_as", [x, ("input",)]:
            return _cast(x, "of input")
        case "getattr", [x, key]:
            return ("getattr", x, key)
        case "square", [x]:
            return _multiplied(x, x)
        case "pow", [x, ("constant", 2)]:
            return _multiplied(x, x)
        case "mean", [x, ("constant", -1), ("constant", True)] if set(node.kwargs) <= {"keepdim"}:
            return ("mean", x)
        case "rsqrt", [x]:
            return ("rsqrt", x)
        case (("add" | "mul"), [a, b]) if not node.kwargs:
            return _commuting(name, a, b)
        case "rms_norm", [x, _, weight, eps]:  # over the last axis, which is all that w has
            return ("rms_norm", x, weight, eps)
        case "silu", [x, *_] if set(node.kwargs) <= {"inplace"}:
            return ("silu", x)
        case "gelu", [x, ("constant", "tanh")]:
            return ("gelu", x, ("constant", "tanh"))
    return _UNKNOWN


def _argument(a: Any, values: dict[fx.Node, Expression]) -> Expression:
    if isinstance(a, fx.Node):
        return values[a]
    return ("constant", a) if isinstance(a, (bool, int, float, str, torch.dtype)) else _UNKNOWN


def _cast(x: Expression, dtype: str) -> Expression:
    return ("cast", x, dtype)


def _commuting(name: str, a: Expression, b: Expression) -> Expression:
    return (name, *sorted((a, b), key=repr))


def _multiplied(a: Expression, b: Expression) -> Expression:
    return _commuting("mul", a, b)


def _constants(e: Any) -> Iterator[Any]:
    if isinstance(e, tuple):
        if e[:1] == ("constant",):
            yield e[1]
        else:
            for part in e:
                yield from _constants(part)
