"""A low-rank change goes into codes: what it does survives, where rounding would lose it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint.algorithms import get_algorithm
from zeropoint.algorithms.absorb import PULL, absorb
from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import NonFiniteError
from zeropoint.numerics import FORMATS
from zeropoint.scheme import Scheme

N, K, RANK = 48, 128, 4
every_format = pytest.mark.parametrize("format", FORMATS)
GRIDS = [f for f, row in FORMATS.items() if row.kind != "downcast"]


def problem(scheme, share, seed=0, rank=RANK, dtype=torch.float32):
    """A weight, a change of `share` of its norm, and what the change reads."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    weight = get_algorithm("mse")(0.05 * noise(N, K).to(dtype), scheme)
    reads = noise(rank, K)
    change = noise(N, rank) @ reads
    change *= share * weight.dequantize(torch.float32).norm() / change.norm()
    return weight, change, reads


def norms(error, reads):
    """|E|, |E V|."""
    basis = torch.linalg.qr(reads.T).Q
    return float(error.norm()), float((error @ basis).norm())


def error_of(weight, change, image):
    return weight.dequantize(torch.float32) + change - image.dequantize(torch.float32)


@every_format
def test_what_the_change_does_survives(format):
    """Rounding to nearest loses 0.9 and more of a change of 2 % in 4 bits and fewer, but where it
    learns levels for what has changed.
    """
    scheme = Scheme.of(format)
    weight, change, reads = problem(scheme, 0.02)
    left, along = norms(error_of(weight, change, absorb(weight, change, reads)), reads)
    rounded = rtn(weight.dequantize(torch.float32) + change, scheme)
    left_rounded, along_rounded = norms(error_of(weight, change, rounded), reads)
    assert along <= along_rounded
    assert left**2 + PULL * along**2 <= left_rounded**2 + PULL * along_rounded**2
    if scheme.fmt.bits >= 3:
        assert along < 0.15 * change.norm()
    if scheme.fmt.bits in (3, 4) and not scheme.fmt.learns_levels:
        assert along_rounded > 0.9 * change.norm()


@pytest.mark.parametrize("format", GRIDS)
def test_with_the_moment_of_the_inputs_the_output_keeps_the_change(format):
    scheme = Scheme.of(format)
    weight, change, reads = problem(scheme, 0.01)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, K, generator=generator)
    x = x + 0.05 * torch.randn(400, K, generator=generator)
    seen, other = x[:200], x[200:]

    def lost(new):
        """Of what the change does to inputs that were not seen."""
        return float((other @ error_of(weight, change, new).T).norm() / (other @ change.T).norm())

    knowing = lost(absorb(weight, change, reads, seen.T @ seen))
    rounded = rtn(weight.dequantize(torch.float32) + change, scheme)
    assert knowing < min(lost(absorb(weight, change, reads)), lost(rounded))
    assert scheme.fmt.bits < 4 or knowing < 0.9


def test_inputs_that_were_all_zero_say_nothing():
    weight, change, reads = problem(Scheme.of("int4"), 0.02)
    without = absorb(weight, change, reads)
    assert torch.equal(absorb(weight, change, reads, torch.zeros(K, K)).packed, without.packed)


@pytest.mark.parametrize("share", [1.0, 30.0])
@pytest.mark.parametrize("format", [f for f in GRIDS if not Scheme.of(f).double_quant])
def test_a_change_larger_than_the_weight_gets_a_grid_of_its_own(format, share):
    scheme = Scheme.of(format)
    weight, change, reads = problem(scheme, share)
    left, along = norms(error_of(weight, change, absorb(weight, change, reads)), reads)
    rounded = rtn(weight.dequantize(torch.float32) + change, scheme)
    left_rounded, along_rounded = norms(error_of(weight, change, rounded), reads)
    assert along < along_rounded
    assert left < 2 * left_rounded


@every_format
def test_no_change_gives_the_same_codes(format):
    weight, change, reads = problem(Scheme.of(format), 0.1)
    assert absorb(weight, torch.zeros_like(change), reads) is weight


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.003, 0.05, 0.5]),
    rank=st.sampled_from([1, 7, 128, 200]),
    format=st.sampled_from(["int4", "nf4", "int8", "float8_e4m3fn"]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
)
def test_never_worse_than_leaving_the_change_out(seed, share, rank, format, granularity):
    scheme = Scheme(
        format=format,
        granularity=granularity,
        group_size=32 if granularity == "group" else None,
        symmetric=format != "int4",
        scale_dtype="float32",
    )
    weight, change, reads = problem(scheme, share, seed, rank)
    new = absorb(weight, change, reads)
    assert new.scheme == scheme and new.shape == weight.shape
    left, along = norms(error_of(weight, change, new), reads)
    total = float(change.norm())
    assert left**2 + PULL * along**2 <= (1 + PULL) * total**2 * 1.0001


def test_scales_in_8_bits_are_kept():
    scheme = Scheme.of("nf4", double_quant=True)
    weight, change, reads = problem(scheme, 0.02)
    new = absorb(weight, change, reads)
    assert new.scale is weight.scale and new.scheme == scheme
    assert not torch.equal(new.packed, weight.packed)
    _, along = norms(error_of(weight, change, new), reads)
    assert along < 0.15 * change.norm()


def test_a_bfloat16_weight_stays_one():
    weight, change, reads = problem(Scheme.of("int4"), 0.02, dtype=torch.bfloat16)
    new = absorb(weight, change.bfloat16(), reads.bfloat16())
    assert new.dtype == torch.bfloat16 and new.scheme == weight.scheme


def test_a_broken_change():
    weight, change, reads = problem(Scheme.of("int4"), 0.02)
    change[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        absorb(weight, change, reads)
