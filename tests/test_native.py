"""The native library: found and forced, rows, quantizing, threads, and the edges of its buffers."""

import ctypes
import dataclasses
import mmap
import os
import shutil
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from tests.helpers import (
    INTEGERS,
    OF_ONE,
    PROPERTY,
    TABLES,
    assert_embedding,
    in_child,
    instruction_set,
    instruction_sets,
    symmetries,
    threads,
    with_environment,
)
from zeropoint import native
from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import (
    GroupSizeError,
    KernelError,
    NonFiniteError,
    ScaleRangeError,
    UnknownNameError,
    ZeropointError,
)
from zeropoint.kernels import select
from zeropoint.kernels.spec import Spec
from zeropoint.nn import QLinear
from zeropoint.numerics import get_format, get_scale_dtype, quantize
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
every_isa = pytest.mark.parametrize("isa", instruction_sets(), indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS_AND_SIGNS = OF_ONE + [("bfloat16", True), ("float16", True)]
QUANTIZED = [
    (f.name, symmetric)
    for f in INTEGERS + TABLES
    for symmetric in symmetries(f)
    if f.ties == "lower"
]


@pytest.fixture
def isa(request):
    with instruction_set(request.param):
        yield request.param


def usable():
    return [name for name, why in native.instruction_sets().items() if why is None]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(name, symmetric=True, group_size=None, scale_dtype="float32", activations=None):
    if name in ("bfloat16", "float16"):
        group_size = None
    return Scheme(
        format=name,
        granularity="channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        activations=activations,
    )


def by_torch(weight, scheme) -> QTensor:
    """What `rtn` returns where there is no native library."""
    names = ("format", "granularity", "group_size", "symmetric", "scale_dtype")
    quantized = quantize(weight, **{name: getattr(scheme, name) for name in names})
    return QTensor.from_codes(quantized, scheme, weight.dtype)


def assert_same(found: QTensor, expected: QTensor) -> None:
    """Bit for bit, in every part and field."""
    assert found.parts.keys() == expected.parts.keys()
    for suffix, part in expected.parts.items():
        other = found.parts[suffix]
        assert (other.shape, other.dtype) == (part.shape, part.dtype), suffix
        different = (other != part).nonzero()
        assert not len(different), (
            f"{len(different)} differ in {suffix!r}, the first at {different[0]}"
        )
    assert (found.scheme, found.shape, found.dtype) == (
        expected.scheme,
        expected.shape,
        expected.dtype,
    )


# --- which library, which instruction set ---------------------------------------------------------


@needs_library
def test_instruction_sets_are_listed_slowest_first_and_one_is_in_use():
    sets = native.instruction_sets()
    assert list(sets)[0] == "scalar" and sets["scalar"] is None
    assert native.instruction_set() in usable()


@needs_library
@every_isa
def test_an_instruction_set_can_be_chosen(isa):
    assert native.instruction_set() == isa


@needs_library
def test_an_instruction_set_that_does_not_exist_or_work_is_refused(monkeypatch):
    before = native.instruction_set()
    with pytest.raises(
        UnknownNameError, match="'scaler' is not an instruction set; close: 'scalar'"
    ):
        native.use_instruction_set("scaler")
    monkeypatch.setattr(native, "_instruction_sets", lambda library: {"amx": "this CPU has no AMX"})
    with pytest.raises(
        KernelError, match="instruction set amx cannot be used: this CPU has no AMX"
    ):
        native.use_instruction_set("amx")
    monkeypatch.undo()
    assert native.instruction_set() == before


@needs_library
@every_isa
def test_the_environment_forces_an_instruction_set(isa):
    name = in_child(with_environment, {"ZEROPOINT_ISA": isa}, native.instruction_set)
    assert name == isa


@needs_library
def test_without_a_wish_the_fastest_is_used():
    assert in_child(with_environment, {"ZEROPOINT_ISA": ""}, native.instruction_set) == usable()[-1]


@needs_library
def test_a_wish_that_cannot_be_met_is_an_error_not_a_fallback():
    name, message = in_child(with_environment, {"ZEROPOINT_ISA": "avx513"}, _refusal)
    assert name == "UnknownNameError"
    assert "'avx513' is not an instruction set; close: 'avx512'" in message
    for isa, reason in native.instruction_sets().items():
        if reason is not None:
            name, message = in_child(with_environment, {"ZEROPOINT_ISA": isa}, _refusal)
            assert name == "KernelError" and reason in message


def _refusal():
    """The error of the first use of the library."""
    try:
        native.why_not()
    except ZeropointError as e:
        return type(e).__name__, str(e)
    raise AssertionError("nothing was refused")


def _without_library(step, library):
    """The kernel of a job where this is what is installed, and why it is not the native one."""
    for name in ("ZEROPOINT_KERNEL", "ZEROPOINT_LIBRARY"):
        os.environ.pop(name, None)
    native.LIBRARY = library
    native._load.cache_clear()
    weight, scheme = noise(8, 64), Scheme.of("int4")
    qweight = rtn(weight, scheme)
    assert_same(qweight, by_torch(weight, scheme))
    with pytest.raises(KernelError) as caught:
        native.rows(qweight, None, torch.float32)
    choice = select.choose(Spec(op="linear", scheme=scheme, shape=(8, 64), device="cpu"))
    assert choice.refused["native"] == native.why_not() == str(caught.value)
    return choice.kernel, native.why_not()


def test_without_a_library_torch_does_the_work_and_the_reason_is_quoted(tmp_path):
    missing = tmp_path / "libzeropoint.so"
    kernel, reason = in_child(_without_library, missing)
    assert kernel == "torch"
    assert reason.startswith(f"the native library was not built ({missing} is not there)")


def test_a_file_that_is_no_library_is_said_not_to_load(tmp_path):
    path = tmp_path / "libzeropoint.so"
    path.write_text("not a library")
    kernel, reason = in_child(_without_library, path)
    assert kernel == "torch" and reason.startswith("the native library does not load: ")


@pytest.mark.parametrize("there", [True, False], ids=["no library", "missing"])
def test_a_library_that_was_named_is_used_or_refused(tmp_path, there):
    path = tmp_path / "libzeropoint.so"
    if there:
        path.write_text("not a library")
    variables = {"ZEROPOINT_LIBRARY": str(path), "ZEROPOINT_ISA": ""}
    name, message = in_child(with_environment, variables, _refusal)
    assert name == "KernelError"
    assert message.startswith(f"ZEROPOINT_LIBRARY={path}: the native library does not load: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int zp_version(void) { return 99; }", "{} has ABI version 99, this zeropoint needs "),
        ("int something_else;", "the native library does not load: {}: undefined symbol"),
    ],
    ids=["another version", "another project's"],
)
def test_a_library_that_is_not_ours_is_refused(tmp_path, source, message):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build another library with")
    path = tmp_path / "libzeropoint.so"
    (tmp_path / "other.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, tmp_path / "other.c"], check=True)
    kernel, reason = in_child(_without_library, path)
    assert kernel == "torch" and reason.startswith(message.format(path))


# --- rows -----------------------------------------------------------------------------------------


@needs_library
@every_isa
@pytest.mark.parametrize(("name", "symmetric"), FORMATS_AND_SIGNS)
def test_rows_are_those_that_torch_dequantizes(name, symmetric, isa):
    indices = torch.tensor([[4, 0, 0], [2, 1, 4]])
    for k, group_size in ((1, None), (7, None), (33, None), (577, None), (96, 32), (90, 9)):
        for scale_dtype in ("float32", "bfloat16", get_format(name).scale_dtype):
            if scale_dtype is None or get_scale_dtype(scale_dtype) not in native.SCALE_DTYPES:
                continue
            scheme = scheme_of(name, symmetric, group_size, scale_dtype)
            weight = by_torch(noise(5, k), scheme)
            for dtype in DTYPES:
                y = native.rows(weight, indices, dtype)
                assert_embedding(y, indices, weight, dtype)
                dense = weight.dequantize(dtype)
                assert torch.equal(y, dense[indices])
                assert torch.equal(native.rows(weight, None, dtype), dense)
    tensor = dataclasses.replace(scheme_of(name, symmetric), granularity="tensor")
    weight = by_torch(noise(5, 33), tensor)
    assert torch.equal(native.rows(weight, indices, torch.float32), weight.dequantize()[indices])


@needs_library
def test_indices_have_any_shape_and_integer_dtype():
    weight = by_torch(noise(5, 33), scheme_of("int4"))
    dense = weight.dequantize(torch.bfloat16)
    for indices in (
        torch.tensor(3),
        torch.tensor([4, 1]),
        torch.tensor([[[4]], [[1]]]),
        torch.tensor([4, 0, 1, 0, 2])[::2],
        torch.tensor([2]).expand(7),
        torch.zeros(2, 0, dtype=torch.int64),
    ):
        for dtype in (torch.int64, torch.int32):
            y = native.rows(weight, indices.to(dtype), torch.bfloat16)
            assert y.shape == (*indices.shape, 33) and torch.equal(y, dense[indices])


@needs_library
@pytest.mark.parametrize("wrong", [[5], [-1], [0, 5, 1], [[2], [-(2**40)]]])
def test_an_index_outside_the_table_is_named_and_nothing_is_read(wrong):
    weight = by_torch(noise(5, 33), scheme_of("nf4"))
    low, high = min(torch.tensor(wrong).view(-1)), max(torch.tensor(wrong).view(-1))
    message = f"indices from {low} to {high} are outside a table of 5 rows"
    with pytest.raises(IndexError, match=message):
        native.rows(weight, torch.tensor(wrong), torch.float32)


# --- quantize -------------------------------------------------------------------------------------


def special_blocks(k, scheme):
    """(rows, k) float32: one kind of block in each row."""
    fmt = scheme.fmt
    x = noise(16, k, seed=k)
    x[1] = 0
    x[2] = 0.3
    x[3] = -0.3
    x[4] = x[4].sign() * 0.7  # one magnitude
    x[5] = x[5].sign() * (x[5].abs() > 1)  # and zeros
    x[6] = x[6].abs()
    x[7] = -x[7].abs()
    x[8] *= 1e-40
    x[9] *= 1e-7  # below float16's smallest scale
    x[10] *= 10.0 ** noise(k, seed=1)
    x[11] = -0.0
    step = 2.0**-7
    if fmt.kind == "integer":  # halfway between codes
        x[12] = (torch.arange(k) % fmt.q_max + 0.5) * step * x[12].sign()
        x[12, ::7] = fmt.q_max * step
    else:
        levels = torch.tensor(sorted(fmt.levels))
        x[12] = ((levels[1:] + levels[:-1]) / 2)[torch.arange(k) % 15]
        x[12, ::7] = -1.0
    end = 65024 * min(1.0, *fmt.reach)  # near float16's, for the scale too, and a bfloat16
    x[13] = end * noise(k, seed=2).sign()
    x[14] = x[14].clamp(-1, 1) * end
    x[15, 0] = 1e4
    return x


@needs_library
@every_isa
@pytest.mark.parametrize(("name", "symmetric"), QUANTIZED)
def test_scales_zero_points_and_codes_are_those_of_torch(name, symmetric, isa):
    scale_dtypes = ("float16", "float32", "bfloat16")
    cases = [(k, None) for k in (1, 2, 7, 33, 100, 577)]
    cases += [(96, 32), (90, 9), (65, 1), (128, 64), (384, 128)]
    for i, (k, group_size) in enumerate(cases):
        scheme = scheme_of(name, symmetric, group_size, scale_dtypes[i % 3])
        for dtype in DTYPES:
            weight = special_blocks(k, scheme).to(dtype)
            if dtype == torch.float16:  # whose grid must end inside float16
                weight = weight.clamp(-3e4, 3e4)
            found = native.quantize(weight, scheme)
            assert found is not None
            assert_same(found, by_torch(weight, scheme))


@needs_library
@every_isa
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quotients_beside_a_tie_are_rounded_as_division_rounds_them(bits, symmetric, isa):
    scheme = scheme_of(f"int{bits}", symmetric, None, "float32")
    weight = noise(256, 1024) * 10.0 ** torch.linspace(-30, 30, 256)[:, None]  # and scales
    weight[:, :2] = weight.abs().amax(1, keepdim=True) * torch.tensor([-1.0, 1.0])
    scale = by_torch(weight, scheme).parts["_scale"].reshape(-1, 1)
    ties = (torch.arange(1022) % (2**bits - 2) - 2 ** (bits - 1) + 1.5) * scale
    steps = (torch.arange(1022) * 7 // 13 % 9 - 4).to(torch.int32)  # neighbours of the tie
    weight[:, 2:] = (ties.view(torch.int32) + steps).view(torch.float32)
    assert_same(native.quantize(weight, scheme), by_torch(weight, scheme))


@needs_library
@every_isa
def test_any_layout_of_a_weight_gives_the_same_codes(isa):
    scheme = scheme_of("int4", False, 32, "float16")
    weight = noise(9, 96)
    for layout in (weight.t().contiguous().t(), noise(20, 200)[::2][:9, 5:101]):
        assert_same(native.quantize(layout, scheme), by_torch(layout, scheme))
    assert_same(native.quantize(weight.requires_grad_(), scheme), by_torch(weight.detach(), scheme))


@needs_library
@every_isa
@pytest.mark.parametrize(("name", "symmetric"), QUANTIZED)
def test_what_no_scale_can_hold_is_left_to_torch_to_refuse(name, symmetric, isa):
    scheme = scheme_of(name, symmetric, 32, "float16")
    fits = noise(3, 64).clamp(-1, 1)
    assert native.quantize(fits, scheme) is not None
    for column in (0, 31, 40, 63):
        for value in (torch.nan, torch.inf, -torch.inf, 1e20, -1e20):
            weight = fits.clone()
            weight[1, column] = value
            assert native.quantize(weight, scheme) is None
            error = ScaleRangeError if abs(value) == 1e20 else NonFiniteError
            with pytest.raises(error, match="does not fit float16|the first at"):
                rtn(weight, scheme)


@needs_library
def test_the_largest_scale_is_used_and_the_next_is_refused():
    scheme = scheme_of("int4", True, 32, "float16")
    weight = noise(1, 32).clamp(-1, 1)
    weight[0, 3] = 7 * 65504.0
    assert_same(native.quantize(weight, scheme), by_torch(weight, scheme))
    weight[0, 3] += 1
    assert native.quantize(weight, scheme) is None


def outcome(function, *arguments):
    """The bytes of the parts, or the error."""
    try:
        q = function(*arguments)
    except ZeropointError as e:
        return type(e).__name__, str(e)
    return {suffix: bytes(part.view(torch.uint8).flatten()) for suffix, part in q.parts.items()}


VALUES = st.floats(width=32) | st.floats(-2, 2, width=32) | st.sampled_from([0.0, 1.0, -1.0, 6e4])


@needs_library
@PROPERTY
@given(
    grid=st.sampled_from(QUANTIZED),
    groups=st.integers(1, 3),
    size=st.integers(1, 24),
    rows=st.integers(1, 3),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_rtn_is_the_same_with_the_library_and_without(
    grid, groups, size, rows, scale_dtype, dtype, data
):
    """Whatever the values: the same bytes, or the same words of refusal."""
    values = data.draw(st.lists(VALUES, min_size=size, max_size=size))
    weight = torch.tensor(values).repeat(groups * rows).view(rows, groups * size)
    weight = (weight * torch.arange(1.0, rows + 1)[:, None]).to(dtype)
    scheme = scheme_of(*grid, size, scale_dtype)
    expected = outcome(by_torch, weight, scheme)
    for name in usable():
        with instruction_set(name):
            assert outcome(rtn, weight, scheme) == expected, name


@needs_library
@pytest.mark.parametrize(("name", "symmetric"), QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_grid_that_ends_beyond_the_dtype_of_the_weight_is_refused_alike(name, symmetric, dtype):
    """The rounded-up end of the grid would come back as Inf."""
    scheme = scheme_of(name, symmetric)
    for seed in range(8):
        random = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        weight = (random.double() * torch.finfo(dtype).max).to(dtype)
        assert outcome(rtn, weight, scheme) == outcome(by_torch, weight, scheme)


def test_only_matrices_of_floats_on_a_cpu_are_quantized_here():
    scheme = scheme_of("int4", True, 32)
    weight = noise(4, 64)
    assert native.can_quantize(weight, scheme) == (native.why_not() is None)
    for other in (weight[0], weight.double(), weight.to("meta"), weight[:0], weight[:, :0]):
        assert not native.can_quantize(other, scheme)
    for name in ("float8_e4m3fn", "bfloat16", "mxfp4"):
        assert not native.can_quantize(weight, scheme_of(name))
    assert not native.can_quantize(weight, Scheme(format="int4", granularity="tensor"))


@needs_library
def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(GroupSizeError, match="K=33 is not a multiple of group_size=32"):
        native.quantize(noise(2, 33), scheme_of("int4", True, 32))


@needs_library
def test_rows_of_any_length_are_quantized():
    in_child(_quantize_long_rows)


def _quantize_long_rows(step):
    for k in (1 << 20, 3_000_001):
        step(f"K={k}")
        weight, scheme = noise(2, k), scheme_of("int4", False)
        assert_same(rtn(weight, scheme), by_torch(weight, scheme))


# --- torch's modes --------------------------------------------------------------------------------


@needs_library
def test_a_default_device_does_not_move_what_the_library_writes():
    in_child(_use_under_a_default_device)


def _use_under_a_default_device(step):
    scheme = scheme_of("int4", False)
    weight, x = noise(5, 100), noise(3, 100)
    expected = rtn(weight, scheme)
    y = native.linear(x, expected, None)
    module = QLinear.from_float(torch.nn.Linear(100, 5), scheme)
    module.freeze(expected)
    with torch.no_grad():
        z = module(x)
        with torch.device("meta"):
            step("quantize")
            assert_same(rtn(weight, scheme), expected)
            step("rows")
            assert torch.equal(native.rows(expected, None, torch.float32), expected.dequantize())
            step("linear")
            assert torch.equal(native.linear(x, expected, None), y)
            step("module")
            assert torch.equal(module(x), z)


@needs_library
def test_a_tensor_without_memory_is_not_quantized_here():
    in_child(_quantize_without_memory)


def _quantize_without_memory(step):
    scheme = scheme_of("int4", False)
    with FakeTensorMode():
        weight = noise(4, 64)
        step("a FakeTensor")
        assert not native.can_quantize(weight, scheme)
    step("a subclass that keeps its values elsewhere")
    assert not native.can_quantize(TwoTensor(noise(4, 64), noise(4, 64)), scheme)
    assert native.can_quantize(torch.nn.Parameter(noise(4, 64)), scheme)


# --- between linear layers ------------------------------------------------------------------------

SIZES_BETWEEN = ((1, 1), (1, 576), (7, 15), (3, 129), (40, 1000))  # the last for several threads
UNIT = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def assert_norm(y, x, weight, *, eps, shift, rounds_first):
    """Within the roundings: of a sum of squares in float32, and of one or two of y's dtype."""
    wide, k = x.double(), x.shape[-1]
    expected = (
        wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + shift)
    )
    unit = UNIT[y.dtype] * (1 if rounds_first else 0.5)  # half a unit each
    bound = expected.abs() * (unit + UNIT[torch.float32] * (k / 2 + 4))
    smallest = torch.finfo(y.dtype).smallest_normal * UNIT[y.dtype] * (1 + weight.double().abs())
    assert y.dtype is x.dtype and bool(((y.double() - expected).abs() <= bound + smallest).all())


def assert_gated(y, gate, up, activation):
    """Within the roundings: of e^-s by the relative error of s, and of two products."""
    g, wide = gate.double(), up.double()
    s = g if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    factor = g / (1 + torch.exp(-s))
    f32 = UNIT[torch.float32]
    tail = g.abs() * torch.finfo(torch.float32).smallest_normal * 4  # e^88.4 is infinity
    tail += torch.finfo(y.dtype).smallest_normal * UNIT[y.dtype]
    bound = (factor.abs() * (UNIT[y.dtype] + f32 * (8 + 4 * s.abs())) + tail) * wide.abs()
    last = torch.finfo(y.dtype).smallest_normal * UNIT[y.dtype]
    assert y.dtype is gate.dtype
    assert bool(((y.double() - factor * wide).abs() <= bound + last).all())


@needs_library
@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds_first", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_norm_is_within_roundings(isa, dtype, rounds_first, shift):
    settings = {"shift": shift, "rounds_first": rounds_first}
    for rows, k in SIZES_BETWEEN:
        for size, eps in ((1.0, 1e-6), (1e-3, 1e-5), (1e2, 1e-5)):
            x, weight = (noise(rows, k) * size).to(dtype), noise(k, seed=1).to(dtype)
            y = native.rms_norm(x, weight, eps=eps, **settings)
            assert_norm(y, x, weight, eps=eps, **settings)
    wide = noise(k, seed=2)  # a weight that is wider than the tokens
    y = native.rms_norm(x, wide, eps=1e-5, shift=shift, rounds_first=False)
    assert_norm(y, x, wide, eps=1e-5, shift=shift, rounds_first=False)
    strided = noise(rows, 2 * k).to(dtype)[:, ::2]
    y = native.rms_norm(strided, weight, eps=1e-5, **settings)
    assert_norm(y, strided, weight, eps=1e-5, **settings)
    zeros = torch.zeros(2, k, dtype=dtype)
    assert torch.equal(native.rms_norm(zeros, weight, eps=1e-5, **settings), zeros)
    spoiled = x.clone()
    spoiled[0, k // 2] = torch.nan
    y = native.rms_norm(spoiled, weight, eps=1e-5, **settings)
    assert bool(y[0].isnan().all()) and not bool(y[1:].isnan().any())


@needs_library
@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_a_gate_is_within_roundings(isa, dtype, activation):
    for rows, k in SIZES_BETWEEN:
        for size in (1.0, 30.0):
            gate, up = (noise(rows, k) * size).to(dtype), noise(rows, k, seed=1).to(dtype)
            assert_gated(native.gated(gate, up, activation), gate, up, activation)
    assert_gated(native.gated(gate.T, up.T, activation), gate.T, up.T, activation)
    edge = torch.finfo(dtype)
    values = [0.0, edge.max, -edge.max, edge.smallest_normal, -88.0, -89.0, -104.0, 88.5, 1e4, -1e4]
    gate = torch.tensor(values, dtype=dtype)
    assert_gated(
        native.gated(gate, torch.ones_like(gate), activation), gate, gate * 0 + 1, activation
    )
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    up, down, nan = native.gated(ends, torch.ones_like(ends), activation).tolist()
    assert up == torch.inf and down != down and nan != nan  # as torch: -inf * 0 is NaN


# Sequences, tokens, all positions, heads, heads of keys and values, width. Few tokens first.
ATTENTIONS = (
    (1, 1, 1, 1, 1, 2),
    (1, 1, 300, 9, 3, 64),
    (2, 3, 261, 7, 1, 80),
    (2, 4, 4, 6, 6, 256),
    (1, 1, 40, 10, 2, 6),
    (1, 5, 5, 2, 2, 32),
    (2, 33, 33, 6, 2, 64),
    (1, 160, 160, 4, 1, 128),
    (1, 40, 300, 3, 3, 96),
    (1, 300, 300, 2, 1, 256),
    (1, 20, 20, 2, 1, 80),
)


def heads_and_cache(sizes, dtype, seed=0):
    """Queries, and keys and values that lie in longer memory."""
    batch, tokens, length, heads, kv_heads, width = sizes
    q = noise(batch, heads, tokens, width, seed=seed)
    keys, values = noise(2, batch, kv_heads, length + 5, width, seed=seed + 1)
    return q.to(dtype), keys.to(dtype)[:, :, :length], values.to(dtype)[:, :, :length]


def assert_attended(y, q, keys, values, scale):
    """Within the roundings: of scores in float32, of a factor where tiles take it, and of y."""
    tokens, length, shared = q.shape[2], keys.shape[2], q.shape[1] // keys.shape[1]
    q, keys, values = (
        x.double()
        for x in (q, keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1))
    )
    hidden = torch.ones(tokens, length).triu(1 + length - tokens).bool()
    factors = (q @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    f32, unit = UNIT[torch.float32], UNIT[y.dtype]
    tiled = y.dtype is torch.bfloat16 and tokens > 4
    score = f32 * (q.shape[-1] + 8) * scale * (q.abs() @ keys.mT.abs())
    relative = 2 * score.masked_fill(hidden, 0).amax(-1, keepdim=True)
    relative += f32 * (length + 16) + tiled * (unit / 2 + 2**-17)
    expected, size = factors @ values, factors @ values.abs()
    bound = relative * size + unit / 2 * expected.abs() + torch.finfo(y.dtype).smallest_normal
    assert bool(((y.transpose(1, 2).double() - expected).abs() <= bound).all())


@needs_library
@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_within_roundings(isa, dtype):
    taken = []
    for sizes in ATTENTIONS:
        for scale in (sizes[-1] ** -0.5, 2.0):  # even factors, and few that count
            q, keys, values = heads_and_cache(sizes, dtype)
            y = native.attend(q, keys, values, scale)
            taken.append(y is not None)
            if y is not None:
                assert y.dtype is dtype and y.shape == q.transpose(1, 2).shape
                assert_attended(y, q, keys, values, scale)
    few = {"scalar": 0}.get(isa, 10)
    assert sum(taken) == few + (10 if isa == "amx" and dtype is torch.bfloat16 else 0)


@needs_library
@every_isa
@pytest.mark.parametrize("tokens", [1, 40])
def test_attention_of_what_is_not_finite_is_as_torchs(isa, tokens):
    q, keys, values = heads_and_cache((1, tokens, 200, 2, 1, 64), torch.bfloat16)
    if native.attend(q, keys, values, 0.125) is None:
        pytest.skip("torch's is used")
    keys[0, 0, 180, 3] = torch.nan
    y = native.attend(q, keys, values, 0.125)
    sees = torch.arange(200 - tokens, 200) >= 180
    assert torch.equal(y[0].isnan().all(-1).all(-1), sees)
    assert not bool(y[0, ~sees].isnan().any())
    keys = torch.zeros_like(keys)
    values[0, 0, 100, 5] = torch.inf  # seen by all: what is not seen may be multiplied by 0
    y = native.attend(q * 1e30, keys, values, 0.125)
    assert bool(y[..., 5].isinf().all()) and bool(y[..., :5].isfinite().all())
    far = torch.full_like(keys, -1e4)  # factors that vanish beside the last position's
    far[:, :, -tokens:] = 1
    y = native.attend(torch.ones_like(q), far, torch.ones_like(values), 1.0)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=2**-8)


@needs_library
@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_is_within_roundings(isa, dtype):
    for batch, tokens, _, heads, kv_heads, width in ATTENTIONS:
        q = noise(batch, tokens, heads, width).to(dtype)
        k, v = noise(2, batch, tokens, kv_heads, width, seed=1).to(dtype)
        for of_all in (True, False):
            cos, sin = noise(2, 1 if of_all else batch, tokens, width, seed=2).to(dtype)
            keys, values = torch.zeros(2, batch, kv_heads, tokens + 2, width, dtype=dtype)
            rotated = native.rotate(q, k, v, cos, sin, keys[:, :, :-1], values[:, :, :-1])
            for found, x in ((rotated, q), (keys[:, :, 1:-1], k)):
                wide, c, s = (
                    x.double().transpose(1, 2),
                    cos.double()[:, None],
                    sin.double()[:, None],
                )
                other = torch.cat([-wide[..., width // 2 :], wide[..., : width // 2]], -1)
                expected, size = wide * c + other * s, (wide * c).abs() + (other * s).abs()
                bound = UNIT[dtype] / 2 * expected.abs() + 2 * UNIT[torch.float32] * size
                bound += torch.finfo(dtype).smallest_normal * UNIT[dtype]
                assert bool(((found.double() - expected).abs() <= bound).all())
            assert torch.equal(values[:, :, 1:-1], v.transpose(1, 2))
            for memory in (keys, values):
                assert not memory[:, :, [0, -1]].any()


def test_the_bounds_of_norms_and_gates_reject_what_is_wrong():
    x, weight = noise(4, 64), noise(64, seed=1)
    settings = {"eps": 1e-5, "shift": 0.0, "rounds_first": False}
    y = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    assert_norm(y, x, weight, **settings)
    g = torch.nn.functional.silu(x) * x.flip(0)
    assert_gated(g, x, x.flip(0), "silu")
    for wrong in (lambda y: y * (1 + 1e-4), lambda y: -y, lambda y: y[[1, 0, 2, 3]]):
        with pytest.raises(AssertionError):
            assert_norm(wrong(y), x, weight, **settings)
        with pytest.raises(AssertionError):
            assert_gated(wrong(g), x, x.flip(0), "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_of_attention_rejects_what_is_wrong(dtype):
    q, keys, values = heads_and_cache((1, 20, 70, 4, 2, 64), dtype)
    mask = torch.ones(20, 70).tril(50).bool()

    def attend(scale=0.125, mask=mask):
        arguments = (x.double() for x in (q, keys, values))
        y = torch.nn.functional.scaled_dot_product_attention(
            *arguments, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return y.transpose(1, 2).to(dtype)

    assert_attended(attend(), q, keys, values, 0.125)
    more, fewer = torch.ones(20, 70).tril(51).bool(), mask & (torch.arange(70) > 0)
    for wrong in (attend() * 1.03, attend(0.13), attend(mask=more), attend(mask=fewer)):
        with pytest.raises(AssertionError):
            assert_attended(wrong, q, keys, values, 0.125)


# --- threads and processes ------------------------------------------------------------------------


@needs_library
@every_isa
def test_the_number_of_threads_changes_no_row_and_no_code(isa):
    weight, scheme = noise(801, 256), scheme_of("int5", False, 64, "float16")
    expected = by_torch(weight, scheme)
    dense = expected.dequantize()
    settings = {"eps": 1e-5, "shift": 0.0, "rounds_first": True}
    q, keys, values = heads_and_cache((2, 77, 77, 6, 2, 64), torch.bfloat16)
    norms, gates, attentions = [], [], []
    for count in (1, 2, 3, 16, 1):
        with threads(count):
            assert_same(native.quantize(weight, scheme), expected)
            assert torch.equal(native.rows(expected, None, torch.float32), dense)
            norms.append(native.rms_norm(weight, weight[0], **settings))
            gates.append(native.gated(weight, weight.flip(0), "silu"))
            attentions += [native.attend(q[:, :, -1:].contiguous(), keys, values, 0.125)]
            if (many := native.attend(q, keys, values, 0.125)) is not None:
                attentions[-1] = torch.cat([many, attentions[-1]], 1)
    if isa == "scalar":  # which leaves them to torch
        assert attentions == [None] * 5
        attentions = []
    assert all(torch.equal(y, ys[0]) for ys in (norms, gates, attentions) for y in ys)


JOBS = (("int4", 1), ("nf4", 2), ("int8", 20), ("float8_e4m3fn", 3))


def _jobs():
    """(function, what it returns alone): different weights and batches, each cut into pieces."""
    jobs = []
    for i, (name, m) in enumerate(JOBS):
        weight, x = by_torch(noise(801, 256, seed=i), scheme_of(name)), noise(m, 256, seed=9 + i)
        call = partial(native.linear, x, weight, None)
        jobs.append((call, call()))
    return jobs


@needs_library
def test_python_threads_do_not_disturb_each_other():
    with threads(2):
        jobs = _jobs()
        wrong = []

        def repeat(call, expected):
            for _ in range(1000):
                if not torch.equal(call(), expected):
                    wrong.append(call)

        running = [threading.Thread(target=repeat, args=job) for job in jobs]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert not wrong


@needs_library
def test_more_threads_than_there_is_work():
    with threads(64):
        for n, m in ((1, 1), (2, 700), (3, 2000), (40, 64)):
            weight, x = by_torch(noise(n, 256), scheme_of("int4")), noise(m, 256)
            y = native.linear(x, weight, None)
            with threads(1):
                assert torch.equal(native.linear(x, weight, None), y)


@needs_library
def test_a_forked_process_computes_with_threads_of_its_own():
    in_child(_fork_while_the_pool_works)


def _fork_while_the_pool_works(step):
    torch.set_num_threads(2)
    jobs = _jobs()
    stop = threading.Event()

    def hammer():
        call, _ = jobs[0]
        while not stop.is_set():
            call()

    for busy in (False, True):
        other = threading.Thread(target=hammer)
        if busy:
            other.start()
        for i in range(10):
            step(f"fork {i}, " + ("while another thread multiplies" if busy else "pool idle"))
            child = os.fork()
            if child == 0:
                signal.alarm(100)  # rather than hang
                right = all(torch.equal(call(), y) for _ in range(5) for call, y in jobs)
                tasks = list(Path("/proc/self/task").iterdir())
                helped = len(tasks) > 1  # fork copies no other thread
                os._exit(0 if right and helped else 1 if helped else 2)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            problems = {1: "gave wrong results", 2: "worked alone", -signal.SIGALRM: "hung"}
            assert status == 0, f"the child {problems.get(status, f'ended with {status}')}"
            assert all(torch.equal(call(), y) for call, y in jobs)
    stop.set()
    other.join()


# --- the edges of buffers -------------------------------------------------------------------------

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory between two pages that no one may touch."""

    def __init__(self, size):
        pages = -(-size // PAGE)
        self.map = mmap.mmap(-1, (pages + 2) * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.begin, self.end = first + PAGE, first + (pages + 1) * PAGE
        for guard in (first, self.end):
            assert LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0

    def tensor(self, shape, dtype, at_end):
        """Uninitialised: its last byte is the last of the memory, or its first is the first."""
        size = shape.numel() * dtype.itemsize
        memory = (ctypes.c_uint8 * size).from_address(self.end - size if at_end else self.begin)
        memory.owner = self.map
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class Edges:
    """Places tensors at an edge of their memory, and has torch make its empty ones there."""

    def __init__(self, at_end):
        self.at_end = at_end
        self.given = set()

    def empty(self, shape, *, dtype=torch.float32, **_):
        shape = torch.Size(shape)
        if not shape.numel():
            return torch.zeros(shape, dtype=dtype)
        tensor = Guarded(shape.numel() * dtype.itemsize).tensor(shape, dtype, self.at_end)
        self.given.add(tensor.data_ptr())
        return tensor

    def place(self, tensor):
        return (
            None if tensor is None else self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        )

    def place_weight(self, weight):
        parts = {name: getattr(weight, name) for name in ("packed", "scale", "zero_point")}
        return dataclasses.replace(weight, **{n: self.place(p) for n, p in parts.items()})

    def call(self, function, *arguments):
        """function(*arguments), whose result must lie at an edge."""
        new_empty = lambda tensor, *shape: self.empty(shape, dtype=tensor.dtype)  # noqa: E731
        with (
            mock.patch.object(torch, "empty", self.empty),
            mock.patch.object(torch, "empty_like", lambda x: self.empty(x.shape, dtype=x.dtype)),
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
        ):
            result = function(*arguments)
        parts = result.parts.values() if isinstance(result, QTensor) else [result]
        assert all(part.data_ptr() in self.given for part in parts)
        return result


EDGE_SHAPES = [
    *((n, k, None) for n, k in ((3, 1), (3, 33), (2, 100), (5, 127), (3, 577))),
    *((3, 32, 32), (3, 96, 96), (3, 96, 32), (7, 128, 128), (2, 384, 128)),
]


def edge_weights():
    for name, symmetric in FORMATS_AND_SIGNS:
        for i, (n, k, group_size) in enumerate(EDGE_SHAPES):
            scale_dtype = ("float32", "float16", "bfloat16")[i % 3]
            if (
                group_size is not None
                and get_format(name).scale_dtype == "float8_e8m0fnu"
                and i % 2
            ):
                scale_dtype = "float8_e8m0fnu"
            for activations in (None, "int8"):
                scheme = scheme_of(name, symmetric, group_size, scale_dtype, activations)
                yield by_torch(noise(n, k), scheme)


def _at_edges(isa, at_end):
    native.use_instruction_set(isa)
    torch.set_num_threads(2)
    return Edges(at_end), "end" if at_end else "begin"


def _linear_at_edges(step, isa, at_end):
    edges, where = _at_edges(isa, at_end)
    for i, weight in enumerate(edge_weights()):
        n, k = weight.shape
        placed = edges.place_weight(weight)
        for j, m in enumerate(((1, 4, 35), (2, 7, 16), (1, 12, 65))[i % 3]):
            dtype, bias_dtype = DTYPES[(i + j) % 3], DTYPES[(i + j // 3) % 3]
            step(f"{weight.scheme}, N={n}, K={k}, M={m}, {dtype}, bias {bias_dtype}, at {where}")
            x, bias = noise(m, k).to(dtype), noise(n).to(bias_dtype)
            row = k + 3 * (j % 2)  # rows that follow each other, or with 3 values between them
            memory = edges.empty(((m - 1) * row + k,), dtype=dtype)
            edge_x = memory.as_strided((m, k), (row, 1)).copy_(x)
            y = edges.call(native.linear, edge_x, placed, edges.place(bias))
            assert torch.equal(y, native.linear(x, weight, bias))


def _rows_at_edges(step, isa, at_end):
    edges, where = _at_edges(isa, at_end)
    for i, weight in enumerate(edge_weights()):
        step(f"{weight.scheme}, {tuple(weight.shape)}, at {where}")
        indices = torch.tensor([weight.shape[0] - 1, 0, 1])
        dtype = DTYPES[i % 3]
        for which in (indices, None):
            y = edges.call(native.rows, edges.place_weight(weight), edges.place(which), dtype)
            assert torch.equal(y, native.rows(weight, which, dtype))


def _quantize_at_edges(step, isa, at_end):
    edges, where = _at_edges(isa, at_end)
    for name, symmetric in QUANTIZED:
        for i, (n, k, group_size) in enumerate([*EDGE_SHAPES, (3, 90, 9), (3, 65, 1)]):
            scheme = scheme_of(name, symmetric, group_size, ("float32", "float16")[i % 2])
            weight = noise(n, k).to(DTYPES[i % 3])
            step(f"{scheme}, N={n}, K={k}, {weight.dtype}, at {where}")
            found = edges.call(native.quantize, edges.place(weight), scheme)
            assert_same(found, by_torch(weight, scheme))


def _between_at_edges(step, isa, at_end):
    edges, where = _at_edges(isa, at_end)
    for dtype in DTYPES:
        for rows, k in ((1, 1), (3, 15), (2, 64), (5, 577), (70, 577)):
            step(f"{dtype}, {rows} x {k}, at {where}")
            x, w, up = noise(rows, k).to(dtype), noise(k).to(dtype), noise(rows, k).to(dtype)
            norm = partial(native.rms_norm, eps=1e-5, shift=1.0, rounds_first=False)
            assert torch.equal(edges.call(norm, edges.place(x), edges.place(w)), norm(x, w))
            gate = partial(native.gated, activation="silu")
            assert torch.equal(edges.call(gate, edges.place(x), edges.place(up)), gate(x, up))
        for sizes in ATTENTIONS:
            step(f"{dtype}, attention of {sizes}, at {where}")
            q, keys, values = (x.contiguous() for x in heads_and_cache(sizes, dtype))
            attend = partial(native.attend, scale=0.125)
            if (expected := attend(q, keys, values)) is not None:
                placed = map(edges.place, (q, keys, values))
                assert torch.equal(edges.call(attend, *placed), expected)
            batch, tokens, _, heads, kv_heads, width = sizes
            cos, sin = noise(2, 1, tokens, width).to(dtype)
            q, k = noise(batch, tokens, heads, width), noise(batch, tokens, kv_heads, width)
            x = (q.to(dtype), k.to(dtype), k.to(dtype), cos, sin)
            memory = [torch.empty(batch, kv_heads, tokens, width, dtype=dtype) for _ in range(2)]
            expected, new = native.rotate(*x, *memory), [edges.place(m) for m in memory]
            y = edges.call(native.rotate, *map(edges.place, x), *new)
            assert torch.equal(y, expected)
            assert all(map(torch.equal, new, memory))


@needs_library
@every_isa
@pytest.mark.parametrize(
    "function", [_linear_at_edges, _rows_at_edges, _quantize_at_edges, _between_at_edges]
)
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_nothing_is_touched_outside_of_a_buffer(function, at_end, isa):
    in_child(function, isa, at_end)


def _one_byte_outside(step, at_end, write):
    memory = Guarded(3)
    tensor = memory.tensor(torch.Size([3]), torch.uint8, at_end).fill_(7)
    address = tensor.data_ptr()
    for i in range(3):  # inside
        assert ctypes.string_at(address + i, 1) == b"\7"
    outside = address + 3 if at_end else address - 1
    step("inside")
    if write:
        ctypes.memset(outside, 0, 1)
    else:
        ctypes.string_at(outside, 1)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_one_byte_outside_of_a_buffer_is_noticed(at_end, write):
    with pytest.raises(AssertionError, match=rf"died \(-{int(signal.SIGSEGV)}\) after: inside"):
        in_child(_one_byte_outside, at_end, write)


def _linear_with_a_short_buffer(step, short):
    """One value, row or byte less than the shapes say."""
    edges = Edges(at_end=True)
    weight = by_torch(noise(3, 34), scheme_of("int8", False))
    x, bias, new_empty = noise(2, 34), noise(3), torch.Tensor.new_empty
    if short == "x":
        x = edges.place(noise(2, 40))[:, -33:]  # of values without gaps, whole rows are read
    elif short == "bias":
        bias = edges.place(bias[:2])
    elif short == "y":
        new_empty = lambda x, *shape: edges.empty((2, 2), dtype=x.dtype)  # noqa: E731
    else:
        part = edges.place(getattr(weight, short)[:-1])
        weight = dataclasses.replace(weight, **{short: part})
    step("ready")
    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        native.linear(x, weight, bias)


@needs_library
@pytest.mark.parametrize("short", ["packed", "scale", "zero_point", "x", "bias", "y"])
def test_a_kernel_that_passes_the_end_of_any_buffer_is_noticed(short):
    with pytest.raises(AssertionError, match=rf"died \(-{int(signal.SIGSEGV)}\) after: ready"):
        in_child(_linear_with_a_short_buffer, short)
