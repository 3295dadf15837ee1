"""Equalization: the float network stays the same function, and one step size serves all channels better."""

import copy

import pytest
import torch
from torch import nn

from calibquant.model.equalize import (
    Junction,
    best_factors,
    equalize,
    junctions,
    noise,
    rescale,
    scale_factors,
)
from calibquant.model.quant_layer import calibrate_weights, harden, layers
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.fake_quant import Role
from calibquant.quantization.state import calibrating, full_precision, quantizers
from tests.test_quant_resnet import BOTH_BLOCKS, calibrated, float_model, images, spec


def uneven(bottleneck: bool) -> QuantResNet:
    """A network whose channels differ widely: each writer's rows are drawn from a wide range of sizes."""
    model = float_model(bottleneck)
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        spread = torch.exp(1.2 * torch.randn(norm.num_features, generator=generator))
        norm.weight.data *= spread
        norm.bias.data *= spread
    return QuantResNet(model, spec()).eval()


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
    strengths = equalize(equalized, images(), 4, seed=0)
    assert max(strengths.values()) > 0
    errors = []
    for model in (plain, equalized):
        calibrate_weights(model)
        with calibrating(model):
            model(images())
        with torch.no_grad():
            found = model(images())
            with full_precision(model):
                errors.append(float((found - model(images())).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_the_same_seed_gives_the_same_network():
    first, second, other = uneven(True), uneven(True), uneven(True)
    chosen = [equalize(model, images(), 4, seed) for model, seed in ((first, 0), (second, 0), (other, 1))]
    assert chosen[0] == chosen[1]
    pairs = zip(layers(first), layers(second), strict=True)
    assert all(torch.equal(a.weight, b.weight) for (_, a), (_, b) in pairs)
    assert chosen[0].keys() == chosen[2].keys()


def test_the_strength_chosen_has_the_least_noise():
    model = uneven(True)
    junction = junctions(model)[0]
    quantizer = junction.readings[0][0]
    x = torch.rand(256, len(junction.writers[0].bias), generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-2, 1, x.shape[1])
    strength, factors = best_factors(junction, {quantizer: x})
    least = noise(junction, [x], factors)
    assert strength > 0
    assert least < noise(junction, [x], torch.ones_like(factors))


def test_a_silent_channel_stays_and_none_is_scaled_beyond_the_limit():
    factors = scale_factors(torch.tensor([0.0, 1e-6, 1.0, 1.0, 1e6]), 1.0)
    assert factors[0] == 1
    assert float(factors.max()) <= 16
    assert float(factors.min()) >= 1 / 16


def test_a_weight_with_one_step_size_for_all_channels_is_not_made_uneven():
    model = uneven(True)
    junction = junctions(model)[0]
    junction.writers[0].weight_quantizer.ch_axis = -1
    x = torch.rand(64, len(junction.writers[0].bias)) * torch.logspace(-2, 1, len(junction.writers[0].bias))
    strength, factors = best_factors(junction, {junction.readings[0][0]: x})
    assert strength == 0
    assert torch.equal(factors, torch.ones_like(factors))


def test_integers_are_not_scaled():
    model = calibrated(True)
    before = copy.deepcopy(model.state_dict())
    harden(model)
    with pytest.raises(ValueError, match="hardened"):
        equalize(model, images(), 4, seed=0)
    assert torch.equal(model.stem.conv1.bias, before["stem.conv1.bias"])
    assert isinstance(junctions(model)[0], Junction)
