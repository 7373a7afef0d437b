"""Property tests 34 to 36 of the metrics, and the interval."""

import math

import pytest
import torch

from zeropoint.evaluate.statistics import block_bootstrap, rank_agreement, token_distances


def logits(seed, tokens=300, vocabulary=50):
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


TARGETS = torch.randint(50, (300,), generator=torch.Generator().manual_seed(9))


def test_a_model_has_no_distance_from_itself():
    d = token_distances(logits(0), logits(0), TARGETS)
    assert d.kl.abs().max() == 0
    assert d.same_top.all()
    assert torch.equal(d.reference_nll, d.candidate_nll)


def test_kl_is_not_negative_and_matches_torch():
    d = token_distances(logits(0), logits(1), TARGETS)
    p, q = logits(0).double().log_softmax(-1), logits(1).double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(d.kl, expected, rtol=1e-12, atol=1e-12)
    assert d.kl.min() >= -1e-7


def test_kl_is_of_the_candidate_from_the_reference_not_the_reverse():
    sharp, flat = torch.tensor([[10.0, 0.0]]), torch.zeros(1, 2)
    target = torch.zeros(1, dtype=torch.long)
    assert token_distances(sharp, flat, target).kl.item() == pytest.approx(math.log(2), abs=1e-3)
    assert token_distances(flat, sharp, target).kl.item() == pytest.approx(4.307, abs=1e-3)


def test_perplexity_of_the_uniform_distribution_is_the_vocabulary():
    d = token_distances(torch.zeros(300, 50), torch.zeros(300, 50), TARGETS)
    assert math.exp(d.reference_nll.mean()) == pytest.approx(50, rel=1e-12)


def test_paired_delta_is_the_log_of_the_perplexity_ratio():
    d = token_distances(logits(0), logits(1), TARGETS)
    ratio = math.exp(d.candidate_nll.mean()) / math.exp(d.reference_nll.mean())
    delta = block_bootstrap(d.candidate_nll - d.reference_nll).mean
    assert delta == pytest.approx(math.log(ratio), abs=1e-9)


@pytest.mark.parametrize("spoil", [lambda x: 2 * x, lambda x: -x, lambda x: x.roll(1, 0)])
def test_distances_see_scaled_negated_and_shifted_logits(spoil):
    d = token_distances(logits(0), spoil(logits(0)), TARGETS)
    assert d.kl.mean() > 0.1


def test_interval_covers_the_mean_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        values = torch.randn(4096, generator=generator, dtype=torch.float64) + 0.5
        interval = block_bootstrap(values, block=64)
        hits += interval.low <= 0.5 <= interval.high
    # binomial(200, 0.95): mean 190, sd 3.1; the percentile interval of 64 blocks covers about 94 %;
    # 6 sd each way
    assert 170 <= hits <= 200


def test_interval_widens_when_neighbours_repeat():
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    narrow = block_bootstrap(values)
    wide = block_bootstrap(values.repeat_interleave(32)[: 4096 * 8])
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_too_few_tokens_have_a_mean_but_no_interval():
    assert block_bootstrap(torch.ones(100)) == (1.0, None, None)


def test_rank_agreement_is_spearmans_with_ties_shared():
    a = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert rank_agreement(a, a.exp()) == pytest.approx(1)
    assert rank_agreement(a, -a) == pytest.approx(-1)
    # by hand: ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4); covariance 4.5, variances 4.5 and 5
    assert rank_agreement(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(4.5 / 22.5**0.5)
