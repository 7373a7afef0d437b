import re

import pytest
import torch

from tests.helpers import assert_nearest, defaults, example_weight, rtn, schemes
from zeropoint.errors import CheckpointError, GroupSizeError
from zeropoint.numerics import Quantized, blocked, e8p, quantize
from zeropoint.qtensor import QTensor, check_parts, part_specs
from zeropoint.scheme import Scheme

every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)
every_default = pytest.mark.parametrize("scheme", defaults(), ids=str)


def numerics_result(weight, scheme):
    return quantize(
        weight,
        scheme.format,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        float_zero_point=scheme.float_zero_point,
        scale_dtype=scheme.scale_dtype,
    )


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@every_scheme
def test_rows_quantized_by_parts_are_those_quantized_whole(scheme):
    weight = torch.randn((7, 96), generator=torch.Generator().manual_seed(0))
    parts = [rtn(part, scheme.of_some_rows or scheme) for part in weight.split(3)]
    if scheme.of_some_rows is None:
        with pytest.raises(AssertionError):
            QTensor.concatenate(parts)
        return
    joined, whole = QTensor.concatenate(parts).with_scheme(scheme), rtn(weight, scheme)
    assert joined.shape == whole.shape and joined.parts.keys() == whole.parts.keys()
    assert all(same_bits(joined.parts[suffix], whole.parts[suffix]) for suffix in whole.parts)


@every_scheme
def test_packing_keeps_every_code(scheme):
    for shape in [(1, 32), (5, 96), (3, 2, 16, 3)]:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        quantized = numerics_result(weight, scheme)
        q = QTensor.from_codes(quantized, scheme, weight.dtype)
        assert same_bits(q.codes, quantized.codes)
        assert q.shape == weight.shape and q.packed.is_contiguous()
        assert scheme.double_quant or q.scale is quantized.scale
        assert q.zero_point is quantized.zero_point
        check_parts("w", q.parts, shape, scheme)


def test_integers_are_stored_from_the_smallest_code_up_low_bits_first():
    codes = torch.tensor([[-8, 7, 0]], dtype=torch.int8)
    scheme = Scheme(format="int4")
    q = QTensor.from_codes(Quantized(codes, torch.ones(1, 1), None), scheme, torch.float32)
    assert q.packed.tolist() == [0xF0, 0x08]


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantize_follows_the_formula_in_float32_and_returns_the_weights_dtype(scheme, dtype):
    weight = example_weight(dtype=dtype)
    q = rtn(weight, scheme)
    fmt = scheme.fmt
    codes = q.codes.float()
    if q.levels is not None:
        codes = q.levels.float().expand(5, -1).gather(1, q.codes.long())
    elif fmt.kind == "codebook":
        codes = torch.tensor(fmt.levels)[q.codes.long()]
    elif fmt.kind == "vector":
        words = (q.codes.view(5, 12, 8).long() << torch.arange(0, 16, 2)).sum(-1)
        codes = e8p.codewords(torch.device("cpu"))[words].view(5, 96)
    if q.zero_point is not None:
        codes = codes - q.zero_point.repeat_interleave(96 // q.zero_point.shape[1], 1).expand(5, 96)
    real = codes
    if q.scales is not None:
        real = q.scales.float().repeat_interleave(96 // q.scales.shape[1], 1).expand(5, 96) * codes
    assert q.dtype == dtype
    assert torch.equal(q.dequantize(torch.float32), real)
    assert torch.equal(q.dequantize(), real.to(dtype)) and q.dequantize().dtype == dtype


@every_scheme
def test_rows_are_the_rows_of_the_whole(scheme):
    q = rtn(example_weight(), scheme)
    indices = torch.tensor([4, 0, 0, 2])
    rows = q.rows(indices)
    assert rows.shape == (4, 96)
    assert same_bits(rows.codes, q.codes[indices])
    assert torch.equal(rows.dequantize(), q.dequantize()[indices])
    check_parts("rows", rows.parts, (4, 96), scheme.with_float_scales)


@every_default
def test_no_rows_dequantize_to_nothing(scheme):
    rows = rtn(torch.randn(3, 64), scheme).rows(torch.zeros(0, dtype=torch.long))
    assert rows.shape == (0, 64)
    assert rows.dequantize().shape == (0, 64)


@every_scheme
def test_the_first_rows_are_stored_as_they_were(scheme):
    q = rtn(example_weight(), scheme)
    first = q.first_rows(3)
    check_parts("first", first.parts, (3, 96), scheme)
    for suffix, part in first.parts.items():
        whole = q.parts[suffix]
        assert same_bits(part.view(-1), whole.view(-1)[: part.numel()])
    assert torch.equal(first.dequantize(), q.dequantize()[:3])
    assert first.packed.untyped_storage().nbytes() == first.packed.nbytes


@every_scheme
@pytest.mark.parametrize("old", [5, 256 // 3 + 1])  # 3 groups in a row: 15 scales, or 258
def test_rows_after_those_of_a_weight_leave_them_as_they_were(scheme, old):
    q = rtn(example_weight(n=old), scheme)
    values = torch.randn((200, 96), generator=torch.Generator().manual_seed(1))
    grown = q.with_rows(values)
    check_parts("grown", grown.parts, (old + 200, 96), scheme)
    for suffix, part in q.parts.items():
        assert same_bits(part.view(-1), grown.parts[suffix].view(-1)[: part.numel()])
    new = grown.dequantize()[old:]
    if scheme.double_quant or (scheme.granularity == "tensor" and q.scale is not None):
        blocks = [blocked(t, scheme.granularity, scheme.group_size) for t in (values, new)]
        assert_nearest(*blocks, grown.grid.rows(slice(-len(blocks[0]), None)), scheme.fmt)
    else:
        assert same_bits(new, rtn(values, scheme).dequantize())


@every_scheme
def test_columns_are_those_of_the_whole_whichever_groups_they_tear(scheme):
    q = rtn(example_weight(), scheme)
    for kept in (
        range(96),
        range(32, 96),
        [*range(16), *range(48, 96)],
        [*range(8), *range(90 if scheme.fmt.width == 1 else 88, 96)],
    ):
        indices = torch.tensor(list(kept))
        part = q.columns(indices)
        check_parts("columns", part.parts, (5, len(indices)), part.scheme)
        assert same_bits(part.codes, q.codes[:, indices])
        assert torch.equal(part.dequantize(), q.dequantize()[:, indices])


@pytest.mark.parametrize(
    ("kept", "size"), [([0, 2], 32), ([0], 32), ([1, 4, 5], 16), ([1, 2], 16), ([0, 1, 3], 16)]
)
def test_groups_get_smaller_only_where_they_are_torn(kept, size):
    """Heads of 16 columns, groups of 32, that is two heads."""
    q = rtn(example_weight(), Scheme.of("int4", group_size=32))
    heads = torch.arange(96).view(6, 16)
    whole = heads.view(3, 32)
    indices = (whole if size == 32 else heads)[kept].view(-1)
    assert q.columns(indices).scheme == Scheme.of("int4", group_size=size)


@pytest.mark.parametrize("kept", [range(4, 12), range(9), [*range(8), *range(15, 7, -1)]])
def test_codes_of_vectors_stay_together(kept):
    q = rtn(example_weight(), Scheme.of("e8p", group_size=32))
    with pytest.raises(GroupSizeError, match=f"these {len(kept)} columns are not runs of 8 from"):
        q.columns(torch.tensor(list(kept)))


@every_scheme
def test_parts_are_the_tensors_that_exist_and_sum_to_the_bytes(scheme):
    q = rtn(example_weight(), scheme)
    expected = {"": q.packed}
    if q.scale is not None:
        expected["_scale"] = q.scale
    if q.zero_point is not None:
        expected["_zero_point"] = q.zero_point
    if q.levels is not None:
        expected["_levels"] = q.levels
    assert (q.levels is not None) == scheme.fmt.learns_levels
    assert q.parts.keys() == expected.keys()
    assert all(q.parts[suffix] is part for suffix, part in expected.items())
    assert q.nbytes == sum(p.numel() * p.element_size() for p in expected.values())
    assert q.bits_per_weight == 8 * q.nbytes / (5 * 96)


@every_scheme
def test_moving_moves_every_part_and_changes_nothing_else(scheme):
    q = rtn(example_weight(), scheme)
    moved = q.to("meta")
    assert {p.device.type for p in moved.parts.values()} == {"meta"}
    assert moved.device.type == "meta" and q.device.type == "cpu"
    assert (moved.scheme, moved.shape, moved.dtype) == (q.scheme, q.shape, q.dtype)
    assert moved.nbytes == q.nbytes


@every_default
def test_packed_codes_cannot_be_taken_for_the_float_weight(scheme):
    """Decision 3: the stored shape differs from the float shape; a downcast is a float."""
    specs = part_specs((4, 64), scheme)
    if scheme.fmt.kind == "downcast":
        assert specs == {"": ((4, 64), scheme.fmt.dtype)}
    else:
        assert len(specs[""][0]) == 1 and specs[""][1] == torch.uint8


def test_the_repr_shows_the_scheme_codes_scales_and_dtype():
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    q = rtn(weight, Scheme.of("int4", group_size=2))
    text = repr(q)
    assert text.startswith(
        "QTensor(int4 g2 asymmetric, shape=(2, 4), 16.00 bits per weight, "
        "dtype=torch.bfloat16, device=cpu,\n"
    )
    assert re.search(
        r"codes=tensor\(\[\[-8,  7, .*\],\n {16}\[ 1,  1,  1,  1\]\], dtype=torch.int8\)", text
    )
    assert "  scale=tensor([[0.0667, 0.1334],\n" + 16 * " " + "[1.0000, 1.0000]]" in text
    assert "  zero_point=tensor([[ 7, -8],\n" in text
    assert text.endswith(")")


def test_the_repr_leaves_out_what_a_format_does_not_have_and_values_on_meta():
    plain = repr(rtn(torch.ones(1, 2), Scheme.of("bfloat16")))
    assert "codes=tensor([[1., 1.]], dtype=torch.bfloat16)" in plain
    assert "scale" not in plain and "zero_point" not in plain
    q = rtn(torch.ones(1, 2), Scheme.of("int8"))
    assert "zero_point" not in repr(q)
    assert repr(q.to("meta")).endswith("dtype=torch.float32, device=meta)")


# --- check_parts ----------------------------------------------------------------------------------


def parts_of(scheme):
    return dict(rtn(example_weight(), scheme).parts)


INT4 = Scheme.of("int4")


@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point"])
def test_a_missing_part_is_named(suffix):
    parts = parts_of(INT4)
    del parts[suffix]
    with pytest.raises(
        CheckpointError, match=f"^a.weight{suffix} is missing; int4 g32 asymmetric needs it"
    ):
        check_parts("a.weight", parts, (5, 96), INT4)


def test_a_part_too_many_is_named():
    scheme = Scheme.of("int8")
    parts = parts_of(scheme) | {"_zero_point": torch.zeros(5, 1, dtype=torch.int8)}
    with pytest.raises(
        CheckpointError, match="a.weight_zero_point is there, but int8 per channel has no such part"
    ):
        check_parts("a.weight", parts, (5, 96), scheme)


@pytest.mark.parametrize(
    ("suffix", "part", "message"),
    [
        (
            "",
            torch.zeros(5, 48, dtype=torch.uint8),
            r"w is \(5, 48\) torch.uint8, but int4 g32 asymmetric of shape \(5, 96\) needs \(240",
        ),
        (
            "",
            torch.zeros(240, dtype=torch.int8),
            r"w is \(240,\) torch.int8, but .* needs \(240,\) torch.uint8",
        ),
        (
            "_scale",
            torch.ones(5, 3),
            r"w_scale is \(5, 3\) torch.float32, but .* needs \(5, 3\) torch.float16",
        ),
        (
            "_scale",
            torch.ones(5, 2).half(),
            r"w_scale is \(5, 2\) torch.float16, but .* needs \(5, 3\)",
        ),
        (
            "_zero_point",
            torch.zeros(5, 1, dtype=torch.int8),
            r"w_zero_point is \(5, 1\) .* needs \(5, 3\)",
        ),
    ],
)
def test_a_part_of_another_shape_or_dtype_is_named_with_both(suffix, part, message):
    with pytest.raises(CheckpointError, match=message):
        check_parts("w", parts_of(INT4) | {suffix: part}, (5, 96), INT4)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_float_weight_is_not_a_downcast_of_another_dtype(name):
    with pytest.raises(
        CheckpointError, match=rf"w is .* torch.float32, but {name} .* torch.{name}"
    ):
        check_parts("w", {"": example_weight()}, (5, 96), Scheme.of(name))
