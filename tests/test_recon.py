"""Reconstruction: what it promises of errors, of carried activations, of schedules and of leftovers."""

import math

import pytest
import torch

from calibquant.errors import UserError
from calibquant.model.quant_layer import harden, layers
from calibquant.quantization.drop import Draws
from calibquant.quantization.fake_quant import AdaRoundFakeQuantize, FixedFakeQuantize, IntegerWeight
from calibquant.quantization.state import full_precision, quantizers
from calibquant.solver import recon
from calibquant.solver.caches import Activations
from calibquant.solver.learn import (
    Engine,
    ReconSettings,
    batch_order,
    cosine,
    mixed_input,
    reconstruction_loss,
    regularizer_exponent,
)
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import float32_precision, learned_is_finite, reconstruct
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def run(**changes):
    config = small_config(quant__w_qconfig__bit=2, **changes)
    model = calibrated_model(config, IMAGES)
    results = list(reconstruct(model, IMAGES, recon_settings(config), seed=7))
    return model, results


def test_reconstruction_lowers_the_error_of_every_unit():
    _, results = run(quant__recon__iters=200, quant__recon__weight=1e-3)
    assert [r.name for r in results][:3] == ["stem", "layer1.0", "layer1.1"]
    assert results[-1].name == "classifier"
    for result in results:
        assert result.error_after < result.error_before or result.reverted, result
    assert sum(result.reverted for result in results) < len(results) / 2
    assert results[-1].error_after < results[-1].error_before


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("quantizer", ["AdaRoundFakeQuantize", "LSQFakeQuantize", "LSQPlusFakeQuantize"])
def test_nothing_learned_is_left_afterwards(granularity, quantizer):
    model, _ = run(quant__recon__granularity=granularity, quant__w_qconfig__quantizer=quantizer)
    harden(model)
    assert all(isinstance(layer.weight_quantizer, IntegerWeight) for _, layer in layers(model))
    assert all(type(q) is FixedFakeQuantize for _, q in quantizers(model))
    assert not list(model.parameters())
    assert not any("rounding" in key for key in model.state_dict())


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize(("cache", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_activations_carried_from_unit_to_unit_are_those_of_the_whole_network(
    granularity, cache, tolerance
):
    config = small_config(quant__recon__granularity=granularity, quant__recon__cache=cache)
    model = calibrated_model(config, IMAGES)
    with torch.no_grad(), full_precision(model):
        float_logits = model(IMAGES)
    kept = {}
    write = Activations.write

    def spy(self, unit, quantized, full, still_read):
        kept["last"] = quantized, full
        write(self, unit, quantized, full, still_read)
        assert set(self.full) == still_read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Activations, "write", spy)
        list(reconstruct(model, IMAGES, recon_settings(config), seed=1))
    quantized, full = kept["last"]
    torch.testing.assert_close(full.float(), float_logits, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(quantized.float(), model(IMAGES), atol=tolerance, rtol=tolerance)


def test_the_same_seed_gives_the_same_network_bit_for_bit_and_another_seed_another():
    first, _ = run(quant__recon__iters=30)
    torch.manual_seed(99)  # the global generator must not matter
    second, _ = run(quant__recon__iters=30)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    config = small_config(quant__w_qconfig__bit=2, quant__recon__iters=30)
    other = calibrated_model(config, IMAGES)
    list(reconstruct(other, IMAGES, recon_settings(config), seed=8))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_straight_through_rounding_lowers_every_units_error_and_may_move_weights_several_steps():
    changes = dict(quant__recon__round_mode="straight_through", quant__recon__round_lr=0.12)
    model, results = run(quant__recon__iters=200, **changes)
    nearest, _ = run(quant__recon__iters=0)
    assert all(r.unconverged == 0 and r.error_after <= r.error_before for r in results)
    assert sum(r.reverted for r in results) < len(results) / 4
    assert all(point.rounding == 0 for r in results for point in r.trace)
    moved = [
        (a.weight_quantizer.codes.float() - b.weight_quantizer.codes.float()).abs().max()
        for (_, a), (_, b) in zip(layers(model), layers(nearest), strict=True)
    ]
    assert float(max(moved)) >= 2


def test_zero_steps_or_nearest_rounding_with_fixed_steps_change_only_the_representation():
    config = small_config(quant__recon__iters=0)
    model = calibrated_model(config, IMAGES)
    with torch.no_grad():
        before = model(IMAGES)
        list(reconstruct(model, IMAGES, recon_settings(config), seed=1))
        assert torch.equal(model(IMAGES), before)
    nearest = small_config(
        quant__recon__round_mode="nearest", quant__a_qconfig__quantizer="FixedFakeQuantize"
    )
    model = calibrated_model(nearest, IMAGES)
    results = list(reconstruct(model, IMAGES, recon_settings(nearest), seed=1))
    with torch.no_grad():
        assert torch.equal(model(IMAGES), before)
    assert all(r.moved == 0 and r.error_after == pytest.approx(r.error_before) for r in results)


def test_convergence_and_flips_are_reported():
    _, short = run(quant__recon__iters=4)
    _, long = run(quant__recon__iters=150, quant__recon__weight=1.0, quant__recon__round_lr=0.1)
    assert all(r.unconverged > 0.5 for r in short)
    assert all(r.unconverged < 0.1 for r in long)
    assert any(r.moved > 0 for r in short + long)
    assert long[0].trace[0].step == 0 and long[0].trace[-1].step == 149
    assert long[0].trace[0].rounding == 0  # warming up
    assert max(point.rounding for point in long[0].trace) > 0


class Recording(Engine):
    """Keeps each step's learning rates, by group of parameters."""

    def optimizer(self, groups, device):
        self.groups = groups
        self.rates = [[] for _ in groups]
        return super().optimizer(groups, device)

    def step(self, step, generator):
        def recorded() -> None:
            step()
            for rates, group in zip(self.rates, self.groups, strict=True):
                rates.append(float(group["lr"]))

        return recorded


@pytest.mark.parametrize("mode", ["learned_hard_sigmoid", "straight_through"])
def test_rates_fall_along_a_cosine_but_for_soft_roundings_and_go_with_the_root_of_the_fan_in(mode):
    rates = {"round_lr": 0.01, "scale_lr": 4e-4, "weight_scale_lr": 1e-3}
    config = small_config(
        **{f"quant__recon__{k}": v for k, v in rates.items()}, quant__recon__round_mode=mode
    )
    model, engine = calibrated_model(config, IMAGES), Recording()
    width = float(model.stem.conv1.weight_quantizer.scale.mean())
    next(reconstruct(model, IMAGES, recon_settings(config), seed=7, engine=engine))  # the stem: 27 inputs
    falling = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    steps, soft = [4e-4 * f for f in falling], [0.01] * 6
    straight = [0.01 * math.sqrt(27 / 1024) * f for f in falling]
    rounding = [soft, steps] if mode == "learned_hard_sigmoid" else [steps, straight]
    expected = [*rounding, [1e-3 * width * f for f in falling]]
    for found, wanted in zip(engine.rates, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_learning_at_most_doubles_or_halves_the_step_sizes_of_weights():
    """At a rate at which those of channels with small weights would end below zero."""
    config = small_config(quant__recon__weight_scale_lr=1.0, quant__recon__iters=20)
    model = calibrated_model(config, IMAGES)
    before = {name: layer.weight_quantizer.scale.clone() for name, layer in layers(model)}
    list(reconstruct(model, IMAGES, recon_settings(config), seed=7))
    ratios = [layer.weight_quantizer.scale / before[name] for name, layer in layers(model)]
    every = torch.cat([ratio.flatten() for ratio in ratios])
    assert 0.499 < float(every.min()) < 0.6 and 1.7 < float(every.max()) < 2.001


def test_of_a_units_inputs_as_many_elements_are_quantized_as_the_config_says():
    quantized, full = torch.ones(8, 3, 40, 40), torch.zeros(8, 3, 40, 40)
    draws = Draws([quantized], 0.25, torch.Generator().manual_seed(0))
    draws.refill()
    mixed = mixed_input(quantized, full, torch.arange(8), draws.drops[0])
    assert float(mixed.mean()) == pytest.approx(0.25, abs=0.01)


def test_only_what_learning_moved_counts_as_moved_not_what_compensation_or_step_sizes_do():
    """With a rate of 0 no weight leaves its grid point, wherever that is and however wide its step."""
    _, still = run(
        quant__recon__compensate=True,
        quant__recon__round_mode="straight_through",
        quant__recon__round_lr=0.0,
        quant__recon__weight_scale_lr=2e-2,
        quant__recon__iters=20,
    )
    assert all(r.moved == 0 for r in still)
    assert any(r.error_after < r.error_start < r.error_before for r in still)  # both did act


def test_soft_rounding_at_the_start_reproduces_the_float_weight_inside_the_range():
    config = small_config(quant__w_qconfig__observer="MinMaxObserver")
    model = calibrated_model(config, IMAGES)
    for _, layer in layers(model):
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, AdaRoundFakeQuantize)
        quantizer.start_rounding(layer.weight)
        scale, _ = quantizer.hard_qparams(layer.weight.ndim)
        difference = ((quantizer(layer.weight) - layer.weight).abs() / scale).detach()
        # a min-max range with a rounded zero-point may clip half a step at its ends
        assert float(difference.max()) < 0.51 and float(difference.median()) < 1e-4


def test_every_image_is_drawn_equally_often_and_the_tail_is_used():
    order = batch_order(13, 4, 26, torch.Generator().manual_seed(0))
    assert order.shape == (26, 4)
    assert torch.bincount(order.flatten()).tolist() == [8] * 13
    assert batch_order(3, 32, 5, torch.Generator()).shape == (5, 3)


def test_schedules_are_functions_of_the_step():
    settings = ReconSettings(iters=100, warm_up=0.2, b_range=(20, 2))
    assert regularizer_exponent(19, settings) is None
    assert regularizer_exponent(20, settings) == 20
    assert regularizer_exponent(60, settings) == pytest.approx(11)
    assert regularizer_exponent(99, settings) == pytest.approx(2.225)
    assert regularizer_exponent(99, ReconSettings(iters=100, warm_up=1.0)) is None
    assert cosine(0, 10) == 1 and cosine(5, 10) == pytest.approx(0.5) and cosine(10, 10) == pytest.approx(0)


def test_the_loss_is_the_squared_error_summed_over_channels_and_averaged_over_the_rest():
    a, b = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    expected = (a - b).pow(2).sum(1).mean()
    assert math.isclose(float(reconstruction_loss(a, b)), float(expected), rel_tol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep_gpu", [True, False])
def test_on_a_gpu_the_same_job_runs_with_caches_there_or_in_host_memory(keep_gpu):
    config = small_config(quant__w_qconfig__bit=2, quant__recon__iters=50, quant__recon__keep_gpu=keep_gpu)
    model = calibrated_model(config, IMAGES).cuda()
    results = list(reconstruct(model, IMAGES, recon_settings(config), seed=7))
    assert sum(r.error_after for r in results) < sum(r.error_before for r in results)


def test_precisions_set_by_torchs_newer_names_stay_and_are_told(caplog):
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        with float32_precision("tf32"):
            assert conv.fp32_precision == "ieee"
        assert "conv.fp32_precision is set and stays ieee" in caplog.text
    finally:
        conv.fp32_precision = before
    with float32_precision("fp32"):
        assert not torch.backends.cudnn.allow_tf32


def test_a_weights_step_size_that_is_no_number_is_seen():
    model = calibrated_model(small_config(), IMAGES)
    assert learned_is_finite(model.stem)
    model.stem.conv1.weight_quantizer.scale[0] = torch.inf
    assert not learned_is_finite(model.stem)


def test_ranges_are_set_again_on_what_a_unit_is_really_given():
    changes = {"quant__a_qconfig__quantizer": "FixedFakeQuantize", "quant__recon__iters": 0}
    (plain, _), (again, _) = run(**changes), run(quant__recon__ranges="quantized", **changes)
    pairs = list(zip(quantizers(plain), quantizers(again), strict=True))
    (stem, same), *later = [(a, b) for (_, a), (_, b) in pairs]
    assert torch.equal(stem.scale, same.scale)  # the images are the same in both networks
    assert sum(not torch.equal(a.scale, b.scale) for a, b in later) > len(later) / 2


def test_ranges_set_again_are_those_of_an_observer_of_the_quantized_activations():
    config = small_config(
        quant__a_qconfig__quantizer="FixedFakeQuantize",
        quant__a_qconfig__observer="MinMaxObserver",
        quant__ends_8bit=[],
        quant__recon__iters=0,
        quant__recon__cache="fp32",
        quant__recon__ranges="quantized",
    )
    model = calibrated_model(config, IMAGES)
    results = reconstruct(model, IMAGES, recon_settings(config), seed=1)
    next(results)
    block = model.blocks[0]
    with torch.no_grad():
        x = model.stem(IMAGES)
        with full_precision(block):
            most = float(block.branch.conv1(x).max())
    next(results)
    assert float(block.branch.conv1.output_quantizer.scale) == pytest.approx(most / 15, rel=1e-5)


def test_merged_units_are_learned_together_and_leave_the_network_whole():
    merged = ["layer1.0", "layer2.1"]
    model, results = run(quant__recon__merge=merged, quant__recon__iters=40)
    names = [result.name for result in results]
    assert names[0] == "stem+layer1.0" and "layer2.0+layer2.1" in names
    assert len(names) == len(model.units("block")) - 2
    assert all(isinstance(layer.weight_quantizer, IntegerWeight) for _, layer in layers(model))
    with torch.no_grad():
        assert torch.isfinite(model(IMAGES)).all()


def test_merged_units_that_get_worse_are_taken_back_whole():
    changes = {"quant__recon__merge": ["layer1.0"], "quant__recon__iters": 3, "quant__recon__scale_lr": 1e3}
    model, results = run(**changes)
    assert results[0].reverted
    plain = calibrated_model(small_config(quant__w_qconfig__bit=2), IMAGES)
    harden(plain)
    for mine, other in ((model.stem, plain.stem), (model.blocks[0], plain.blocks[0])):
        for (name, a), (_, b) in zip(mine.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_a_unit_that_diverges_where_no_error_is_finite_is_taken_back_and_hardened(monkeypatch):
    monkeypatch.setattr(recon, "unit_errors", lambda *_: recon.Errors(math.inf, None))
    monkeypatch.setattr(recon, "learned_is_finite", lambda _: False)
    model, results = run(quant__recon__iters=2)
    assert all(result.reverted for result in results)
    assert all(isinstance(layer.weight_quantizer, IntegerWeight) for _, layer in layers(model))


@pytest.mark.parametrize(
    ("granularity", "merge", "words"),
    [
        ("block", ["layer2.7"], "layer2.7 is no unit; nearest are layer2.0, layer2.1,"),
        ("block", ["stem"], "stem cannot be merged"),
        ("layer", ["layer1.0.join"], "layer1.0.join cannot be merged"),
    ],
)
def test_units_that_cannot_be_merged_are_named(granularity, merge, words):
    with pytest.raises(UserError, match=rf"quant\.recon\.merge: {words}"):
        small_config(quant__recon__granularity=granularity, quant__recon__merge=merge)


def test_weights_step_sizes_are_learned_under_floors_that_stay():
    (fixed, _), (learned, results) = (
        run(quant__recon__iters=30, quant__recon__weight_scale_lr=rate) for rate in (0.0, 0.01)
    )
    moved = []
    for (_, a), (_, b) in zip(layers(fixed), layers(learned), strict=True):
        assert bool((b.weight_quantizer.scale > 0).all())
        assert not b.weight_quantizer.scale.requires_grad
        assert int(b.weight_quantizer.codes.max()) < 2**b.weight_quantizer.bits
        apart = (a.weight_quantizer.codes.int() - b.weight_quantizer.codes.int()).abs()
        assert int(apart.max()) <= 1  # the same floor, rounded up or down
        moved.append(not torch.equal(a.weight_quantizer.scale, b.weight_quantizer.scale))
    assert sum(moved) > len(moved) / 2
    assert sum(result.reverted for result in results) < len(results) / 2
