"""The operators that quantized modules call: schema, checks, shapes for tracing, gradients.

Registered with `torch.library.Library`, so `torch.compile`, `torch.export` and autograd see single
operators. One contract for all kernels:

    zeropoint::linear     y = x @ dequantize(weight).T + bias
    zeropoint::embedding  y = dequantize(weight)[indices]
    zeropoint::image      y = dequantize(quantize(weight)), gradient passed straight through
    zeropoint::on_grid    the same on a grid that is given, whose gradient is that of LSQ

A weight travels as its parts (packed, scale, zero_point, levels) and its scheme's fields, because
operators take tensors; `weight_arguments` and `_weight` convert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zeropoint.kernels.select import choose, get_kernel
from zeropoint.kernels.spec import Spec
from zeropoint.numerics import (
    Format,
    Grid,
    blocked,
    fake_quantize,
    get_format,
    get_scale_dtype,
)
from zeropoint.numerics.learned import grid_gradients, on_grid, stored_grid
from zeropoint.qtensor import PARTS, QTensor, part_specs
from zeropoint.scheme import Scheme

_WEIGHT = (
    "Tensor packed, Tensor? scale, Tensor? zero_point, Tensor? levels, "
    "str format, str granularity, int group_size, str activations, int[] shape"
)
_LIBRARY = torch.library.Library("zeropoint", "DEF")
_LIBRARY.define(f"linear(Tensor x, Tensor? bias, {_WEIGHT}, str kernel) -> Tensor")
_LIBRARY.define(f"embedding(Tensor indices, {_WEIGHT}, ScalarType dtype, str kernel) -> Tensor")
_LIBRARY.define(
    "image(Tensor weight, str format, str granularity, int group_size, bool symmetric, "
    "bool float_zero_point, str scale_dtype, bool double_quant) -> Tensor"
)
_LIBRARY.define(
    "on_grid(Tensor weight, Tensor scale, Tensor? zero_point, str format, str granularity, "
    "int group_size, bool float_zero_point, str scale_dtype) -> Tensor"
)


# --- a weight as arguments of an operator, and back ---


def weight_arguments(weight: QTensor) -> tuple[Any, ...]:
    """A weight as the operators' arguments, in the order of their schemas."""
    scheme = weight.scheme
    return (
        weight.packed,
        weight.scale,
        weight.zero_point,
        weight.levels,
        scheme.format,
        scheme.granularity,
        scheme.group_size or 0,
        scheme.activations or "",
        list(weight.shape),
    )


def _weight(arguments: Sequence[Any], dtype: torch.dtype) -> QTensor:
    """Inverse of `weight_arguments`, after checking that the parts fit together."""
    tensors = dict(zip(PARTS, arguments[: len(PARTS)], strict=True))
    format, granularity, group_size, activations, shape = arguments[len(PARTS) :]
    scale, zero_point = tensors["_scale"], tensors["_zero_point"]
    torch._check(
        len(shape) == 2, lambda: f"weight shape is {shape}; linear and embedding need (N, K)"
    )
    double_quant = scale is not None and scale.dtype == torch.uint8
    scale_dtype = "float32" if scale is None else str(scale.dtype).removeprefix("torch.")
    if double_quant:
        scale_dtype = "float8_e4m3fn" if get_format(format).double_quant else "float32"
    scheme = _scheme(
        format,
        granularity,
        group_size,
        zero_point is None,
        zero_point is not None and zero_point.is_floating_point(),
        scale_dtype,
        double_quant,
        activations,
    )
    weight = QTensor.from_parts(tensors, scheme=scheme, shape=shape, dtype=dtype)
    specs = _specs(weight.shape, scheme)
    parts = weight.parts
    torch._check(
        parts.keys() == specs.keys(),
        lambda: f"a weight of {scheme} has the parts {list(specs)}, not {list(parts)}",
    )
    for suffix, want in specs.items():
        _check_part(suffix, parts[suffix], want, weight)
    return weight


def _check_part(
    suffix: str, part: Tensor, want: tuple[tuple[int, ...], torch.dtype], weight: QTensor
) -> None:
    torch._check(
        (tuple(part.shape), part.dtype) == want,
        lambda: (
            f"{suffix.lstrip('_') or 'packed'} is {tuple(part.shape)} {part.dtype}, but "
            f"{weight.scheme} of {tuple(weight.shape)} needs {want[0]} {want[1]}"
        ),
    )


@lru_cache
def _scheme(
    format: str,
    granularity: Any,
    group_size: int,
    symmetric: bool,
    float_zero_point: bool,
    scale_dtype: str,
    double_quant: bool,
    activations: str,
) -> Scheme:
    return Scheme(
        format=format,
        granularity=granularity,
        group_size=group_size or None,
        symmetric=symmetric,
        float_zero_point=float_zero_point,
        scale_dtype=scale_dtype,
        double_quant=double_quant,
        activations=activations or None,
    )


@lru_cache
def _specs(shape: torch.Size, scheme: Scheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return part_specs(shape, scheme)


# --- linear ---


def _linear_inputs(x: Tensor, bias: Tensor | None, weight: Sequence[Any]) -> QTensor:
    """The weight, after all checks."""
    torch._check(x.is_floating_point(), lambda: f"x is {x.dtype}; linear needs a float dtype")
    qweight = _weight(weight, x.dtype)
    n, k = qweight.shape
    torch._check(
        qweight.scheme.activations in (None, "int8"),
        lambda: f"{qweight.scheme.activations} activations are rounded before the operator",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] == k,
        lambda: f"x is {tuple(x.shape)}, but weight is {(n, k)}: need (..., {k})",
    )
    if bias is not None:
        torch._check(tuple(bias.shape) == (n,), lambda: f"bias is {tuple(bias.shape)}, not ({n},)")
        torch._check(
            bias.is_floating_point() and bias.dtype.itemsize <= max(4, x.dtype.itemsize),
            lambda: f"bias is {bias.dtype}; x of {x.dtype} needs a float dtype no wider",
        )
    return qweight


def _linear(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    *weight, kernel = arguments
    return get_kernel(kernel).linear(x, _linear_inputs(x, bias, weight), bias)


def _linear_fake(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    weight = _linear_inputs(x, bias, arguments[:-1])
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, packed, scale, zero_point, levels, *scheme, _ = inputs
    seen = x if ctx.needs_input_grad[3] else None
    ctx.save_for_backward(packed, scale, zero_point, levels, seen)
    ctx.scheme, ctx.dtype = scheme, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx = dL/dy @ weight; dL/dbias = sum of dL/dy over tokens; dL/dscale: `_scale_gradient`.
    Codes have no gradient, and int8 activations pass it straight through.
    """
    *parts, x = ctx.saved_tensors
    weight = _weight((*parts, *ctx.scheme), ctx.dtype)
    grad_x = grad_bias = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _floats(weight, ctx.dtype)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    if ctx.needs_input_grad[3]:
        grad_scale = _scale_gradient(grad, x, weight)
    return (grad_x, grad_bias, None, grad_scale, *([None] * 8))


def _scale_gradient(grad: Tensor, x: Tensor, weight: QTensor) -> Tensor:
    """dL/ds = sum over the block of dL/dw * level, where w = s * level. Returns it as scale is."""
    assert weight.scale is not None
    to_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    levels = _floats(replace(weight, scale=torch.ones_like(weight.scale)), x.dtype)
    scheme = weight.scheme
    blocks = blocked(to_weight * levels, scheme.granularity, scheme.group_size)
    return blocks.sum(-1, dtype=torch.float32).to(weight.scale.dtype)


def _floats(weight: QTensor, dtype: torch.dtype) -> Tensor:
    """The whole weight, (N, K), by the fastest kernel that looks up rows: all of them."""
    plain = weight.with_scheme(replace(weight.scheme, activations=None))
    n, k = weight.shape
    spec = Spec(op="embedding", scheme=plain.scheme, shape=(n, k), device=weight.device.type)
    return embedding(torch.arange(n, device=weight.device), plain, dtype, choose(spec).kernel)


# --- embedding ---


def _embedding_inputs(indices: Tensor, arguments: tuple[Any, ...]) -> QTensor:
    """The weight, after all checks that need no values."""
    *weight, dtype, _ = arguments
    torch._check(
        indices.dtype in (torch.int32, torch.int64),
        lambda: f"indices are {indices.dtype}; embedding needs int32 or int64",
    )
    return _weight(weight, dtype)


def _embedding(indices: Tensor, *arguments: Any) -> Tensor:
    weight = _embedding_inputs(indices, arguments)
    if indices.device.type == "cpu" and indices.numel():  # elsewhere it would wait for the device
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"indices from {low} to {high} are outside a table of {weight.shape[0]} rows"
            )
    *_, dtype, kernel = arguments
    return get_kernel(kernel).embedding(indices, weight, dtype)


def _embedding_fake(indices: Tensor, *arguments: Any) -> Tensor:
    weight = _embedding_inputs(indices, arguments)
    return weight.packed.new_empty((*indices.shape, weight.shape[1]), dtype=weight.dtype)


# --- image ---


def _image(
    weight: Tensor,
    format: str,
    granularity: Any,
    group_size: int,
    symmetric: bool,
    float_zero_point: bool,
    scale_dtype: str,
    double_quant: bool,
) -> Tensor:
    return fake_quantize(
        weight,
        format,
        granularity=granularity,
        group_size=group_size or None,
        symmetric=symmetric,
        float_zero_point=float_zero_point,
        scale_dtype=scale_dtype,
        double_quant=double_quant,
    ).contiguous()


def _image_fake(weight: Tensor, *scheme: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _image_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dweight = dL/dimage: the straight-through estimator (arXiv:1308.3432)."""
    return (grad, *([None] * 7))


# --- on_grid ---


def _given_grid(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, *scheme: Any
) -> tuple[Tensor, Grid, Format]:
    """Blocks, their grid as it is stored, and the format, after checking that they fit together."""
    format, granularity, group_size, float_zero_point, scale_dtype = scheme
    fmt = get_format(format)
    blocks = blocked(weight, granularity, group_size or None)
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        torch._check(
            part is None or (part.shape == blocks.shape[:2] and part.is_floating_point()),
            lambda name=name, part=part: (
                f"{name} is {tuple(part.shape)} {part.dtype}; {tuple(weight.shape)} per "
                f"{granularity} needs {tuple(blocks.shape[:2])} of a float dtype"
            ),
        )
    dtype = get_scale_dtype(scale_dtype)
    grid = stored_grid(scale, zero_point, fmt, dtype, float_zero_point=float_zero_point)
    return blocks, grid, fmt


def _on_grid(weight: Tensor, *grid: Any) -> Tensor:
    image = on_grid(*_given_grid(weight, *grid)).contiguous()
    return image.view(weight.shape).to(weight.dtype)


def _on_grid_fake(weight: Tensor, *grid: Any) -> Tensor:
    _given_grid(weight, *grid)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _on_grid_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, zero_point, *ctx.scheme = inputs
    ctx.save_for_backward(weight, scale, zero_point)


def _on_grid_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `numerics.learned.grid_gradients`."""
    weight, scale, zero_point = ctx.saved_tensors
    blocks, grid, fmt = _given_grid(weight, scale, zero_point, *ctx.scheme)
    to_weight, to_scale, to_zero = grid_gradients(grad.reshape(blocks.shape), blocks, grid, fmt)
    return (
        to_weight.view(weight.shape).to(weight.dtype),
        to_scale.to(scale.dtype),
        None if zero_point is None or to_zero is None else to_zero.to(zero_point.dtype),
        *([None] * 5),
    )


for _name, _function, _fake in (
    ("linear", _linear, _linear_fake),
    ("embedding", _embedding, _embedding_fake),
    ("image", _image, _image_fake),
    ("on_grid", _on_grid, _on_grid_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zeropoint::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("zeropoint::image", _image_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "zeropoint::on_grid", _on_grid_backward, setup_context=_on_grid_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "zeropoint::linear", _linear_backward, setup_context=_linear_setup, lib=_LIBRARY
)


# --- what modules call ---


Parts = Mapping[str, Tensor | None]  # of a weight, by the names of a module's buffers


class EagerLinear:
    """`linear` of one frozen weight whose parts have passed the checks once: straight to the kernel
    when nobody looks on (tracing, autograd, a dispatch mode), else through the operator.
    """

    def __init__(self, weight: QTensor, kernel: str) -> None:
        self._parts = (weight.packed, weight.scale, weight.zero_point, weight.levels)
        _weight(weight_arguments(weight), weight.dtype)
        bind = getattr(get_kernel(kernel), "bind_linear", None)
        plain = all(p is None or (type(p) is Tensor and p.is_contiguous()) for p in self._parts)
        # (parts, x, bias) -> y, or None where this call must not go straight to the kernel or these
        # are not the weight's parts.
        self.run: Callable[[Parts, Tensor, Tensor | None], Tensor | None] = (
            _nothing if bind is None or not plain else _straight(bind(weight), self, weight.shape)
        )

    def holds(self, parts: Parts) -> bool:
        """Whether these buffers still are the weight's parts."""
        packed, scale, zero_point, levels = self._parts
        return (
            parts.get("weight") is packed
            and parts.get("weight_scale") is scale
            and parts.get("weight_zero_point") is zero_point
            and parts.get("weight_levels") is levels
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module binds its own parts at its first call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing(*_: object) -> None:
    """What a pickled EagerLinear comes back as, and what one without a direct way computes."""


def _straight(
    direct: Callable[[Tensor, Tensor | None], Tensor], eager: EagerLinear, shape: torch.Size
) -> Callable[[Parts, Tensor, Tensor | None], Tensor | None]:
    """`EagerLinear.run`. One function for all questions: between the layers of a model, when caches
    are full of other things, Python's calls cost more than what they ask. What exports without
    dynamo passes tensors of a type of its own.
    """
    packed, scale, zero_point, levels = eager._parts
    columns = shape[1]
    is_compiling, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
    tracing_state, dispatch_modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack
    functorch_level = torch._C._functorch.peek_interpreter_stack

    def run(parts: Parts, x: Tensor, bias: Tensor | None) -> Tensor | None:
        if (
            parts.get("weight") is packed
            and parts.get("weight_scale") is scale
            and parts.get("weight_zero_point") is zero_point
            and parts.get("weight_levels") is levels
            and type(x) is Tensor
            and tracing_state() is None
            and not is_compiling()
            and dispatch_modes() == 0
            and functorch_level() is None
            and x.dtype in _DIRECT_DTYPES
            and x.is_cpu
            and (shape := x.shape)
            and shape[-1] == columns
            and (bias is None or bias.dtype in _DIRECT_DTYPES)
            and not (
                is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
            )
        ):
            return direct(x, bias)
        return None

    return run


def nobody_looks(x: Tensor) -> bool:
    """Whether a call on x may go straight to the native library: a plain tensor of floats on the
    CPU, no tracing, no dispatch mode: what `_straight` asks, too. Gradients are the caller's to ask
    about.
    """
    return (
        type(x) is Tensor
        and torch._C._get_tracing_state() is None
        and not torch.compiler.is_dynamo_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and x.dtype in _DIRECT_DTYPES
        and x.is_cpu
    )


_DIRECT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def linear(x: Tensor, weight: QTensor, bias: Tensor | None, kernel: str) -> Tensor:
    """y = x @ weight.T + bias. x: (..., K) float; weight: (N, K); bias: (N,); y: (..., N) as x."""
    y: Tensor = torch.ops.zeropoint.linear(x, bias, *weight_arguments(weight), kernel)
    return y


def embedding(indices: Tensor, weight: QTensor, dtype: torch.dtype, kernel: str) -> Tensor:
    """Rows of the weight. indices: (...) int; weight: (N, K); returns (..., K) of `dtype`.

    Raises IndexError for an index outside the table (on a CPU).
    """
    y: Tensor = torch.ops.zeropoint.embedding(indices, *weight_arguments(weight), dtype, kernel)
    return y


def image(weight: Tensor, scheme: Scheme, grid: Grid | None = None) -> Tensor:
    """dequantize(quantize(weight)) with the gradient of the identity. weight: (N, K) float.

    grid: (R, G) float parameters to use instead of the grid that spans the range; the gradients of
    `numerics.learned`. Raises NonFiniteError, ScaleRangeError, GroupSizeError.
    """
    if grid is not None:
        z: Tensor = torch.ops.zeropoint.on_grid(
            weight,
            grid.scale,
            grid.zero_point,
            scheme.format,
            scheme.granularity,
            scheme.group_size or 0,
            scheme.float_zero_point,
            scheme.scale_dtype,
        )
        return z
    y: Tensor = torch.ops.zeropoint.image(
        weight,
        scheme.format,
        scheme.granularity,
        scheme.group_size or 0,
        scheme.symmetric,
        scheme.float_zero_point,
        scheme.scale_dtype,
        scheme.double_quant,
    )
    return y
