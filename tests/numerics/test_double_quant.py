"""Scales in 8 bits, and 4-bit weights, against files that bitsandbytes wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from zeropoint.algorithms.rtn import rtn
from zeropoint.numerics import double_quant, unpack
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

GOLDEN = Path(__file__).parents[1] / "golden" / "bitsandbytes.safetensors"
SHA256 = "36272fdf6c62e1c2225a264db46bf53a8fd37128f50858eb50ac03f7cd904603"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
each = pytest.mark.parametrize("size", BLOCK_SIZES)
both = pytest.mark.parametrize("kind", ["nf4", "fp4"])


@pytest.fixture(scope="module")
def golden():
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == SHA256
    return load_file(GOLDEN)


def test_the_golden_file_says_who_made_it():
    with safe_open(GOLDEN, framework="pt") as file:
        assert file.metadata()["producer"] == "bitsandbytes 0.50.2, CPU"


def nibbles(packed):
    """Codes of bitsandbytes: the upper half of a byte first."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)


def quantized(golden, kind, size, **options) -> QTensor:
    return rtn(golden["weight"], Scheme.of(kind, group_size=size, **options))


@each
@both
def test_codes_are_those_of_bitsandbytes(golden, kind, size):
    ours = quantized(golden, kind, size)
    assert torch.equal(ours.codes.view(-1), nibbles(golden[f"{kind}.{size}.packed"]))


@each
@both
def test_scales_are_the_absmax_of_bitsandbytes(golden, kind, size):
    """All but those of zeros: bitsandbytes stores 0, we the smallest positive number."""
    ours = quantized(golden, kind, size).scales.view(-1)
    theirs = golden[f"{kind}.{size}.absmax"]
    assert torch.equal(ours[theirs > 0], theirs[theirs > 0])
    assert (ours[theirs == 0] == 2.0**-126).all()


@each
@both
def test_double_quant_stores_what_bitsandbytes_stores(golden, kind, size):
    ours = quantized(golden, kind, size, double_quant=True)
    assert torch.equal(ours.codes.view(-1), nibbles(golden[f"{kind}.{size}.packed"]))
    offset, absmax, codes = parts(ours.scale)
    assert torch.equal(offset, golden[f"{kind}.{size}.absmax_offset"])
    assert torch.equal(absmax, golden[f"{kind}.{size}.absmax_absmax"])
    assert torch.equal(codes, golden[f"{kind}.{size}.absmax_codes"])
    image = ours.dequantize()[:, ::61]
    assert torch.equal(image, golden[f"{kind}.{size}.image"])


def parts(stored):
    """offset, absmax and codes of scales in 8 bits, read as the format's page has them."""
    rest, absmax, codes = stored[4:], [], []
    while len(rest):
        absmax.append(rest[:4])
        codes.append(rest[4:260])
        rest = rest[260:]
    floats = [t.clone().view(torch.float32) for t in (stored[:4], torch.cat(absmax))]
    return (*floats, torch.cat(codes))


def test_the_levels_are_those_of_bitsandbytes(golden):
    assert torch.equal(double_quant.levels(), golden["levels"])


@given(
    st.integers(1, 700),
    st.floats(1e-6, 1e4),
    st.sampled_from([0.0, 1e-3, 1.0]),
    st.integers(0, 99),
)
def test_a_scale_comes_back_within_a_step_of_its_block(count, size, spread, seed):
    """The widest gap between levels is .0141 of the block's absmax, 1.5e-5 the lattice's half."""
    generator = torch.Generator().manual_seed(seed)
    scale = size * (1 + spread * torch.rand(1, count, generator=generator))
    stored = double_quant.compress(scale)
    assert stored.dtype == torch.uint8 and len(stored) == double_quant.stored_bytes(count)
    again = double_quant.expand(stored, (1, count))
    farthest = (scale - scale.mean()).abs().max()
    bound = farthest * (0.0141 / 2 + 2e-5) + 4 * torch.finfo(torch.float32).eps * scale.max()
    assert ((again - scale).abs() <= bound).all()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("more", [1, 3, 300])
def test_scales_after_those_of_a_weight_leave_their_bytes_as_they_were(count, more):
    generator = torch.Generator().manual_seed(count)
    old, new = (1 + torch.rand((n, 1), generator=generator) for n in (count, more))
    stored = double_quant.compress(old)
    extended = double_quant.extend(stored, count, new)
    assert len(extended) == double_quant.stored_bytes(count + more)
    assert torch.equal(extended[: len(stored)], stored)
    again = double_quant.expand(extended, (count + more, 1))
    assert torch.equal(again[:count], double_quant.expand(stored, (count, 1)))
    offset, absmax, _ = parts(extended)
    for i, (scale, wanted) in enumerate(zip(again[count:], new, strict=True), start=count):
        reach = float(absmax[i // 256])
        nearest = min(max(float(wanted), float(offset) - reach), float(offset) + reach)
        assert abs(float(scale) - nearest) <= reach * (0.0141 / 2 + 2e-5) + 1e-6


def test_the_oracle_of_the_golden_test_can_fail(golden):
    ours = quantized(golden, "nf4", 64)
    wrong = nibbles(golden["nf4.64.packed"]).clone()
    wrong[5] ^= 1
    assert not torch.equal(ours.codes.view(-1), wrong)


def test_rows_of_a_weight_with_8_bit_scales():
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    q = rtn(weight, Scheme.of("nf4", group_size=32, double_quant=True))
    rows = q.rows(torch.tensor([4, 0]))
    assert torch.equal(rows.dequantize(), q.dequantize()[[4, 0]])
    assert torch.equal(unpack(q.packed.view(5, -1), 4, 128), q.codes)


def test_bits_per_weight_of_bitsandbytes_nf4():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    assert rtn(weight, Scheme.of("nf4", group_size=64)).bits_per_weight == 4.5
    q = rtn(weight, Scheme.of("nf4", group_size=64, double_quant=True))
    assert q.bits_per_weight == pytest.approx(4.127, abs=5e-4)  # QLoRA, section 3
    assert q.nbytes == q.scheme.storage_bytes((1024, 1024))
