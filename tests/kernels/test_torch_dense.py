import pytest
import torch

from tests.helpers import defaults, example_weight, rtn, schemes
from zeropoint.kernels import torch_dense
from zeropoint.kernels.spec import Spec


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_it_takes_every_scheme_on_every_device(scheme):
    for device in ("cpu", "cuda", "mps"):
        for op in ("linear", "embedding"):
            spec = Spec(op=op, scheme=scheme, shape=(5, 7), device=device)
            assert torch_dense.why_not(spec) is None


@pytest.mark.parametrize("scheme", defaults(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_torchs_own_operator_on_the_dequantized_weight(scheme, dtype):
    weight = rtn(example_weight(5, 64), scheme)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense = weight.dequantize(dtype)
    assert torch.equal(torch_dense.linear(x, weight, None), torch.nn.functional.linear(x, dense))
    indices = torch.tensor([[0, 4]])
    assert torch.equal(torch_dense.embedding(indices, weight, dtype), dense[indices])
