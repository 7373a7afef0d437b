"""zeropoint doctor: facts about this machine."""

from __future__ import annotations

import platform
import re

import pytest
import torch

import zeropoint
from cli.conftest import Cli
from zeropoint.cli import machine
from zeropoint.kernels.select import KERNELS
from zeropoint.numerics import FORMATS


def test_versions_machine_and_kernels(cli: Cli) -> None:
    ran = cli("doctor")
    assert (ran.code, ran.err) == (0, "")
    for expected in (platform.python_version(), zeropoint.__version__, torch.__version__, *KERNELS):
        assert expected in ran.out
    data = cli("doctor", "--json", "-").json
    assert data["versions"]["torch"] == torch.__version__
    assert data["cpu"]["threads"] == torch.get_num_threads()
    cpu = [row for row in data["kernels"] if row["device"] == "cpu"]
    assert len(cpu) == len(KERNELS) * len(FORMATS)
    assert all(row["reason"] is None for row in cpu if row["kernel"] == "torch")
    assert all(row["reason"] for row in cpu if row["kernel"] == "reference")


def test_what_is_missing_and_forced(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(machine, "_cpuinfo", dict)  # no /proc/cpuinfo
    monkeypatch.setenv("ZEROPOINT_KERNEL", "torch")
    ran = cli("doctor")
    assert re.search("no-such-package +not installed", ran.out)
    assert "torch (ZEROPOINT_KERNEL)" in ran.out
    data = cli("doctor", "--json", "-").json
    assert data["versions"]["no-such-package"] is None
    assert set(data["cpu"]["instruction_sets"].values()) == {None}
    assert data["forced_kernel"] == "torch"
