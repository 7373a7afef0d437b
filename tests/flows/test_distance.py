"""The loss of distillation, against torch's own."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from zeropoint.errors import StateError
from zeropoint.flows import distance as module
from zeropoint.flows.distance import distance


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_once", [10, 1 << 20], ids=["a token at a time", "all at once"])
def test_logits_are_compared_by_their_divergence(monkeypatch, at_once):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", at_once)
    ours, theirs = noise(2, 5, 7).requires_grad_(), noise(2, 5, 7, seed=1)
    loss = distance(CausalLMOutput(logits=ours), CausalLMOutput(logits=theirs), {})
    (3 * loss).backward()
    reference = ours.detach().double().requires_grad_()
    expected = torch.nn.functional.kl_div(
        reference.log_softmax(-1).view(10, 7),
        theirs.double().log_softmax(-1).view(10, 7),
        log_target=True,
        reduction="batchmean",
    )
    (3 * expected).backward()
    # Ten terms of order one, each a few roundings of float32.
    assert abs(loss.item() - expected.item()) < 1e-6
    assert torch.allclose(ours.grad.double(), reference.grad, atol=1e-7)


def test_equal_answers_have_no_distance():
    same = CausalLMOutput(logits=noise(1, 3, 9))
    assert abs(distance(same, same, {}).item()) < 1e-7
    assert distance(noise(3, 4), noise(3, 4), {}).item() == 0


def test_without_logits_it_is_the_relative_squared_error():
    ours, theirs = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    expected = (ours - theirs).square().sum() / theirs.square().sum()
    output = [BaseModelOutput(last_hidden_state=t) for t in (ours, theirs)]
    assert torch.equal(distance(*output, {}), expected)
    assert torch.equal(distance(ours, theirs, {}), expected)


def test_padding_does_not_count():
    ours, theirs = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = distance(ours, theirs, {"attention_mask": mask})
    kept = mask.bool()
    assert torch.allclose(found, distance(ours[kept], theirs[kept], {}))
    assert not torch.allclose(found, distance(ours, theirs, {}))


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(StateError, match=r"answers \(1, 3, 9\) and its teacher \(1, 3, 8\)"):
        distance(noise(1, 3, 9), noise(1, 3, 8), {})
