"""Histograms in unicode blocks."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 64, 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def bars(counts: Sequence[int], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of text, the top one first: columns whose heights are proportional to the counts.

    Bins are joined, or repeated, to fill the width as far as whole bins allow. What is not 0 shows.

    >>> print("\\n".join(bars([1, 2, 4], width=3, height=2)))
      █
    ▄██
    """
    heights = _columns(counts, width)
    top = max(heights, default=0)
    if top == 0:
        return []
    eighths = [max(round(8 * height * h / top), h > 0) for h in heights]
    return [
        "".join(_EIGHTHS[min(8, max(0, e - 8 * line))] for e in eighths).rstrip()
        for line in reversed(range(height))
    ]


def _columns(counts: Sequence[int], width: int) -> list[int]:
    if len(counts) > width:
        joined = -(-len(counts) // width)
        return [sum(counts[i : i + joined]) for i in range(0, len(counts), joined)]
    repeated = max(1, width // max(1, len(counts)))
    return [count for count in counts for _ in range(repeated)]
