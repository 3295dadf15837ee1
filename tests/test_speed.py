"""What the benchmark of steps measures with is what it says."""

import argparse
import sys

import pytest
import torch

from benchmarks import speed
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.script import run_script
from tests.small import calibrated_model, small_config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps is 0, allowed is an integer of at least 1"),
        (["--rounds", "0"], "--rounds is 0, allowed is an integer of at least 1"),
        (["--batch", "0"], "--batch is 0, allowed is an integer of at least 1"),
        (["--out", "/"], "--out /: is a folder, allowed is the name of a file"),
        (["--out", "/dev/null/x.json"], "/dev/null: cannot be written: Not a directory"),
        (["--images", "8"], "--images is 8, allowed is an integer of at least 32, the images of a batch"),
    ],
)
def test_options_that_cannot_be_used_are_one_line_at_once(monkeypatch, capsys, options, words):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--config", "config.yaml", *options])
    with pytest.raises(SystemExit) as stopped:
        run_script(speed.main)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {words}\n"


@pytest.fixture
def small():
    """Names of a small network's units, settings, and what gives wanted ones with what they learn from."""
    config, device = small_config(), torch.device("cpu")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, settings = calibrated_model(config, images), recon_settings(config)
    names = [unit.name for unit in model.units("block")]
    return names, settings, lambda wanted: speed.units_with_data(model, images, settings, device, wanted)


def test_each_wanted_unit_comes_with_what_it_learns_from(small):
    names, _, units_with_data = small
    found = list(units_with_data(names[1:]))
    assert [unit.name for unit, _ in found] == names[1:]
    assert all(len(data.target) == 4 for _, data in found)


@pytest.mark.parametrize("pays", [True, False])
def test_bfloat16_has_a_column_only_where_the_steps_would_use_it(monkeypatch, small, pays):
    monkeypatch.setattr(speed, "bfloat16_pays", lambda device: pays)
    for path in ("ours", "floor"):
        monkeypatch.setattr(speed, path, lambda *given: ([1.0] * given[-1], 1.0))
    names, settings, units_with_data = small
    ((unit, data),) = units_with_data(names[:1])
    args = argparse.Namespace(rounds=1, steps=1)
    row = speed.measure(unit, data, settings, torch.device("cpu"), None, args)
    assert ("fast_bf16" in row) == pays == ("fast_bf16" in speed.table([row]))


def test_the_floor_of_every_unit_is_timed_that_of_a_narrow_shortcut_too(small):
    """torch's own backward pass of a 1x1 convolution with stride and few channels corrupts memory."""
    names, settings, units_with_data = small
    for unit, data in units_with_data(names[:-1]):  # the classifier has no convolution
        seconds, _ = speed.floor(unit, data, settings, 2)
        assert len(seconds) == 2 and min(seconds) > 0
