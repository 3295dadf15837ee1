"""A run's report shows what the run found, needs nothing but itself, and never costs a run."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibquant.errors import UserError
from calibquant.report import plots
from calibquant.report.page import run_page
from calibquant.report.record import THUMBNAILS
from calibquant.report.run_data import read_run
from calibquant.solver import report
from calibquant.solver.imagenet_util import Calibration
from calibquant.solver.report import make_comparison, make_report, recorded_for_report, write_report
from tests.runs import NASTY, Parts, activation, metrics, require_self_contained, unit, write_run
from tests.small import calibrated_model, random_float_model, small_config, some_wnids, write_images
from tests.test_end_to_end import ROOT, only, script, write_config

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the real script, two bits by single layers, from inside its place."""
    place = tmp_path_factory.mktemp("report")
    write_images(place / "imagenet" / "val", some_wnids(3), 2)
    write_images(place / "imagenet" / "sel", some_wnids(4), 3, seed=1)
    torch.save(random_float_model(small_config()).state_dict(), place / "float.pth")
    config = write_config(place, quant__recon__granularity="layer")
    done = script("main_imagenet", "--config", str(config), cwd=place)
    assert done.returncode == 0, done.stderr
    folder = only((place / "train_log" / "resnet18_imagenet_w2_a4").iterdir())
    assert f"report: {folder.relative_to(place) / 'report.html'}\n" in done.stdout
    return folder


# What a report shows


def test_a_run_leaves_a_report_of_all_it_found(real: Path) -> None:
    assert sorted(path.name for path in real.iterdir()) == [
        "calibquant.log",
        "metrics.json",
        "report.html",
        "report.json",
    ]
    found = json.loads((real / "metrics.json").read_text())
    page = (real / "report.html").read_text()
    parts = require_self_contained(page)
    assert len(found["units"]) == 21 and all(u["peak_memory_gib"] > 0 for u in found["units"])
    for entry in found["units"]:
        assert entry["name"] in parts.text and f"{entry['error_after']:.4g}" in parts.text
    for key in ("float", "range_only", "quantized"):
        assert f"{found[key]['top1']:.2f} %" in parts.text
    size = f"{found['checkpoint_mb']:.2f} MB"
    for words in (size, found["checkpoint"], found["calibration"]["sha256"], "quant.recon.drop_prob"):
        assert words in parts.text
    assert found["versions"]["torch"] in parts.text and "12 of 12 are shown" in parts.text
    assert parts.count("img") == 12 and "not drawn" not in page and "no number" not in page
    assert parts.count("svg") == 6 + 21 + 17  # charts, a curve per unit, a histogram per activation


def test_a_report_is_made_again_from_the_run_alone(real: Path) -> None:
    before = (real / "report.html").read_bytes()
    done = script("report", str(real), cwd=real, as_module=True)
    assert (done.returncode, done.stdout) == (0, f"{real / 'report.html'}\n"), done.stderr
    assert (real / "report.html").read_bytes() == before


def test_the_result_of_a_repository_run_of_an_older_version_is_shown(tmp_path: Path) -> None:
    old = json.loads((ROOT / "benchmarks/results/rs50_msra_w4a4_qdrop.json").read_text())
    parts = require_self_contained(run_page(read_run(write_run(tmp_path, old))))
    top1, size, moved = old["quantized"]["top1"], old["checkpoint_mb"], old["units"][0]["rounded_away"]
    assert f"{100 * moved:.2f} %" in parts.text
    assert f"{top1:.2f} %" in parts.text and f"{size:.2f} MB" in parts.text and "layer4.2" in parts.text
    assert "recorded no activations" in parts.text and "kept no pictures" in parts.text


SOFT = {"quant": {"recon": {"iters": 80, "warm_up": 0.2, "b_range": [20, 2]}}}
STRAIGHT = {"quant": {"recon": {**SOFT["quant"]["recon"], "round_mode": "straight_through"}}}


def test_curves_tell_of_a_regulariser_only_where_there_is_one(tmp_path: Path) -> None:
    flat = [{"step": s, "reconstruction": 2 - s / 80, "rounding": 0.0} for s in range(0, 80, 4)]
    one = metrics([unit("stem", trace=flat)])
    for config, tells in ((SOFT, True), (STRAIGHT, False)):
        run = read_run(write_run(tmp_path, one | {"config": config}))
        assert ("regulariser" in Parts(run_page(run)).text) == tells
        assert ("warm-up" in Parts(run_page(run)).text) == tells
        assert ("var(--shade)" in plots.loss_panel(run.units[0], run)) == tells


def test_the_curve_of_units_that_learned_on_has_their_own_steps(tmp_path: Path) -> None:
    flat = [{"step": s, "reconstruction": 2 - s / 400, "rounding": 0.0} for s in range(0, 400, 20)]
    config = {"quant": {**SOFT["quant"], "distil": {"iters": 400}}}
    both = metrics([unit("a"), unit("up_to_a", trace=flat, distilled=True)], config=config)
    run = read_run(write_run(tmp_path, both))
    alone, together = (plots.loss_panel(each, run) for each in run.units)
    assert ">80<" in alone and ">400<" in together
    assert "var(--shade)" in alone and "var(--shade)" not in together


def test_a_killed_runs_ranges_are_shown_as_calibrated(tmp_path: Path) -> None:
    extra = {"images": 8, "activations": [activation("stem", learned=None)]}
    run = read_run(write_run(tmp_path, metrics([unit("stem")]), extra))
    assert "1 % clipped as calibrated" in Parts(run_page(run)).text
    dashed = plots.activation_panel(run.activations[0])
    assert "stroke-dasharray" in dashed and "var(--after)" not in dashed


@pytest.mark.parametrize("damaged", ["", "[1]", '{"images"'])
def test_a_damaged_record_of_activations_costs_only_what_it_holds(tmp_path: Path, damaged: str) -> None:
    folder = write_run(tmp_path, metrics([unit("stem")]))
    (folder / "report.json").write_text(damaged)
    text = Parts(make_report(folder).read_text()).text
    assert "Activations and pictures are missing: " in text and "68.25 %" in text and "stem" in text


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "did not finish"),
    "no units": (metrics([]), "No unit was reconstructed"),
    "one unit": (metrics([unit("stem")]), "stem"),
    "no step": (metrics([unit("stem", trace=[])]), "No step was made"),
    "one step": (
        metrics([unit("stem", trace=[{"step": 0, "reconstruction": 1.0, "rounding": 0.0}])]),
        "stem",
    ),
    "diverged": (
        metrics(
            [
                unit(
                    "a",
                    error_after=math.nan,
                    trace=[{"step": 0, "reconstruction": math.inf, "rounding": 1}],
                )
            ]
        ),
        "these units is no finite number: a.",
    ),
    "no error": (metrics([unit("a", error_before=0.0, error_after=0.0)]), "no number to show"),
    "huge": (metrics([unit("a", error_before=1e308, error_after=5e-324, seconds=1e300)]), "1e+308"),
    "distilled": (metrics([unit("a"), unit("up_to_a", distilled=True)]), "Of up_to_a it is the divergence"),
    "reverted": (metrics([unit("a"), unit("b", reverted=True)]), "no better, kept as before learning: b."),
    "continued": (
        metrics([unit("a", seconds=700.0)], seconds={"reconstruct": 9.0}),
        "The run was continued",
    ),
    "killed": ({k: v for k, v in metrics([unit("a")]).items() if k != "quantized"}, "did not finish"),
    "skipped": (metrics([unit("a")], calibration={"count": 9, "skipped": 3}), "were skipped: 3"),
    "wrong types": (
        metrics([3, None, {"trace": 5}], seconds=[], config="x", versions=None, command=7),
        "?",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_runs_have_a_report_too(tmp_path: Path, case: str) -> None:
    content, words = ODD[case]
    page = run_page(read_run(write_run(tmp_path, content)))
    assert words in require_self_contained(page).text and "not drawn" not in page


def test_a_network_of_150_layers_stays_small_and_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"layer{stage}.{block}.conv{i}" for stage in (1, 2, 3) for block in range(25) for i in (1, 2)]
    extra = {
        "images": 32,
        "activations": [activation(name, counts=list(range(1, 97))) for name in names],
        "thumbnails": [{"file": f"{i}.png", "jpeg": "/9j/" + "A" * 2800} for i in range(THUMBNAILS)],
    }
    run = read_run(write_run(tmp_path, metrics([unit(name) for name in names]), extra))
    curve, histogram = plots.loss_panel(run.units[0], run), plots.activation_panel(run.activations[0])
    monkeypatch.setattr(plots, "loss_panel", lambda *_: curve)  # equal data: drawn once, to save time
    monkeypatch.setattr(plots, "activation_panel", lambda _: histogram)
    parts = require_self_contained(run_page(run))
    boxes = [attributes["viewbox"] or "" for tag, attributes in parts.tags if tag == "svg"]
    heights = [float(box.split()[3]) for box in boxes]
    assert len(heights) == 306 and max(heights) > 15 * 150  # a chart's rows keep their height
    assert not [attributes for tag, attributes in parts.tags if tag == "details" and attributes]  # folded


def test_texts_of_a_run_are_never_markup(tmp_path: Path) -> None:
    content = metrics([unit(NASTY), unit("b", reverted=True)], command=[NASTY], checkpoint=NASTY)
    content |= {"versions": {NASTY: NASTY}, "config": {NASTY: {NASTY: NASTY}}, "seconds": {NASTY: 1}}
    content["calibration"] = {"count": NASTY, "sha256": NASTY, "skipped": NASTY}
    pictures = [
        {"file": NASTY, "jpeg": "/9j/AAAA"},
        {"file": "x", "jpeg": '/9j/"><script>'},
        {"jpeg": NASTY},
    ]
    extra = {"images": NASTY, "activations": [activation(NASTY, bits=NASTY)], "thumbnails": pictures}
    folder = write_run(tmp_path / "<b>" / "<i>&", content, extra)
    page = run_page(read_run(folder))
    parts = require_self_contained(page)
    assert parts.count("b") > 0 and parts.count("i") > 0 and parts.count("img") == 1
    assert parts.text.count("<script>fetch") >= 8 and "not drawn" not in page
    assert "default-src 'none'" in page


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.floats() | st.integers() | JUNK
UNITS = st.lists(
    st.fixed_dictionaries({}, optional={key: NUMBERS for key in unit("") if key not in ("name", "trace")})
    | st.fixed_dictionaries(
        {
            "trace": st.lists(
                st.fixed_dictionaries({k: NUMBERS for k in ("step", "reconstruction", "rounding")})
            )
        }
    ),
    max_size=3,
)
ACTIVATIONS = st.lists(
    st.fixed_dictionaries(
        {"counts": st.lists(NUMBERS, max_size=4)},
        optional={key: NUMBERS for key in activation("") if key not in ("counts",)},
    ),
    max_size=2,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional={key: JUNK for key in metrics([])}), UNITS, ACTIVATIONS, JUNK)
def test_any_content_has_a_page(
    tmp_path: Path, content: Any, units: Any, activations: Any, junk: Any
) -> None:
    extra = {"activations": activations, "thumbnails": junk, "images": junk}
    folder = write_run(tmp_path, content | {"units": units}, extra)
    require_self_contained(run_page(read_run(folder)))
    make_comparison([folder, folder], str(tmp_path / "compare.html"))


# A report never costs a run


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_matplotlib_a_run_ends_well_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(write_run(tmp_path, metrics([unit("a")])))
    (line,) = refusals(caplog)
    assert (
        "matplotlib is not installed: pip install matplotlib" in line and "calibquant.solver.report" in line
    )
    with pytest.raises(UserError, match="matplotlib is not installed"):
        make_report(tmp_path)


@pytest.mark.parametrize("name", ["report", "sensitivity"])
def test_a_backend_that_matplotlib_no_longer_has_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Qt4Agg")  # as a .bashrc may still say
    config = str(write_config(tmp_path))
    arguments = {"report": [str(write_run(tmp_path, metrics([])))], "sensitivity": ["--config", config]}
    done = script(name, *arguments[name], cwd=tmp_path)
    line = only(done.stderr.strip().splitlines())
    assert done.returncode == 2 and line.startswith("error: MPLBACKEND: ") and "'Qt4Agg'" in line


def test_what_cannot_be_written_or_read_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path / "a", metrics([unit("a")]))
    (folder / "report.html").mkdir()
    write_report(folder)
    write_report(tmp_path / "gone")
    lines = refusals(caplog)
    assert len(lines) == 2 and all(
        "report: could not be made" in line and "\n" not in line for line in lines
    )
    assert "cannot be written" in lines[0] and "cannot be read" in lines[1]


def test_an_interrupt_of_the_report_alone_does_not_say_that_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "make_report", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path)
    (line,) = refusals(caplog)
    assert "the run itself is complete" in line and f"calibquant.solver.report {tmp_path}" in line


def test_a_recording_that_fails_is_one_line_and_the_reconstruction_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise UserError("report.json: cannot be written: No space left on device")

    monkeypatch.setattr(report, "write_json", full)
    config = small_config()
    model = calibrated_model(config, IMAGES)
    done = False
    with recorded_for_report(tmp_path, model, Calibration(IMAGES, ["x"] * 12, ""), config):
        done = True
    (line,) = refusals(caplog)
    assert done and "No space left" in line
    with pytest.raises(KeyError), recorded_for_report(tmp_path, model, Calibration(IMAGES, [], ""), config):
        raise KeyError  # what goes wrong inside is not swallowed


def test_the_core_needs_no_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import calibquant.solver.main_imagenet"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Several runs


def test_runs_are_compared_by_results_units_and_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = {"top1": 55.5, "top5": 80.0, "images": 200, "skipped": 0}
    first = write_run(tmp_path / "one", metrics([unit("stem"), unit("layer1.0")]))
    other = metrics([unit("stem", error_after=0.7), unit("layer9.9")], quantized=score)
    other["config"] = {"quant": {"w_qconfig": {"bit": 2}, "a_qconfig": {"bit": 4}}}
    second = write_run(tmp_path / "two", other)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(first), str(second / "metrics.json")])
    report.main()
    assert capsys.readouterr().out == "compare.html\n"
    parts = require_self_contained((tmp_path / "compare.html").read_text())
    for words in ("68.25 %", "55.50 %", "layer9.9", "quant.w_qconfig.bit", "-14.50", "-1.75"):
        assert words in parts.text
    assert "quant.a_qconfig.bit" not in parts.text and parts.count("svg") == 3
    assert "Errors compare" in parts.text
    many = make_comparison([first] * 12, str(tmp_path / "many.html")).read_text()
    assert "The first 8 runs are shown" in many and "the same in all runs" in many


@pytest.mark.parametrize("change", [{"sharpness": [0.5, 4]}, {"augment": "crop_flip"}])
def test_where_images_are_changed_at_random_another_seed_makes_them_others(tmp_path, change):
    both = [metrics([unit("stem")], config={"data": change, "process": {"seed": n}}) for n in (1, 2)]
    folders = [write_run(tmp_path / str(number), run) for number, run in enumerate(both)]
    parts = Parts(make_comparison(folders, str(tmp_path / "compare.html")).read_text())
    assert "differs between the runs (process.seed)." in parts.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"quant": {"equalize": {"iters": 100}}}}, "quant.equalize.iters"),
        ({"config": {"data": {"sharpness": [0.5, 4]}}}, "data.sharpness"),
        ({"config": {"process": {"seed": 3}}}, ""),
        ({"config": {"data": {"batch_size": 3}}}, ""),
        ({"calibration": {"count": 12, "sha256": "cd" * 32}}, "the calibration images"),
    ],
)
def test_errors_that_are_measured_by_other_things_are_not_compared(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    runs = [metrics([unit("stem")], config={}), metrics([unit("stem")], config={}) | change]
    folders = [write_run(tmp_path / str(number), run) for number, run in enumerate(runs)]
    parts = Parts(make_comparison(folders, str(tmp_path / "compare.html")).read_text())
    assert ("Errors are not shown" in parts.text) == bool(named)
    assert f"differs between the runs ({named})." in parts.text or not named
    assert parts.count("svg") == (2 if named else 3)  # top-1, after / before, and errors


@pytest.mark.parametrize("name", ["metrics.json", "page", "."])
def test_a_page_takes_no_other_files_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, metrics([unit("a")]))
    before = (run / "metrics.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--output", str(run / name)])
    with pytest.raises(SystemExit) as stopped:
        report.run_script(report.main)
    assert stopped.value.code == 2 and "ends in .html" in only(capsys.readouterr().err.splitlines())
    assert (run / "metrics.json").read_bytes() == before and len([*run.iterdir()]) == 1


@pytest.mark.parametrize("content", [None, "", "[1]", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        report.run_script(report.main)
    line = only(capsys.readouterr().err.strip().splitlines())
    assert stopped.value.code == 2 and "metrics.json: " in line and len(line) < 400
