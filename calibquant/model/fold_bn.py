"""Batch-norm folding: a convolution and the batch norm that reads its output become one convolution."""

import torch
from torch import Tensor, nn


def fold_bn(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the single convolution that equals ``norm(convolution(x))`` at inference.

    Returns:
        ``(weight, bias)`` of shapes ``[out, in / groups, k, k]`` and ``[out]``, computed in float64
        and returned in the convolution's dtype.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = torch.zeros_like(gain) if convolution.bias is None else convolution.bias.double()
    weight = convolution.weight.double() * gain[:, None, None, None]
    folded = norm.bias.double() + (bias - norm.running_mean.double()) * gain
    dtype = convolution.weight.dtype
    return weight.to(dtype).detach(), folded.to(dtype).detach()
