"""The demo's table; the demo itself is `make demo`."""

import importlib.util
from io import StringIO
from pathlib import Path

from rich.console import Console

FILE = Path(__file__).parent.parent / "examples" / "demo.py"


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_table_shows_every_figure_in_full():
    demo = load_demo()
    row = {
        "comparison": {
            "candidate": {"bytes": 538_061_000, "bits_per_weight": 32.0, "perplexity": 123.456},
            "delta_nll": {"mean": -0.0123, "low": -0.0234, "high": 0.0345},
            "kl": {"mean": 0.0456},
            "top1_agreement": 0.987,
        },
        "speed": {
            "prefill_tokens_per_second": 1434.4,
            "decode_tokens_per_second": 21.5,
            "peak_rss_bytes": 2_602_000_000,
        },
    }
    out = StringIO()
    Console(file=out, width=demo.wide.width).print(demo.table({"original": row, "bfloat16": row}))
    text = out.getvalue()
    for figure in (
        *("538.1", "32.00", "123.46", "-0.0123", "(-0.0234 +0.0345)", "0.0456"),
        *("98.7%", "1434", "21.5", "2602", "original", "bfloat16"),
    ):
        assert text.count(figure) >= 1, figure
    assert "…" not in text
