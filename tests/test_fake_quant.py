"""The quantizers: what each learns, what dropping and hardening do, and what a weight becomes."""

import copy
import math

import pytest
import torch
from torch import Tensor

from calibquant.quantization.drop import Draws
from calibquant.quantization.fake_quant import (
    QUANTIZERS,
    AdaRoundFakeQuantize,
    FakeQuantize,
    FixedFakeQuantize,
    IntegerWeight,
    LSQFakeQuantize,
    LSQPlusFakeQuantize,
    QuantizerConfig,
    Role,
)
from calibquant.quantization.observer import PER_TENSOR
from calibquant.quantization.rounding import (
    FARTHEST,
    NEAREST,
    ROUNDINGS,
    Rounding,
    SoftRounding,
    StraightThroughRounding,
)

ALL_QUANTIZERS = pytest.mark.parametrize("name", QUANTIZERS)
ALL_BITS = pytest.mark.parametrize("bits", range(2, 9))
BOTH_SIGNS = pytest.mark.parametrize("symmetric", [False, True])
BOTH_AXES = pytest.mark.parametrize("ch_axis", [PER_TENSOR, 0])


def some_weight() -> Tensor:
    """``[6, 4, 3, 3]`` with channels of different magnitude and mean."""
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return (x + 0.3) * torch.linspace(0.1, 2, 6).view(-1, 1, 1, 1)


def range_of(x: Tensor, quantizer: FakeQuantize) -> tuple[Tensor, Tensor]:
    observer = quantizer.make_observer()
    return observer.search(observer.whole(x))


def calibrated(
    name: str, x: Tensor, bits: int = 4, symmetric: bool = False, ch_axis: int = PER_TENSOR
) -> FakeQuantize:
    """A quantizer whose range clips the largest values of ``x``."""
    quantizer = QuantizerConfig(name, "MinMaxObserver", bits, symmetric, ch_axis).build(Role.WEIGHT)
    low, high = range_of(x, quantizer)
    quantizer.set_range(0.8 * low, 0.9 * high)
    return quantizer


def learning_rounding(
    bits: int, symmetric: bool, ch_axis: int, kind: type[Rounding] = SoftRounding
) -> tuple[FakeQuantize, Tensor]:
    """A quantizer that learns the rounding of `some_weight`, and what it learns, one number a weight."""
    quantizer = calibrated("AdaRoundFakeQuantize", some_weight(), bits, symmetric, ch_axis)
    assert isinstance(quantizer, AdaRoundFakeQuantize)
    return quantizer, quantizer.start_rounding(some_weight(), kind).learned


def grid_of(quantizer: FakeQuantize, ndim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step size, and the bounds of the grid in steps from zero."""
    scale, zero_point = quantizer.hard_qparams(ndim)
    return scale, quantizer.quant_min - zero_point, quantizer.quant_max - zero_point


def drift(quantizer: FakeQuantize) -> None:
    """Move a zero-point that is learned between two integers."""
    if isinstance(quantizer, LSQPlusFakeQuantize):
        quantizer.zero_point.data += 0.3


def torchs_fake_quantize(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    bounds = quantizer.quant_min, quantizer.quant_max
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach()
    if quantizer.ch_axis == PER_TENSOR:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), *bounds)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), quantizer.ch_axis, *bounds)


@ALL_QUANTIZERS
@BOTH_AXES
@BOTH_SIGNS
@ALL_BITS
def test_a_calibrated_quantizer_gives_torchs_values(name, ch_axis, symmetric, bits):
    x = some_weight()
    quantizer = calibrated(name, x, bits, symmetric, ch_axis)
    assert torch.equal(quantizer(x), torchs_fake_quantize(quantizer, x))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_can_be_the_channel_axis(axis):
    x = some_weight()[..., 0]
    quantizer = calibrated("FixedFakeQuantize", x, ch_axis=axis)
    assert quantizer.scale.shape == (x.shape[axis],)
    assert torch.equal(quantizer(x), torchs_fake_quantize(quantizer, x))


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("FixedFakeQuantize", []),
        ("LSQFakeQuantize", ["scale"]),
        ("LSQPlusFakeQuantize", ["scale", "zero_point"]),
        ("AdaRoundFakeQuantize", []),
    ],
)
def test_which_qparams_reconstruction_may_learn(name, learned):
    quantizer = calibrated(name, some_weight())
    assert [key for key, _ in quantizer.named_parameters()] == learned
    assert [id(p) for p in quantizer.learned_qparams()] == [id(getattr(quantizer, key)) for key in learned]
    assert not any(p.requires_grad for p in quantizer.parameters())


@BOTH_AXES
def test_learned_qparams_get_torchs_gradients_with_lsqs_factor(ch_axis):
    x = some_weight()
    quantizer = calibrated("LSQPlusFakeQuantize", x, ch_axis=ch_axis)
    qparams = quantizer.learned_qparams()
    actual = torch.autograd.grad(quantizer.requires_grad_()(x).square().sum(), qparams)
    factor = 1 / math.sqrt(x.numel() / quantizer.scale.numel() * 15)
    if ch_axis == PER_TENSOR:
        expected = torch._fake_quantize_learnable_per_tensor_affine(x, *qparams, 0, 15, factor)
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(x, *qparams, ch_axis, 0, 15, factor)
    expected = torch.autograd.grad(expected.square().sum(), qparams)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_learned_step_that_turned_negative_still_quantizes():
    quantizer = calibrated("LSQFakeQuantize", some_weight())
    quantizer.scale.data.fill_(-0.1)
    assert quantizer(some_weight()).abs().max() < 1e-4  # on a grid of the smallest step
    assert quantizer.scale.item() == pytest.approx(-0.1)


def dropping(chance, x):
    draws = Draws([x], chance, torch.Generator().manual_seed(1))
    draws.refill()
    return draws.drops[0]


@ALL_QUANTIZERS
def test_forward_changes_no_state_and_not_its_input(name):
    x = some_weight()
    quantizer = calibrated(name, x)
    if isinstance(quantizer, AdaRoundFakeQuantize):
        quantizer.start_rounding(x)
    quantizer.drop = dropping(0.5, x)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(x)
    torch.testing.assert_close(quantizer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(x, some_weight())


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999, 1.0])
def test_drop_prob_is_the_chance_to_stay_quantized(chance):
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.013
    quantizer = calibrated("LSQFakeQuantize", x)
    quantized = quantizer(x)
    quantizer.drop = dropping(chance, x)
    mixed = quantizer(x)
    is_quantized = mixed == quantized
    assert bool((is_quantized | (mixed == x)).all())
    assert float(is_quantized.float().mean()) == pytest.approx(chance, abs=0.02)


def test_only_the_elements_that_stayed_quantized_teach_the_step():
    x = some_weight()
    quantizer = calibrated("LSQFakeQuantize", x).requires_grad_()
    quantizer.drop = dropping(0.0, x)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), quantizer.scale)
    assert gradient == 0


def test_a_disabled_quantizer_does_nothing():
    quantizer = calibrated("FixedFakeQuantize", some_weight(), bits=2)
    quantizer.enabled = False
    assert torch.equal(quantizer(some_weight()), some_weight())


@ALL_QUANTIZERS
@BOTH_AXES
@BOTH_SIGNS
def test_hardened_gives_bit_equal_values_and_learns_nothing(name, ch_axis, symmetric):
    x = some_weight()
    quantizer = calibrated(name, x, 3, symmetric, ch_axis)
    drift(quantizer)
    fixed = quantizer.hardened()
    assert torch.equal(fixed.zero_point, fixed.zero_point.round())
    assert type(fixed) is FixedFakeQuantize and not list(fixed.parameters())
    assert torch.equal(fixed(x), quantizer(x))


@ALL_QUANTIZERS
@BOTH_AXES
@BOTH_SIGNS
@ALL_BITS
def test_an_integer_weight_equals_the_nearest_rounded_weight_bit_for_bit(name, ch_axis, symmetric, bits):
    weight = some_weight()
    quantizer = calibrated(name, weight, bits, symmetric, ch_axis)
    drift(quantizer)
    integers = IntegerWeight.harden(quantizer, weight)
    assert integers.codes.dtype == torch.uint8 and int(integers.codes.max()) < 2**bits
    assert torch.equal(integers.dequantize(), quantizer(weight))


@BOTH_AXES
@BOTH_SIGNS
def test_soft_rounding_starts_at_the_weight_itself(ch_axis, symmetric):
    weight = some_weight()
    quantizer, _ = learning_rounding(3, symmetric, ch_axis)
    scale, low, high = grid_of(quantizer, weight.ndim)
    expected = weight.clamp(low * scale, high * scale)
    torch.testing.assert_close(quantizer(weight), expected, rtol=1e-5, atol=1e-6)


@BOTH_AXES
@BOTH_SIGNS
@ALL_BITS
def test_learned_rounding_goes_up_exactly_where_the_logit_is_not_negative(ch_axis, symmetric, bits):
    weight = some_weight()
    quantizer, logits = learning_rounding(bits, symmetric, ch_axis)
    logits.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    logits.data.view(-1)[0] = 0.0
    scale, low, high = grid_of(quantizer, weight.ndim)
    up = torch.where(logits >= 0, torch.ceil(weight / scale), torch.floor(weight / scale))
    levels = torch.clamp(up, low, high)
    assert torch.equal(IntegerWeight.harden(quantizer, weight).dequantize(), levels * scale)


def test_settled_soft_rounding_equals_hard_rounding():
    weight = some_weight()
    quantizer, logits = learning_rounding(3, False, 0)
    logits.data = torch.where(torch.rand(weight.shape) < 0.5, -5.0, 5.0)
    assert torch.equal(quantizer(weight), IntegerWeight.harden(quantizer, weight).dequantize())


@pytest.mark.parametrize("kind", ROUNDINGS.values())
def test_what_rounding_learns_gets_gradients_and_the_step_gets_none(kind):
    quantizer, learned = learning_rounding(4, False, 0, kind)
    quantizer(some_weight()).sum().backward()
    assert learned.grad is not None and bool((learned.grad != 0).any())
    assert quantizer.scale.grad is None


@BOTH_AXES
@BOTH_SIGNS
@ALL_BITS
def test_straight_through_rounding_starts_at_nearest_and_learning_uses_what_is_deployed(
    ch_axis, symmetric, bits
):
    weight = some_weight()
    quantizer, learned = learning_rounding(bits, symmetric, ch_axis, StraightThroughRounding)
    nearest = calibrated("FixedFakeQuantize", weight, bits, symmetric, ch_axis)
    torch.testing.assert_close(quantizer(weight), nearest(weight), rtol=1e-6, atol=1e-7)
    learned.data += 3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    scale, low, high = grid_of(quantizer, weight.ndim)
    expected = torch.round(learned.detach()).clamp(low, high)  # several steps away, but on the grid
    integers = IntegerWeight.harden(quantizer, weight)
    assert torch.equal(integers.dequantize(), expected * scale)
    torch.testing.assert_close(quantizer(weight).detach(), integers.dequantize(), rtol=1e-6, atol=1e-7)


def test_straight_through_gradient_is_that_of_the_rounded_weight_also_for_weights_beyond_the_grid():
    weight = some_weight()
    quantizer, learned = learning_rounding(2, False, 0, StraightThroughRounding)
    factor = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    (quantizer(weight) * factor).sum().backward()
    scale, low, high = grid_of(quantizer, weight.ndim)
    assert bool(((weight / scale < low) | (weight / scale > high)).any())
    torch.testing.assert_close(learned.grad, factor * scale)


@pytest.mark.parametrize("kind", [SoftRounding, StraightThroughRounding])
def test_weights_given_grid_points_wait_where_nearest_rounding_finds_these(kind):
    before = torch.linspace(-12, 12, 901)
    after = before.round().clamp(-8, 7)
    after[::7] = (after[::7] + 1).clamp(-8, 7)  # compensation may have chosen others
    waiting = kind.waiting(before, after, torch.tensor(-8.0), torch.tensor(7.0))
    assert torch.equal(waiting.round(), after)
    towards = ((waiting - after) * (before - after) > 0) | (waiting == before)
    off_the_grid = (before - after).abs() > 1e-3
    assert bool(towards[(after > -8) & (after < 7) & off_the_grid].all())


def test_for_soft_rounding_they_wait_inside_the_grid():
    before = torch.linspace(-12, 12, 901)
    waiting = SoftRounding.waiting(
        before, before.round().clamp(-8, 7), torch.tensor(-8.0), torch.tensor(7.0)
    )
    assert float(waiting.min()) > -8 and float(waiting.max()) < 7
    apart = (waiting - waiting.round()).abs()
    assert float(apart.min()) > NEAREST - 1e-4 and float(apart.max()) < FARTHEST + 1e-4


def test_straight_through_they_wait_where_they_were_but_for_those_of_other_grid_points():
    before = torch.tensor([0.2, -0.4, 0.49, 1.2, 9.0])
    after = torch.tensor([0.0, 0.0, 0.0, 2.0, 7.0])
    waiting = StraightThroughRounding.waiting(before, after, torch.tensor(-8.0), torch.tensor(7.0))
    torch.testing.assert_close(waiting, torch.tensor([0.2, -0.4, 0.45, 1.55, 7.45]))


@ALL_QUANTIZERS
def test_hardening_a_weight_before_calibration_is_refused(name):
    quantizer = QuantizerConfig(name, "MinMaxObserver", 4, False, 0).build(Role.WEIGHT)
    with pytest.raises(ValueError, match="before its range was calibrated"):
        IntegerWeight.harden(quantizer, some_weight())


def test_a_config_builds_the_quantizer_it_names():
    quantizer = QuantizerConfig("LSQFakeQuantize", "AvgMSEObserver", 3, True, 1).build(Role.ACTIVATION)
    assert type(quantizer) is LSQFakeQuantize
    assert type(quantizer.make_observer()).__name__ == "AvgMSEObserver"
    assert (quantizer.quant_min, quantizer.quant_max, quantizer.ch_axis) == (-4, 3, 1)
    assert quantizer.role is Role.ACTIVATION


def test_changing_bits_changes_the_grid():
    quantizer = calibrated("FixedFakeQuantize", some_weight(), bits=2)
    quantizer.set_bits(8)
    quantizer.set_range(*range_of(some_weight(), quantizer))
    assert (quantizer(some_weight()) - some_weight()).abs().max() <= 0.51 * quantizer.scale.item()
