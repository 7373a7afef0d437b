"""Writes bitsandbytes.safetensors: 4-bit weights as bitsandbytes makes them on a CPU.

    pip install bitsandbytes==0.50.2 && python tests/golden/make_bitsandbytes.py

weight: (3, 4096) bfloat16 with zeros, blocks of zeros, a block of every midpoint between two levels
(ties), large and small blocks. For each format and block size: packed codes, absmax; and with
compress_statistics=True ("double quantization") the codes, absmax and offset of the absmax.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def weight() -> torch.Tensor:
    w = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)) * 0.05
    w[0, :64] = 0
    w[0, 64:80] = -0.0
    w[1, :256] *= 1e-4
    w[1, 256:512] *= 1e3
    for at, kind in ((1024, "nf4"), (1088, "fp4")):
        levels = bnb.get_4bit_type(kind, device="cpu").sort().values
        w[2, at : at + 64] = 0
        w[2, at] = 1
        w[2, at + 1 : at + 16] = (levels[1:] + levels[:-1]) / 2
        w[2, at + 16 : at + 31] = -(levels[1:] + levels[:-1]) / 2
    return w.bfloat16()


def main() -> None:
    w = weight()
    tensors = {"weight": w}
    for kind in ("nf4", "fp4"):
        for size in BLOCK_SIZES:
            packed, state = bnb.quantize_4bit(w, blocksize=size, quant_type=kind)
            name = f"{kind}.{size}"
            tensors[f"{name}.packed"] = packed.reshape(-1)
            tensors[f"{name}.absmax"] = state.absmax
            again, nested = bnb.quantize_4bit(
                w, blocksize=size, quant_type=kind, compress_statistics=True
            )
            assert torch.equal(again, packed)
            tensors[f"{name}.absmax_codes"] = nested.absmax
            tensors[f"{name}.absmax_absmax"] = nested.state2.absmax
            tensors[f"{name}.absmax_offset"] = nested.offset.reshape(1)
            tensors[f"{name}.image"] = bnb.dequantize_4bit(packed, nested)[:, ::61].contiguous()
    tensors["levels"] = bnb.create_dynamic_map()
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        Path(__file__).with_name("bitsandbytes.safetensors"),
        metadata={"producer": f"bitsandbytes {bitsandbytes.__version__}, CPU"},
    )


if __name__ == "__main__":
    main()
