"""Writes torchao.safetensors: what torchao makes of a matrix in the formats of OCP and NVIDIA.

    pip install torchao && python tests/golden/make_torchao.py

weight (N, K) float32. For each format of MX NAME.scale (N, K / 32) uint8, the bytes of the scales,
and NAME.codes (N, K) uint8, a code each; and for nvfp4 the same by groups of 16, with
nvfp4.tensor_scale () float32.
"""

from pathlib import Path

import torch
import torchao
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

N, K = 24, 256
ELEMENTS = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}


def example() -> torch.Tensor:
    """Rows of many sizes, ties between codes, zeros of both signs, a row of one magnitude."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    weight[:12] *= torch.logspace(-6, 3, 12)[:, None]
    weight[12:16] = torch.arange(-512, 512).view(4, K) / 64  # ties of every element format
    weight[16] = torch.randint(-8, 9, (K,), generator=generator) / 4
    weight[17] = 0.3 * weight[17].sign()
    weight[18, :64] = 0.0
    weight[19, ::3] = -0.0
    weight[20] *= 1e-40
    weight[21] *= 1e37
    return weight


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(len(packed), -1)


def main() -> None:
    weight = example()
    tensors = {"weight": weight}
    for name, element in ELEMENTS.items():
        scale, codes = to_mx(weight, element, 32)
        codes = codes.view(torch.uint8).view(N, -1)
        tensors[f"{name}.scale"] = scale.view(torch.uint8).view(N, K // 32).clone()
        tensors[f"{name}.codes"] = (nibbles(codes) if name == "mxfp4" else codes).clone()
    moderate = weight[:20].contiguous()
    tensor_scale = per_tensor_amax_to_scale(moderate.abs().max())
    scale, packed = nvfp4_quantize(moderate, 16, tensor_scale)
    tensors["nvfp4.tensor_scale"] = tensor_scale
    tensors["nvfp4.scale"] = scale.view(torch.uint8).view(20, K // 16).clone()
    tensors["nvfp4.codes"] = nibbles(packed).clone()
    save_file(
        tensors,
        Path(__file__).with_name("torchao.safetensors"),
        metadata={"producer": f"torchao {torchao.__version__}, CPU"},
    )


if __name__ == "__main__":
    main()
