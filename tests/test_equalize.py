"""Equalization: the float network stays the same function, and one step size serves all channels better."""

import pytest
import torch

from calibquant.model.equalize import (
    channel_ranges,
    equalize,
    junctions,
    rescale,
    sample_activations,
    scale_factors,
)
from calibquant.model.quant_layer import harden, layers
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.fake_quant import Role
from calibquant.quantization.state import calibrating, full_precision, quantizers, quantizing_only, watching
from calibquant.solver.pipeline import quantize_model
from tests.small import random_float_model, small_config
from tests.test_quant_resnet import BOTH_BLOCKS, calibrated, float_model, images, spec


def uneven(bottleneck: bool) -> QuantResNet:
    """A network whose channels differ widely, and whose readers make up for it, as trained ones do."""
    model = QuantResNet(float_model(bottleneck), spec()).eval()
    generator = torch.Generator().manual_seed(1)
    for junction in junctions(model):
        rescale(junction, torch.exp(torch.randn(len(junction.writers[0].bias), generator=generator)))
    return model


def weights(model: QuantResNet) -> list[torch.Tensor]:
    return [layer.weight.clone() for _, layer in layers(model)]


@BOTH_BLOCKS
def test_every_activation_and_layer_has_its_place(bottleneck):
    model = calibrated(bottleneck)
    found = junctions(model)
    seen = [quantizer for junction in found for quantizer, _ in junction.readings]
    assert sorted(map(id, seen)) == sorted(id(q) for _, q in quantizers(model, Role.ACTIVATION))
    every = [layer for _, layer in layers(model)]
    writers = [id(layer) for junction in found for layer in junction.writers]
    readers = [id(layer) for junction in found for _, reading in junction.readings for layer in reading]
    assert sorted(writers) == sorted(id(layer) for layer in every if layer is not model.classifier.fc)
    assert sorted(readers) == sorted(id(layer) for layer in every if layer is not model.stem.conv1)


@BOTH_BLOCKS
def test_scaling_leaves_the_float_network_as_it_was(bottleneck):
    model = uneven(bottleneck)
    with full_precision(model), torch.no_grad():
        before = model(images())
        generator = torch.Generator().manual_seed(2)
        for junction in junctions(model):
            channels = len(junction.writers[0].bias)
            rescale(junction, torch.exp(torch.randn(channels, generator=generator)))
        after = model(images())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@BOTH_BLOCKS
def test_equalized_activations_lose_less(bottleneck):
    plain, equalized = uneven(bottleneck), uneven(bottleneck)
    equalize(equalized, images(), 4, seed=0, strength=0.5)
    errors = []
    for model in (plain, equalized):
        with calibrating(model):
            model(images())
        activations = [quantizer for _, quantizer in quantizers(model, Role.ACTIVATION)]
        with torch.no_grad():
            with quantizing_only(model, activations):
                found = model(images())
            with full_precision(model):
                errors.append(float((found - model(images())).square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_full_strength_gives_all_channels_one_range_and_half_of_it_the_root():
    ranges = torch.logspace(-0.5, 0.5, 9)
    torch.testing.assert_close(ranges / scale_factors(ranges, 1.0), torch.ones(9))
    torch.testing.assert_close(ranges / scale_factors(ranges, 0.5), ranges.sqrt())


def test_sampled_ranges_are_those_of_the_whole_activation():
    model = uneven(True)
    quantizer = model.blocks[0].branch.conv1.output_quantizer
    sampled = channel_ranges(quantizer, sample_activations(model, images(), 4, seed=1)[quantizer])
    seen: list[torch.Tensor] = []
    with torch.no_grad(), watching({quantizer: seen.append}), full_precision(model):
        model(images())
    whole = channel_ranges(quantizer, seen[0].movedim(1, -1).flatten(0, -2))
    assert float((sampled / whole - 1).abs().max()) < 0.2


def test_channels_of_grouped_convolutions_are_scaled_in_their_groups():
    config = small_config(
        model__type="resnext50_32x4d",
        model__kwargs={"num_classes": 10, "small_images": True, "base_width": 16},
    )
    model = quantize_model(random_float_model(config), config)
    with full_precision(model), torch.no_grad():
        before = model(images())
        equalize(model, images(), 4, seed=0, strength=1.0)
        torch.testing.assert_close(
            model(images()), before, rtol=1e-4, atol=1e-4 * float(before.abs().max())
        )


def test_no_strength_leaves_every_weight():
    model = uneven(True)
    before = weights(model)
    equalize(model, images(), 4, seed=0, strength=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_the_same_seed_gives_the_same_network():
    first, second = uneven(True), uneven(True)
    for model in (first, second):
        equalize(model, images(), 4, seed=0, strength=0.5)
        torch.rand(3)  # the global generator must not matter
    pairs = zip(layers(first), layers(second), strict=True)
    assert all(torch.equal(a.weight, b.weight) for (_, a), (_, b) in pairs)


def test_a_silent_channel_stays_and_none_is_scaled_beyond_the_limit():
    factors = scale_factors(torch.tensor([0.0, 1e-6, 1.0, 1.0, 1e6]), 1.0)
    assert factors[0] == 1
    assert float(factors.max()) <= 8
    assert float(factors.min()) >= 1 / 8


def test_a_weight_with_one_step_size_for_all_channels_is_not_made_uneven():
    model = uneven(True)
    for _, layer in layers(model):
        layer.weight_quantizer.ch_axis = -1
    before = weights(model)
    equalize(model, images(), 4, seed=0, strength=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_integers_are_not_scaled():
    model = calibrated(True)
    harden(model)
    before = model.stem.conv1.bias.clone()
    with pytest.raises(ValueError, match="hardened"):
        equalize(model, images(), 4, seed=0, strength=0.5)
    assert torch.equal(model.stem.conv1.bias, before)
