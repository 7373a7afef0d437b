"""Codebooks: real = scale * levels[code], with scale = max |r| of the block.

Source: QLoRA (arXiv:2305.14314) section 3 for nf4; bitsandbytes for the code order of both tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.numerics.formats import Format


def codebook_codes(blocks: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The code of the level nearest to real / scale. blocks: (R, G, B) float; scale: (R, G);
    returns uint8.
    """
    assert fmt.levels is not None
    code_of = {level: code for code, level in reversed(list(enumerate(fmt.levels)))}  # -0.0 is 0.0
    ordered = sorted(code_of)
    levels = torch.tensor(ordered, dtype=torch.float32, device=blocks.device)
    codes = torch.tensor([code_of[v] for v in ordered], dtype=torch.uint8, device=blocks.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    normalised = blocks.float() / scale.unsqueeze(-1).float()
    return codes[torch.bucketize(normalised.contiguous(), midpoints)]


def codebook_values(codes: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """real = scale * levels[codes]. codes: (R, G, B) uint8; scale: (R, G); returns float32."""
    assert fmt.levels is not None
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=codes.device)
    return levels[codes.int()].mul_(scale.unsqueeze(-1).float())
