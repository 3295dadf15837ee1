"""Runs' files as a report reads them, and what its pages must be."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

MAX_BYTES = 3_000_000
NASTY = "<script>fetch('http://example.org')</script>\"' onerror=x $\\frac{1}{0}$ \x00\u2028 é 字"
"""A text that is markup, a formula, and more than ASCII."""


class Parts(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def require_self_contained(page: str) -> Parts:
    """No script and no address but inline data and places in the page itself."""
    parts = Parts(page)
    assert parts.count("script") == parts.count("iframe") == parts.count("object") == 0
    for tag, attributes in parts.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page.encode()) < MAX_BYTES
    return parts


def unit(name: str, **changes: Any) -> dict[str, Any]:
    """A unit as `metrics.json` holds it."""
    trace = [
        {"step": s, "reconstruction": 2 - s / 80, "rounding": max(0.0, s - 20.0)} for s in range(0, 80, 4)
    ]
    found = {
        "name": name,
        "error_before": 2.5,
        "error_after": 1.25,
        "seconds": 3.0,
        "unconverged": 0.02,
        "moved": 0.11,
        "reverted": False,
        "trace": trace,
        "peak_memory_gib": 0.5,
    }
    return found | changes


def activation(name: str, **changes: Any) -> dict[str, Any]:
    """An activation as `report.json` holds it."""
    ranges = {"low": 0.0, "high": 3.0, "clipped": 0.01}
    found = {
        "name": name,
        "bits": 4,
        "channels": 1,
        "low": 0.0,
        "high": 4.0,
        "elements": 1000,
        "zeros": 400,
    }
    counts = [90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 0, 3]
    return found | {"counts": counts, "calibrated": ranges, "learned": ranges | {"high": 2.5}} | changes


def metrics(units: list[Any], **changes: Any) -> dict[str, Any]:
    """A finished run's `metrics.json`."""
    score = {"top1": 70.0, "top5": 90.0, "images": 200, "skipped": 0}
    return {
        "command": ["main_imagenet.py", "--config", "c.yaml"],
        "seed": 1,
        "seconds": {"load": 1.0, "reconstruct": 1000.0},
        "config": {"quant": {"w_qconfig": {"bit": 4}, "a_qconfig": {"bit": 4}, "recon": {"iters": 80}}},
        "versions": {"torch": "2.11"},
        "calibration": {"count": 12, "sha256": "ab" * 32, "skipped": 0},
        "float": score,
        "range_only": score | {"top1": 61.5},
        "quantized": score | {"top1": 68.25},
        "checkpoint": "model_quantized/x.pth",
        "checkpoint_mb": 1.5,
        "float32_mb": 9.0,
        "peak_memory_gib": 0.75,
        "peak_host_memory_gib": 0.75,
        "units": units,
    } | changes


def write_run(folder: Path, content: Any, extra: Any = None) -> Path:
    """A run's folder with the given files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    if extra is not None:
        (folder / "report.json").write_text(json.dumps(extra))
    return folder
