"""Affine quantization as pure functions: the one copy of every formula.

Quantization parameters (qparams) arrive broadcast-shaped: a scalar tensor for per-tensor, and e.g.
``[C, 1, 1, 1]`` for per-channel quantization of a convolution's weight, so that both are one path.
Rounding is half-to-even on ``x * (1 / scale)``, then the zero-point is added, as torch's own
``fake_quantize_per_tensor_affine`` does.

What a gradient of our own is given to keep is never the result of a change in place: compiled by torch
2.11, such a gradient is zero.
"""

import torch
from torch import Tensor

SCALE_EPS = torch.finfo(torch.float32).eps
"""Smallest scale: below it ``1 / scale`` leaves float32's comfortable range."""

PER_TENSOR = -1
"""The value of `ch_axis` that means one range for the whole tensor, as in the published configs."""

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid (Louizos et al. 2018; AdaRound, Nagel et al. 2020, eq. 23)."""


def quant_bounds(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return ``(quant_min, quant_max)``: unsigned for asymmetric, signed for symmetric grids.

    Raises:
        ValueError: bits outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}, allowed are 2 to 8")
    if symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def choose_qparams_affine(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of a grid as wide as the clipping range ``[min_val, max_val]``, zero in it.

    A symmetric grid is as wide as the larger end on both sides. As signed integers have, it has a level
    more below zero than above: it ends half a step short of that end above, and half a step beyond below.

    Args:
        min_val, max_val: clipping range, any shape (one element per tensor or channel).
        symmetric: one step size on both sides of a zero-point of 0.

    Returns:
        ``(scale, zero_point)``, float32, shaped as the range; zero_point holds integers.
    """
    min_val = torch.clamp(min_val, max=0.0)
    max_val = torch.clamp(max_val, min=0.0)
    levels = float(quant_max - quant_min)
    if symmetric:
        scale = torch.clamp(2 * torch.maximum(-min_val, max_val) / levels, min=SCALE_EPS)
        return scale, torch.zeros_like(scale)
    scale = torch.clamp((max_val - min_val) / levels, min=SCALE_EPS)
    zero_point = torch.clamp(quant_min - torch.round(min_val / scale), quant_min, quant_max)
    return scale, zero_point


def broadcastable(qparam: Tensor, ndim: int, ch_axis: int) -> Tensor:
    """A qparam of shape ``[C]`` or ``[1]``, shaped to broadcast over a tensor of ``ndim`` axes.

    ``ch_axis`` is the axis of the channels, -1 where the tensor has one qparam.
    """
    if ch_axis == PER_TENSOR:
        return qparam
    shape = [1] * ndim
    shape[ch_axis] = -1
    return qparam.view(shape)


def round_to_steps(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How many steps of ``scale`` each element of ``x`` is from zero, rounded and kept in bounds."""
    return (x * (1.0 / scale)).round_().clamp_(low, high)


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integer codes of ``x`` (as floats): ``clamp(round(x / scale) + zero_point)``."""
    return round_to_steps(x, scale, quant_min - zero_point, quant_max - zero_point).add_(zero_point)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of integer codes: ``(codes - zero_point) * scale``."""
    return (codes - zero_point).mul_(scale)


def fake_quantize_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize, differentiable in ``x``, ``scale`` and ``zero_point``.

    Straight-through inside the clipping range; the step size's gradient is LSQ's (Esser et al. 2020,
    eq. 3), the zero-point's LSQ+'s (Bhalgat et al. 2020), both times ``grad_factor`` (LSQ, section
    2.2: ``1 / sqrt(numel * quant_max)``). Where ``mask`` is false an element stays as it is (QDrop).
    """
    if x.is_cuda and mask is None and scale.numel() == 1 and not torch.is_grad_enabled():
        zero_point = integer_zero_point(zero_point, quant_min, quant_max).to(torch.int32)
        return fake_quantize_in_one_pass(x, scale, zero_point, quant_min, quant_max)
    if is_channels_last(x):
        stored = as_stored(x), as_stored(scale), as_stored(zero_point)
        drawn = None if mask is None else as_stored(mask)
        return as_axes(fake_quantize_affine(*stored, quant_min, quant_max, grad_factor, drawn), x)
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, grad_factor, mask)
    return result


def fake_quantize_in_one_pass(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """:func:`fake_quantize_affine` without gradients, by torch's own kernel: one pass for four on a GPU.

    On a CPU that takes longer than the four.

    Args:
        scale, zero_point: ``[1]``; the zero-point int32.
    """
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)


def integer_zero_point(zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """A zero-point, which may be learned, as it is deployed: an integer inside the grid."""
    return torch.round(zero_point).clamp(quant_min, quant_max)


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is ``[N, C, H, W]`` by its axes and ``[N, H, W, C]`` in memory.

    What has gradients of its own is given such tensors as they are stored: compiled code would copy each
    gradient, on its way in, to the order of the axes (torch 2.11 to 2.14).
    """
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def as_stored(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N, H * W, C]``; what has no such axes stays as it is."""
    return x.permute(0, 2, 3, 1).flatten(1, 2) if x.ndim == 4 else x


def as_axes(x: Tensor, like: Tensor) -> Tensor:
    """``[N, H * W, C]`` as ``[N, C, H, W]``, like another tensor."""
    rows: Tensor = x.unflatten(1, like.shape[2:])
    return rows.permute(0, 3, 1, 2)


class _FakeQuantize(torch.autograd.Function):
    """:func:`fake_quantize_affine` with its gradients written out, to spare passes over memory."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, grad_factor, mask):  # type: ignore[no-untyped-def, override]
        zero_point = integer_zero_point(zero_point, quant_min, quant_max)
        low, high = quant_min - zero_point, quant_max - zero_point
        y = round_to_steps(x, scale, low, high) * scale  # a new tensor, see above
        if mask is not None:
            y = torch.where(mask, y, x)
        ctx.save_for_backward(x, y, scale, low, high, mask)
        ctx.grad_factor = grad_factor
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, y, scale, low, high, mask = ctx.saved_tensors
        straight = (x >= (low - 0.5) * scale).logical_and_(x <= (high + 0.5) * scale)
        if mask is not None:
            straight.logical_or_(mask.logical_not())
        grad_x = grad * straight if ctx.needs_input_grad[0] else None
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            # inside: round(x/s) - x/s; outside: the bound's distance from the zero-point, y/s
            slope = torch.addcmul(y, x, straight, value=-1)
            grad_scale = sum_of_products(slope, grad, scale.shape) * (ctx.grad_factor / scale)
        if ctx.needs_input_grad[2]:
            clipped = sum_of_products(straight.logical_not_(), grad, scale.shape)
            grad_zero_point = clipped * (-ctx.grad_factor * scale)
        return grad_x, grad_scale, grad_zero_point, None, None, None, None


def sum_of_products(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """``(a * b)`` summed to a broadcastable shape; on a CPU one pass where everything is summed.

    On a GPU compiled code makes it one pass, with whatever else reads ``a`` and ``b``.
    """
    alike = a.dtype == b.dtype and a.stride() == b.stride()
    if a.device.type == "cpu" and shape.numel() == 1 and alike and a.is_contiguous():
        return torch.dot(a.flatten(), b.flatten()).view(shape)
    return (a * b).sum_to_size(shape)


def lsq_grad_factor(x: Tensor, qparam: Tensor, quant_max: int) -> float:
    """LSQ's gradient scale ``1 / sqrt(elements per step size * quant_max)`` (Esser et al. 2020)."""
    return float((x.numel() / qparam.numel() * quant_max) ** -0.5)


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """Soft rounding ``h`` in [0, 1] from rounding logits (AdaRound, Nagel et al. 2020, eq. 23)."""
    if is_channels_last(logits):
        return as_axes(rectified_sigmoid(as_stored(logits)), logits)
    result: Tensor = _RectifiedSigmoid.apply(logits)
    return result


class _RectifiedSigmoid(torch.autograd.Function):
    """:func:`rectified_sigmoid`; its slope follows from its value, so nothing else is kept."""

    @staticmethod
    def forward(ctx, logits):  # type: ignore[no-untyped-def, override]
        h = torch.sigmoid(logits).mul_(ZETA - GAMMA).add_(GAMMA).clamp(0.0, 1.0)  # a new tensor
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        (h,) = ctx.saved_tensors
        slope = (h - GAMMA).mul_(ZETA - h).mul_(1 / (ZETA - GAMMA))
        return slope.mul_((h > 0).logical_and_(h < 1)).mul_(grad)


def initial_rounding_logits(weight: Tensor, scale: Tensor) -> Tensor:
    """Rounding logits for which soft rounding reproduces the weight: ``h = frac(weight / scale)``."""
    ratio = weight / scale
    fraction = ratio - torch.floor(ratio)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def round_from_floor(
    floor: Tensor,
    h: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Dequantized weight whose floor ``floor(weight / scale)`` is moved up by ``h`` in [0, 1]."""
    return (floor + h).clamp(quant_min - zero_point, quant_max - zero_point) * scale


def rounding_regularizer(h: Tensor, b: float | Tensor) -> Tensor:
    """Sum of ``1 - |2h - 1|^b``: zero only where every ``h`` is 0 or 1 (AdaRound, eq. 24)."""
    result: Tensor = _RoundingRegularizer.apply(h, b)
    return result


class _RoundingRegularizer(torch.autograd.Function):
    """:func:`rounding_regularizer`, with one power for value and gradient together."""

    @staticmethod
    def forward(ctx, h, b):  # type: ignore[no-untyped-def, override]
        centred = h.mul(2).sub_(1)
        slope = centred.abs().pow_(b - 1)
        value = h.numel() - (slope * centred.abs()).sum()
        ctx.save_for_backward(slope * centred.sign_())  # a new tensor
        ctx.factor = -2 * b
        return value

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        (slope,) = ctx.saved_tensors
        return slope * (grad * ctx.factor), None
