"""Folding a batch norm changes nothing but the number of operations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calibquant.model.fold_bn import fold_bn


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.01, 3)
    return norm


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_convolution_equals_convolution_and_batch_norm(groups, bias):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, bias=bias)
    norm, x = random_norm(16), torch.randn(2, 8, 9, 9)
    weight, offset = fold_bn(convolution, norm)
    with torch.no_grad():
        expected = norm(convolution(x))
    torch.testing.assert_close(F.conv2d(x, weight, offset, 2, 1, 1, groups), expected, rtol=1e-4, atol=1e-5)


def test_a_channel_of_hardly_any_variance_folds_to_finite_values():
    norm = random_norm(4)
    norm.running_var.fill_(1e-30)
    weight, bias = fold_bn(nn.Conv2d(4, 4, 1, bias=False), norm)
    assert weight.isfinite().all() and bias.isfinite().all()


def test_folding_leaves_the_model_alone_and_returns_plain_tensors():
    convolution, norm = nn.Conv2d(4, 4, 1, bias=False), random_norm(4)
    before = convolution.weight.clone(), norm.running_mean.clone()
    weight, bias = fold_bn(convolution, norm)
    weight.zero_()
    assert torch.equal(convolution.weight, before[0]) and torch.equal(norm.running_mean, before[1])
    assert not weight.requires_grad and not bias.requires_grad and weight.dtype == torch.float32
