import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY
from zeropoint.numerics import pack, unpack
from zeropoint.numerics.packing import row_bytes


def oracle(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row as one big number, code i at bit i * bits, written low byte first."""
    rows = []
    for row in codes.tolist():
        number = 0
        for i, code in enumerate(row):
            for j in range(bits):
                number |= (code >> j & 1) << (i * bits + j)
        rows.append(list(number.to_bytes(-(-len(row) * bits // 8), "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(len(codes), -1)


def random_codes(n, k, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)


@PROPERTY
@given(
    bits=st.integers(1, 8), n=st.integers(1, 4), k=st.integers(1, 70), seed=st.integers(0, 2**32)
)
def test_packing_is_undone_bit_for_bit_and_has_the_documented_layout(bits, n, k, seed):
    codes = random_codes(n, k, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert torch.equal(packed, oracle(codes, bits))
    assert torch.equal(unpack(packed, bits, k), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_tail_length_keeps_rows_on_bytes_and_padding_zero(bits):
    for k in range(1, 18):
        codes = torch.full((2, k), 2**bits - 1, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (2, row_bytes(k, bits)) == (2, -(-k * bits // 8))
        ones = sum(byte.bit_count() for byte in packed[0].tolist())
        assert ones == k * bits, "padding bits are not zero"
        assert torch.equal(unpack(packed, bits, k), codes)


def test_the_example_of_the_header_is_what_is_written():
    packed = pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0b11_010_001, 0b0000000_0]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_transposed_view_packs_as_its_copy_does(bits):
    codes = random_codes(16, 5, bits, seed=1).t()
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
    assert pack(codes, bits).is_contiguous()


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_result_owns_its_memory(bits):
    codes = random_codes(2, 8, bits, seed=2)
    before = codes.clone()
    packed = pack(codes, bits)
    stored = packed.clone()
    unpack(packed, bits, 8).zero_()
    assert torch.equal(packed, stored)
    packed.zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p * 2,
        lambda p: -p,
        lambda p: p[[1, 0, 2]],
        lambda p: p.index_fill(1, torch.tensor(0), 0),
    ],
    ids=["output x 2", "sign flipped", "two rows swapped", "first byte lost"],
)
def test_the_oracle_tells_a_spoilt_packing_apart(spoil):
    codes = random_codes(3, 11, 4, seed=3)
    assert not torch.equal(spoil(pack(codes, 4)), oracle(codes, 4))
