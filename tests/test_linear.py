"""Products of a few rows: the same as x @ weight.T whatever the number of rows."""

import pytest
import torch
from eagle_fast_kernels.linear import few_rows_matmul
from torch import nn

from eagle_fast.linear import FewRowsLinear, use_few_rows_linear


# one row, fewer than a step, whole steps, the last count that takes the fast way, and past it
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (8,), (3, 5), (32,), (33,), (2, 2, 9)])
def test_few_rows(shape, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 48, generator=generator).to(device)
    weight = torch.randn(100, 48, generator=generator).to(device)
    out = few_rows_matmul(x, weight)
    assert out.shape == (*shape, 100)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


def test_model_is_swapped_but_shares_its_weights():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(Quantised(4, 4), nn.Linear(4, 3, bias=False)))
    x = torch.randn(5, 8)
    expected = model(x)
    first = model[0]
    use_few_rows_linear(model)
    assert type(model[0]) is type(model[1][1]) is FewRowsLinear
    assert type(model[1][0]) is Quantised
    assert type(first) is nn.Linear
    assert model[0].weight is first.weight
    torch.testing.assert_close(model(x), expected)


def test_gradients():
    x = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(few_rows_matmul, (x, weight))
