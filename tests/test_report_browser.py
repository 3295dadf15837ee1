"""A real browser shows a report whole, in light and dark, wide and narrow, and asks nobody for anything."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibquant.report.record import thumbnails
from calibquant.solver.report import make_comparison, make_report
from tests.browser import CHROMIUM, Browser
from tests.runs import activation, metrics, unit, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")

TEXTS = "svg text, p, td, th, span, b, small, h1, h2, li, summary, code"
CONTRASTS = """(() => {
  const canvas = document.createElement('canvas').getContext('2d');
  const rgb = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = colour => rgb(colour).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour; } };
  return [...document.querySelectorAll('TEXTS')].map(node => { const style = getComputedStyle(node);
    const [a, b] = [node.tagName === 'text' ? style.fill : style.color, behind(node)].map(light);
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.slice(0, 40)]; });
})()""".replace("TEXTS", TEXTS)
"""The contrast of each text to what lies behind it, as WCAG defines it."""
PICTURES = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
PLOTS = (
    "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().height, s.getScreenCTM().a])"
)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report with everything in it."""
    names = [f"layer{stage}.{block}.conv{i}" for stage in (1, 2) for block in range(4) for i in (1, 2)]
    pictures = thumbnails(torch.rand(12, 3, 40, 40), [f"{i}.png" for i in range(12)], [0.0] * 3, [1.0] * 3)
    units = [unit(names[0], reverted=True), *(unit(name) for name in names[1:])]
    extra = {"images": 32, "activations": [activation(name) for name in names], "thumbnails": pictures}
    return make_report(write_run(tmp_path / "resnet18_x_w4_a4" / "run", metrics(units), extra))


def test_a_report_is_whole_and_readable_in_light_and_dark_on_a_desk_and_on_a_phone(
    page: Path, tmp_path: Path
) -> None:
    backgrounds = set()
    with Browser() as browser:
        for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
            browser.open(page, width, dark)
            assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(PICTURES) == 12
            text = browser.evaluate("document.body.innerText")
            for words in (
                "68.25 %",
                "1.50 MB",
                "kept as before",
                "layer2.3.conv2",
                "12 of 12 are shown",
            ):
                assert words in text
            contrasts = browser.evaluate(CONTRASTS)
            assert len(contrasts) > 300 and min(contrasts)[0] >= 4.5, min(contrasts)
            plots = browser.evaluate(PLOTS)
            assert len(plots) == 6 + 16 + 16 and min(height for height, _ in plots) > 40
            assert 11 * min(scale for _, scale in plots) >= 9  # pixels of the plots' text
            browser.screenshot(tmp_path / "shot.png")
            shot = np.asarray(Image.open(tmp_path / "shot.png").convert("L"), float)
            assert shot.shape[1] == width and shot.shape[0] > 2500 and shot.std() > 10
            backgrounds.add((dark, bool(shot[0, 0] > 128)))
    assert backgrounds == {(False, True), (True, False)}


def test_nothing_in_a_run_s_texts_runs_or_is_asked_for(tmp_path: Path) -> None:
    nasty = '"><img src=http://example.org/x onerror="window.hacked=1"><script>window.hacked=1</script>'
    content = metrics([unit(nasty)], checkpoint=nasty, versions={nasty: nasty})
    other = content | {"config": {nasty: nasty}}
    folders = [write_run(tmp_path / name, run) for name, run in (("a", content), ("b", other))]
    pages = [make_report(folders[0]), make_comparison(folders, str(tmp_path / "compare.html"))]
    with Browser() as browser:
        for page in pages:
            browser.open(page, 1280, dark=False)
            assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
            assert browser.evaluate("typeof window.hacked") == "undefined"
            assert "<script>window.hacked" in browser.evaluate("document.body.innerText")


def test_the_browser_of_these_tests_does_report_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://example.org/x.png'><script>nowhere()</script>")
    with Browser() as browser:
        browser.open(page, 800, dark=False)
        assert "nowhere is not defined" in " ".join(browser.complaints())
        assert browser.requests() == [page.as_uri(), "http://example.org/x.png"]
