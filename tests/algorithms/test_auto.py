"""`auto` keeps what loses least on inputs that nothing was fitted to."""

from __future__ import annotations

import pytest
import torch

from zeropoint.algorithms import get_algorithm
from zeropoint.algorithms.choice import Moments, output_error
from zeropoint.algorithms.gptq import gptq
from zeropoint.algorithms.rtn import rtn
from zeropoint.algorithms.search import search

from .cases import CALIBRATED, hessian, problem

auto = get_algorithm("auto")


def moments(fitted_to: int, judged_by: int = 512):
    weight, x = problem(tokens=fitted_to + judged_by)
    return weight, Moments(hessian(x[:fitted_to]), hessian(x[fitted_to:]))


@pytest.mark.parametrize("scheme", CALIBRATED, ids=str)
@pytest.mark.parametrize("tokens", [4, 512])
def test_nothing_it_tried_loses_less_on_unseen_inputs(scheme, tokens):
    weight, seen = moments(tokens)
    choice = auto.choose(weight, seen, scheme)
    tried = (
        gptq(weight, seen.seen, scheme).weight,
        search(weight, scheme, seen.seen.diagonal()),
        rtn(weight, scheme),
    )
    errors = [output_error(weight, q.dequantize(torch.float32), seen.unseen) for q in tried]
    assert choice.output_error == min(errors)
    assert output_error(weight, choice.weight.dequantize(), seen.unseen) == min(errors)


def test_feedback_fitted_to_a_few_inputs_of_another_kind_is_not_kept():
    """All inputs that codes are fitted to are one: GPTQ pushes errors into all other directions."""
    weight, seen = moments(512)
    alike = torch.ones(64, 64).double() + 1e-3 * torch.eye(64)
    choice = auto.choose(weight, Moments(alike, seen.unseen), CALIBRATED[1])
    fitted = gptq(weight, alike, CALIBRATED[1])
    assert fitted.algorithm == "gptq" and choice.algorithm in ("mse", "rtn")
    lost = output_error(weight, fitted.weight.dequantize(), seen.unseen)
    assert choice.output_error < lost
    assert choice.reason == (
        f"on inputs that none had seen it loses {choice.output_error:.3g} of the output, "
        f"gptq {lost:.3g}"
    )


def test_without_inputs_to_judge_by_it_is_gptq():
    weight, seen = moments(512)
    expected = gptq(weight, seen.seen, CALIBRATED[1])
    for unseen in (None, torch.full((64, 64), float("nan")).double()):
        choice = auto.choose(weight, Moments(seen.seen, unseen), CALIBRATED[1])
        assert choice.algorithm == "gptq" and choice.reason is None
        assert torch.equal(choice.weight.packed, expected.weight.packed)
