"""Max pooling: the gathered form against torch's own, value and gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calibquant.model.pooling import gathered_max_pool, max_pool


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 2, 2), (3, 3, 0), (2, 3, 0)])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 9, 7)])
def test_value_and_gradient_are_those_of_torch(window, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    theirs, ours = F.max_pool2d(x, *window), gathered_max_pool(x, *window)
    assert torch.equal(ours, theirs)
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(theirs, x, grad)
    (actual,) = torch.autograd.grad(ours, x, grad)
    torch.testing.assert_close(actual, expected)


def test_a_network_without_pooling_stays_without():
    x = torch.randn(1, 2, 4, 4)
    compiled = torch.compile(lambda t: max_pool(nn.Identity(), t), backend="eager")
    assert torch.equal(compiled(x), x) and max_pool(nn.Identity(), x) is x


def test_compiled_pooling_gives_the_same_values():
    x = torch.randn(2, 3, 8, 8)
    pooling = nn.MaxPool2d(3, 2, 1)
    compiled = torch.compile(lambda t: max_pool(pooling, t), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), pooling(x))
