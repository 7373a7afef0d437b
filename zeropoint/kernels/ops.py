"""The operators that quantized modules call: schema, checks, shapes for tracing, gradient. One contract for all kernels.

Registered with `torch.library.Library`, so `torch.compile`, `torch.export` and autograd see single operators:

    zeropoint::linear     y = x @ dequantize(weight).T + bias
    zeropoint::embedding  y = dequantize(weight)[indices]
    zeropoint::image      y = dequantize(quantize(weight)), gradient passed straight through (live modules)

A weight travels as its parts (packed, scale, zero_point) and its scheme's fields, because operators take tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zeropoint.kernels.select import get_kernel
from zeropoint.numerics import fake_quantize, get_format
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

_WEIGHT = (
    "Tensor packed, Tensor? scale, Tensor? zero_point, str format, str granularity, int group_size, int[] shape"
)
_LIBRARY = torch.library.Library("zeropoint", "DEF")
_LIBRARY.define(f"linear(Tensor x, Tensor? bias, {_WEIGHT}, str kernel) -> Tensor")
_LIBRARY.define(f"embedding(Tensor indices, {_WEIGHT}, ScalarType dtype, str kernel) -> Tensor")
_LIBRARY.define(
    "image(Tensor weight, str format, str granularity, int group_size, bool symmetric, str scale_dtype) -> Tensor"
)


def weight_arguments(weight: QTensor) -> tuple[Any, ...]:
    """A weight as the operators' arguments, in the order of their schemas."""
    scheme = weight.scheme
    return (
        weight.packed,
        weight.scale,
        weight.zero_point,
        scheme.format,
        scheme.granularity,
        scheme.group_size or 0,
        list(weight.shape),
    )


@lru_cache
def _scheme(
    format: str, granularity: Any, group_size: int, symmetric: bool, scale_dtype: str
) -> Scheme:
    return Scheme(
        format=format,
        granularity=granularity,
        group_size=group_size or None,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )


def _weight(
    packed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    granularity: Any,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> QTensor:
    """Inverse of `weight_arguments`."""
    scale_dtype = "float32" if scale is None else str(scale.dtype).removeprefix("torch.")
    scheme = _scheme(format, granularity, group_size, zero_point is None, scale_dtype)
    return QTensor(
        packed=packed,
        scale=scale,
        zero_point=zero_point,
        scheme=scheme,
        shape=torch.Size(shape),
        dtype=dtype,
    )


def _check_weight(packed: Tensor, scale: Tensor | None, format: str, shape: list[int]) -> None:
    torch._check(len(shape) == 2, lambda: f"weight shape is {shape}; linear and embedding need (N, K)")
    needs_scale = get_format(format).kind != "downcast"
    torch._check((scale is not None) == needs_scale, lambda: f"{format}: scale is {scale}")
    if needs_scale:
        torch._check(packed.dtype == torch.uint8, lambda: f"packed codes are {packed.dtype}, not uint8")


def _check_linear(
    x: Tensor, bias: Tensor | None, packed: Tensor, scale: Tensor | None, format: str, shape: list[int]
) -> None:
    _check_weight(packed, scale, format, shape)
    n, k = shape
    torch._check(x.is_floating_point(), lambda: f"x is {x.dtype}; linear needs a float dtype")
    torch._check(
        x.dim() >= 1 and x.shape[-1] == k, lambda: f"x is {tuple(x.shape)}, but weight is {(n, k)}: need (..., {k})"
    )
    if bias is not None:
        torch._check(tuple(bias.shape) == (n,), lambda: f"bias is {tuple(bias.shape)}, not ({n},)")


def _linear(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    granularity: str,
    group_size: int,
    shape: list[int],
    kernel: str,
) -> Tensor:
    _check_linear(x, bias, packed, scale, format, shape)
    weight = _weight(packed, scale, zero_point, format, granularity, group_size, shape, x.dtype)
    return get_kernel(kernel).linear(x, weight, bias)


def _linear_fake(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    granularity: str,
    group_size: int,
    shape: list[int],
    kernel: str,
) -> Tensor:
    _check_linear(x, bias, packed, scale, format, shape)
    return x.new_empty((*x.shape[:-1], shape[0]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, packed, scale, zero_point, *scheme, shape, _ = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.scheme, ctx.shape, ctx.dtype = scheme, shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx = dL/dy @ weight; dL/dbias = sum of dL/dy over tokens. Codes have no gradient."""
    packed, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _weight(packed, scale, zero_point, *ctx.scheme, ctx.shape, ctx.dtype)
        grad_x = grad @ weight.dequantize(ctx.dtype)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, grad_bias, *([None] * 8))


def _embedding(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    granularity: str,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    _check_weight(packed, scale, format, shape)
    weight = _weight(packed, scale, zero_point, format, granularity, group_size, shape, dtype)
    return get_kernel(kernel).embedding(indices, weight, dtype)


def _embedding_fake(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    granularity: str,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    _check_weight(packed, scale, format, shape)
    return packed.new_empty((*indices.shape, shape[1]), dtype=dtype)


def _image(
    weight: Tensor, format: str, granularity: Any, group_size: int, symmetric: bool, scale_dtype: str
) -> Tensor:
    return fake_quantize(
        weight,
        format,
        granularity=granularity,
        group_size=group_size or None,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )


def _image_fake(weight: Tensor, *scheme: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _image_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dweight = dL/dimage: the straight-through estimator (arXiv:1308.3432)."""
    return (grad, *([None] * 5))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("image", _image, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
torch.library.register_fake("zeropoint::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("zeropoint::embedding", _embedding_fake, lib=_LIBRARY)
torch.library.register_fake("zeropoint::image", _image_fake, lib=_LIBRARY)
torch.library.register_autograd("zeropoint::image", _image_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "zeropoint::linear", _linear_backward, setup_context=_linear_setup, lib=_LIBRARY
)


def linear(x: Tensor, weight: QTensor, bias: Tensor | None, kernel: str) -> Tensor:
    """y = x @ weight.T + bias. x: (..., K) float; weight: (N, K); bias: (N,); returns (..., N) of x's dtype."""
    y: Tensor = torch.ops.zeropoint.linear(x, bias, *weight_arguments(weight), kernel)
    return y


def embedding(indices: Tensor, weight: QTensor, dtype: torch.dtype, kernel: str) -> Tensor:
    """Rows of the weight. indices: (...) int; weight: (N, K); returns (..., K) of `dtype`."""
    y: Tensor = torch.ops.zeropoint.embedding(indices, *weight_arguments(weight), dtype, kernel)
    return y


def image(weight: Tensor, scheme: Scheme) -> Tensor:
    """dequantize(quantize(weight)) with the gradient of the identity. weight: (N, K) float; returns the same.

    Raises NonFiniteError, ScaleRangeError, GroupSizeError.
    """
    y: Tensor = torch.ops.zeropoint.image(
        weight,
        scheme.format,
        scheme.granularity,
        scheme.group_size or 0,
        scheme.symmetric,
        scheme.scale_dtype,
    )
    return y
