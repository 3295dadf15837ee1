"""The quickstart's images are what it says, a network can be trained on them, and its table is honest."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from easydict import EasyDict
from PIL import Image

from calibquant.errors import UserError
from calibquant.model.load import build_model, load_weights
from calibquant.solver import quickstart
from calibquant.solver.config import KEYS, config_name, load_config
from calibquant.solver.quickstart import Row, broken_claims, newest_run, print_table, table

REPOSITORY = Path(__file__).resolve().parents[1]
YAMLS = [REPOSITORY / "exp/quickstart" / name for name in ("w4a4.yaml", "w2a4.yaml")]
EARLY, LATE, LATEST = "20260101-000000-99999", "20260102-000000-00001", "20260103-000000-00000"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("quickstart") / "digits"
    quickstart.write_digits(folder)
    return folder


@pytest.fixture
def config(digits: Path) -> EasyDict:
    config = load_config(YAMLS[0])
    config.data.path = str(digits)
    return config


def images(folder: Path) -> dict[str, bytes]:
    """Contents of a part's images by ``<digit>/<number>.png``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


# --- the images and the float network ---------------------------------------------------------------------


def test_every_digit_is_in_train_or_val_and_none_in_both(digits: Path) -> None:
    train, val = images(digits / "train"), images(digits / "val")
    assert len(train) == 1343 and len(val) == 454
    assert {Path(name).name for name in (*train, *val)} == {f"{n:04d}.png" for n in range(1797)}
    assert not set(train) & set(val)
    assert not set(train.values()) & set(val.values())  # no two digits have the same pixels


def test_sel_is_256_of_the_training_images_every_class_about_evenly(digits: Path) -> None:
    train, sel = images(digits / "train"), images(digits / "sel")
    assert len(sel) == 256 and sel.items() <= train.items()
    counts = [sum(name.startswith(f"{digit}/") for name in sel) for digit in range(10)]
    assert min(counts) == 25 and max(counts) == 26


@pytest.mark.parametrize("part", ["train", "sel", "val"])
def test_every_part_has_the_ten_classes_in_about_equal_shares(digits: Path, part: str) -> None:
    folders = sorted(path.name for path in (digits / part).iterdir())
    assert folders == list("0123456789")
    counts = [len(list((digits / part / name).iterdir())) for name in folders]
    assert max(counts) < 1.1 * min(counts)


def test_images_have_the_size_that_the_configs_ask_for(digits: Path) -> None:
    sizes = set()
    for path in digits.glob("*/*/*.png"):
        with Image.open(path) as image:
            sizes.add(image.size)
    data = load_config(YAMLS[0]).data
    assert sizes == {(data.input_size, data.input_size)} == {(data.test_resize, data.test_resize)}


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(digits: Path, tmp_path: Path) -> None:
    counts = quickstart.write_digits(tmp_path / "deep" / "digits")
    assert counts == {"train": 1343, "sel": 256, "val": 454}
    for part in counts:
        assert images(tmp_path / "deep/digits" / part) == images(digits / part)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["digits"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        quickstart.write_digits(tmp_path / "file" / "digits")


def test_a_folder_in_the_networks_place_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "train", lambda _: pytest.fail("the network was trained first"))
    (tmp_path / "resnet18_digits.pth").mkdir()
    with pytest.raises(UserError, match=r"resnet18_digits\.pth: is a folder"):
        quickstart.prepare(tmp_path)
    assert not (tmp_path / "digits").exists()


def test_the_mean_and_deviation_of_the_configs_are_those_of_the_images(config: EasyDict) -> None:
    images, targets = quickstart.read_training_images(config)
    assert images.shape == (1343, 3, 16, 16) and targets.unique().tolist() == list(range(10))
    assert abs(float(images.mean())) < 0.01 and abs(float(images.std()) - 1) < 0.01


def test_a_shifted_image_is_moved_by_up_to_two_pixels_into_background() -> None:
    torch.manual_seed(0)
    single = torch.full((1, 3, 9, 9), -1.0)
    single[:, :, 4, 4] = 5.0
    moved = quickstart.shifted(single.expand(200, -1, -1, -1))
    places = {tuple(image[0].eq(5).nonzero()[0].tolist()) for image in moved}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert bool((moved.eq(5).sum((1, 2, 3)) == 3).all() & (moved.eq(-1) | moved.eq(5)).all())


def test_training_learns_and_the_same_seed_gives_the_same_network(
    config: EasyDict, capsys: pytest.CaptureFixture[str]
) -> None:
    config.model.kwargs.base_width = 8
    first, second = (quickstart.train(config, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    accuracies = re.findall(r"top-1 ([\d.]+) % of 454", capsys.readouterr().out)
    assert len(accuracies) == 2 and all(float(accuracy) > 40 for accuracy in accuracies)


def test_prepare_writes_weights_that_fit_and_does_nothing_the_second_time(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def untrained(config: EasyDict) -> torch.nn.Module:
        assert config.data.path == str(digits)
        return build_model(config.model.type, dict(config.model.kwargs))

    monkeypatch.setattr(quickstart, "train", untrained)
    quickstart.prepare(digits.parent)
    weights = digits.parent / "resnet18_digits.pth"
    config = load_config(YAMLS[1])
    load_weights(
        untrained_model := build_model(config.model.type, dict(config.model.kwargs)), "", str(weights)
    )
    assert untrained_model.fc.out_features == 10
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    quickstart.prepare(digits.parent)
    assert weights.stat().st_mtime_ns == before
    assert [line.split(":")[1].split(";")[0] for line in capsys.readouterr().out.splitlines()] == [
        " already there",
        " already there",
    ]


# --- the configs ------------------------------------------------------------------------------------------


def test_the_configs_name_every_key_in_order_and_its_command() -> None:
    for path in YAMLS:
        assert list(flat(yaml.safe_load(path.read_text()))) == [key.path for key in KEYS]
        command = f"python ./calibquant/solver/main_imagenet.py --config ./exp/quickstart/{path.name}"
        assert f"# {command}\n" in path.read_text()


def flat(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_the_configs_differ_in_the_weights_bits_alone() -> None:
    first, second = (load_config(path) for path in YAMLS)
    assert (first.quant.w_qconfig.bit, second.quant.w_qconfig.bit) == (4, 2)
    second.quant.w_qconfig.bit = 4
    assert first == second


# --- the results ------------------------------------------------------------------------------------------

GOOD = {"w4a4": (99.0, 97.0, 98.5), "w2a4": (99.0, 30.0, 97.0)}
"""Float, ranges only, reconstructed."""


def write_metrics(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))


def score(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 100.0, "images": 454}


def write_run(root: Path, name: str, run: str, top1: tuple[float, float, float]) -> None:
    """A finished run of a quickstart config, and a later one that scored its file again."""
    outputs = config_name(load_config(REPOSITORY / f"exp/quickstart/{name}.yaml"))
    file = Path("model_quantized") / outputs / f"{run}.pth"
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(bytes(400_000))
    results = dict(zip(("float", "range_only", "quantized"), map(score, top1), strict=True))
    settings = {"model": {"path": "./float.pth"}}
    write_metrics(root / "train_log" / outputs / run, checkpoint=str(file), config=settings, **results)
    write_metrics(root / "test_log" / outputs / run, checkpoint=str(file), quantized=score(top1[2]))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "float.pth").write_bytes(bytes(2_800_000))
    for name, top1 in GOOD.items():
        write_run(tmp_path, name, EARLY, (10.0, 10.0, 10.0))
        write_run(tmp_path, name, LATE, top1)
    return tmp_path


def test_the_table_shows_the_newest_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_table(runs)
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.replace("|", " ").split()[:3] == ["bits", "float", "ranges"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert [row.replace("|", " ").split() for row in rows] == [
        ["W4A4", "99.00", "97.00", "98.50", "98.50", "400", "2,800"],
        ["W2A4", "99.00", "30.00", "97.00", "97.00", "400", "2,800"],
    ]


def test_newest_prints_the_file_of_the_newest_run(runs: Path) -> None:
    for path in YAMLS:
        assert newest_run(runs, "train_log", load_config(path))["checkpoint"].endswith(f"{LATE}.pth")


def test_a_run_that_did_not_finish_is_no_result(runs: Path) -> None:
    config = load_config(YAMLS[0])
    write_metrics(runs / "train_log" / config_name(config) / LATEST, float=score(99.0))
    with pytest.raises(UserError, match=f"{LATEST}.*did not finish, range_only is missing"):
        newest_run(runs, "train_log", config)


def test_a_file_that_was_not_scored_again_or_is_gone_is_named(runs: Path) -> None:
    outputs = config_name(load_config(YAMLS[0]))
    metrics = runs / "test_log" / outputs / LATE / "metrics.json"
    saved = metrics.read_text()
    metrics.unlink()
    with pytest.raises(UserError, match=rf"test_log.*no run of {LATE}\.pth"):  # not that of another file
        print_table(runs)
    metrics.write_text(saved)
    (runs / "model_quantized" / outputs / f"{LATE}.pth").unlink()
    with pytest.raises(UserError, match=rf"{LATE}\.pth: No such file"):
        print_table(runs)


@pytest.mark.parametrize("what", [None, 5, "x\0", [], {"top1": "99"}, {"model": [1]}])
@pytest.mark.parametrize("key", ["float", "quantized", "checkpoint", "config"])
def test_a_file_edited_by_hand_is_a_claim_that_does_not_hold_or_one_line(
    runs: Path, key: str, what: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "train_log" / config_name(load_config(YAMLS[0])) / LATE / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: what}))
    if key in ("checkpoint", "config"):
        with pytest.raises(UserError):
            print_table(runs)
    else:
        assert not print_table(runs)
        assert "is nan, expected" in capsys.readouterr().err


def test_without_runs_the_way_to_make_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run; `make quickstart`"):
        print_table(tmp_path)


def row(name: str) -> Row:
    float_top1, range_only, reconstructed = GOOD[name]
    return Row(name.upper(), float_top1, range_only, reconstructed, reconstructed, 400.0, 2800.0)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("w4a4", {"float_top1": 96.9, "reconstructed": 96.5, "from_file": 96.5}, "float top-1 is 96.90"),
        ("w2a4", {"float_top1": 96.9, "reconstructed": 96.5, "from_file": 96.5}, "float top-1 is 96.90"),
        ("w4a4", {"reconstructed": 97.9, "from_file": 97.9}, "within 1 of float's 99.00"),
        ("w2a4", {"reconstructed": 93.9, "from_file": 93.9}, "within 5 of float's 99.00"),
        ("w4a4", {"from_file": 98.0}, "top-1 from the file is 98.00"),
        ("w2a4", {"from_file": 97.5}, "top-1 from the file is 97.50"),
        ("w2a4", {"range_only": 96.5}, "expected at least 1 above 96.50"),
    ],
)
def test_each_claim_that_does_not_hold_is_said(name: str, change: dict[str, Any], said: str) -> None:
    rows = {other: row(other) for other in GOOD}
    assert broken_claims(**rows) == []
    rows[name] = replace(rows[name], **change)
    (claim,) = broken_claims(**rows)
    assert claim.startswith(f"{name.upper()}: ") and said in claim


def test_claims_hold_at_their_very_bounds() -> None:
    w4a4 = replace(row("w4a4"), float_top1=97.0, reconstructed=96.0, from_file=96.0)
    w2a4 = replace(row("w2a4"), float_top1=97.0, reconstructed=92.0, from_file=92.0, range_only=91.0)
    assert broken_claims(w4a4, w2a4) == []


def test_a_wide_number_keeps_the_table_readable() -> None:
    lines = table([replace(row("w4a4"), float_kb=123_456_789.0)])
    assert lines[-1].split("|")[-2].strip() == "123,456,789"


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "calibquant/solver/quickstart.py"
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)


def test_the_script_exits_with_1_where_a_claim_does_not_hold(runs: Path) -> None:
    write_run(runs, "w2a4", LATEST, (99.0, 30.0, 30.5))
    result = run_script("table", "--root", str(runs))
    assert result.returncode == 1
    assert "| W2A4" in result.stdout
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == [" W2A4", " W2A4"]


def test_the_script_prints_a_file_name_alone(runs: Path) -> None:
    result = run_script("newest", str(YAMLS[0]), "--root", str(runs))
    assert result.returncode == 0 and result.stderr == ""
    assert (runs / result.stdout.removesuffix("\n")).is_file()
