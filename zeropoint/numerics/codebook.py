"""Codebooks: real = scale * levels[code], with the least scale at which the levels span the block.

Sources: QLoRA (arXiv:2305.14314) section 3 for nf4; bitsandbytes for the code order of nf4 and fp4;
llama.cpp for iq4nl.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.numerics.formats import Format


def codebook_codes(blocks: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The code of the level nearest to real / scale. blocks: (R, G, B) float; scale: (R, G);
    returns uint8.

    A value between two levels has the lower one; of two codes with one level (fp4 has two zeros)
    the first stands for values below or at it. Both as in bitsandbytes 0.50, bit for bit.
    """
    assert fmt.levels is not None
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=blocks.device)
    levels, codes = levels.sort(stable=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    normalised = blocks.float() * (1.0 / scale.unsqueeze(-1).float())
    return codes.to(torch.uint8)[torch.bucketize(normalised.contiguous(), midpoints)]


def codebook_values(codes: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """real = scale * levels[codes]. codes: (R, G, B) uint8; scale: (R, G); returns float32."""
    assert fmt.levels is not None
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=codes.device)
    return levels[codes.int()].mul_(scale.unsqueeze(-1).float())
