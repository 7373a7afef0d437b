"""Fixtures for tests of every room."""

import pytest


@pytest.fixture
def torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen modules compute as live ones do, so that a test can ask for equality, bit for bit."""
    monkeypatch.setenv("ZEROPOINT_KERNEL", "torch")
