"""Small tensors gain nothing from threads, and a loaded machine loses a lot to their waiting."""

import gc
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.figures import FIGURES

torch.set_num_threads(1)
settings.register_profile("no clock", deadline=None)  # a loaded machine may stall for as long as it likes
settings.load_profile("no clock")


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection, which each unit that is learned asks for."""
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In one of several processes: hand on the figures that its tests recorded."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the figures of a process that has ended; one that crashed has none."""
    FIGURES.extend(getattr(node, "workeroutput", {}).get("figures", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the figures that tests recorded, one a line."""
    for line in FIGURES:
        terminalreporter.write_line(line)
