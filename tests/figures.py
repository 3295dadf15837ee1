"""Figures that tests report in one line each at the end of the run."""

FIGURES: list[str] = []


def record(text: str) -> None:
    """Show a line under the test run's summary."""
    FIGURES.append(text)
