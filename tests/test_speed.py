"""What the benchmark of steps measures with is what it says."""

import sys

import pytest

from benchmarks import speed
from calibquant.solver.script import run_script


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps is 0, allowed is an integer of at least 1"),
        (["--rounds", "0"], "--rounds is 0, allowed is an integer of at least 1"),
        (["--batch", "0"], "--batch is 0, allowed is an integer of at least 1"),
        (["--images", "8"], "--images is 8, allowed is an integer of at least 32, the images of a batch"),
    ],
)
def test_numbers_that_nothing_can_be_measured_with_are_one_line(monkeypatch, capsys, options, words):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--config", "config.yaml", *options])
    with pytest.raises(SystemExit) as stopped:
        run_script(speed.main)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {words}\n"
