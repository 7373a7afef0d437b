"""Writes llm_int8.safetensors: what bitsandbytes makes of inputs with planted outliers.

    pip install bitsandbytes && python tests/golden/make_llm_int8.py

weight_codes (N, K) int8, weight_absmax (N,) float32, bias (N,) float16; and for the cases `many`
(several tokens) and `one` (a single token): x (T, K) float16, columns: the outlier columns, y
(T, N) float16 of Linear8bitLt's operator with threshold 6, plain (T, N) float16 without.
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

N, K, T = 24, 160, 10
THRESHOLD = 6.0


def product(x, codes, absmax, bias, threshold):
    """Columns of outliers, and y."""
    x_codes, x_absmax, columns = functional.int8_vectorwise_quant(x.clone(), threshold=threshold)
    if not threshold:
        operator = torch.ops.bitsandbytes.int8_scaled_mm
        return columns, operator(x_codes, codes, x_absmax, absmax, bias=bias, dtype=x.dtype)
    operator = torch.ops.bitsandbytes.int8_mixed_scaled_mm
    return columns, operator(x, x_codes, codes, x_absmax, absmax, columns, bias)[0]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator).half()
    bias = torch.randn(N, generator=generator).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    x = torch.randn(T, K, generator=generator).clamp(-3, 3)
    x[:, 7] *= 20  # outliers in nearly every token
    x[3, 40] = -61.0  # in one token only
    x[5, 41] = THRESHOLD  # at the threshold
    x[6, 42] = 5.996  # below it, and the largest value of its token
    x[6, 7] = 0.25  # below it, in a column of outliers
    x[8] = 0.0
    tensors = {"weight_codes": codes, "weight_absmax": absmax, "bias": bias}
    for name, tokens in (("many", x.half()), ("one", x[3:4].half())):
        columns, y = product(tokens, codes, absmax, bias, THRESHOLD)
        _, plain = product(tokens, codes, absmax, bias, 0.0)
        for what, tensor in (("x", tokens), ("columns", columns), ("y", y), ("plain", plain)):
            tensors[f"{name}.{what}"] = tensor.contiguous()
    save_file(
        tensors,
        Path(__file__).with_name("llm_int8.safetensors"),
        metadata={"producer": f"bitsandbytes {bitsandbytes.__version__}", "threshold": "6.0"},
    )


if __name__ == "__main__":
    main()
