"""Ablations: paired statistics against synthetic data, and the real command on a tiny network."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ablation, ablation_runs
from benchmarks.ablation_plan import PRESETS, edited, parse_variant, taken
from benchmarks.ablation_report import SetEffect, plot_sets, sets_table
from benchmarks.ablation_runs import Scorer, image_metrics
from benchmarks.ablation_statistics import (
    fitted_temperature,
    own_spread,
    paired_difference,
    pooled,
    rank_correlation,
    spread,
)
from benchmarks.compare_to_float import compare
from calibquant.errors import UserError
from calibquant.solver import main_imagenet
from calibquant.solver.checkpoint import load_checkpoint
from calibquant.solver.config import load_config, plain
from calibquant.solver.imagenet_util import load_calibration
from calibquant.solver.pipeline import float_model
from calibquant.solver.rank_sets import find_set
from calibquant.solver.resume import run_state
from calibquant.solver.run_log import start_run
from calibquant.solver.script import run_script
from tests.small import random_float_model, small_config, some_wnids, write_images
from tests.test_end_to_end import write_config

ROOT = Path(__file__).resolve().parents[1]
QUICK = {f"quant__{side}_qconfig__observer": "MinMaxObserver" for side in "wa"}
VARIANTS = ("qdrop", "all_dropped,quant.equalize.iters=5,quant.recon.drop_prob=0")
SETS, SEEDS = ("list0.txt", "list1.txt", "list2.txt"), ("1", "2")


@pytest.fixture
def images():
    """Two networks' values on the same 400 images, which differ far less than the images do."""
    draw = np.random.default_rng(1)
    hardness = draw.normal(0, 10, 400)
    return hardness, hardness + 0.5 + draw.normal(0, 1, 400)


def test_an_interval_holds_the_true_difference_which_pairing_makes_narrow(images):
    found = paired_difference(images[1], images[0])
    assert found.low < 0.5 < found.high and found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.15)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(2)
    found = [paired_difference(draw.normal(1, 1, 30), np.zeros(30), seed) for seed in range(100)]
    assert 86 <= sum(one.low <= 1 <= one.high for one in found) <= 100


def test_swapping_the_variants_turns_the_interval_over(images):
    there, back = paired_difference(images[1], images[0]), paired_difference(images[0], images[1])
    swapped = (-back.mean, -back.high, -back.low)
    assert (there.mean, there.low, there.high) == pytest.approx(swapped, abs=0.02)
    assert there == paired_difference(images[1], images[0])  # the same draws each time


def test_equal_variants_differ_by_nothing_and_one_image_gives_no_interval(images):
    same = paired_difference(images[0], images[0])
    assert same.mean == same.low == same.high == 0
    one = paired_difference(np.ones(1), np.zeros(1))
    assert one.mean == 1 and np.isnan(one.low) and np.isnan(one.high)


def test_an_image_on_which_a_network_diverged_has_no_kl():
    expected, target = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    found = image_metrics(expected, torch.full((1, 2), torch.nan), target, 1.0)
    assert math.isnan(found["kl"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_diverged_is_told_and_drawn(tmp_path, value):
    found = paired_difference(np.array([1.0, value, 2.0]), np.zeros(3))
    assert not np.isfinite([found.mean, found.low, found.high]).any()
    lost = {"top1": 0.0, "agreement": 0.0, "kl": value, "expected_drop": value}
    fine = {"top1": 70.0, "agreement": 80.0, "kl": 0.1, "expected_drop": 0.1}
    both = {"one": lost, "two": fine}
    effects = [SetEffect("w2a4", "ours", 3, 75.0, both, lost, dict.fromkeys(lost, found), {})]
    plot_sets(tmp_path / "plot.svg", effects)
    assert "<svg" in (tmp_path / "plot.svg").read_text() and str(value) in sets_table(effects)


def test_the_expected_drop_is_the_drop_with_less_noise_for_a_network_too_sure_of_itself():
    draw = torch.Generator().manual_seed(3)
    full = 6 * torch.randn(3000, 5, generator=draw)
    labels = torch.multinomial((full / 3).softmax(1), 1, generator=draw)
    temperature = fitted_temperature(full, labels[:, 0])
    assert temperature == pytest.approx(3, rel=0.1)
    other = full + 3 * torch.randn(full.shape, generator=draw)
    each = zip(full.split(1), other.split(1), labels, strict=True)
    found = [image_metrics(*one, temperature) for one in each]
    drops = np.array([one["expected_drop"] for one in found])
    hits = 100.0 * (full.argmax(1) == labels[:, 0]).numpy()
    told = hits - np.array([one["top1"] for one in found])
    assert drops.mean() == pytest.approx(told.mean(), abs=3 * told.std() / len(told) ** 0.5)
    assert drops.std() < 0.5 * told.std() and drops.min() >= 0
    assert not drops[[one["agreement"] == 100 for one in found]].any()


def test_runs_are_averaged_image_by_image_over_those_that_scored_it():
    both = [np.array([0.0, 100.0]), np.array([100.0, 100.0])]
    assert pooled(both, ["ab", "ab"]).tolist() == [50, 100]
    assert pooled(both, ["ab", "ca"]).tolist() == [50, 100, 100]


def test_spreads_and_ranks():
    assert spread([3.0, 1.0, 2.5]) == 2
    assert np.isnan(spread([1.0, float("nan"), 2.0])), "a set on which a network diverged is not left out"
    assert rank_correlation([1, 2, 3], [0.1, 0.5, 9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 0.5, 0.1]) == pytest.approx(-1)
    assert all(np.isnan(rank_correlation(*pair)) for pair in (([1, 2], [1, 2]), ([1, 2, 3], [4, 4, 4])))


def answers(draw: np.random.Generator, effects) -> np.ndarray:
    """Values ``[sets, images]`` of sets with these effects, on images harder and easier by far more."""
    return draw.normal(0, 10, 300) + np.array(effects)[:, None] + draw.normal(0, 1, (len(effects), 300))


def test_sets_alike_have_no_spread_of_their_own_though_their_means_differ():
    draw = np.random.default_rng(4)
    trials = [answers(draw, np.zeros(6)) for _ in range(300)]
    found = [own_spread(values) for values in trials]
    assert min(spread(values.mean(axis=1)) for values in trials) > 0.03
    assert 0.92 < np.mean([one.low == 0 for one in found]) <= 1
    assert np.median([one.mean for one in found]) < 0.03


def test_the_sets_own_spread_is_that_of_their_effects_about_as_often_as_its_interval_says():
    draw = np.random.default_rng(5)
    deviation = 0.2
    effects = draw.normal(0, deviation, (300, 6))
    truth = np.median(np.ptp(draw.normal(0, deviation, (10000, 6)), axis=1))
    found = [own_spread(answers(draw, one)) for one in effects]
    assert np.mean([one.low <= truth <= one.high for one in found]) == pytest.approx(0.95, abs=0.04)
    assert np.median([one.mean for one in found]) == pytest.approx(truth, rel=0.15)


def test_endless_images_would_leave_the_spread_as_it_is():
    images = np.random.default_rng(6).normal(0, 1, 50)
    found = own_spread(np.stack([images, images + 1, images + 2]))
    assert found.mean == pytest.approx(1.588, abs=1e-3), "the median range of three normal draws"
    assert found.low < 2 < found.high
    lost = own_spread(np.array([[1.0, np.nan], [1.0, 2.0]]))
    assert np.isnan([lost.mean, lost.low, lost.high]).all()
    assert np.isnan(own_spread(np.zeros((2, 1))).mean)


def test_a_variant_is_a_preset_a_file_or_edits(tmp_path):
    assert parse_variant("ours").edits == {}
    assert parse_variant("qdrop").edits["quant.equalize.iters"] == 0
    both = parse_variant("ours,quant.ends_8bit=[stem_weight, stem_output],quant.recon.b_range=[9,2]")
    assert both.edits == {"quant.ends_8bit": ["stem_weight", "stem_output"], "quant.recon.b_range": [9, 2]}
    assert both.name.startswith("ours,") and parse_variant("mine,quant.equalize.iters=5").name == "mine"
    other = parse_variant(f"other={write_config(tmp_path, quant__equalize__iters=5)},quant.calibrate=5")
    assert other.name == "other" and other.quant is not None and other.quant["equalize"]["iters"] == 5
    assert other.edits == {"data.augment": "none", "data.sharpness": [1, 1], "quant.calibrate": 5}


@pytest.mark.parametrize("text", ["qdorp", "", "quant.equalize.iters=5", "a b", "ours,quant.equalize"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(UserError, match=r"--variants "):
        parse_variant(text)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("exp/**/qdrop.yaml")), ids=lambda path: "_".join(path.parts[-3:-1])
)
def test_the_preset_and_the_files_of_plain_qdrop_say_the_same(path):
    config, qdrop = plain(load_config(path.with_name("config.yaml"))), plain(load_config(path))
    rate = {"quant.recon.round_lr": qdrop["quant"]["recon"]["round_lr"]}  # a schedule's, not a method's
    assert edited(config, PRESETS["qdrop"] | rate) == qdrop


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Val and train images of a few classes, float weights, and three lists of train images."""
    folder = tmp_path_factory.mktemp("ablation")
    write_images(folder / "imagenet" / "val", some_wnids(4), 3)
    write_images(folder / "imagenet" / "train", some_wnids(4), 4, seed=1)
    torch.save(random_float_model(small_config()).state_dict(), folder / "float.pth")
    names = sorted(str(p.relative_to(folder / "imagenet/train")) for p in folder.glob("imagenet/train/*/*"))
    for number, name in enumerate(SETS):
        (folder / name).write_text("\n".join(names[number * 4 : number * 4 + 8]))
    return folder


def run(place: Path, monkeypatch, *arguments: str) -> int:
    """The command's exit code, run in the folder."""
    config = place / "config0.yaml"
    if not config.exists():
        write_config(place, data__calibration="train", quant__recon__iters=40, **QUICK)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--config", str(config), *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(ablation.main)
    return stopped.value.code


def ablate(place: Path, patch, variants=VARIANTS, bits=("w2a4",), sets=SETS, seeds=SEEDS, more=()) -> int:
    """The command at a tiny budget."""
    budget = ("--steps", "3", "--images", "8", "--batch_size", "4", "--input_size", "12")
    points = ("--variants", *variants, "--bits", *bits, "--sets", *sets, "--seeds", *seeds)
    outputs = ("--out", "out.json", "--plot", "plot.png", "--scores", "scores.json")
    return run(place, patch, *points, *budget, *outputs, *more)


@pytest.fixture(scope="module")
def finished(place):
    """The JSON of a whole ablation."""
    scores = [
        {"set": name, "sha256": "", "statistics": n, "ranges": {"kl": -n}} for n, name in enumerate(SETS)
    ]
    (place / "scores.json").write_text(json.dumps({"sets": scores}))
    with pytest.MonkeyPatch.context() as patch:
        assert ablate(place, patch) == 0
    return json.loads((place / "out.json").read_text())


def test_every_combination_is_run_and_told(finished, place):
    assert len(finished["runs"]) == 2 * 3 * 2 <= len(list((place / "train_log/ablation").glob("*.json")))
    assert finished["val_images"] == 12 and finished["baseline"] == "qdrop"
    for one in finished["runs"]:
        assert one["calibration_images"] == 8 and one["seconds"]["reconstruct"] > 0
        assert one["reconstructed"]["kl"] > 0 and one["range_only"]["agreement"] <= 100
    config = finished["config"]
    assert config["data"]["input_size"] == config["data"]["test_resize"] == 12
    assert config["quant"]["recon"]["iters"] == 3 and {"machine", "date", "versions"} <= finished.keys()
    assert finished["variants"]["all_dropped"] == {"quant.equalize.iters": 5, "quant.recon.drop_prob": 0}
    assert (place / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_comparisons_are_those_of_the_runs(finished):
    baseline, other = finished["comparisons"]
    for one in (baseline, other):
        runs = [r["reconstructed"]["kl"] for r in finished["runs"] if r["variant"] == one["variant"]]
        assert one["runs"] == len(runs) == 6 and one["means"]["kl"] == pytest.approx(np.mean(runs))
    assert baseline["variant"] == "qdrop" and baseline["differences"] == {}
    assert other["variant"] == "all_dropped"
    difference = other["differences"]["kl"]
    assert difference["mean"] == pytest.approx(other["means"]["kl"] - baseline["means"]["kl"])
    assert difference["low"] <= difference["mean"] <= difference["high"]


def test_sets_are_held_against_their_scores(finished):
    for one in finished["sets"]:
        found = [one["means"][f"list{n}"]["kl"] for n in range(3)]
        assert one["spreads"]["kl"] == pytest.approx(max(found) - min(found))
        rank = rank_correlation(range(3), found)
        assert one["correlations"]["statistics"]["kl"] == pytest.approx(rank)
        assert one["correlations"]["ranges"]["kl"] == pytest.approx(-rank)
        own = one["own_spreads"]["kl"]
        assert 0 <= own["low"] <= own["mean"] <= own["high"]


def test_of_one_set_seeds_are_told_that_draw_other_images(finished, place, monkeypatch, capsys):
    assert ablate(place, monkeypatch, sets=SETS[:1]) == 0
    (one, _) = found = json.loads((place / "out.json").read_text())["sets"]
    runs = [run["reconstructed"]["kl"] for run in finished["runs"] if run["set"] == "list0"]
    assert one["means"]["seed 1"]["kl"] == pytest.approx(runs[0]) and len(one["means"]) == 2
    assert not any(effect["correlations"] for effect in found)
    assert "| w2a4 | qdrop | 2 |" in capsys.readouterr().out


def test_what_is_there_is_not_run_again(finished, place, monkeypatch, capsys):
    monkeypatch.setattr(ablation_runs, "quantize_model", None)  # would fail if it were called
    assert ablate(place, monkeypatch) == 0
    assert json.loads((place / "out.json").read_text())["runs"] == finished["runs"]
    out = capsys.readouterr().out
    assert "12 of 12 kept: w2a4 all_dropped list2 seed 2: top-1 " in out
    assert "| bits | variant | runs | top-1 % |" in out and "statistics ~ KL" in out


def test_only_what_is_new_is_run(finished, place, monkeypatch, capsys):
    variants = ("another_name,quant.equalize.iters=5,quant.recon.drop_prob=0", VARIANTS[0])
    assert ablate(place, monkeypatch, variants, ("w2a4", "w3a4"), SETS[:2], SEEDS[:1]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 8 " in line]
    assert [" done: w3a4 " in line for line in lines] == [False, False, True, True] * 2
    assert [" kept: w2a4 " in line for line in lines] == [True, True, False, False] * 2


def test_other_images_under_the_same_names_are_scored_anew(finished, place):
    config = load_config(place / "config0.yaml")
    model, device = random_float_model(config), torch.device("cpu")
    before = Scorer(config, model, device).identity
    victim = min((place / "imagenet/val").rglob("*.JPEG"))
    content = victim.read_bytes()
    try:
        victim.write_bytes(content + b"\0")
        assert Scorer(config, model, device).identity != before
    finally:
        victim.write_bytes(content)
    assert Scorer(config, model, device).identity == before


def test_images_that_a_set_leaves_are_scored_too(finished, place, monkeypatch, capsys):
    """Of sixteen train images each set leaves eight, four of them both; of val images nothing changes."""
    more = ("--unused", "--out", "unused.json", "--plot", "unused.png", "--work", "unused")
    assert ablate(place, monkeypatch, sets=SETS[:2], seeds=SEEDS[:1], more=more) == 0
    found = json.loads((place / "unused.json").read_text())
    assert found["val_images"] == 12 and found["other_images"] == 12
    assert [one["scored_images"] for one in found["runs"]] == [20] * 4
    assert [one["images"] for one in found["sets"]] == [16] * 2
    before = [r for r in finished["runs"] if r["set"] in ("list0", "list1") and r["seed"] == int(SEEDS[0])]
    for one, whole in zip(found["on_val"]["comparisons"], found["comparisons"], strict=True):
        kl = np.mean([r["reconstructed"]["kl"] for r in before if r["variant"] == one["variant"]])
        assert one["means"]["kl"] == pytest.approx(kl) != pytest.approx(whole["means"]["kl"])
    out = capsys.readouterr().out
    assert "Val images alone:" in out and out.count("| bits | variant | runs |") == 2
    kept = [json.loads(path.read_text()) for path in (place / "unused").glob("*.json")]
    for variant, of_all, of_both in zip(VARIANTS, found["comparisons"], found["sets"], strict=True):
        values: dict[str, list[float]] = {}
        for one in (run["result"] for run in kept if run["run"].split()[1] == variant.split(",")[0]):
            for name, kl in zip(one["images"], one["reconstructed"]["kl"], strict=True):
                values.setdefault(name, []).append(kl)
        assert len(values) == 24 and of_all["means"]["kl"] == pytest.approx(
            np.mean([*map(np.mean, values.values())])
        )
        shared = np.array([kls for kls in values.values() if len(kls) == 2])
        assert of_both["spreads"]["kl"] == pytest.approx(abs(np.diff(shared.mean(axis=0)).item()))


def test_a_run_is_that_of_main_imagenet(place, monkeypatch):
    """On the default set: the same images, and the network that it saves."""
    assert (
        run(place, monkeypatch, "--variants", "ours", "--steps", "3", "--images", "7", "--out", "o.json")
        == 0
    )
    (one,) = json.loads((place / "o.json").read_text())["runs"]
    config = load_config(place / "config0.yaml")
    config.quant.calibrate, config.quant.recon.iters = 7, 3
    assert one["sha256"] == load_calibration(config).sha256 and one["set"] == "train"
    assert taken(find_set(place / "imagenet/train", place), 7, 1005).names == load_calibration(config).files
    with start_run("train_log", config) as log, run_state("config0.yaml", fresh=True) as state:
        device = torch.device("cpu")
        saved = main_imagenet.quantize(config, device, log, state)
        found = compare(float_model(config), load_checkpoint(saved)[0], config, device)
    assert found["kl"] == pytest.approx(one["reconstructed"]["kl"], rel=1e-6)
    assert found["agreement"] == pytest.approx(one["reconstructed"]["agreement"])


MISTAKES = {
    "unknown key quant.equalise; did you mean quant.equalize?": [
        "--variants",
        "ours,quant.equalise.iters=5",
    ],
    "ours: quant.w_qconfig.bit is 9, allowed is": ["--variants", "ours", "--bits", "w9a4"],
    "--bits 4: allowed is the form w4a4": ["--variants", "ours", "--bits", "4"],
    "quant.recon.iters is -1, allowed": ["--variants", "ours", "--steps", "-1"],
    "--variants: ours stands twice": ["--variants", "ours", "ours"],
    "--seeds: 1 stands twice": ["--variants", "ours", "--seeds", "1", "1"],
    "data.input_size must be the same for all": ["--variants", "a,data.input_size=8"],
    "nowhere: No such file": ["--variants", "ours", "--sets", "nowhere"],
    "xxx: File name too long": ["--variants", "ours", "--sets", "x" * 300],
    "config no.yaml: cannot be read": ["--variants", "qdrop=no.yaml"],
    "other.json: is no file that select_calibration.py": [
        *["--variants", "ours", "--sets", "list0.txt", "--scores", "other.json"]
    ],
    "has no score of the set": ["--variants", "ours", "--scores", "empty.json"],
    "--out broken: is a folder": ["--variants", "ours", "--out", "broken"],
    "--plot p.jpg: allowed are": ["--variants", "ours", "--plot", "p.jpg"],
    "runs calibrate with every image": ["--variants", "ours", "--images", "16", "--unused"],
    "is no valid YAML value": ["--variants", "ours,quant.recon.iters=2020-13-01"],
    "0.JPEG: cannot be read (No such file or directory)": ["--variants", "ours", "--sets", "broken"],
    "--plot shows what sets change": ["--variants", "ours", "--plot", "p.png"],
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(place, monkeypatch, capsys, words):
    (place / "other.json").write_text("[]")
    (place / "empty.json").write_text('{"sets": []}')
    link = place / "broken" / "0.JPEG"
    if not link.is_symlink():
        link.parent.mkdir()
        link.symlink_to("nowhere")
    assert run(place, monkeypatch, *MISTAKES[words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_damaged_run_is_named(finished, place, monkeypatch, capsys):
    path = min((place / "train_log/ablation").glob("*.json"), key=lambda path: path.stat().st_mtime)
    before = path.read_text()
    try:
        path.write_text(before[:-9])
        assert ablate(place, monkeypatch) == 2
    finally:
        path.write_text(before)
    assert f"{path.name}: cannot be read as a run" in capsys.readouterr().err
