"""The operators' contract, for every kernel, against the float64 oracle."""

import dataclasses

import pytest
import torch

from tests.helpers import (
    assert_embedding,
    assert_linear,
    by_threes,
    defaults,
    example_weight,
    rtn,
    schemes,
)
from zeropoint.errors import NonFiniteError, UnknownNameError, ZeropointError
from zeropoint.kernels import ops
from zeropoint.kernels.select import KERNELS
from zeropoint.kernels.spec import Spec
from zeropoint.numerics import Grid
from zeropoint.scheme import Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)
every_default = pytest.mark.parametrize("scheme", defaults(), ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# One format of each kind for what costs seconds.
KINDS = [Scheme.of(name) for name in ("int4", "nf4", "float8_e4m3fn", "bfloat16")]


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def skip_if_refused(kernel, op, scheme, shape):
    reason = KERNELS[kernel].why_not(Spec(op=op, scheme=scheme, shape=shape, device="cpu"))
    if reason is not None and kernel != "reference":
        pytest.skip(reason)


def inputs(k, dtype):
    """x of every layout, contiguous or not, with an outlier and a zero token."""
    batch = noise(7, k, dtype=dtype)
    batch[3] = 0
    batch[4, 2] = 100.0
    return {
        "M=1": batch[:1],
        "M=7": batch,
        "1-D": batch[5],
        "3-D": noise(2, 3, k, dtype=dtype),
        "no token": batch[:0],
        "transposed": noise(k, 3, dtype=dtype).t(),
        "strided": noise(4, 2 * k, dtype=dtype)[::2, ::2],
        "3-D transposed": noise(2, k, 3, dtype=dtype).mT,
        "expanded": batch[:1].expand(3, k),
    }


# --- values ---------------------------------------------------------------------------------------


@every_kernel
@every_scheme
def test_linear_matches_the_oracle_on_every_layout_of_x(kernel, scheme):
    weight = rtn(example_weight(5, 96), scheme)
    skip_if_refused(kernel, "linear", scheme, (5, 96))
    for dtype in DTYPES:
        bias = noise(5, dtype=dtype, seed=1)
        for layout, x in inputs(96, dtype).items():
            for b in (None, bias) if layout in ("M=1", "M=7") else (bias,):
                y = ops.linear(x, weight, b, kernel)
                assert y.shape == (*x.shape[:-1], 5), layout
                assert_linear(y, x, weight, b, kernel)


@every_kernel
@pytest.mark.parametrize("scheme", by_threes(), ids=str)
def test_linear_matches_the_oracle_on_odd_shapes(kernel, scheme):
    for n, k in [(1, 3), (3, 9), (17, 39), (2, 129)]:
        k *= scheme.fmt.width
        skip_if_refused(kernel, "linear", scheme, (n, k))
        weight = rtn(example_weight(n, k), scheme)
        for m in (1, 5):
            x = noise(m, k)
            assert_linear(ops.linear(x, weight, None, kernel), x, weight, None, kernel)


@every_kernel
@every_scheme
def test_embedding_matches_the_oracle(kernel, scheme):
    skip_if_refused(kernel, "embedding", scheme, (5, 96))
    weight = rtn(example_weight(5, 96), scheme)
    for dtype in DTYPES:
        for rows in (2, [4, 0, 0, 1], [[2], [3]], [[[1]]]):
            indices = torch.tensor(rows)
            y = ops.embedding(indices, weight, dtype, kernel)
            assert y.shape == (*indices.shape, 96)
            assert_embedding(y, indices, weight, dtype)


@every_kernel
@every_default
def test_embedding_of_no_index_has_no_row(kernel, scheme):
    skip_if_refused(kernel, "embedding", scheme, (5, 64))
    weight = rtn(example_weight(5, 64), scheme)
    y = ops.embedding(torch.zeros(2, 0, dtype=torch.long), weight, torch.float32, kernel)
    assert y.shape == (2, 0, 64)


@every_scheme
def test_image_is_what_freezing_would_store(scheme):
    for dtype in DTYPES:
        weight = example_weight(5, 96, dtype=dtype)
        image = ops.image(weight, scheme)
        assert image.dtype == dtype
        assert torch.equal(image, rtn(weight, scheme).dequantize())


# --- contract with torch --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", KINDS, ids=str)
def test_linear_keeps_the_operator_contract(scheme):
    weight = ops.weight_arguments(rtn(example_weight(5, 64), scheme))
    op = torch.ops.zeropoint.linear
    x, bias = noise(3, 64).requires_grad_(), noise(5).requires_grad_()
    torch.library.opcheck(op, (x, bias, *weight, "torch"))
    if scheme is KINDS[-1]:
        torch.library.opcheck(op, (noise(2, 64, 3).mT, None, *weight, "torch"))


@pytest.mark.parametrize("scheme", KINDS, ids=str)
def test_embedding_keeps_the_operator_contract(scheme):
    weight = ops.weight_arguments(rtn(example_weight(5, 64), scheme))
    indices = torch.tensor([[1, 4], [0, 0]])
    torch.library.opcheck(
        torch.ops.zeropoint.embedding, (indices, *weight, torch.bfloat16, "torch")
    )


@pytest.mark.parametrize("scheme", KINDS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_image_keeps_the_operator_contract(scheme, layout):
    weight = noise(5, 64) if layout == "contiguous" else noise(64, 5).t()
    fields = (
        scheme.format,
        scheme.granularity,
        scheme.group_size or 0,
        scheme.symmetric,
        scheme.float_zero_point,
        scheme.scale_dtype,
        scheme.double_quant,
    )
    torch.library.opcheck(torch.ops.zeropoint.image, (weight.requires_grad_(), *fields))


LEARNABLE = [
    Scheme.of("int4"),
    Scheme.of("int3", symmetric=True),
    Scheme.of("int2", float_zero_point=True),
    *KINDS[1:3],
]


def start(weight, scheme):
    """The grid that rounding would choose, as parameters."""
    qweight = rtn(weight, scheme)
    zero_point = qweight.zero_point
    parts = (qweight.scale, zero_point)
    return Grid(*(None if p is None else p.float().requires_grad_() for p in parts))


@pytest.mark.parametrize("scheme", LEARNABLE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_on_grid_keeps_the_operator_contract(scheme, layout):
    weight = noise(5, 64) if layout == "contiguous" else noise(64, 5).t()
    grid = start(weight, scheme)
    fields = (scheme.format, scheme.granularity, scheme.group_size or 0)
    fields = (*fields, scheme.float_zero_point, scheme.scale_dtype)
    arguments = (weight.requires_grad_(), grid.scale, grid.zero_point, *fields)
    torch.library.opcheck(torch.ops.zeropoint.on_grid, arguments)


@pytest.mark.parametrize("scheme", LEARNABLE, ids=str)
def test_on_the_grid_that_spans_the_range_the_image_is_the_same(scheme):
    for dtype in DTYPES:
        weight = example_weight(5, 64, dtype=dtype)
        y = ops.image(weight, scheme, start(weight, scheme))
        assert y.dtype == dtype and torch.equal(y, ops.image(weight, scheme))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_grid_of_another_shape_is_refused(device):
    weight, scheme = torch.ones(5, 64, device=device), Scheme.of("int4")
    scale = torch.ones(5, 2, device=device)
    with pytest.raises(RuntimeError, match=r"scale is \(5, 1\).*needs \(5, 2\) of a float dtype"):
        ops.image(weight, scheme, Grid(scale[:, :1], None))
    codes = torch.zeros(5, 2, dtype=torch.int8, device=device)
    with pytest.raises(RuntimeError, match=r"zero_point is \(5, 2\) torch.int8; .* a float dtype"):
        ops.image(weight, scheme, Grid(scale, codes))


@every_default
def test_operators_trace_without_values(scheme):
    weight = rtn(example_weight(5, 64), scheme).to("meta")
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")
    y = ops.linear(x, weight, None, "torch")
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), torch.bfloat16, "meta")
    indices = torch.empty(2, 3, dtype=torch.long, device="meta")
    rows = ops.embedding(indices, weight, torch.float16, "torch")
    assert (rows.shape, rows.dtype, rows.device.type) == ((2, 3, 64), torch.float16, "meta")
    image = ops.image(torch.empty(5, 64, dtype=torch.bfloat16, device="meta"), scheme)
    assert (image.shape, image.dtype, image.device.type) == ((5, 64), torch.bfloat16, "meta")


# --- gradients ------------------------------------------------------------------------------------


@every_default
@every_dtype
def test_linear_has_the_gradients_of_the_dense_product(scheme, dtype):
    weight = rtn(example_weight(5, 64), scheme)
    x, bias = noise(2, 3, 64, dtype=dtype).requires_grad_(), noise(5, dtype=dtype).requires_grad_()
    upstream = noise(2, 3, 5, dtype=dtype, seed=2)
    ops.linear(x, weight, bias, "torch").backward(upstream)

    dense = weight.dequantize(dtype)
    expected_x = upstream.double() @ dense.double()
    size = upstream.double().abs() @ dense.double().abs()
    eps = torch.finfo(torch.float32).eps
    rounding = torch.finfo(dtype).eps
    # Sums of 5 and of 6 terms in float32, then one rounding to the dtype.
    assert x.grad.dtype == dtype and bias.grad.dtype == dtype
    assert ((x.grad - expected_x).abs() <= 2 * 5 * eps * size + rounding * expected_x.abs()).all()
    terms = upstream.double().view(-1, 5)
    bound = 2 * 6 * eps * terms.abs().sum(0) + rounding * terms.sum(0).abs()
    assert ((bias.grad - terms.sum(0)).abs() <= bound).all()


def test_linear_without_a_bias_or_with_a_constant_x_gives_the_other_gradient():
    weight = rtn(example_weight(5, 64), Scheme.of("int8"))
    x, bias = noise(3, 64), noise(5)
    ops.linear(x, weight, bias.requires_grad_(), "torch").sum().backward()
    assert x.grad is None and bias.grad.tolist() == [3.0] * 5
    ops.linear(x.requires_grad_(), weight, None, "torch").sum().backward()
    expected = weight.dequantize().sum(0).expand(3, 64)
    assert torch.allclose(x.grad, expected, rtol=0, atol=1e-5)  # 5 terms below 50 in float32


@every_scheme
def test_image_passes_the_gradient_straight_through(scheme):
    weight = example_weight(5, 96).requires_grad_()
    upstream = noise(5, 96, seed=3)
    ops.image(weight, scheme).backward(upstream)
    assert torch.equal(weight.grad, upstream)


# --- refusals -------------------------------------------------------------------------------------

WEIGHT = rtn(example_weight(8, 64), Scheme.of("int4"))
devices = pytest.mark.parametrize("device", ["cpu", "meta"])


@devices
@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.ones(2, 63), None, r"x is \(2, 63\), but weight is \(8, 64\): need \(..., 64\)"),
        (torch.tensor(1.0), None, r"x is \(\), but weight is \(8, 64\)"),
        (
            torch.ones(2, 64, dtype=torch.int32),
            None,
            "x is torch.int32; linear needs a float dtype",
        ),
        (torch.ones(2, 64), torch.ones(7), r"bias is \(7,\), not \(8,\)"),
        (torch.ones(2, 64), torch.ones(1, 8), r"bias is \(1, 8\), not \(8,\)"),
    ],
)
def test_linear_refuses_what_does_not_fit_the_weight(device, x, bias, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear(
            x.to(device), WEIGHT.to(device), None if bias is None else bias.to(device), "torch"
        )


@devices
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shape": torch.Size([2, 4, 64])},
            r"weight shape is \[2, 4, 64\]; linear and embedding need \(N, K\)",
        ),
        ({"scale": None}, "int4 .* has the parts .*_scale.*, not"),
        (
            {"packed": WEIGHT.packed.view(torch.int8)},
            r"packed is \(256,\) torch.int8, but int4 g32 .* torch.uint8",
        ),
        ({"packed": WEIGHT.packed[:3]}, "packed"),
        ({"scale": WEIGHT.scale[:, :1]}, "scale"),
        ({"scale": WEIGHT.scale.view(4, 4)}, "scale"),
        ({"zero_point": WEIGHT.zero_point[:, :1]}, "zero_point"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_operators_refuse_parts_that_do_not_fit_together(device, change, message):
    weight = dataclasses.replace(WEIGHT, **change).to(device)
    with pytest.raises((RuntimeError, ZeropointError), match=message):
        ops.linear(torch.ones(2, 64, device=device), weight, None, "torch")
    with pytest.raises((RuntimeError, ZeropointError), match=message):
        indices = torch.zeros(2, dtype=torch.long, device=device)
        ops.embedding(indices, weight, torch.float32, "torch")


def test_a_downcast_with_a_scale_is_refused():
    weight = rtn(example_weight(8, 64), Scheme.of("bfloat16"))
    with pytest.raises(
        RuntimeError, match=r"bfloat16 has the parts \[\'\'\], not \[\'\', \'_scale\'\]"
    ):
        ops.linear(
            torch.ones(2, 64), dataclasses.replace(weight, scale=WEIGHT.scale), None, "torch"
        )


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UnknownNameError, match="'torhc' is not a kernel; close: 'torch'"):
        ops.linear(torch.ones(2, 64), WEIGHT, None, "torhc")


def test_image_refuses_a_weight_that_is_not_finite():
    with pytest.raises(NonFiniteError, match=r"1 NaN and 0 Inf .* the first at \[0, 0\]"):
        ops.image(torch.full((1, 32), 1.0).index_fill(1, torch.tensor(0), torch.nan), WEIGHT.scheme)


@every_kernel
@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_outside_the_table_is_refused_as_torch_does(kernel, index):
    with pytest.raises(IndexError, match="out of (range|bounds)"):
        torch.nn.functional.embedding(torch.tensor([index]), torch.ones(8, 64))
    with pytest.raises((IndexError, RuntimeError)):
        ops.embedding(torch.tensor([index]), WEIGHT, torch.float32, kernel)


@every_kernel
def test_an_index_that_is_not_an_integer_is_refused(kernel):
    for indices in (torch.ones(8, dtype=torch.bool), torch.ones(8)):
        with pytest.raises((IndexError, RuntimeError, TypeError)):
            ops.embedding(indices, WEIGHT, torch.float32, kernel)
