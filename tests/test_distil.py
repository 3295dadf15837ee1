"""Learning by the network's output: what is learned, of whom, by what, and what is kept of it."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from calibquant.errors import UserError
from calibquant.model.quant_layer import harden, layers, soften
from calibquant.quantization.fake_quant import FixedFakeQuantize, IntegerWeight
from calibquant.quantization.state import full_precision, quantizers
from calibquant.solver import recon
from calibquant.solver.cache_plan import estimate
from calibquant.solver.caches import FileStore
from calibquant.solver.distil import alike, divergence
from calibquant.solver.fast import FastEngine
from calibquant.solver.learn import Engine
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import Memory, reconstruct
from calibquant.solver.resume import RunState
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(3))
AFTER = "layer2.1"
STAGE = f"up_to_{AFTER}"
PLACE = 6
"""Of the stage among the results: stem, four blocks, and itself."""


def config_with(**changes):
    given = {"quant__distil__after": [AFTER], "quant__distil__iters": 60, "quant__distil__round_lr": 0.2}
    return small_config(**{"quant__w_qconfig__bit": 2} | given | changes)


def decided_model(config):
    """The random network, but that it is as sure of its predictions as a trained one."""
    model = calibrated_model(config, IMAGES)
    model.classifier.fc.weight *= 20
    model.classifier.fc.calibrate_weight()
    return model


def run(count=None, memory=None, engine=None, store=None, **changes):
    """The network and what each unit came to; only the first ones where a number is given."""
    config = config_with(**changes)
    model = decided_model(config)
    results = reconstruct(
        model, IMAGES, recon_settings(config), 7, memory=memory, engine=engine, store=store
    )
    return model, [result for _, result in zip(range(count or 99), results, strict=False)]


@cache
def usual(count=None):
    """A run without changes; nobody may change the network."""
    return run(count)


def logits_up_to_stage(model):
    """The network's logits with the stage quantized and the rest float."""
    with torch.no_grad(), full_precision(model.classifier), full_precision(model.blocks[4:]):
        return model(IMAGES)


def float_logits():
    model = decided_model(config_with())
    with torch.no_grad(), full_precision(model):
        return model(IMAGES)


def kl(output, target):
    """KL(target || output) in nats, the mean over images, as SciPy computes it."""
    p, q = (softmax(x.double().numpy(), axis=1) for x in (target, output))
    return float(np.mean(rel_entr(p, q).sum(1)))


def assert_same(one, other):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_divergence_is_scipys():
    draw = torch.Generator().manual_seed(1)
    output, target = (5 * torch.randn(7, 11, generator=draw) for _ in range(2))
    assert float(divergence(output, target)) == pytest.approx(kl(output, target), rel=1e-5)
    assert float(divergence(target, target)) == pytest.approx(0, abs=1e-6)


def test_units_that_learn_on_bring_the_networks_output_nearer_to_the_float_ones():
    before, _ = run(PLACE - 1, quant__recon__cache="fp32")
    after, results = run(PLACE, quant__recon__cache="fp32")
    stage, target = results[-1], float_logits()
    assert [r.name for r in results] == ["stem", "layer1.0", "layer1.1", "layer2.0", AFTER, STAGE]
    assert stage.error_before == pytest.approx(kl(logits_up_to_stage(before), target), rel=5e-3)
    assert stage.error_after == pytest.approx(kl(logits_up_to_stage(after), target), rel=5e-3)
    assert stage.error_after < 0.8 * stage.error_before and not stage.reverted
    assert stage.trace[-1].reconstruction < stage.trace[0].reconstruction
    assert 0 < stage.moved < 0.5


def test_everything_that_units_have_learns_and_nothing_behind_them_does():
    before, _ = usual(PLACE - 1)
    after, _ = usual(PLACE)
    for (name, one), (_, other) in zip(
        before.state_dict().items(), after.state_dict().items(), strict=True
    ):
        learned = not name.startswith(("blocks.4", "blocks.5", "blocks.6", "blocks.7", "classifier"))
        kind = name.rsplit(".", 1)[-1]
        if not learned or kind == "zero_point":
            assert torch.equal(one, other), name
        elif kind in ("bias", "scale"):
            assert not torch.equal(one, other), name
    front = [after.stem, *after.blocks[:4]]
    for module in front:
        assert all(isinstance(layer.weight_quantizer, IntegerWeight) for _, layer in layers(module))
        assert all(type(quantizer) is FixedFakeQuantize for _, quantizer in quantizers(module))
        assert not any(value.requires_grad for value in module.state_dict(keep_vars=True).values())


def test_units_behind_learn_from_what_the_units_before_now_give(monkeypatch):
    seen = {}
    learn = recon.reconstruct_unit

    def spy(unit, data, means, generator):
        seen[unit.name] = data.quantized[0].clone()
        return learn(unit, data, means, generator)

    monkeypatch.setattr(recon, "reconstruct_unit", spy)
    model, _ = run(PLACE + 1, quant__recon__cache="fp32")
    with torch.no_grad():
        x = model.stem(IMAGES)
        for block in model.blocks[:4]:
            x = block(x)
    torch.testing.assert_close(seen["layer3.0"], x, atol=1e-4, rtol=1e-4)


def test_what_is_softened_and_hardened_again_is_what_it_was():
    model, _ = run(quant__distil__after=[])
    again = copy.deepcopy(model)
    soften(again)
    assert list(again.parameters()) and not any(isinstance(m, IntegerWeight) for m in again.modules())
    harden(again)
    assert_same(model, again)


@pytest.mark.parametrize("compensate", [False, True])
def test_the_last_unit_may_be_the_networks_last(compensate):
    changes = {"quant__distil__after": ["classifier"], "quant__distil__round_lr": 0.0}
    changes |= {"quant__recon__compensate": compensate, "quant__recon__cache": "fp32"}
    model, results = run(**changes)
    stage = results[-1]
    assert stage.name == "up_to_classifier" and stage.moved == 0
    assert stage.reverted == compensate  # which left nothing to be had
    with torch.no_grad():  # of the float network, not of the classifier that was matched to its inputs
        assert stage.error_after == pytest.approx(kl(model(IMAGES), float_logits()), rel=1e-3)


def test_the_names_that_an_error_proposes_are_allowed():
    merged = {"quant__recon__merge": ["layer1.0"]}
    with pytest.raises(UserError, match=r"quant\.distil\.after: stem is no unit") as refused:
        config_with(quant__distil__after=["stem"], **merged)
    proposed = str(refused.value).rpartition("nearest are ")[2].split(", ")
    assert "layer1.0" in proposed
    config_with(quant__distil__after=proposed, **merged)


def test_at_rates_of_0_nothing_is_learned():
    exactly = {"quant__recon__cache": "fp32", "quant__distil__round_lr": 0.0}
    before, _ = run(PLACE - 1, **exactly)
    after, results = run(PLACE, quant__distil__lr=0, **exactly)
    assert results[-1].error_after == results[-1].error_before and not results[-1].trace
    assert_same(before, after)


@pytest.mark.parametrize("changes", [{"quant__distil__lr": lr} for lr in (1e4, 1e30, 1e308)])
def test_what_makes_the_output_no_better_is_taken_back(changes):
    before, _ = usual(PLACE - 1)
    after, results = run(PLACE, **changes)
    assert results[-1].reverted and results[-1].error_after == results[-1].error_before
    assert math.isfinite(results[-1].error_after)
    assert_same(before, after)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.0, 0.0), (1e-3, 2**-10), (0.25, 0.25), (3e-5, 2**-15), (1.7e308, math.inf), (math.inf, math.inf)],
)
def test_rates_are_powers_of_two_whatever_they_are(rate, expected):
    assert alike(rate) == expected


def test_images_held_out_decide():
    _, results = run(PLACE, quant__recon__held_out=0.25)
    stage = results[-1]
    assert stage.held_out_before is not None and stage.held_out_after is not None
    assert stage.held_out_after <= stage.held_out_before


@pytest.mark.parametrize(
    ("granularity", "merge", "after"),
    [
        ("layer", [], "layer2.1.join"),
        ("block", ["layer2.1"], "layer2.1"),
    ],
)
def test_units_of_every_kind_learn_on(granularity, merge, after):
    changes = {"quant__recon__granularity": granularity, "quant__recon__merge": merge}
    model, results = run(quant__distil__after=[after], **changes)
    (stage,) = (result for result in results if result.name.startswith("up_to_"))
    assert stage.error_after < stage.error_before
    assert stage.name == f"up_to_{results[results.index(stage) - 1].name}"
    assert all(isinstance(layer.weight_quantizer, IntegerWeight) for _, layer in layers(model))


def test_caches_elsewhere_and_the_same_seed_give_the_same_network(tmp_path):
    model, _ = usual()
    again, _ = run(store=FileStore(torch.float16, tmp_path))
    assert_same(model, again)


class KilledAfter(RunState):
    """A state whose run is killed once some units are kept."""

    def __init__(self, folder, count):
        super().__init__(folder)
        self.left = count

    def remember(self, unit, result):
        super().remember(unit, result)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kept", [PLACE - 1, PLACE, PLACE + 2])
def test_a_killed_run_goes_on_to_the_same_network(tmp_path, kept):
    whole, results = usual()
    with pytest.raises(KeyboardInterrupt):
        run(memory=KilledAfter(tmp_path, kept))
    again, resumed = run(memory=RunState(tmp_path))
    assert_same(whole, again)
    assert [(r.name, r.error_after, r.reverted) for r in resumed] == [
        (r.name, r.error_after, r.reverted) for r in results
    ]


class OneCompiled(FastEngine):
    """Compiles the stage alone."""

    def __init__(self):
        super().__init__(always=True)
        self.seen = 0

    def objective(self, problem, work, device):
        self.seen += 1
        chosen = super() if self.seen == PLACE else Engine()
        return chosen.objective(problem, work, device)


def test_compiled_steps_follow_the_plain_ones(caplog):
    _, plain = usual(PLACE)
    engine = OneCompiled()
    _, compiled = run(PLACE, engine=engine)
    assert engine.compiles and "uncompiled" not in caplog.text
    for p, q in zip(plain[-1].trace[:20], compiled[-1].trace[:20], strict=True):
        assert q.reconstruction == pytest.approx(p.reconstruction, rel=2e-2), p.step
    assert compiled[-1].error_after == pytest.approx(plain[-1].error_after, rel=0.2)


@pytest.mark.parametrize(
    ("granularity", "name", "nearest"),
    [
        ("block", "layer1.7", "layer1.0, layer1.1"),
        ("layer", "layer1.0", "layer1.0.join"),
        ("layer", "layer1.0.conv1", "layer1.0.join"),
    ],
)
def test_units_that_learning_cannot_follow_are_named(granularity, name, nearest):
    with pytest.raises(UserError) as caught:
        small_config(quant__distil__after=[name], quant__recon__granularity=granularity)
    line = str(caught.value)
    assert "quant.distil.after" in line and name in line and nearest in line and "\n" not in line


def test_the_memory_that_is_foreseen_holds_the_images_and_a_step_of_the_whole_network():
    plain, distilled = (
        estimate(calibrated_model(config, IMAGES), IMAGES[:1], 100, recon_settings(config))
        for config in (config_with(quant__distil__after=[]), config_with())
    )
    values = sum(4 * 256 // 2**stage for stage in range(4) for _ in range(4)) + 4 * 256
    model = calibrated_model(config_with(), IMAGES)  # whose units up to AFTER learn
    learned = sum(
        layer.weight.numel() for part in (model.stem, *model.blocks[:4]) for _, layer in layers(part)
    )
    assert distilled.step == 5 * 4 * 8 * values + 7 * 4 * learned > plain.step
    assert plain.caches < distilled.caches <= plain.caches + 100 * IMAGES[0].nbytes


def test_nothing_is_kept_or_computed_where_no_unit_is_named(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(recon, "images_and_logits", never)
    run(quant__distil__after=[], memory=Memory())
