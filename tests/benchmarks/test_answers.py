"""The checkers of the benchmarks accept what kernels compute and reject what they should."""

import dataclasses

import pytest
import torch

from bench._answers import WrongAnswerError, check_linear, check_logits, mean_kl, sample
from tests.helpers import rtn
from zeropoint import native
from zeropoint.kernels.select import KERNELS
from zeropoint.kernels.spec import Spec
from zeropoint.scheme import Scheme

SCHEMES = [
    Scheme.of("int4"),
    Scheme.of("int4", group_size=64, symmetric=True),
    Scheme.of("int8"),
    Scheme.of("int8", activations="int8"),
    Scheme.of("nf4"),
    Scheme.of("float8_e4m3fn"),
    Scheme.of("bfloat16"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def case(scheme, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(40, 512, generator=generator), scheme)
    return torch.randn(3, 512, generator=generator).to(dtype), weight


@every_scheme
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_pass(kernel, scheme):
    spec = Spec(op="linear", scheme=scheme, shape=(40, 512), device="cpu")
    reason = KERNELS[kernel].why_not(spec)
    if reason is not None and kernel != "reference":
        pytest.skip(reason)
    linear = KERNELS[kernel].linear
    # The torch kernel rounds the weight to a 16-bit dtype of x; it is not what is timed.
    dtypes = [torch.float32] if kernel == "torch" else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        x, weight = case(scheme, dtype)
        rounds = kernel == "native" and native.instruction_set() == "avx512_bf16"
        y = linear(x, weight, None)
        as_bfloat16 = rounds and dtype == torch.bfloat16
        assert 0 < check_linear("kernel", y, x, weight, as_bfloat16=as_bfloat16) <= 1


def lose_a_scale(weight):
    parts = {"packed": weight.packed.clone()}
    if weight.scale is None:
        parts["packed"][0] = 0
    else:
        parts["scale"] = weight.scale.clone()
        parts["scale"][0, 0] = 1.0
    return dataclasses.replace(weight, **parts)


@every_scheme
def test_wrong_answers_are_rejected(scheme):
    x, weight = case(scheme)
    linear = KERNELS["reference"].linear
    right = linear(x, weight, None)
    swapped = right.clone()
    swapped[:, [0, -1]] = right[:, [-1, 0]]
    missing = x.clone()
    missing[:, -1] = 0
    wrong = {
        "twice": right * 2,
        "negative": -right,
        "two rows swapped": swapped,
        "a scale lost": linear(x, lose_a_scale(weight), None),
        "the last column left out": linear(missing, weight, None),
        "one in a thousand": right * 1.001,
        "NaN": right * torch.nan,
    }
    for name, y in wrong.items():
        with pytest.raises(WrongAnswerError, match="M=3.*what rounding explains"):
            check_linear(name, y, x, weight)


def test_samples_are_spread_and_have_both_ends():
    assert sample(3, 8).tolist() == [0, 1, 2]
    assert sample(9, 3).tolist() == [0, 4, 8]
    assert sample(1, 8).tolist() == [0]


def test_kl_of_logits():
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    assert mean_kl(logits, logits + 3) == pytest.approx(0, abs=1e-6)
    assert mean_kl(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])) == pytest.approx(0.1201, abs=1e-4)
    assert check_logits("same", logits, logits, 1e-6) == pytest.approx(0, abs=1e-6)
    for wrong in (-logits, logits * torch.nan):
        with pytest.raises(WrongAnswerError, match="model: mean KL .* at most 0.01"):
            check_logits("model", logits, wrong, 0.01)
