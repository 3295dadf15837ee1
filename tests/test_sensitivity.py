"""What a unit costs, against the whole network run anew for each; budgets, against every assignment."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from calibquant.errors import UserError
from calibquant.model.quant_layer import QuantLayer, layers
from calibquant.quantization.fake_quant import Role
from calibquant.quantization.state import full_precision, quantizers, quantizing_only
from calibquant.solver import main_imagenet, sensitivity, test_imagenet
from calibquant.solver.bit_budget import Choice, assignment_overrides, best_choices
from calibquant.solver.config import check_config, load_config, plain
from calibquant.solver.pipeline import calibrate, quant_spec, quantize_model
from calibquant.solver.probe import Bits, Probe
from calibquant.solver.script import run_script
from tests.small import calibrated_model, random_float_model, small_config, some_wnids, write_images
from tests.test_end_to_end import only, script, write_config

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(6))
TARGETS = torch.arange(12)
ENDS = ["stem_weight", "classifier_input", "classifier_weight"]


QUICK = {f"quant__{side}_qconfig__observer": "MinMaxObserver" for side in "wa"}
"""Ranges that are quick to find."""


def small(**changes):
    return small_config(**QUICK, **changes)


def probe_of(config, granularity: str = "block", **images) -> Probe:
    model = quantize_model(random_float_model(config), config)
    special = dict(model.special_bits(quant_spec(config)))
    return Probe(model, granularity, special, list(IMAGES.split(8)), **images)


def kl_and_agreement(model, reference, images=IMAGES) -> tuple[float, float]:
    """Both by NumPy and SciPy from the whole network's logits."""
    with torch.no_grad():
        found, expected = (torch.cat([m(b) for b in images.split(8)]) for m in (model, reference))
    ours, theirs = (log_softmax(x.double().numpy(), axis=1) for x in (found, expected))
    kl = (np.exp(theirs) * (theirs - ours)).sum(1).mean()
    return kl, 100 * (ours.argmax(1) == theirs.argmax(1)).mean()


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("bits", [Bits(2, 4), Bits(3, None), Bits(None, 3)], ids=str)
def test_a_units_cost_is_that_of_the_whole_network_with_it_alone_quantized(granularity, bits):
    config = small(quant__ends_8bit=ENDS, quant__overrides=[{"match": "layer2.1", "w_bit": 5}])
    found = {m.unit: m for m in probe_of(config, granularity).sweep([Bits(8, 8), bits]) if m.bits == bits}
    config.quant.w_qconfig.bit, config.quant.a_qconfig.bit = bits.weight or 4, bits.activation or 4
    brute, reference = calibrated_model(config, IMAGES), random_float_model(config)
    roles = {role for role in Role if bits.of(role) is not None}
    assert [unit.name for unit in brute.units(granularity)] == list(found)
    for unit in brute.units(granularity):
        with full_precision(brute):
            for _, quantizer in quantizers(unit.module):
                quantizer.enabled = quantizer.role in roles
            kl, agreement = kl_and_agreement(brute, reference)
        assert found[unit.name].cost.kl == pytest.approx(kl, rel=1e-3, abs=1e-9), unit.name
        assert found[unit.name].cost.agreement == pytest.approx(agreement)
        assert found[unit.name].weights == sum(layer.weight.numel() for _, layer in layers(unit.module))


def test_the_whole_networks_cost_is_that_of_calibrated_ranges():
    config = small(quant__w_qconfig__bit=3)
    probe = probe_of(config)
    assert all(m.cost.kl >= 0 for m in probe.sweep([Bits(2, 4), Bits(3, 4)]))
    cost = probe.network_cost(dict.fromkeys(probe.names, Bits(3, 4)))
    kl, agreement = kl_and_agreement(calibrated_model(config, IMAGES), random_float_model(config))
    assert cost.kl == pytest.approx(kl, rel=1e-3) and cost.agreement == pytest.approx(agreement)


def test_the_whole_networks_cost_at_bits_that_no_sweep_has_tried_is_the_same():
    config = small(quant__w_qconfig__bit=3)
    probe, other = probe_of(config), probe_of(config)
    everywhere = dict.fromkeys(probe.names, Bits(3, 4))
    for _ in probe.sweep([Bits(2), Bits(3)]):
        pass
    for _ in other.sweep([Bits(3, 4)]):
        pass
    weights = probe.network_cost(dict.fromkeys(probe.names, Bits(3)))
    assert probe.network_cost(everywhere) == other.network_cost(everywhere) != weights


def test_images_to_measure_may_be_others_than_those_to_calibrate_and_have_labels():
    config = small()
    other = IMAGES.flip(0) * 1.5
    probe = probe_of(config, measured=list(other.split(8)), targets=list(TARGETS.split(8)))
    (*_, last) = probe.sweep([Bits(2, 2)])
    cost = probe.network_cost(dict.fromkeys(probe.names, Bits(2, 2)))
    config.quant.w_qconfig.bit = config.quant.a_qconfig.bit = 2
    model = calibrated_model(config, IMAGES)
    kl, _ = kl_and_agreement(model, random_float_model(config), other)
    with torch.no_grad():
        hits = torch.cat([model(batch).argmax(1) for batch in other.split(8)]) == TARGETS
    assert cost.kl == pytest.approx(kl, rel=1e-3)
    assert cost.top1 == pytest.approx(100 * hits.float().mean().item())
    assert last.unit == "classifier" and last.cost.top1 is not None


def test_the_range_of_a_weight_is_found_once_for_each_of_its_bit_widths(monkeypatch):
    counted: list[int] = []
    calibrate_weight = QuantLayer.calibrate_weight

    def count(layer: QuantLayer) -> None:
        counted.append(layer.weight_quantizer.bits)
        calibrate_weight(layer)

    monkeypatch.setattr(QuantLayer, "calibrate_weight", count)
    candidates = [Bits(2, 4), Bits(2, 8), Bits(4, 4), Bits(4, 8)]
    probe = probe_of(small(quant__ends_8bit=["stem_weight"]))
    assert len(list(probe.sweep(candidates))) == len(candidates) * len(probe.units)
    inner = len(layers(probe.model)) - 1
    assert sorted(counted) == [2] * inner + [4] * inner + [8]


def test_quantizing_only_lets_the_chosen_act_and_restores_the_rest():
    config = small()
    model = calibrated_model(config, IMAGES)
    (_, chosen), (_, other), *_ = quantizers(model)
    other.enabled = False
    with pytest.raises(KeyError), quantizing_only(model, [chosen]):
        assert [q for _, q in quantizers(model) if q.enabled] == [chosen]
        raise KeyError
    assert [q for _, q in quantizers(model) if not q.enabled] == [other]


# Budgets

CHOICE = st.builds(Choice, st.integers(0, 60), st.floats(0, 5).map(lambda x: round(x, 3)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=6), st.integers(0, 300))
def test_the_best_choices_are_those_that_trying_all_of_them_finds(units, limit):
    every = [sum(c.weight_bits for c in chosen) for chosen in itertools.product(*units)]
    costs = [sum(c.cost for c in chosen) for chosen in itertools.product(*units)]
    allowed = [cost for bits, cost in zip(every, costs, strict=True) if bits <= limit]
    if not allowed:
        with pytest.raises(ValueError, match="fewest bits"):
            best_choices(units, limit)
        return
    chosen = [choices[pick] for choices, pick in zip(units, best_choices(units, limit), strict=True)]
    assert sum(c.weight_bits for c in chosen) <= limit
    assert sum(c.cost for c in chosen) == pytest.approx(min(allowed), abs=1e-9)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("ends", [ENDS, [], ["stem_output", "classifier_input"]], ids=len)
def test_overrides_of_an_assignment_give_the_network_that_was_measured(granularity, ends):
    own = [{"match": "layer3.0.conv1", "w_bit": 7}, {"match": "layer1.1", "a_bit": 3}]
    config = small(quant__ends_8bit=ends, quant__overrides=own)
    probe = probe_of(config, granularity)
    candidates = [Bits(2, 4), Bits(3, 5)]
    found = list(probe.sweep(candidates))
    assignment = {name: candidates[place % 2] for place, name in enumerate(probe.names)}
    cost = probe.network_cost(assignment)
    mixed = plain(config)
    overrides = assignment_overrides(probe, assignment, Bits(4, 4))
    mixed["quant"]["overrides"] = overrides + mixed["quant"]["overrides"]
    model = quantize_model(random_float_model(config), check_config(mixed))
    calibrate(model, IMAGES, check_config(mixed))
    kl, _ = kl_and_agreement(model, random_float_model(config))
    assert cost.kl == pytest.approx(kl, rel=1e-3)
    chosen = [m for m in found if assignment[m.unit] == m.bits]
    bits = sum(layer.weight_quantizer.bits * layer.weight.numel() for _, layer in layers(model))
    assert sum(m.weight_bits for m in chosen) == bits


# The script


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    write_images(folder / "imagenet" / "val", some_wnids(5), 2)
    write_images(folder / "imagenet" / "sel", some_wnids(4), 3, seed=1)
    torch.save(random_float_model(small_config()).state_dict(), folder / "float.pth")
    return folder


def run(monkeypatch, main: Callable[[], None], *arguments: str) -> None:
    """A script's main in this process, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    main()


def test_the_script_ranks_plots_and_writes_a_config_that_runs(place, monkeypatch):
    config = write_config(place, quant__recon__iters=2, **QUICK)
    options = ["--bits", "w2a4,w4a4", "--budget", "5.1", "--images", "8", "--val", "6"]
    done = script("sensitivity", "--config", str(config), *options, cwd=place)
    assert done.returncode == 0, done.stderr
    folder = only((place / "train_log" / "sensitivity" / "resnet18_imagenet_w2_a4").iterdir())
    files = ["calibquant.log", "metrics.json", "mixed.yaml", "sensitivity.png"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    costs = {m["unit"]: m["cost"] for m in metrics["sensitivity"] if m["bits"] == "w2a4"}
    assert len(metrics["sensitivity"]) == 2 * len(costs) == 20
    printed = [line.split()[0] for line in done.stdout.splitlines() if line.split()[0] in costs]
    assert printed == sorted(costs, key=lambda unit: -costs[unit]["kl"])
    assert all(cost["top1"] is not None for cost in costs.values())
    assert metrics["calibration"]["count"] == 8 and metrics["config"]["quant"]["calibrate"] == 12

    mixed = load_config(folder / "mixed.yaml")
    overrides = plain(mixed)["quant"].pop("overrides")
    assert overrides and plain(load_config(config)) | {"quant": 0} == plain(mixed) | {"quant": 0}
    assert metrics["budget"]["bits_per_weight"] <= 5.1
    path = f"train_log/sensitivity/resnet18_imagenet_w2_a4/{folder.name}/mixed.yaml"
    assert f"python ./calibquant/solver/main_imagenet.py --config {path}" in done.stdout
    monkeypatch.chdir(place)
    run(monkeypatch, main_imagenet.main, "--config", path)
    saved = only((place / "model_quantized").glob("resnet18_imagenet_w2_a4_mixed_*/*.pth"))
    content = torch.load(saved, weights_only=True)["layers"].values()
    weights = sum(np.prod(layer["shape"]) for layer in content)
    average = sum(np.prod(layer["shape"]) * layer["bits"] for layer in content) / weights
    assert average == pytest.approx(metrics["budget"]["bits_per_weight"])
    run(monkeypatch, test_imagenet.main, "--config", path, "--quantized_model_path", saved.name)


def test_a_budget_of_weights_alone_tells_what_the_config_that_is_written_costs(place, monkeypatch, caplog):
    monkeypatch.chdir(place)
    config = str(write_config(place, quant__w_qconfig__bit=3, quant__a_qconfig__bit=2, **QUICK))
    options = ["--plot", "none", "--images", "4", "--budget", "8", "--bits"]
    found = []
    for bits in ("w3", "w3a2"):  # a single choice of weights' bits, so that both choose the same
        run(monkeypatch, sensitivity.main, "--config", config, *options, bits)
        path = max((place / "train_log/sensitivity/resnet18_imagenet_w3_a2").iterdir(), key=creation)
        metrics = json.loads((path / "metrics.json").read_text())
        found.append((metrics["budget"]["cost"], load_config(path / "mixed.yaml").quant.overrides))
    assert found[0] == found[1]
    assert "(of weights alone, activations then at 2 bits, sum" in caplog.text


def creation(folder: Path) -> int:
    return (folder / "metrics.json").stat().st_mtime_ns


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "w9a4"], "--bits is 'w9a4', allowed is a list such as w2a4,w4a4"),
        (["--bits", "w4a4,"], "--bits is 'w4a4,', allowed"),
        (["--images", "0"], "--images is 0, allowed is an integer of at least 1"),
        (["--val", "-1"], "--val is -1, allowed"),
        (["--budget", "nan"], "--budget is nan, allowed is a number from"),
        (["--bits", "a4", "--budget", "3"], "--bits is a4, allowed with --budget"),
        (["--bits", "w4,w4a4", "--budget", "3"], "--bits is w4,w4a4, allowed with --budget"),
        (["--bits", "w2a4", "--budget", "4.5"], "--budget is 4.5, allowed is a number from 4.546, the"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(place, options, words, monkeypatch, capsys):
    monkeypatch.chdir(place)
    config = str(write_config(place))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, lambda: run_script(sensitivity.main), "--config", config, *options)
    line = only(capsys.readouterr().err.strip().splitlines())
    assert stopped.value.code == 2 and line.startswith(f"error: {words}"), line


def test_without_matplotlib_one_line_says_what_to_do_and_none_is_needed_for_no_plot(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(place)
    config = str(write_config(place, **QUICK))
    with pytest.raises(UserError, match=r"requirements\.txt, or give --plot none"):
        run(monkeypatch, sensitivity.main, "--config", config)
    run(monkeypatch, sensitivity.main, "--config", config, "--plot", "none", "--images", "2")


def test_a_plot_that_cannot_be_written_costs_no_config(place, monkeypatch):
    def fail(*_: object) -> None:
        raise UserError("sensitivity.png: cannot be written: No space left on device")

    monkeypatch.setattr(sensitivity, "plot_sensitivity", fail)
    monkeypatch.chdir(place)
    config = str(write_config(place, data__type="full_disk", **QUICK))
    with pytest.raises(UserError, match="No space left"):
        run(monkeypatch, sensitivity.main, "--config", config, "--images", "2", "--budget", "8")
    folder = only((place / "train_log" / "sensitivity" / "resnet18_full_disk_w2_a4").iterdir())
    assert "budget" in json.loads((folder / "metrics.json").read_text())
    load_config(folder / "mixed.yaml")


def test_a_written_config_is_whole_yaml_in_the_keys_order(tmp_path):
    config = small()
    sensitivity.write_config(tmp_path / "mixed.yaml", config, [{"match": "stem", "a_bit": 5}], "3 bits")
    raw = yaml.safe_load((tmp_path / "mixed.yaml").read_text())
    assert list(raw) == ["quant", "model", "data", "process"]
    assert raw["quant"].pop("overrides") == [{"match": "stem", "a_bit": 5}]
