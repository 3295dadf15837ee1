"""Equalization: the float network stays the same function, and one step size serves all channels better."""

import pytest
import torch

from calibquant.model.equalize import junctions, rescale
from calibquant.model.quant_layer import QuantLayer, layers
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.fake_quant import FixedFakeQuantize, Role
from calibquant.quantization.state import calibrating, full_precision, quantizers, quantizing_only
from calibquant.solver import equalize as module
from calibquant.solver.equalize import EqualizeSettings, equalize
from calibquant.solver.learn import plain_steps, reconstruction_loss
from calibquant.solver.pipeline import calibrate, quantize_model, recon_settings
from calibquant.solver.recon import reconstruct
from tests.small import random_float_model, small_config
from tests.test_quant_resnet import BOTH_BLOCKS, calibrated, float_model, images, spec


def spread(channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.exp(torch.randn(channels, generator=generator))


def uneven(bottleneck: bool) -> QuantResNet:
    """A network whose channels differ widely, and whose readers make up for it, as trained ones do."""
    model = QuantResNet(float_model(bottleneck), spec()).eval()
    generator = torch.Generator().manual_seed(1)
    for junction in junctions(model):
        rescale(junction, spread(len(junction.writer.bias), generator))
    with calibrating(model):
        model(images())
    return model


def equalized(model: QuantResNet, iters: int = 60, lr: float = 0.05, seed: int = 0):
    return equalize(model, images(), EqualizeSettings(iters, lr), 4, seed, plain_steps)


def weights(model: QuantResNet) -> list[torch.Tensor]:
    return [layer.weight.clone() for _, layer in layers(model)]


@BOTH_BLOCKS
def test_channels_are_scaled_where_no_addition_joins_them_to_others(bottleneck):
    model = calibrated(bottleneck)
    found = {id(junction.quantizer): junction for junction in junctions(model)}
    joins = {id(block.join.output_quantizer) for block in model.blocks}
    first, stem = model.blocks[0], model.stem.output_quantizer
    projected = isinstance(first.shortcut, QuantLayer)
    every = {id(q) for _, q in quantizers(model, Role.ACTIVATION)}
    assert found.keys() == every - joins - (set() if projected else {id(stem)})
    if projected:
        assert {id(r) for r in found[id(stem)].readers} == {id(first.shortcut), id(first.path()[0])}


@BOTH_BLOCKS
def test_scaling_leaves_the_float_network_as_it_was(bottleneck):
    model = uneven(bottleneck)
    with full_precision(model), torch.no_grad():
        before = model(images())
        generator = torch.Generator().manual_seed(2)
        for junction in junctions(model):
            rescale(junction, spread(len(junction.writer.bias), generator))
        after = model(images())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_channels_of_grouped_convolutions_are_scaled_in_their_groups():
    config = small_config(
        model__type="resnext50_32x4d",
        model__kwargs={"num_classes": 10, "small_images": True, "base_width": 16},
        quant__equalize={"iters": 5, "lr": 0.05},
    )
    model = quantize_model(random_float_model(config), config)
    with full_precision(model), torch.no_grad():
        before, old = model(images()), weights(model)
        calibrate(model, images(), config)
        after = model(images())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert not all(torch.equal(a, b) for a, b in zip(old, weights(model), strict=True))


@BOTH_BLOCKS
def test_equalized_activations_lose_less(bottleneck):
    model = uneven(bottleneck)
    chosen = [junction.quantizer for junction in junctions(model)]

    @torch.no_grad()
    def error() -> float:
        with full_precision(model):
            wanted = model(images())
        with quantizing_only(model, chosen):
            return float((model(images()) - wanted).square().mean())

    before = error()
    found = equalized(model)
    assert all(after < start for _, start, after in found)
    assert error() < 0.7 * before


@BOTH_BLOCKS
def test_the_errors_told_are_those_of_the_network_that_is_left(bottleneck):
    """Learned by channel, folded into weights, run as one step size: the same numbers."""
    model = uneven(bottleneck)
    told = equalized(model)
    chosen = [junction.quantizer for junction in junctions(model)]
    x, names = images(), model.block_names
    with torch.no_grad():
        for unit in model.units("block", names[:1] if told[0][0].startswith("stem+") else [])[:-1]:
            with full_precision(unit.module):
                target = unit.module(x)
            with quantizing_only(unit.module, chosen):
                error = float(reconstruction_loss(unit.module(x), target))
            if unit.name in dict((name, 0) for name, _, _ in told):
                after = {name: after for name, _, after in told}[unit.name]
                assert error == pytest.approx(after, rel=0.05)
            x = target


def test_a_channel_that_nobody_reads_gives_its_levels_to_the_others():
    """Of two channels, one wide and unread, the step size that counts comes to suit the narrow one."""
    model = uneven(True)
    junction = next(j for j in junctions(model) if len(j.readers) == 1)
    wide = junction.writer
    rescale(junction, torch.tensor([1 / 50.0, *[1.0] * (len(wide.bias) - 1)]))
    reader = junction.readers[0]
    reader.weight[:, 0] = 0
    with calibrating(model):
        model(images())
    before = float(junction.quantizer.scale)
    equalized(model, 200)
    narrow = wide.weight[1:].abs().max()
    assert float(junction.quantizer.scale / narrow) < 0.5 * before / float(narrow)


def test_what_does_not_help_changes_nothing():
    model = uneven(True)
    before, scale = weights(model), model.stem.output_quantizer.scale.clone()
    assert all(start == after for _, start, after in equalized(model, 20, lr=50.0))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert torch.equal(model.stem.output_quantizer.scale, scale)


def test_the_same_seed_gives_the_same_network():
    first, second = uneven(True), uneven(True)
    for model in (first, second):
        equalized(model, 10)
        torch.rand(3)  # the global generator must not matter
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_nothing_is_left_of_learning():
    model = uneven(True)
    equalized(model, 5)
    assert not any(q._forward_hooks for _, q in quantizers(model))
    assert all(q.scale.shape == (1,) and q.enabled for _, q in quantizers(model, Role.ACTIVATION))


def test_many_images_are_not_all_looked_at(monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 3)
    seen = []
    monkeypatch.setattr(
        module, "learn_steps", lambda task, start, *_: seen.append(len(task.inputs)) or start
    )
    equalized(uneven(True), 1)
    assert set(seen) == {3}


@pytest.mark.parametrize(("role", "axis"), [(Role.WEIGHT, -1), (Role.ACTIVATION, 1)])
def test_there_is_no_junction_where_it_would_cost_or_gain_nothing(role, axis):
    model = uneven(True)
    for _, quantizer in quantizers(model, role):
        quantizer.ch_axis = axis
    assert junctions(model) == []
    assert equalized(model) == []


@pytest.mark.parametrize("iters", [0, 20])
def test_the_stem_s_range_stays_as_its_reader_wants_it(iters):
    config = small_config(
        model__type="resnet50",
        quant__equalize={"iters": iters, "lr": 0.05},
        quant__ends_8bit=[],
        quant__recon__scale_lr=1e-3,
    )
    model = quantize_model(random_float_model(config), config)
    x = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    calibrate(model, x, config)
    before = float(model.stem.output_quantizer.scale)
    assert (type(model.stem.output_quantizer) is FixedFakeQuantize) == (iters > 0)
    next(iter(reconstruct(model, x, recon_settings(config), seed=7)))
    assert (float(model.stem.output_quantizer.scale) == before) == (iters > 0)
