from types import SimpleNamespace

import pytest

from tests.helpers import schemes
from zeropoint import _env
from zeropoint.errors import KernelError, UnknownNameError
from zeropoint.kernels import reference, select, torch_dense
from zeropoint.kernels.select import KERNELS, Choice, choose, get_kernel
from zeropoint.kernels.spec import Spec
from zeropoint.scheme import Scheme

SPEC = Spec(op="linear", scheme=Scheme.of("int4"), shape=(8, 64), device="cpu")


def refusing(reason):
    return SimpleNamespace(why_not=lambda spec: reason, linear=None, embedding=None)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("ZEROPOINT_KERNEL", raising=False)


@pytest.fixture
def table(monkeypatch):
    """Replace the table of kernels for one test. As a whole: its order is the rank."""

    def replace(**kernels):
        monkeypatch.setattr(select, "KERNELS", kernels)

    return replace


@pytest.mark.parametrize("scheme", schemes(), ids=str)
@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_every_job_finds_a_kernel_on_the_cpu_that_is_not_the_oracle(scheme, op):
    choice = choose(Spec(op=op, scheme=scheme, shape=(8, 64), device="cpu"))
    assert choice.kernel in KERNELS and choice.kernel != "reference"


def test_a_kernel_is_found_by_name():
    assert get_kernel("torch") is torch_dense
    assert get_kernel("reference") is reference


def test_an_unknown_kernel_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="'torhc' is not a kernel; close: 'torch'"):
        get_kernel("torhc")


def test_the_first_without_a_reason_is_chosen_and_faster_ones_are_quoted(table):
    table(a=refusing("no AVX-512"), b=refusing("only int8"), c=torch_dense, d=torch_dense)
    assert choose(SPEC) == Choice(kernel="c", refused={"a": "no AVX-512", "b": "only int8"})


def test_without_a_kernel_every_reason_is_listed(table):
    table(fast=refusing("no AVX-512"), reference=reference)
    with pytest.raises(KernelError) as caught:
        choose(SPEC)
    message = str(caught.value)
    assert "no kernel can do" in message and "int4" in message
    assert "'fast': 'no AVX-512'" in message
    assert "the float64 oracle is slow" in message


@pytest.mark.parametrize("name", KERNELS)
def test_the_environment_forces_a_kernel_the_oracle_included(monkeypatch, name):
    monkeypatch.setenv("ZEROPOINT_KERNEL", name)
    assert choose(SPEC) == Choice(kernel=name, refused={})


def test_a_forced_kernel_that_cannot_do_the_job_is_an_error_not_a_fallback(monkeypatch, table):
    table(fast=refusing("K=64 is not a multiple of 128"), torch=torch_dense)
    monkeypatch.setenv("ZEROPOINT_KERNEL", "fast")
    with pytest.raises(
        KernelError, match="ZEROPOINT_KERNEL=fast cannot do .*: K=64 is not a multiple of 128"
    ):
        choose(SPEC)


def test_a_forced_kernel_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setenv("ZEROPOINT_KERNEL", "tirton")
    with pytest.raises(UnknownNameError, match="'tirton' is not a kernel; "):
        choose(SPEC)


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("", None)])
def test_an_empty_variable_forces_nothing(monkeypatch, value, expected):
    monkeypatch.setenv("ZEROPOINT_KERNEL", value)
    assert _env.forced_kernel() == expected
