"""MX formats, bit for bit: by hand, by fractions of the specification, and as torchao has them."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers import PROPERTY
from zeropoint.algorithms.rtn import rtn
from zeropoint.numerics import dequantize, get_format, quantize
from zeropoint.scheme import Scheme

GOLDEN = Path(__file__).parents[1] / "golden" / "torchao.safetensors"
SHA256 = "2142e0efde9af36f5670fffe4038a1a30d54c8e0b9eca72f96287a65c84c49ca"
MX = ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2")
E_MAX = {"mxfp4": 2, "mxfp8_e4m3": 8, "mxfp8_e5m2": 15}  # the specification's table 1
each = pytest.mark.parametrize("name", MX)


@pytest.fixture(scope="module")
def golden():
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == SHA256
    return load_file(GOLDEN)


def encoded(values, name, group_size=32):
    """Bytes of the scales, and codes."""
    q = quantize(values, name, group_size=group_size, scale_dtype="float8_e8m0fnu")
    assert q.scale.dtype == torch.float8_e8m0fnu
    return q.scale.view(torch.uint8), q.codes.view(torch.uint8)


def test_the_golden_file_says_who_made_it():
    with safe_open(GOLDEN, framework="pt") as file:
        assert file.metadata()["producer"] == "torchao 0.18.0, CPU"


@each
def test_scales_and_codes_are_those_of_torchao(golden, name):
    scale, codes = encoded(golden["weight"], name)
    assert torch.equal(scale, golden[f"{name}.scale"])
    same = (codes == golden[f"{name}.codes"]).all(dim=1)
    # torchao divides by 2^-126 at least, twice the scale that it stores for row 20 (about 1e-40)
    assert [i for i, ok in enumerate(same) if not ok] == ([] if name == "mxfp4" else [20])


@pytest.mark.parametrize(
    ("name", "values", "scale", "codes"),
    [
        # floor(log2 5) = 2, less e_max = 2: 2^0, stored as 127. S EE M: 5 is a tie of 4 and 6.
        ("mxfp4", [5.0, -0.5, 1.0, -6.0], 127, [0b0110, 0b1001, 0b0010, 0b1111]),
        # 7.9 is cut off at 6; -0.2 becomes the minus zero.
        ("mxfp4", [7.9, -0.2, 0.25, 0.75], 127, [0b0111, 0b1000, 0b0000, 0b0010]),
        # floor(log2 0.03) = -6: 2^-8.
        ("mxfp4", [0.03, 0.0, 2.0**-8, -(2.0**-9)], 119, [0b0111, 0, 0b0010, 0b1001]),
        # S EEEE MMM, bias 7: 448 = 1.75 * 2^8; 511 is cut off at it. 2^-9 is the smallest.
        ("mxfp8_e4m3", [448.0, 511.0, -1.0, 2.0**-9], 127, [0x7E, 0x7E, 0xB8, 0x01]),
        # S EEEEE MM, bias 15: 57344 = 1.75 * 2^15.
        ("mxfp8_e5m2", [57344.0, 65000.0, 1.0, -(2.0**-16)], 127, [0x7B, 0x7B, 0x3C, 0x81]),
        ("mxfp4", [0.0, -0.0, 0.0, 0.0], 0, [0, 8, 0, 0]),
        ("mxfp8_e4m3", [2.0**-140, 0.0, 0.0, 0.0], 0, [0, 0, 0, 0]),
    ],
)
def test_bits_worked_out_by_hand(name, values, scale, codes):
    found_scale, found = encoded(torch.tensor([values]), name, group_size=4)
    assert found_scale.tolist() == [[scale]] and found.tolist() == [codes]


def elements(name):
    """The value of every finite code without a sign, from its bits."""
    bits, mantissa, bias = {"mxfp4": (3, 1, 1), "mxfp8_e4m3": (7, 3, 7), "mxfp8_e5m2": (7, 2, 15)}[
        name
    ]
    last = {"mxfp4": 7, "mxfp8_e4m3": 0x7E, "mxfp8_e5m2": 0x7B}[name]
    assert last < 1 << bits
    values = []
    for code in range(last + 1):
        exponent, fraction = divmod(code, 1 << mantissa)
        if exponent == 0:
            values.append(Fraction(fraction, 1 << mantissa) * Fraction(2) ** (1 - bias))
        else:
            one = 1 + Fraction(fraction, 1 << mantissa)
            values.append(one * Fraction(2) ** (exponent - bias))
    return values


@each
@PROPERTY
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1,
                       max_size=6))  # fmt: skip
def test_every_code_is_the_nearest_to_even_of_the_specification(name, values):
    scale, codes = encoded(torch.tensor([values]), name, group_size=len(values))
    largest = max(abs(v) for v in values)
    exponent = -127
    if largest:
        exponent = min(127, max(-127, math.frexp(largest)[1] - 1 - E_MAX[name]))
    assert scale.item() == exponent + 127
    sign = 8 if name == "mxfp4" else 128
    table = elements(name)
    for value, code in zip(values, codes[0].tolist(), strict=True):
        target = abs(Fraction(value)) / Fraction(2) ** exponent
        nearest = min(range(len(table)), key=lambda c: (abs(table[c] - target), c % 2))
        assert code == nearest + sign * (math.copysign(1, value) < 0)


@each
def test_values_are_those_of_the_elements_times_the_scale(name):
    codes = torch.tensor([[0, 1, 3, 5]], dtype=torch.uint8)
    scale = torch.tensor([[119]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    fmt = get_format(name)
    found = dequantize(codes if fmt.dtype is None else codes.view(fmt.dtype), scale, format=name)
    table = elements(name)
    assert found[0].tolist() == [float(table[c] / 256) for c in (0, 1, 3, 5)]


@each
def test_a_weight_is_stored_as_codes_and_a_byte_for_each_block(name):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    q = rtn(weight, Scheme.of(name))
    assert q.scale.dtype == torch.float8_e8m0fnu and q.scale.shape == (6, 2)
    assert q.bits_per_weight == get_format(name).bits + 8 / 32
    scale, codes = encoded(weight, name)
    assert torch.equal(q.scale.view(torch.uint8), scale)
    assert torch.equal(q.codes.view(torch.uint8), codes)


@each
def test_zeros_are_zeros_where_subnormal_numbers_are_flushed(name):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        q = quantize(torch.zeros(1, 32), name, group_size=32, scale_dtype="float8_e8m0fnu")
        assert bool((q.codes.view(torch.uint8) == 0).all())
    finally:
        torch.set_flush_denormal(False)
