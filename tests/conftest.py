"""Small tensors gain nothing from threads, and a loaded machine loses a lot to their waiting."""

import pytest
import torch

from tests.figures import FIGURES

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the figures that tests recorded, one a line."""
    for line in FIGURES:
        terminalreporter.write_line(line)
