"""The native library (`csrc/`): found, loaded, and its functions on tensors and QTensors.

Plain C through ctypes, so one library serves every Python and every torch. It is optional:
`why_not()` says why there is none, and callers then use torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    POINTER,
    addressof,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from zeropoint import _env
from zeropoint.errors import KernelError, UnknownNameError, nearest
from zeropoint.numerics import double_quant, get_scale_dtype, scale_shape
from zeropoint.qtensor import QTensor, part_specs
from zeropoint.scheme import Scheme

VERSION = 8  # of the C ABI: ZP_VERSION in csrc/zeropoint.h
LIBRARY = Path(__file__).parent / "lib" / "libzeropoint.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DOUBLE_QUANT = 3  # a scale_dtype: scales in 8 bits
SCALE_DTYPES = {**DTYPES, torch.float8_e8m0fnu: 4}
KINDS = {"integer": 0, "codebook": 1}
KINDS_BY_DTYPE = {
    torch.float8_e4m3fn: 2,
    torch.float8_e5m2: 3,
    torch.bfloat16: 4,
    torch.float16: 5,
}
MOST_COLUMNS = 1 << 18  # a row, its scales and its activations lie on a thread's stack
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
PRODUCT = Struct("8P2q4i")  # zp_product of csrc/zeropoint.h
NORM = Struct("3P2q2f4i")  # zp_norm
GATE = Struct("3Pq3i")  # zp_gate
ROTATION = Struct(3 * "2P3q" + "2P4q2i")  # zp_rotation
ATTENTION = Struct("4P10qf2i")  # zp_attention
MOST_WIDTH = 256  # of a head: ZP_MOST_WIDTH
OK, BAD_INDEX, NO_MEMORY, BAD_ARGUMENT = range(4)


class Format(ctypes.Structure):
    """zp_format of csrc/zeropoint.h."""

    _fields_ = [
        ("kind", c_int32),
        ("bits", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("group_size", c_int64),
        ("scale_stride", c_int64),
        ("scale_dtype", c_int32),
        ("float_zero_point", c_int32),
        ("levels", c_float * 16),
        ("scale_levels", POINTER(c_float)),
    ]


# --- the library ---


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none; KernelError where one was named and cannot be used."""
    named, forced = _env.library(), _env.forced_isa()
    if named is None and not LIBRARY.is_file():
        return (
            f"the native library was not built ({LIBRARY} is not there): no C++ compiler at install"
        )
    library = _open(named or LIBRARY)
    if named is not None and isinstance(library, str):
        raise KernelError(f"ZEROPOINT_LIBRARY={named}: {library}")
    if forced is not None and not isinstance(library, str):
        _use_isa(library, forced)
    return library


def _open(path: Path) -> ctypes.CDLL | str:
    """The library in this file, or why it is none."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.zp_version()
    except (OSError, AttributeError) as e:  # not a library, or another's
        return f"the native library does not load: {e}"
    if version != VERSION:
        return f"{path} has ABI version {version}, this zeropoint needs {VERSION}; install it again"
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    library.zp_linear.argtypes = [c_void_p]
    library.zp_rms_norm.argtypes = library.zp_gated.argtypes = [c_void_p]
    library.zp_rotate.argtypes = library.zp_attend.argtypes = [c_void_p]
    library.zp_rms_norm.restype = library.zp_gated.restype = library.zp_rotate.restype = None
    library.zp_rows.argtypes = [
        POINTER(Format), c_void_p, c_void_p, c_void_p, c_void_p,  # weight
        c_void_p, c_int64, c_void_p, c_int32, c_int32,
    ]  # fmt: skip
    library.zp_quantize.argtypes = [
        POINTER(Format), c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int32,
    ]  # fmt: skip
    library.zp_isa_name.argtypes = library.zp_isa_why_not.argtypes = [c_int32]
    library.zp_isa_name.restype = library.zp_isa_why_not.restype = c_char_p
    library.zp_use_isa.argtypes = [c_int32]
    library.zp_read_bytes.argtypes = [c_void_p, c_int64, c_int32]
    library.zp_read_bytes.restype = c_int64
    library.zp_peak_operations.argtypes = [c_int32, c_int64, c_int32]
    library.zp_peak_operations.restype = c_double


def why_not() -> str | None:
    """Why the native library cannot be used, or None."""
    found = _load()
    return found if isinstance(found, str) else None


def _library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise KernelError(found)
    return found


def instruction_sets() -> dict[str, str | None]:
    """Every instruction set the library has code for, slowest first: None, or why not here."""
    return _instruction_sets(_library())


def _instruction_sets(library: ctypes.CDLL) -> dict[str, str | None]:
    sets: dict[str, str | None] = {}
    while (name := library.zp_isa_name(len(sets))) is not None:
        reason = library.zp_isa_why_not(len(sets))
        sets[name.decode()] = None if reason is None else reason.decode()
    return sets


def instruction_set() -> str:
    """The one in use: the fastest that works here, or the one that `ZEROPOINT_ISA` names."""
    library = _library()
    name: bytes = library.zp_isa_name(library.zp_isa_in_use())
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Use this one from now on, in the whole process. Raises UnknownNameError, KernelError."""
    _use_isa(_library(), name)


def _use_isa(library: ctypes.CDLL, name: str) -> None:
    sets = _instruction_sets(library)
    if name not in sets:
        raise UnknownNameError(f"{name!r} is not an instruction set; {nearest(name, sets)}")
    if sets[name] is not None:
        raise KernelError(f"instruction set {name} cannot be used: {sets[name]}")
    library.zp_use_isa(list(sets).index(name))


# --- a weight as the library sees it ---


@cache
def _format(scheme: Scheme, n: int, k: int) -> Format:
    """Kept for as long as the process lives, so that its address may be."""
    fmt = scheme.fmt
    row = Format(
        kind=KINDS[fmt.kind] if fmt.dtype is None else KINDS_BY_DTYPE[fmt.dtype],
        bits=fmt.bits,
        n=n,
        k=k,
        group_size=scheme.group_size or k,
        scale_stride=0 if scheme.granularity == "tensor" else k // (scheme.group_size or k),
        scale_dtype=SCALE_DTYPES[get_scale_dtype(scheme.scale_dtype)],
        float_zero_point=scheme.float_zero_point,
    )
    if fmt.levels is not None:
        row.levels[:] = fmt.levels
    if scheme.double_quant:
        row.scale_dtype = DOUBLE_QUANT
        row.scale_levels = _scale_levels()
    return row


@cache
def _scale_levels() -> ctypes.Array[c_float]:
    """The levels of double quantization as C has them, kept for as long as the process lives."""
    return (c_float * 256)(*double_quant.levels().tolist())


def _contiguous_parts(weight: QTensor) -> tuple[Tensor | None, ...]:
    """packed, scale, zero_point, levels: themselves where they are contiguous."""
    parts = (weight.packed, weight.scale, weight.zero_point, weight.levels)
    return tuple(None if part is None else part.contiguous() for part in parts)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# --- its functions ---


def linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias. x: (..., K) float; weight: (N, K); bias: (N,); returns (..., N) of
    x's dtype.

    x becomes 16-bit integers, one scale for every 128 columns or fewer (8-bit integers, one scale
    a token, when the scheme has int8 activations); 15-bit ones for a few tokens of a codebook,
    whose levels become integers too; float32 for other formats and for many tokens of a codebook.
    Tiles (AMX) of many tokens take it as bfloat16, or as the sum of two where it is not.
    """
    return bind_linear(weight)(x, bias)


def bind_linear(weight: QTensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`linear` of one weight, with what does not change from call to call looked up once."""
    n, k = weight.shape
    form = addressof(_format(weight.scheme, n, k))
    # Addresses are read at every call: tensors may be moved under a module (share_memory_).
    packed, scale, zero_point, levels = map(_address_of, _contiguous_parts(weight))
    int8_activations = weight.scheme.activations == "int8"
    call, pack, get_threads = _library().zp_linear, PRODUCT.pack, torch.get_num_threads

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_contiguous():
            m, stride = x.numel() // k, k
        elif x.dim() == 2 and x.stride(1) == 1:
            m, stride = x.shape[0], x.stride(0)
        else:
            return linear(x.contiguous(), bias)
        *rows, _ = x.shape
        y = x.new_empty(*rows, n)  # half the time of torch.empty or of a tuple
        bias_at = bias_dtype = 0
        if bias is not None:
            bias = bias.contiguous()
            bias_at, bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        # One argument of bytes: ctypes takes three times as long to convert each value.
        product = pack(
            form, packed(), scale(), zero_point(), levels(),
            bias_at, x.data_ptr(), y.data_ptr(), stride, m,
            bias_dtype, DTYPES[x.dtype], int8_activations, get_threads(),
        )  # fmt: skip
        result = call(product)
        if result != OK:
            _raise(result, x.dtype, m, k)
        return y

    return linear


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, shift: float, rounds_first: bool) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + shift), in float32. x: (..., K) float; weight: (K,)
    float; returns (..., K) of x's dtype. rounds_first: to that dtype before the product, too.

    Zhang and Sennrich 2019, equation 4.
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    columns = weight.numel()
    norm = NORM.pack(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // max(columns, 1), columns,
        eps, shift, DTYPES[x.dtype], DTYPES[weight.dtype], rounds_first, torch.get_num_threads(),
    )  # fmt: skip
    _library().zp_rms_norm(norm)
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y = activation(gate) * up, the first factor rounded to their dtype. Both: (..., N) float, of
    one shape and dtype, as is y. activation: a key of ACTIVATIONS.

    Shazeer 2020, equation 6.
    """
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    product = GATE.pack(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(),
        DTYPES[gate.dtype], ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    _library().zp_gated(product)
    return y


def rotate(
    queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    all_keys: Tensor, all_values: Tensor,
) -> Tensor:  # fmt: skip
    """The rotary embedding of queries, which are returned, and of keys, which are written as the
    last T of `all_keys`, as values, unchanged, are of `all_values`.

    queries: (B, T, H, D) float, D even; keys, values: (B, T, H2, D); cos, sin: (B or 1, T, D), all
    contiguous and of one dtype; all_keys, all_values: (B, H2, L, D) of that dtype and any strides
    with contiguous (L, D). Returns (B, H, T, D).

    y = x * cos + rotate_half(x) * sin in float32. Su et al. 2021, equation 34.
    """
    batch, tokens, heads, width = queries.shape
    kv_heads, length = all_keys.shape[1:3]
    y = queries.new_empty(batch, heads, tokens, width)
    size = tokens * width
    past = (length - tokens) * width * queries.element_size()
    rotation = ROTATION.pack(
        queries.data_ptr(), y.data_ptr(), heads, heads * size, size,
        keys.data_ptr(), all_keys.data_ptr() + past, kv_heads, *all_keys.stride()[:2],
        values.data_ptr(), all_values.data_ptr() + past, kv_heads, *all_values.stride()[:2],
        cos.data_ptr(), sin.data_ptr(), size if cos.shape[0] > 1 else 0, batch, tokens, width,
        DTYPES[queries.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _library().zp_rotate(rotation)
    return y


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor | None:
    """y = softmax(scale * queries @ keys^T) @ values of each head, in float32; None where torch is
    as fast. Token t of T stands at position L - T + t, and sees those up to its own.

    queries: (B, H, T, D) float, contiguous; keys, values: (B, H2, L, D) of the same dtype and any
    strides with contiguous (L, D); each of the H2 serves H / H2 neighbours. scale: positive.
    Returns (B, T, H, D), contiguous. Vaswani et al. 2017, equation 1.
    """
    batch, heads, tokens, width = queries.shape
    y = queries.new_empty(batch, tokens, heads, width)
    attention = ATTENTION.pack(
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), y.data_ptr(),
        batch, heads, keys.shape[1], tokens, keys.shape[2], width,
        *keys.stride()[:2], *values.stride()[:2], scale,
        DTYPES[queries.dtype], torch.get_num_threads(),
    )  # fmt: skip
    result = _library().zp_attend(attention)
    if result == NO_MEMORY:
        raise MemoryError(f"no memory for keys and values of {tuple(keys.shape)}")
    return y if result == OK else None


def _address_of(part: Tensor | None) -> Callable[[], int]:
    """What returns where it lies: 0 for none."""
    return int if part is None else part.data_ptr


def _raise(result: int, dtype: torch.dtype, m: int, k: int) -> None:
    assert result == NO_MEMORY, f"zp_linear returned {result}"
    raise MemoryError(f"no memory for {m} x {k} activations of {dtype}")


def rows(weight: QTensor, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantized rows. indices: (...) int, or None for all; returns (..., K) of `dtype`.

    Raises IndexError for an index outside the weight.
    """
    n, k = weight.shape
    if indices is not None:
        indices = indices.to(torch.int64).contiguous()
    count = n if indices is None else indices.numel()
    parts = _contiguous_parts(weight)
    out = torch.empty((*((n,) if indices is None else indices.shape), k), dtype=dtype, device="cpu")
    result = _library().zp_rows(
        byref(_format(weight.scheme, n, k)),
        *map(_pointer, parts),
        _pointer(indices),
        count,
        out.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    if result == BAD_INDEX:
        assert indices is not None
        low, high = (int(v) for v in indices.aminmax())
        raise IndexError(f"indices from {low} to {high} are outside a table of {n} rows")
    assert result == OK, f"zp_rows returned {result}"
    return out


def can_quantize(weight: Tensor, scheme: Scheme) -> bool:
    """Whether `quantize` does this job."""
    return (
        why_not() is None
        and type(weight) in (Tensor, torch.nn.Parameter)  # not one without memory of its own
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.dtype in DTYPES
        and scheme.fmt.kind in KINDS
        and scheme.fmt.ties == "lower"  # and so no scale of 8 bits either
        and not scheme.fmt.learns_levels
        and scheme.granularity != "tensor"
        and not scheme.float_zero_point
        and weight.numel() > 0
        and weight.shape[1] <= MOST_COLUMNS
    )


def quantize(weight: Tensor, scheme: Scheme) -> QTensor | None:
    """Round to nearest in one pass over the weight: the same scales, zero points and codes as
    `numerics.quantize`, bit for bit. Its scales are floats, whatever the scheme does to them later.

    weight: (N, K) float on a CPU, for which `can_quantize`. Returns None where a value is not
    finite or close to its dtype's largest, or a scale does not fit its dtype: `numerics.quantize`
    decides about those. Raises GroupSizeError.
    """
    n, k = weight.shape
    scale_shape(weight.shape, scheme.granularity, scheme.group_size)  # raises
    weight = weight.detach().contiguous()
    parts = {
        suffix: torch.empty(shape, dtype=dtype, device="cpu")
        for suffix, (shape, dtype) in part_specs(weight.shape, scheme).items()
    }
    result = _library().zp_quantize(
        byref(_format(scheme, n, k)),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        _pointer(parts[""]),
        _pointer(parts.get("_scale")),
        _pointer(parts.get("_zero_point")),
        torch.get_num_threads(),
    )
    if result == BAD_ARGUMENT:
        return None
    assert result == OK, f"zp_quantize returned {result}"
    return QTensor.from_parts(parts, scheme=scheme, shape=weight.shape, dtype=weight.dtype)
