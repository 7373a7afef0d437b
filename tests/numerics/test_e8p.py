"""The codebook of vectors: property 26 of QuIP#'s E8P, and the distance it leaves to a Gaussian."""

from itertools import product

import pytest
import torch

from zeropoint.numerics import dequantize, e8p, quantize
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

CPU = torch.device("cpu")
WORDS = torch.arange(1 << 16)


def gaussian(vectors: int) -> torch.Tensor:
    return torch.randn(vectors, 8, generator=torch.Generator().manual_seed(0))


def squared_distances(vectors: torch.Tensor) -> torch.Tensor:
    """To the nearest of all codewords, one by one. vectors: (V, 8); returns (V,) float64."""
    codewords = e8p.codewords(CPU).double()
    parts = vectors.double().split(64)
    return torch.cat([torch.cdist(part, codewords).amin(1).square() for part in parts])


def test_the_patterns_are_all_227_within_norm_10_and_29_of_norm_12():
    patterns = e8p.wholes() + 0.5
    norms = patterns.square().sum(1)
    every = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=8)))
    assert len(patterns.unique(dim=0)) == 256
    assert int((norms <= 10).sum()) == int((every.square().sum(1) <= 10).sum()) == 227
    assert int((norms == 12).sum()) == e8p.OF_NORM_12 == 29
    largest = (patterns[-29:] == 1.5).sum(0)  # of 145 = 8 * 18 + 1
    assert largest.min() >= 17 and largest.max() <= 19, "no coordinate is preferred"


def test_there_are_65536_distinct_codewords_a_quarter_from_half_integers_with_an_even_sum():
    codewords = e8p.codewords(CPU)
    assert len(codewords.unique(dim=0)) == 1 << 16
    points = codewords - torch.where(WORDS >> 15 == 1, 0.25, -0.25).unsqueeze(1)
    assert (points % 1 == 0.5).all() and (points.sum(1) % 2 == 0).all()
    assert codewords.abs().max() == 2.75
    assert torch.equal((-codewords).unique(dim=0), codewords.unique(dim=0))


def test_a_word_is_a_pattern_signs_and_a_shift():
    word = 0b1_0000101_00000000  # + 1/4, values 0 and 2 negative, the first pattern: all 1/2
    expected = [-0.25, 0.75, -0.25, 0.75, 0.75, 0.75, 0.75, 0.75]
    assert e8p.codewords(CPU)[word].tolist() == expected
    assert e8p.codewords(CPU)[word ^ (1 << 8)].tolist()[7] == -0.25, "the sum stays even"


def test_every_codeword_is_its_own_nearest():
    assert torch.equal(e8p.nearest(e8p.codewords(CPU)), WORDS)


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0, 1.5, 3.0, 100.0])
def test_the_nearest_codeword_is_that_of_a_search_through_all(size):
    vectors = size * gaussian(512)
    found = (vectors - e8p.codewords(CPU)[e8p.nearest(vectors)]).double().square().sum(1)
    slack = 64 * 2.0**-24 * (vectors.double().norm(dim=1) + 5).square()
    assert (found <= squared_distances(vectors) + slack).all()


def test_a_tie_gives_one_of_the_nearest():
    """Middles between codewords, and points of zeros and whole numbers."""
    codewords = e8p.codewords(CPU)
    some = codewords[WORDS[:: 1 << 8]]
    whole = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=3))).repeat_interleave(3, 1)[:, :8]
    vectors = torch.cat([(some[1:] + some[:-1]) / 2, whole])
    found = (vectors - codewords[e8p.nearest(vectors)]).double().square().sum(1)
    assert torch.allclose(found, squared_distances(vectors), rtol=1e-6, atol=1e-6)


def test_every_pattern_and_both_shifts_are_used():
    words = e8p.nearest(1.1 * gaussian(1 << 15))
    assert len((words & 0xFF).unique()) == 256
    assert len((words >> 8).unique()) == 256


def mse(scale: float, vectors: torch.Tensor) -> torch.Tensor:
    """(V,) float64: what each loses on codewords times `scale`."""
    image = scale * e8p.codewords(CPU)[e8p.nearest(vectors / scale)]
    return (vectors - image).double().square().mean(1)


def test_a_gaussian_loses_a_little_less_than_known():
    """.0925 was computed with 29 random patterns; the bound for 2 bits is 2^-4 = .0625. Measured
    over 110592 other vectors: .0930 at 0.9 times the root mean square, the scale of QuIP#, and
    .0911 at the best. Tolerance: 6 standard errors of 2^16 vectors, and half a last digit.
    """
    vectors = gaussian(1 << 16)
    for scale, expected in ((0.9, 0.0930), (e8p.SCALE_TO_RMS, 0.0911)):
        lost = mse(scale, vectors)
        assert abs(lost.mean() - expected) < 6 * lost.std() / len(lost) ** 0.5 + 5e-5
        assert 0.0625 < lost.mean()


def test_the_scale_is_the_best_for_a_gaussian():
    vectors = gaussian(1 << 15)
    losses = [mse(e8p.SCALE_TO_RMS * share, vectors).mean() for share in (0.96, 1.0, 1.04)]
    assert min(losses) == losses[1]
    q = quantize(vectors.view(8, -1), "e8p")
    assert torch.allclose(
        q.scale, e8p.SCALE_TO_RMS * vectors.view(8, -1).square().mean(1).sqrt()[:, None]
    )
    assert (dequantize(*q, "e8p") - vectors.view(8, -1)).square().mean() < 0.0925


def test_eight_codes_lie_in_a_checkpoint_as_one_16_bit_integer():
    words = torch.randint(0, 1 << 16, (3, 4), generator=torch.Generator().manual_seed(0))
    weight = e8p.codewords(CPU)[words].view(3, 32)
    scheme = Scheme.of("e8p", group_size=-1)
    codes = e8p.vector_codes(weight.unsqueeze(1), torch.ones(3, 1)).view(3, 32)
    q = quantize(weight, "e8p")._replace(codes=codes)
    packed = QTensor.from_codes(q, scheme, torch.float32).packed
    assert torch.equal(packed.view(torch.int16).long() & 0xFFFF, words.view(-1))
    assert 8 * packed.numel() == 2 * weight.numel()
