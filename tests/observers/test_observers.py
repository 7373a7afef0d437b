"""Observers: means over all tokens, whatever the batches."""

from __future__ import annotations

import pytest
import torch

from zeropoint.observers import CrossObserver, HessianObserver, MeanSquareObserver
from zeropoint.observers.hessian import ROWS

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
Y = X + 0.1 * torch.randn(30, 6, generator=torch.Generator().manual_seed(1))


def test_a_hessian_is_the_mean_of_outer_products():
    observer = HessianObserver(6)
    for part in X.split(7):
        observer.update(part)
    found = observer.result()
    assert found.tokens == 30 and found.matrix.dtype == torch.float32
    expected = (sum(torch.outer(x, x) for x in X.double()) / 30).float()
    torch.testing.assert_close(found.matrix, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.matrix, found.matrix.T)


def test_a_hessian_of_more_columns_than_are_summed_at_a_time_is_whole():
    x = torch.randn(40, 2 * ROWS + 5, generator=torch.Generator().manual_seed(2))
    observer = HessianObserver(x.shape[1])
    observer.update(x)
    found, _ = observer.result()
    torch.testing.assert_close(found.double(), x.double().T @ x.double() / 40, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:ROWS, ROWS:], found[ROWS:, :ROWS].T)


def test_bfloat16_inputs_are_summed_in_float32():
    observer = HessianObserver(1)
    observer.update(torch.ones(1000, 1, dtype=torch.bfloat16))
    assert observer.result().matrix.item() == 1.0


def test_the_diagonal_is_the_mean_square():
    observer, whole = MeanSquareObserver(6), HessianObserver(6)
    for part in X.split(11):
        observer.update(part)
        whole.update(part)
    expected = whole.result().matrix.diagonal()
    torch.testing.assert_close(observer.result().float(), expected)


def test_drift_is_seen_by_the_quantized_inputs():
    observer = CrossObserver(6)
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        observer.update(x, y)
    expected = (X - Y).double().T @ Y.double() / 30
    torch.testing.assert_close(observer.result(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [CrossObserver, MeanSquareObserver])
def test_nothing_seen_is_zero(make):
    assert make(3).result().abs().max() == 0


def test_nothing_seen_is_no_tokens():
    assert HessianObserver(3).result().tokens == 0
