"""The native CPU kernels, under every instruction set that works here, against the oracle."""

import dataclasses
from functools import lru_cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import (
    FORMATS,
    INTEGERS,
    OF_ONE,
    PROPERTY,
    assert_embedding,
    assert_linear,
    corruptions,
    in_child,
    instruction_set,
    instruction_sets,
    integer_bound,
    rtn,
    summing_bound,
    threads,
)
from zeropoint import native
from zeropoint.kernels import native as kernel
from zeropoint.kernels import ops, reference, select
from zeropoint.kernels.spec import Spec
from zeropoint.qtensor import QTensor, quantized
from zeropoint.scheme import Scheme

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("int4", "int3", "int8", "nf4", "float8_e4m3fn", "float8_e5m2", "bfloat16")
FORMATS_AND_SIGNS = OF_ONE + [("bfloat16", True), ("float16", True)]


every_isa = pytest.mark.parametrize("isa", instruction_sets(), indirect=True)


@pytest.fixture
def isa(request):
    with instruction_set(request.param):
        yield request.param


# --- cases ----------------------------------------------------------------------------------------

# Below, at and above: a vector, a chunk of codes, a block of activations (128), a panel (512) and a
# stretch (1024) of columns; rows that do and do not fill a tile of 4 or 6.
SHAPES = {
    ("tensor", None): [(5, 31), (17, 577)],
    ("channel", None): [(1, 1), (5, 7), (17, 31), (3, 33), (16, 100), (33, 127), (7, 577)],
    ("group", 32): [(5, 32), (17, 96), (3, 352)],
    ("group", 64): [(5, 64), (7, 192)],
    ("group", 96): [(17, 96), (3, 288)],
    ("group", 128): [(9, 128), (5, 640)],
    ("group", 384): [(6, 384), (3, 1152)],
}
BATCHES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 33, 65, 130)  # below and above what is multiplied as tiles


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(name, symmetric=True, granularity="channel", group_size=None, **fields):
    if FORMATS[name].kind == "downcast":
        granularity, group_size = "channel", None
    return Scheme(
        format=name, granularity=granularity, group_size=group_size, symmetric=symmetric, **fields
    )


@lru_cache(maxsize=64)
def weight_of(scheme, n, k) -> QTensor:
    """Small, so that outliers in x stay inside float16; one outlier, a zero row, a negative row."""
    weight = noise(n, k, seed=n * k) / 50
    weight[0, k // 2] = 0.7
    weight[1 % n] = 0.0
    weight[2 % n] = -weight[2 % n].abs()
    return QTensor.from_codes(quantized(weight, scheme), scheme, torch.float32)


@lru_cache(maxsize=64)
def tokens(m, k, dtype) -> torch.Tensor:
    """(m, k), kinds of tokens in turn: as they are, zero, negative, with an outlier, denormal,
    huge, of every magnitude.
    """
    wide = dtype != torch.float16
    x = noise(m, k, seed=m + k)
    x[1::7] = 0
    x[2::7] = -x[2::7].abs()
    x[3::7, k // 3] = 1e4
    x[4::7] *= 1e-40 if wide else 1e-6
    x[5::7] *= 1e30 if wide else 1e2
    x[6::7] *= 10.0 ** (noise(1, k, seed=1) * (3 if wide else 0.5))
    return x.to(dtype)


def in_batches(weight, x, bias):
    """The rows of x multiplied in batches of BATCHES."""
    return torch.cat([kernel.linear(part, weight, bias) for part in x.split(BATCHES)])


def weights(name, symmetric, activations=None, **fields):
    scale_dtypes = ("float16", "bfloat16", "float32")
    for (granularity, group_size), shapes in SHAPES.items():
        for i, (n, k) in enumerate(shapes):
            scale_dtype = scale_dtypes[i % 3] if granularity == "group" else "float32"
            own = FORMATS[name].scale_dtype
            if granularity == "group" and i % 2 == 0 and own == "float8_e8m0fnu":
                scale_dtype = own
            scheme = scheme_of(
                name,
                symmetric,
                granularity,
                group_size,
                scale_dtype=scale_dtype,
                double_quant=scale_dtype == "float32"
                and granularity == "group"
                and FORMATS[name].kind == "codebook"
                and not FORMATS[name].double_quant,
                activations=activations,
                **fields,
            )
            yield weight_of(scheme, n, k)


# --- values ---------------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize(("name", "symmetric"), FORMATS_AND_SIGNS)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_every_format_shape_and_batch_matches_the_oracle(name, symmetric, activations, isa):
    bias_dtypes = (None, *DTYPES)
    for i, weight in enumerate(weights(name, symmetric, activations)):
        n, k = weight.shape
        for j, dtype in enumerate((torch.float32, DTYPES[1 + i % 2])):
            x = tokens(sum(BATCHES), k, dtype)
            bias_dtype = bias_dtypes[(i + j) % 4]
            bias = None if bias_dtype is None else noise(n, seed=i).to(bias_dtype)
            assert_linear(in_batches(weight, x, bias), x, weight, bias, "native")


# Beyond what fits in a cache or in registers at once: columns of a pass (AMX: 4096 for few tokens,
# 576 or 1152 for many), rows of a panel (256), tokens kept with it (512), scales of a vector (16)
# and of a block that is quantized again (256). N, K, tokens.
DEEP = ((40, 1632, 3), (40, 4416, 5), (35, 8256, 40), (33, 1632, 150), (289, 832, 530))


@every_isa
@pytest.mark.parametrize(
    "scheme",
    [
        scheme_of("int4", False, "group", 32),
        scheme_of("int5", True, "group", 96),
        scheme_of("int6", False, "group", 32),
        scheme_of("int8", False),
        scheme_of("int8", activations="int8"),
        scheme_of("int4", activations="int8"),
        scheme_of("nf4", granularity="group", group_size=32),
        scheme_of("nf4", granularity="group", group_size=32, double_quant=True),
        scheme_of("nf4", granularity="group", group_size=32, scale_dtype="bfloat16"),
        scheme_of("mxfp4", granularity="group", group_size=32, scale_dtype="float8_e8m0fnu"),
        scheme_of("float8_e5m2"),
        scheme_of("mxfp8_e4m3", granularity="group", group_size=32, scale_dtype="float8_e8m0fnu"),
        scheme_of("bfloat16"),
        scheme_of("float16"),
    ],
    ids=str,
)
def test_jobs_of_several_passes_match_the_oracle(scheme, isa):
    for n, k, m in DEEP:
        if scheme.group_size is None or k % scheme.group_size == 0:
            weight, x = weight_of(scheme, n, k), tokens(m, k, torch.bfloat16)
            assert_linear(kernel.linear(x, weight, None), x, weight, None, "native")


@every_isa
@pytest.mark.parametrize("exponent", [-127, -118, -117, -40, 100])
def test_mx_scales_at_the_ends_of_their_range_match_the_oracle(exponent, isa):
    scheme = scheme_of(
        "mxfp8_e5m2", granularity="group", group_size=32, scale_dtype="float8_e8m0fnu"
    )
    weight = weight_of(scheme, 5, 96)
    scale = torch.full_like(weight.scale, exponent + 127, dtype=torch.uint8)
    weight = dataclasses.replace(weight, scale=scale.view(torch.float8_e8m0fnu))
    for m in (1, 4, 17, 33):
        x = (noise(m, 96) * 2.0 ** (-exponent // 2)).bfloat16()
        assert_linear(kernel.linear(x, weight, None), x, weight, None, "native")


@every_isa
@pytest.mark.parametrize("name", [f.name for f in INTEGERS])
def test_float_zero_points_of_every_shape_and_batch_match_the_oracle(name, isa):
    for i, weight in enumerate(weights(name, False, float_zero_point=True)):
        n, k = weight.shape
        x = tokens(sum(BATCHES), k, DTYPES[i % 3])
        assert_linear(in_batches(weight, x, None), x, weight, None, "native")
        indices = torch.arange(n).flip(0)
        rows = kernel.embedding(indices, weight, torch.float32)
        # What is subtracted from a stored code, 2^(bits-1) + zero_point, is rounded to float32.
        offset = 2.0**weight.scheme.fmt.bits + weight.zero_point.double().abs()
        slack = 2.0**-24 * (weight.scale.double() * offset).repeat_interleave(
            k // offset.shape[1], dim=1
        )
        expected = reference.weight_values(weight)
        distance = (rows.flip(0).double() - expected).abs()
        assert (distance <= slack + 2.0**-23 * expected.abs()).all()


@every_isa
@pytest.mark.parametrize("name", [f.name for f in INTEGERS if f.signed_scale])
def test_negative_scales_match_the_oracle(name, isa):
    for i, weight in enumerate(weights(name, True)):
        scale = weight.scale.clone()
        scale.view(-1)[::2] *= -1
        weight = dataclasses.replace(weight, scale=scale)
        x = tokens(sum(BATCHES), weight.shape[1], DTYPES[i % 3])
        assert_linear(in_batches(weight, x, None), x, weight, None, "native")


@needs_library
@PROPERTY
@given(
    grid=st.sampled_from(FORMATS_AND_SIGNS),
    n=st.integers(1, 20),
    k=st.integers(1, 300),
    m=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    activations=st.sampled_from([None, "int8"]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 99),
)
def test_any_shape_and_magnitude_matches_the_oracle(
    grid, n, k, m, dtype, activations, exponent, seed
):
    """Where x is float16 only magnitudes that leave y inside it."""
    scheme = scheme_of(*grid, activations=activations)
    weight = rtn(noise(n, k, seed=seed), scheme)
    factor = 10.0 ** (exponent if dtype != torch.float16 else exponent / 30)
    x = (noise(m, k, seed=seed + 1) * factor).to(dtype)
    bias = noise(n, seed=seed)
    for name in usable():
        with instruction_set(name):
            assert_linear(kernel.linear(x, weight, bias), x, weight, bias, "native")


def usable():
    return [name for name, why in native.instruction_sets().items() if why is None]


@every_isa
@pytest.mark.parametrize("name", KINDS)
def test_a_token_that_is_not_finite_gives_no_finite_output_and_leaves_the_others(name, isa):
    for k, columns in ((96, (0, 40, 95)), (577, (0, 300, 576))):
        weight = weight_of(scheme_of(name), 5, k)
        for m, dtype in product((1, 2, 5, 33), (torch.float32, torch.bfloat16)):
            for i, column in enumerate(columns):
                at = (3 * i) % m
                clean = noise(m, k).to(dtype)
                clean[at] = 0
                expected = kernel.linear(clean, weight, None)
                for value in (torch.nan, torch.inf, -torch.inf):
                    x = clean.clone()
                    x[at] = noise(k, seed=2).to(dtype)
                    x[at, column] = value
                    y = kernel.linear(x, weight, None)
                    assert not y[at].isfinite().any()
                    y[at] = expected[at]
                    assert torch.equal(y, expected)


@every_isa
@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "float8_e4m3fn"])
def test_an_int8_token_that_is_not_finite_becomes_nan(name, isa):
    weight = weight_of(scheme_of(name, activations="int8"), 5, 200)
    for m in (1, 5, 33):
        x = noise(m, 200)
        x[m - 1, 150] = torch.inf
        y = kernel.linear(x, weight, None)
        assert y[m - 1].isnan().all() and y[: m - 1].isfinite().all()


@every_isa
@pytest.mark.parametrize("activations", [None, "int8"])
def test_tokens_near_both_ends_of_float32_are_numbers_like_others(activations, isa):
    """A token of 1e-36, still normal, is not 0; at the other end a token's sum times 2^(bits + 2)
    must be a float32 too (docs/kernels.md).
    """
    for name, granularity in (("int4", "channel"), ("int8", "channel"), ("nf4", "channel")):
        small = scheme_of(name, True, granularity, activations=activations)
        weight = rtn(noise(5, 100) * 1e-3, small)
        top = torch.finfo(torch.float32).max / (4 * 256 * 100)
        for magnitude in (top, 1e-34, 1e-35, 1e-36, 1e-37):
            for m in (1, 13):
                x = noise(m, 100).sign() * magnitude
                assert_linear(kernel.linear(x, weight, None), x, weight, None, "native")


@every_isa
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_a_float8_code_that_is_nan_makes_its_row_nan(name, isa):
    weight = weight_of(scheme_of(name), 5, 100)
    for code in (0x7F, 0xFF):
        for column in (0, 50, 99):
            packed = weight.packed.clone()
            packed[2 * 100 + column] = code
            wrong = dataclasses.replace(weight, packed=packed)
            for m, dtype in product((1, 3, 20), DTYPES):
                y = kernel.linear(noise(m, 100).to(dtype), wrong, None)
                assert y[:, 2].isnan().all() and y[:, [0, 1, 3, 4]].isfinite().all()
            rows = kernel.embedding(torch.tensor([2, 3]), wrong, torch.bfloat16)
            assert rows.isnan().nonzero().tolist() == [[0, column]]


@every_isa
@pytest.mark.parametrize("name", ["int4", "int5", "nf4", "float8_e4m3fn"])
def test_any_layout_of_x_gives_what_its_copy_gives(name, isa):
    k = 96
    weight = weight_of(scheme_of(name, granularity="group", group_size=32), 5, k)
    bias = noise(5, 3)[:, 1]  # strided
    wide = noise(30, 3 * k)
    for dtype in DTYPES:
        x = wide.to(dtype)
        for m in (3, 15):
            for layout in (
                x[:m, :k],
                x[::2][:m, 7 : 7 + k],  # rows that start anywhere
                x[:m, ::3],
                noise(k, m).to(dtype).t(),
                x[:1, :k].expand(m, k),
                x[0].as_strided((m, k), (1, 1)),  # rows that overlap
                x[:4, : 2 * k].view(4, 2, k)[:m],
                x[:m, : 3 * k].view(m, 3, k).transpose(0, 1),
                x[m, :k],
            ):
                y = kernel.linear(layout, weight, bias)
                assert y.shape == (*layout.shape[:-1], 5)
                copy = layout.reshape(-1, k).clone()
                assert torch.equal(y.view(-1, 5), kernel.linear(copy, weight, bias.clone()))
        for empty in (x[:0, :k], x[:0, :k].view(0, 3, k), x[:0, : 2 * k].view(2, 0, k)):
            assert kernel.linear(empty, weight, None).shape == (*empty.shape[:-1], 5)


@every_isa
def test_parts_of_any_layout_are_read_as_they_are(isa):
    """A slice of a longer checkpoint tensor, assigned as a part."""
    weight = weight_of(scheme_of("int4", False, "group", 32), 4, 128)
    x = noise(3, 128)
    for part in ("packed", "scale", "zero_point"):
        whole = getattr(weight, part)
        apart = torch.stack([whole, torch.ones_like(whole)], dim=-1)[..., 0]
        assert not apart.is_contiguous()
        other = dataclasses.replace(weight, **{part: apart})
        assert_linear(ops.linear(x, other, None, "native"), x, weight, None, "native")
        indices = torch.tensor([3, 0])
        y = ops.embedding(indices, other, torch.float32, "native")
        assert_embedding(y, indices, weight, torch.float32)
    scheme = scheme_of("bfloat16")
    transposed = noise(100, 4).bfloat16().t()
    weight = QTensor(
        packed=transposed,
        scale=None,
        zero_point=None,
        scheme=scheme,
        shape=transposed.shape,
        dtype=torch.float32,
    )
    x = noise(3, 100)
    assert_linear(ops.linear(x, weight, None, "native"), x, weight, None, "native")


@every_isa
@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "bfloat16"])
def test_more_tokens_than_are_prepared_at_once(name, isa):
    weight = weight_of(scheme_of(name), 5, 33)
    x = tokens(2 * 1024 + 3, 33, torch.float32)
    assert_linear(kernel.linear(x, weight, None), x, weight, None, "native")


@every_isa
@pytest.mark.parametrize(("name", "symmetric"), [("int8", True), ("int4", False), ("int3", True)])
@pytest.mark.parametrize("k", [32768, 32769, 40000])
def test_int8_tokens_longer_than_32_bit_sums_hold(name, symmetric, k, isa):
    """Sums of 255 * 127 pass 2^31 after 66311 columns."""
    weight = weight_of(scheme_of(name, symmetric, activations="int8"), 3, k)
    for m in (1, 2, 13):
        x = noise(m, k)
        x[0] = 1  # every product is as large as it can be
        assert_linear(kernel.linear(x, weight, None), x, weight, None, "native")


@every_isa
def test_the_largest_products_do_not_overflow(isa):
    """Codes and activations all at an end of their range, over whole blocks."""
    for k in (128, 577, 66400):
        for sign in (1, -1):
            for activations in (None, "int8"):
                scheme = scheme_of("int8", activations=activations)
                values = torch.full((2, k), float(sign))
                values[:, 0] /= 2  # or codes would be 1
                weight = rtn(values, scheme)
                assert weight.codes.abs().max() == 127
                for m in (1, 13):
                    x = torch.full((m, k), 3.0)
                    assert_linear(kernel.linear(x, weight, None), x, weight, None, "native")


@every_isa
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_the_longest_rows_fit_a_threads_stack(name, isa):
    weight = weight_of(scheme_of(name), 1, native.MOST_COLUMNS)
    x = noise(1, native.MOST_COLUMNS)
    for m in (1, 13):
        y = kernel.linear(x.expand(m, -1), weight, None)
        assert_linear(y[:1], x, weight, None, "native")
        assert torch.equal(y, y[:1].expand(m, -1))


@needs_library
@pytest.mark.parametrize("activations", [None, "int8"])
def test_instruction_sets_differ_in_the_order_of_sums_only(activations):
    """Activations become the same integers under each; those of a codebook up to as many tokens as
    each is faster with. Tiles take many float tokens for sums of two bfloat16: below the bound.
    """
    for name, symmetric in FORMATS_AND_SIGNS:
        weight = weight_of(scheme_of(name, symmetric, activations=activations), 9, 577)
        for m in (1, 4, 33):
            x = noise(m, 577)
            found = []
            for isa in usable():
                with instruction_set(isa):
                    found.append(kernel.linear(x, weight, None).double())
            bound = 2 * summing_bound(1.01 * x, weight)  # 1.01: the integers are not x itself
            if weight.scheme.fmt.kind == "codebook":
                real = reference.weight_values(weight)
                bound = bound + integer_bound(x.double(), weight, real, activations == "int8")
            for y in found[1:]:
                assert ((y - found[0]).abs() <= bound).all(), (name, m)


@every_isa
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_the_number_of_threads_changes_no_bit(name, activations, isa):
    """801 rows are cut into as many pieces as there are threads, and more."""
    weight = weight_of(scheme_of(name, activations=activations), 801, 256)
    for m in (1, 3, 13, 70):
        x = noise(m, 256)
        with threads(1):
            alone = kernel.linear(x, weight, None)
        for count in (2, 3, 1, 16, 20, 2):  # of more than 16, some share a stretch of the rows
            with threads(count):
                assert torch.equal(kernel.linear(x, weight, None), alone), (m, count)
    assert_linear(alone, x, weight, None, "native")


@every_isa
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("m", [511, 512, 769, 1030])
def test_tokens_in_pieces_are_what_they_are_alone(m, activations, isa):
    """Fewer rows than tokens: each thread prepares a piece of the tokens."""
    for name, dtype in (("int4", torch.bfloat16), ("int8", torch.float32), ("nf4", torch.float16)):
        weight = weight_of(scheme_of(name, activations=activations), 65, 192)
        x, bias = noise(m, 200).to(dtype)[:, :192], noise(65).to(dtype)
        with threads(1):
            alone = kernel.linear(x, weight, bias)
        assert_linear(alone, x, weight, bias, "native")
        for count in (2, 3, 16):
            with threads(count):
                assert torch.equal(kernel.linear(x, weight, bias), alone), (name, count)


# --- contract with torch --------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "bfloat16"])
def test_operators_keep_the_contract(name):
    scheme = scheme_of(name, activations="int8" if name == "int8" else None)
    weight = ops.weight_arguments(weight_of(scheme, 5, 100))
    x, bias = noise(3, 100).requires_grad_(), noise(5).requires_grad_()
    torch.library.opcheck(torch.ops.zeropoint.linear, (x, bias, *weight, "native"))
    strided = noise(100, 4).to(torch.bfloat16).t()
    torch.library.opcheck(torch.ops.zeropoint.linear, (strided, None, *weight, "native"))
    indices = torch.tensor([[1, 4], [0, 0]], dtype=torch.int32)
    arguments = (indices, *weight, torch.bfloat16, "native")
    torch.library.opcheck(torch.ops.zeropoint.embedding, arguments)


@needs_library
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_gradients_are_those_of_the_dense_product(name, activations):
    """Int8 activations pass the gradient straight through."""
    weight = weight_of(scheme_of(name, activations=activations), 5, 100)
    x, bias = noise(2, 3, 100).requires_grad_(), noise(5).requires_grad_()
    upstream = noise(2, 3, 5, seed=2)
    ops.linear(x, weight, bias, "native").backward(upstream)
    dense = weight.dequantize().double()
    eps = torch.finfo(torch.float32).eps
    bound = 2 * 5 * eps * (upstream.double().abs() @ dense.abs())
    assert ((x.grad - upstream.double() @ dense).abs() <= bound).all()
    terms = upstream.double().view(-1, 5)
    assert ((bias.grad - terms.sum(0)).abs() <= 2 * 6 * eps * terms.abs().sum(0)).all()


@needs_library
def test_float64_is_left_to_torch():
    weight = weight_of(scheme_of("int4"), 5, 100)
    x = noise(3, 100).double()
    y = ops.linear(x, weight, None, "native")
    assert torch.equal(y, ops.linear(x, weight, None, "torch")) and y.dtype == torch.float64
    rows = ops.embedding(torch.tensor([1, 2]), weight, torch.float64, "native")
    assert torch.equal(rows, weight.dequantize(torch.float64)[1:3])


@needs_library
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_a_weight_without_rows_or_columns(shape):
    """nn.Linear has such sizes: no output, or the bias alone."""
    in_child(_multiply_an_empty_weight, shape)


def _multiply_an_empty_weight(step, shape):
    weight = rtn(torch.ones(shape), scheme_of("bfloat16"))
    bias = torch.arange(float(shape[0]))
    spec = Spec(op="linear", scheme=weight.scheme, shape=shape, device="cpu")
    chosen = select.choose(spec).kernel
    for x in (torch.ones(3, shape[1]), torch.ones(2, 3, shape[1]), torch.ones(200, shape[1])):
        step(f"x {tuple(x.shape)}")
        y = ops.linear(x, weight, bias, chosen)
        assert torch.equal(y, bias.expand(*x.shape[:-1], -1))


@needs_library
def test_a_bias_of_another_dtype_than_the_kernels_is_refused():
    weight = weight_of(scheme_of("int4"), 5, 100)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(RuntimeError, match="bias|dtype"):
            ops.linear(noise(3, 100), weight, torch.ones(5, dtype=dtype), "native")


@needs_library
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no other device")
def test_tensors_on_another_device_are_refused():
    in_child(_mix_devices)


def _mix_devices(step):
    weight = weight_of(scheme_of("int4"), 5, 100)
    x, bias, indices = noise(3, 100), noise(5), torch.tensor([1])
    for what, call in (
        ("x", lambda: ops.linear(x.cuda(), weight, None, "native")),
        ("bias", lambda: ops.linear(x, weight, bias.cuda(), "native")),
        ("indices", lambda: ops.embedding(indices.cuda(), weight, torch.float32, "native")),
    ):
        step(f"{what} on a GPU, the weight on the CPU")
        with pytest.raises(RuntimeError, match="device"):
            call()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "it runs on the CPU, the weight is on cuda"),
        ({"scheme": scheme_of("int4", True, "group", 48)}, "group_size=48 is not a multiple of 32"),
        ({"shape": (8, (1 << 18) + 1)}, "K=262145 is more than 262144"),
    ],
)
def test_why_not_names_what_the_kernel_cannot_do(change, reason):
    spec = Spec(op="linear", scheme=scheme_of("int4"), shape=(8, 96), device="cpu")
    choice = select.choose(dataclasses.replace(spec, **change))
    assert (choice.kernel, choice.refused["native"]) == ("torch", reason)


def test_without_the_library_its_reason_is_quoted_and_torch_is_used(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: "it was not built")
    spec = Spec(op="linear", scheme=scheme_of("int4"), shape=(8, 96), device="cpu")
    assert select.choose(spec) == select.Choice(
        kernel="torch", refused={"native": "it was not built"}
    )


@needs_library
@pytest.mark.parametrize("scheme", [scheme_of(n, s) for n, s in FORMATS_AND_SIGNS], ids=str)
@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_it_is_the_first_choice_for_every_format(scheme, op, monkeypatch):
    monkeypatch.delenv("ZEROPOINT_KERNEL", raising=False)
    spec = Spec(op=op, scheme=scheme, shape=(8, 96), device="cpu")
    assert select.choose(spec) == select.Choice(kernel="native", refused={})


@needs_library
def test_vectors_are_left_to_torch_with_the_reason(monkeypatch):
    monkeypatch.delenv("ZEROPOINT_KERNEL", raising=False)
    spec = Spec(op="linear", scheme=Scheme.of("e8p"), shape=(8, 128), device="cpu")
    refused = {"native": "e8p has codes for 8 values together"}
    assert select.choose(spec) == select.Choice(kernel="torch", refused=refused)


# --- the checker can fail -------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_the_product_is_rejected(name, activations, dtype):
    scheme = scheme_of(name, granularity="group", group_size=32, activations=activations)
    weight = rtn(noise(4, 128, seed=1), scheme)
    x, bias = noise(3, 128).to(dtype), noise(4).to(dtype)
    y = kernel.linear(x, weight, bias)
    assert_linear(y, x, weight, bias, "native")
    if weight.scale is None:
        packed = weight.packed.clone()
        packed[2, :32] = 0
        lost = dataclasses.replace(weight, packed=packed)
    else:
        scale = weight.scale.clone()
        scale[2, 0] = 0
        lost = dataclasses.replace(weight, scale=scale)
    for what, wrong in (
        *corruptions(y, kernel.linear(x, lost, bias)),
        ("bias left out", kernel.linear(x, weight, None)),
        (
            "one column left out",
            kernel.linear(x.clone().index_fill_(1, torch.tensor(5), 0), weight, bias),
        ),
    ):
        with pytest.raises(AssertionError, match="are further than rounding"):
            assert_linear(wrong, x, weight, bias, "native")
            pytest.fail(what)


@needs_library
def test_int8_activations_and_exact_ones_are_told_apart():
    exact, rounded = (
        weight_of(scheme_of("int8", activations=activations), 4, 128)
        for activations in (None, "int8")
    )
    x = noise(3, 128)
    for right, wrong in ((exact, rounded), (rounded, exact)):
        y = reference.linear(x, right, None)
        assert_linear(y, x, right, None, "native")
        with pytest.raises(AssertionError, match="are further than rounding"):
            assert_linear(y, x, wrong, None, "native")
