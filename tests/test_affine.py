"""The arithmetic against torch's own fake-quantize operators and against hand computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibquant.quantization.affine import (
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    initial_rounding_logits,
    lsq_grad_factor,
    quant_bounds,
    quantize_affine,
    rectified_sigmoid,
    round_from_floor,
    rounding_regularizer,
)

ALL_BITS = pytest.mark.parametrize("bits", range(2, 9))
BOTH_SIGNS = pytest.mark.parametrize("symmetric", [False, True])
floats = st.floats(-100, 100, width=32)


def random_case(bits: int, symmetric: bool, channels: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """A tensor with values on both sides of the clipping range, none of them near a rounding tie."""
    generator = torch.Generator().manual_seed(bits)
    quant_min, quant_max = quant_bounds(bits, symmetric)
    scale = torch.rand(channels, generator=generator) * 0.3 + 0.01
    zero_point = torch.randint(quant_min, quant_max + 1, (channels,), generator=generator).float()
    if symmetric:
        zero_point.zero_()
    steps = torch.randint(-(2**bits), 2**bits, (6, channels, 50), generator=generator)
    offset = torch.rand(steps.shape, generator=generator) * 0.9 - 0.45
    return (steps + offset) * scale[:, None], scale, zero_point, quant_min, quant_max


@ALL_BITS
@BOTH_SIGNS
@pytest.mark.parametrize("ties", [False, True])
def test_per_tensor_values_equal_torchs_bit_for_bit(bits, symmetric, ties):
    x, scale, zero_point, *bounds = random_case(bits, symmetric, 1)
    if ties:
        x = (torch.arange(-999.0, 999) + 0.5) * scale
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), *bounds)
    assert torch.equal(fake_quantize_affine(x, scale, zero_point, *bounds), expected)


@ALL_BITS
@BOTH_SIGNS
@pytest.mark.parametrize("ties", [False, True])
def test_per_channel_values_equal_torchs_bit_for_bit(bits, symmetric, ties):
    x, scale, zero_point, *bounds = random_case(bits, symmetric, 5)
    if ties:
        x = (torch.arange(-999.0, 999) + 0.5) * scale.view(1, 5, 1)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 1, *bounds)
    actual = fake_quantize_affine(x, scale.view(1, 5, 1), zero_point.view(1, 5, 1), *bounds)
    assert torch.equal(actual, expected)


@ALL_BITS
@BOTH_SIGNS
@pytest.mark.parametrize("channels", [1, 5])
def test_gradients_of_input_step_and_zero_point_equal_torchs(bits, symmetric, channels):
    x, scale, zero_point, *bounds = random_case(bits, symmetric, channels)
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    factor = lsq_grad_factor(x, scale, bounds[1])
    if channels == 1:
        expected = torch._fake_quantize_learnable_per_tensor_affine(*inputs, *bounds, factor)
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(*inputs, 1, *bounds, factor)
    shape = (1, channels, 1)
    actual = fake_quantize_affine(x, scale.view(shape), zero_point.view(shape), *bounds, factor)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_channel", [False, True])
def test_elements_outside_the_mask_pass_unchanged_and_teach_the_qparams_nothing(layout, per_channel):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, 7, generator=generator).to(memory_format=layout)
    mask = torch.rand(x.shape, generator=generator) < 0.5
    shape = (1, 5, 1, 1) if per_channel else (1,)
    inputs = [x, torch.full(shape, 0.15), torch.full(shape, 4.0)]
    upstream = torch.randn(x.shape, generator=generator)
    inputs = [t.requires_grad_() for t in inputs]
    expected = torch.where(mask, fake_quantize_affine(*inputs, 0, 15, 0.5), x)
    actual = fake_quantize_affine(*inputs, 0, 15, 0.5, mask)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_zero_point_between_integers_acts_as_the_nearest_one():
    x, scale, zero_point, *bounds = random_case(4, False, 1)
    expected = fake_quantize_affine(x, scale, zero_point, *bounds)
    assert torch.equal(fake_quantize_affine(x, scale, zero_point + 0.3, *bounds), expected)


def test_lsq_gradient_factor_counts_the_elements_of_one_step_size():
    x = torch.empty(8, 4, 3)
    assert lsq_grad_factor(x, torch.empty(1), 15) == pytest.approx(1 / math.sqrt(96 * 15))
    assert lsq_grad_factor(x, torch.empty(4), 15) == pytest.approx(1 / math.sqrt(24 * 15))


@settings(deadline=None)
@given(
    x=st.lists(floats, min_size=1),
    scale=st.floats(2**-10, 8, width=32),
    bits=st.integers(2, 8),
    zero_point=st.integers(0, 255),
)
def test_quantizing_twice_changes_nothing(x, scale, bits, zero_point):
    _, quant_max = quant_bounds(bits, symmetric=False)
    qparams = torch.tensor(scale), torch.tensor(float(min(zero_point, quant_max)))
    once = fake_quantize_affine(torch.tensor(x), *qparams, 0, quant_max)
    assert torch.equal(fake_quantize_affine(once, *qparams, 0, quant_max), once)


@settings(deadline=None)
@given(ends=st.tuples(floats, floats), bits=st.integers(2, 8), symmetric=st.booleans())
def test_the_chosen_grid_covers_the_range_to_half_a_step_and_holds_zero(ends, bits, symmetric):
    bounds = quant_bounds(bits, symmetric)
    edges = torch.tensor([min(ends), 0.0, max(ends)])
    scale, zero_point = choose_qparams_affine(edges[0], edges[2], *bounds, symmetric)
    error = (fake_quantize_affine(edges, scale, zero_point, *bounds) - edges).abs()
    assert error.max() <= scale * 0.5001
    assert error[1] == 0


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "scale", "zero_point"),
    [
        (-1.0, 2.0, False, 0.2, 5),
        (0.0, 3.0, False, 0.2, 0),
        (1.0, 3.0, False, 0.2, 0),
        (-3.0, -1.0, False, 0.2, 15),
        (-1.5, 0.5, True, 0.2, 0),
        (-0.5, 1.5, True, 0.2, 0),
    ],
)
def test_four_bit_qparams_of_simple_ranges(low, high, symmetric, scale, zero_point):
    bounds = quant_bounds(4, symmetric)
    chosen = choose_qparams_affine(torch.tensor([low]), torch.tensor([high]), *bounds, symmetric)
    torch.testing.assert_close(chosen, (torch.tensor([scale]), torch.tensor([float(zero_point)])))


def test_an_all_zero_tensor_gets_a_usable_step():
    scale, zero_point = choose_qparams_affine(torch.zeros(2), torch.zeros(2), 0, 15, False)
    assert torch.equal(fake_quantize_affine(torch.zeros(2), scale, zero_point, 0, 15), torch.zeros(2))


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_two_to_eight_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        quant_bounds(bits, symmetric=False)


def test_codes_are_integers_inside_the_bounds_and_dequantize_to_the_fake_quantized_values():
    _, scale, zero_point, *bounds = random_case(8, True, 1)
    x = torch.arange(-999.0, 999) / 2 * scale  # ties show any difference in the rounding
    codes = quantize_affine(x, scale, zero_point, *bounds)
    assert set(codes.unique().tolist()) == set(range(-128, 128))
    expected = fake_quantize_affine(x, scale, zero_point, *bounds)
    assert torch.equal(dequantize_affine(codes, scale, zero_point), expected)


@ALL_BITS
def test_initial_soft_rounding_reproduces_the_weight_clamped_to_the_grid(bits):
    weight, scale, zero_point, quant_min, quant_max = random_case(bits, False, 1)
    h = rectified_sigmoid(initial_rounding_logits(weight, scale))
    actual = round_from_floor(torch.floor(weight / scale), h, scale, zero_point, quant_min, quant_max)
    low, high = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    torch.testing.assert_close(actual, torch.clamp(weight, low, high), rtol=1e-5, atol=1e-6)


def test_rounding_up_stops_at_the_ends_of_the_grid():
    floor, h = torch.tensor([-5.0, 0.0, 9.0]), torch.tensor([0.5, 0.25, 0.5])
    actual = round_from_floor(floor, h, torch.tensor(0.1), torch.tensor(3.0), 0, 7)
    torch.testing.assert_close(actual, torch.tensor([-0.3, 0.025, 0.4]))


def test_soft_rounding_reaches_zero_and_one_exactly():
    h = rectified_sigmoid(torch.tensor([-4.0, 0.0, 4.0]))
    assert torch.equal(h, torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("b", [20.0, 2.0])
def test_regularizer_is_zero_once_rounding_is_hard(b):
    assert rounding_regularizer(torch.tensor([0.0, 1.0, 1.0]), b) == 0


def test_regularizer_equals_a_hand_computation():
    h = torch.tensor([0.25, 0.5, 0.9, 1.0])
    by_hand = (1 - 0.5**2) + 1 + (1 - 0.8**2) + 0
    assert float(rounding_regularizer(h, 2.0)) == pytest.approx(by_hand)


@pytest.mark.parametrize("b", [20.0, 7.3, 2.0])
def test_gradients_of_soft_rounding_and_regularizer_equal_autograds(b):
    logits = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    h = torch.clamp(torch.sigmoid(logits) * 1.2 - 0.1, 0, 1)
    expected = (1 - (2 * h - 1).abs() ** b).sum() + (h * torch.arange(101)).sum()
    h = rectified_sigmoid(logits)
    actual = rounding_regularizer(h, b) + (h * torch.arange(101)).sum()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))
