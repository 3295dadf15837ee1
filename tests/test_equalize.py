"""Equalization: the float network stays the same function, and one step size serves all channels better."""

from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import nn

from calibquant.model.equalize import Junction, junctions, rescale
from calibquant.model.quant_layer import layers
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.fake_quant import FakeQuantize, Role, SharedRangeFakeQuantize
from calibquant.quantization.state import (
    calibrating,
    full_precision,
    quantizers,
    quantizing_only,
    watching,
)
from calibquant.solver import equalize as module
from calibquant.solver.equalize import EqualizeSettings, Task, equalize, shift_to_floors, stages
from calibquant.solver.learn import plain_steps, reconstruction_loss
from calibquant.solver.pipeline import calibrate, quantize_model, recon_settings
from calibquant.solver.recon import reconstruct
from tests.small import random_float_model, small_config
from tests.test_quant_resnet import BOTH_BLOCKS, calibrated, float_model, images, spec
from tests.test_recon import IMAGES


def spread(channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.exp(torch.randn(channels, generator=generator))


def uneven(bottleneck: bool) -> QuantResNet:
    """A network whose channels differ widely, and whose readers make up for it, as trained ones do."""
    model = QuantResNet(float_model(bottleneck), spec()).eval()
    generator = torch.Generator().manual_seed(1)
    for junction in junctions(model):
        rescale(junction, spread(junction.channels, generator))
    with calibrating(model):
        model(images())
    return model


def equalized(model: QuantResNet, iters: int = 60, lr: float = 0.05, seed: int = 0, scope: str = "network"):
    settings = EqualizeSettings(iters=iters, lr=lr, scope=scope)
    return equalize(model, images(), settings, 4, seed, plain_steps)


def activations(parts: Iterable[nn.Module]) -> list[FakeQuantize]:
    return [quantizer for part in parts for _, quantizer in quantizers(part, Role.ACTIVATION)]


@torch.no_grad()
def logits_error(model: QuantResNet, chosen: Iterable[FakeQuantize]) -> float:
    """Mean squared error of the logits with the chosen quantizers on and no others."""
    with full_precision(model):
        wanted = model(images())
    with quantizing_only(model, chosen):
        return float((model(images()) - wanted).square().mean())


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
def test_stages_are_the_network_and_each_one_is_read_by_what_follows(bottleneck):
    model = calibrated(bottleneck)
    found = stages(model)
    parts = [part for stage in found for part in stage.parts]
    assert [id(p) for p in parts] == [id(u.module) for u in model.units("block")[:-1]]
    behind = [*(stage.parts[0] for stage in found[1:]), model.classifier]
    assert all(stage.reader is part for stage, part in zip(found, behind, strict=True))
    joined = {id(q): number for number, stage in enumerate(found) for q in activations(stage.parts)}
    for junction in junctions(model):
        assert len({joined[id(quantizer)] for quantizer, _ in junction.readings}) == 1


@BOTH_BLOCKS
def test_scaling_leaves_the_float_network_as_it_was(bottleneck):
    model = uneven(bottleneck)
    with full_precision(model), torch.no_grad():
        before = model(images())
        generator = torch.Generator().manual_seed(2)
        for junction in junctions(model):
            rescale(junction, spread(junction.channels, generator))
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


def with_floors(bottleneck: bool) -> QuantResNet:
    """A network whose channels stay above zero, each at a height of its own."""
    model = QuantResNet(float_model(bottleneck), spec()).eval()
    generator = torch.Generator().manual_seed(3)
    for junction in junctions(model):
        bias = junction.writers[0].bias
        bias += 20 * torch.rand(len(bias), generator=generator)
    return model


@torch.no_grad()
def lowest(model: QuantResNet) -> list[tuple[Junction, torch.Tensor]]:
    """The least value of each channel of each junction in the float network."""
    found, seen = junctions(model), {}

    with full_precision(model), watching({q: partial(seen.__setitem__, q) for q in activations([model])}):
        model(images())
    least = {q: x.transpose(0, 1).flatten(1).amin(1) for q, x in seen.items()}
    return [(j, torch.stack([least[q] for q, _ in j.readings]).amin(0)) for j in found]


@BOTH_BLOCKS
def test_what_channels_never_fall_below_goes_into_biases_behind_them(bottleneck, monkeypatch):
    monkeypatch.setattr(module, "BELOW", 0.0)
    model = with_floors(bottleneck)
    before = lowest(model)
    can = [junction.can_shift for junction, _ in before]
    assert any(can) and not all(can)
    with full_precision(model), torch.no_grad():
        wanted = model(images())
        shifted = shift_to_floors(model, images(), 4)
        got = model(images())
    assert shifted == sum(int((floors > 0).sum()) for junction, floors in before if junction.can_shift) > 20
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    for (junction, floors), (_, left) in zip(before, lowest(model), strict=True):
        expected = torch.zeros_like(floors) if junction.can_shift else floors
        torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-3)


def test_a_floor_is_what_nearly_all_values_of_all_batches_keep_above():
    model = with_floors(True)
    stem = model.stem.conv1
    stem.weight.zero_()
    stem.weight[:, 0, 1, 1] = 1.0  # a channel of the image, and a height
    stem.bias.copy_(torch.arange(8.0) - 4)
    x = torch.linspace(0, 1, 2 * 64 * 64).view(2, 1, 64, 64).repeat(1, 3, 1, 1)
    x[0, :, 0, 0] = -3.0  # one value of 4,096
    shift_to_floors(model, x, 1)
    expected = torch.tensor([-4.0, -3.0, -2.0, -1.0, *[-0.25] * 4])  # one image is above 0, one above 0.5
    torch.testing.assert_close(stem.bias, expected, rtol=0, atol=2e-3)


def test_shifted_channels_have_more_levels_for_what_varies():
    model = with_floors(True)

    def error() -> float:
        with calibrating(model):
            model(images())
        return logits_error(model, [model.stem.output_quantizer])

    before = error()
    shift_to_floors(model, images(), 4)
    assert error() < 0.3 * before


@pytest.mark.parametrize("shift", [True, False])
def test_channels_are_shifted_before_ranges_are_set_where_the_config_says_so(shift, caplog):
    config = small_config(model__type="resnet50", quant__equalize={"shift": shift})
    model = quantize_model(random_float_model(config), config)
    model.stem.conv1.bias += 30
    before = model.stem.conv1.bias.clone()
    with caplog.at_level("INFO", "calibquant"):
        calibrate(model, IMAGES, config)
    assert torch.equal(model.stem.conv1.bias, before) == (not shift)
    assert ("shifted" in caplog.text) == shift
    top = float(model.stem.output_quantizer.scale * model.stem.output_quantizer.quant_max)
    assert (top < 25) == shift


@BOTH_BLOCKS
def test_equalized_activations_lose_less(bottleneck):
    model = uneven(bottleneck)
    before = logits_error(model, activations([model]))
    found = equalized(model)
    assert all(after < start for _, start, after in found)
    assert logits_error(model, activations([model])) < 0.7 * before


@BOTH_BLOCKS
def test_in_the_scope_of_the_stem_only_what_touches_its_activations_changes(bottleneck):
    model = uneven(bottleneck)
    stem = next(j for j in junctions(model) if model.stem.conv1 in j.writers)
    touched = {id(layer) for layer in (*stem.writers, *stem.readers)}
    chosen = [quantizer for quantizer, _ in stem.readings]
    scales = [q.scale.clone() for q in activations([model]) if q not in chosen]
    before, old = logits_error(model, chosen), weights(model)
    ((name, start, after),) = equalized(model, scope="stem")
    assert name == stages(model)[0].name and after < start
    assert logits_error(model, chosen) < 0.7 * before
    changed = {
        id(layer)
        for (_, layer), weight in zip(layers(model), old, strict=True)
        if not torch.equal(layer.weight, weight)
    }
    assert changed == touched and len(touched) < len(old)
    left = [q.scale for q in activations([model]) if q not in chosen]
    assert all(torch.equal(a, b) for a, b in zip(scales, left, strict=True))


@BOTH_BLOCKS
def test_the_errors_told_are_those_of_the_network_that_is_left(bottleneck, monkeypatch):
    """Learned by channel, folded into weights, run as one step size: the same numbers."""
    model, tasks, errors = uneven(bottleneck), [], []
    learn, fold = module.learn_steps, module.settle

    def learn_and_tell(task, *rest):
        tasks.append(task)
        return learn(task, *rest)

    def fold_and_run(here, steps):
        fold(here, steps)
        task, chosen = tasks[-1], [quantizer for junction in here for quantizer, _ in junction.readings]
        with torch.no_grad(), quantizing_only(task.module, chosen):
            errors.append(float(reconstruction_loss(task.module(task.inputs.float()), task.target.float())))

    monkeypatch.setattr(module, "learn_steps", learn_and_tell)
    monkeypatch.setattr(module, "settle", fold_and_run)
    told = equalized(model)
    assert [stage.name for stage in stages(model)] == [name for name, _, _ in told]
    assert errors == pytest.approx([after for _, _, after in told], rel=0.02)


def test_a_channel_that_nobody_reads_leaves_the_levels_to_the_others():
    """One channel fifty times as wide as it was, and unread: the step size comes back to the others'."""
    model = uneven(True)
    junction = next(j for j in junctions(model) if len(j.writers) == 1 and len(j.readings[0][1]) == 1)
    (quantizer, (reader,)), (writer,) = junction.readings[0], junction.writers
    narrow = float(quantizer.scale)
    writer.weight[0] *= 50
    writer.bias[0] *= 50
    reader.weight[:, 0] = 0
    with calibrating(model):
        model(images())
    wide = float(quantizer.scale)
    before = writer.weight[1:].clone()
    equalized(model, 200)
    shrunk = float((writer.weight[1:] / before).flatten().median())  # by which step sizes compare
    assert wide > 5 * narrow
    assert float(quantizer.scale) / shrunk < 0.6 * wide


@BOTH_BLOCKS
def test_each_stage_learns_from_what_the_stages_before_it_have_become(bottleneck, monkeypatch):
    model, tasks = uneven(bottleneck), []

    def spy(*parts) -> Task:
        tasks.append(Task(*parts))
        return tasks[-1]

    monkeypatch.setattr(module, "Task", spy)
    found = equalized(model)
    assert sum(after < before for _, before, after in found) > 2  # most have been scaled
    x, rows = images(), None
    with full_precision(model), torch.no_grad():
        for stage, task in zip(stages(model), tasks, strict=True):
            rows = order_of(task.inputs, x) if rows is None else rows
            given, rtol = x[rows].to(task.inputs.dtype), 1e-2
            torch.testing.assert_close(task.inputs, given, rtol=rtol, atol=rtol * float(given.abs().max()))
            for part in stage.parts:
                x = part(x)


def order_of(some: torch.Tensor, all_: torch.Tensor) -> torch.Tensor:
    """Where in a batch the images of another stand."""
    return torch.stack([(all_ - one).abs().flatten(1).sum(1).argmin() for one in some])


@pytest.mark.parametrize("lr", [50.0, 1e38, 1e308])
def test_what_does_not_help_changes_nothing(lr):
    model = uneven(True)
    before, scale = weights(model), model.stem.output_quantizer.scale.clone()
    assert all(start == after for _, start, after in equalized(model, 20, lr=lr))
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
    assert junctions(model) == [] and len(stages(model)) > 1
    assert equalized(model) == []


@pytest.mark.parametrize("ranges", ["float", "quantized"])
@pytest.mark.parametrize(
    ("iters", "scope", "kept"), [(0, "network", 0), (20, "network", 2), (20, "stem", 1)]
)
def test_ranges_stay_as_the_readers_outside_of_a_unit_want_them(iters, scope, kept, ranges):
    config = small_config(
        model__type="resnet50",
        quant__equalize={"iters": iters, "lr": 0.05, "scope": scope},
        quant__ends_8bit=[],
        quant__recon__scale_lr=1e-3,
        quant__recon__ranges=ranges,
    )
    model = quantize_model(random_float_model(config), config)
    calibrate(model, IMAGES, config)

    def read_outside() -> list[FakeQuantize]:
        return [model.stem.output_quantizer, model.blocks[0].join.output_quantizer]

    assert [isinstance(q, SharedRangeFakeQuantize) for q in read_outside()] == [kept >= 1, kept >= 2]
    before = [float(quantizer.scale) for quantizer in read_outside()]
    for _ in zip(range(2), reconstruct(model, IMAGES, recon_settings(config), seed=7), strict=False):
        pass
    after = [float(quantizer.scale) for quantizer in read_outside()]
    assert [a == b for a, b in zip(after, before, strict=True)] == [kept >= 1, kept >= 2]
