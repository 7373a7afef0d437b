"""Peak memory is that of this program."""

import subprocess
import sys

import pytest
import torch

from zeropoint.evaluate import memory
from zeropoint.evaluate.memory import peak_rss_bytes


def test_peak_grows_by_what_is_touched_and_does_not_shrink():
    held = torch.ones(1)
    before = peak_rss_bytes()
    held = torch.ones(100_000_000 + before // 4)  # larger than all that was free
    after = peak_rss_bytes()
    assert after - before > 0.9 * 4 * 100_000_000
    del held
    assert peak_rss_bytes() > 0.99 * after  # the kernel counts each thread's last pages late


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="getrusage is all there is")
def test_a_child_does_not_inherit_the_peak_of_its_parent():
    held = torch.ones(200_000_000)
    code = "from zeropoint.evaluate.memory import peak_rss_bytes; print(peak_rss_bytes())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) < 200_000_000 < 4 * len(held)


def test_without_proc_the_figure_comes_from_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    assert peak_rss_bytes() > 50_000_000
