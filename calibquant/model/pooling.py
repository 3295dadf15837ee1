"""Max pooling whose gradient torch.compile turns into one pass: a gather, where the library scatters.

On a CPU compiled pooling with indices takes ten times as long as this, uncompiled pooling twice.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def max_pool(pooling: nn.Module, x: Tensor) -> Tensor:
    """``pooling(x)`` for a max pooling or identity, in the form that is fastest where it runs.

    In compiled code each maximum of a window gets the window's gradient, elsewhere the first one: the
    same wherever a window's maximum stands once, and after a ReLU wherever it is zero. In bfloat16 some
    stand twice, and all gradients together are larger by some thousandths.
    """
    if torch.compiler.is_compiling() and isinstance(pooling, nn.MaxPool2d):
        kernel, stride, padding = pooling.kernel_size, pooling.stride, pooling.padding
        assert isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)
        return gathered_max_pool(x, kernel, stride, padding)
    out: Tensor = pooling(x)
    return out


def gathered_max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Max pooling of ``[N, C, H, W]`` with square windows, its gradient gathered from the windows."""
    result: Tensor = _MaxPool.apply(x, kernel, stride, padding)
    return result


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, stride, padding):  # type: ignore[no-untyped-def, override]
        y = F.max_pool2d(x, kernel, stride, padding)
        ctx.save_for_backward(x, y)
        ctx.window = kernel, stride, padding
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, y = ctx.saved_tensors
        reach = range(-(-ctx.window[0] // ctx.window[1]))  # windows that may cover a place, along an axis
        total = torch.zeros_like(x)
        for row, in_row in (_window(x, y, 2, back, *ctx.window) for back in reach):
            for column, in_column in (_window(x, y, 3, back, *ctx.window) for back in reach):
                is_maximum = (x == y[:, :, row][..., column]) & (in_row[:, None] & in_column)
                total = total + torch.where(is_maximum, grad[:, :, row][..., column], 0.0)
        return total, None, None, None


def _window(
    x: Tensor, y: Tensor, axis: int, back: int, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """For each place along an axis: the window ``back`` before the last that may cover it; if it does."""
    place = torch.arange(x.shape[axis], device=x.device) + padding
    window = torch.div(place, stride, rounding_mode="floor") - back
    covers = (window >= 0) & (window < y.shape[axis]) & (place < window * stride + kernel)
    return window.clamp(0, y.shape[axis] - 1), covers
