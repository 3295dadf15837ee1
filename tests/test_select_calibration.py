"""A calibration set has every class, is repeatable, whole or absent, and holds only readable images."""

import hashlib
import json
import logging
import os
import random
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from calibquant.errors import UserError
from calibquant.solver import select_calibration as module
from calibquant.solver.config import check_config
from calibquant.solver.imagenet_util import imagenet_wnids, load_calibration
from calibquant.solver.script import run_script
from calibquant.solver.select_calibration import STRATEGIES, list_candidates, select_calibration

ROOT = Path(__file__).resolve().parents[1]
WNIDS = imagenet_wnids()[:4]
SIZES = dict(zip(WNIDS, (1, 2, 4, 8), strict=True))
BOTH_STRATEGIES = pytest.mark.parametrize("strategy", sorted(STRATEGIES))


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(seed).randbytes(12 * 10 * 3)
    Image.frombytes("RGB", (12, 10), pixels).save(path)


def write_train(folder: Path, classes: list[str] = WNIDS, backwards: bool = False) -> Path:
    """Train folder whose classes hold 1, 2, 4 and 8 images, the last in two subfolders of like names."""
    files = [
        f"{name}/{'ab'[i % 2] + '/' if name == WNIDS[3] else ''}{i // 2 if name == WNIDS[3] else i}.JPEG"
        for name, size in zip(classes, SIZES.values(), strict=True)
        for i in range(size)
    ]
    for number, file in sorted(enumerate(files), reverse=backwards):
        write_image(folder / file, number)
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_train(tmp_path / "imagenet" / "train")


def images_of(folder: Path) -> list[str]:
    """Images of a set, relative to it; a broken link counts as none."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.JPEG") if p.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@BOTH_STRATEGIES
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_a_strategy_chooses_num_different_images_of_all_classes(
    strategy: str, sizes: list[int], share: float, seed: int
) -> None:
    candidates = {f"c{c}": [f"c{c}/{i}" for i in range(size)] for c, size in enumerate(sizes)}
    num = len(sizes) + round(share * (sum(sizes) - len(sizes)))
    chosen = STRATEGIES[strategy](candidates, num, random.Random(seed))
    assert len(chosen) == len(set(chosen)) == num
    assert set(chosen) <= {file for images in candidates.values() for file in images}
    counts = Counter(file.split("/")[0] for file in chosen)
    assert counts.keys() == candidates.keys()
    if strategy == "class_balanced":
        largest = max(counts.values())
        assert all(counts[name] >= min(largest - 1, len(candidates[name])) for name in candidates)


def test_random_draws_the_rest_from_all_images_alike() -> None:
    candidates = {"a": [f"a/{i}" for i in range(10)], "b": [f"b/{i}" for i in range(30)]}
    draw = random.Random(0)
    chosen = [file for _ in range(2000) for file in STRATEGIES["random"](candidates, 12, draw)]
    counts = Counter(file.split("/")[0] for file in chosen)
    assert counts["a"] / 2000 == pytest.approx(1 + 10 * 9 / 38, rel=0.05)


@BOTH_STRATEGIES
def test_the_set_holds_num_images_and_every_class(train: Path, strategy: str) -> None:
    folder = select_calibration(train, num=6, strategy=strategy)
    assert folder == train.parent / "sel_6_4classes"
    assert len(images_of(folder)) == 6
    assert {file.split("/")[0] for file in images_of(folder)} == set(WNIDS)


def test_the_same_seed_gives_the_same_set_and_another_another(train: Path, tmp_path: Path) -> None:
    twin = write_train(tmp_path / "elsewhere" / "train", backwards=True)
    first = select_calibration(train, tmp_path / "first", num=8, seed=3)
    again = select_calibration(twin, tmp_path / "again", num=8, seed=3)
    other = select_calibration(train, tmp_path / "other", num=8, seed=4)
    assert manifest_of(first) == manifest_of(again)
    assert images_of(first) == images_of(again) != images_of(other)


def test_the_order_of_folders_on_disk_does_not_matter(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list_candidates(train, "imagenet")
    walk, iterdir = os.walk, Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(iterdir(self))))
    monkeypatch.setattr(
        os, "walk", lambda top, **kw: ((i, d, f[::-1]) for i, d, f in reversed(list(walk(top, **kw))))
    )
    listed = list_candidates(train, "imagenet")
    assert list(listed.items()) == list(expected.items())


def test_links_are_relative_and_survive_a_move(train: Path, tmp_path: Path) -> None:
    folder = select_calibration(train, num=15)
    links = [path for path in folder.rglob("*.JPEG") if path.is_symlink()]
    assert len(links) == 15
    assert not any(link.readlink().is_absolute() for link in links)
    assert len(images_of(train.parent.rename(tmp_path / "moved") / folder.name)) == 15


def test_links_hold_where_folders_are_links_themselves(train: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "out").symlink_to("deep/er")
    (tmp_path / "data").symlink_to("imagenet")
    select_calibration(tmp_path / "data" / "train", tmp_path / "out" / "sel", num=5)
    assert len(images_of(tmp_path / "deep" / "er" / "sel")) == 5


def test_a_train_folder_may_be_given_relative_to_the_current_one(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(train)
    assert select_calibration(Path(), num=4) == train.parent / "sel_4_4classes"


def test_copies_do_without_the_train_folder(train: Path, tmp_path: Path) -> None:
    folder = select_calibration(train, num=15, copy=True)
    train.rename(tmp_path / "gone")
    assert len(images_of(folder)) == 15
    assert not any(path.is_symlink() for path in folder.rglob("*"))


@pytest.mark.parametrize("copy", [False, True])
def test_the_manifest_tells_how_the_set_came_to_be(train: Path, copy: bool) -> None:
    folder = select_calibration(train, num=9, seed=5, strategy="class_balanced", copy=copy)
    manifest = manifest_of(folder)
    files = manifest.pop("files")
    assert manifest == {
        "num": 9, "seed": 5, "strategy": "class_balanced", "classes": 4, "train": "train"
    }  # fmt: skip
    assert [entry["file"] for entry in files] == images_of(folder)
    for entry in files:
        assert entry["sha256"] == hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
        assert (folder / entry["file"]).read_bytes() == (train / entry["file"]).read_bytes()
    assert str(train.parent) not in (folder / "manifest.json").read_text()


def test_like_names_in_subfolders_stay_apart(train: Path) -> None:
    folder = select_calibration(train, num=15)
    assert f"{WNIDS[3]}/a/0.JPEG" in images_of(folder)
    assert f"{WNIDS[3]}/b/0.JPEG" in images_of(folder)


def test_sel_is_linked_where_the_name_is_free(train: Path) -> None:
    first = select_calibration(train, num=6)
    link = train.parent / "sel"
    assert str(link.readlink()) == first.name == "sel_6_4classes"
    select_calibration(train, num=7)
    assert str(link.readlink()) == first.name, "a later set leaves the link alone"


def test_sel_is_not_linked_to_a_folder_the_user_named(train: Path) -> None:
    select_calibration(train, train.parent / "mine", num=6)
    assert not os.path.lexists(train.parent / "sel")


def test_the_default_config_reads_the_set(train: Path) -> None:
    select_calibration(train, num=6)
    config = check_config(
        {"model": {"type": "resnet18"}, "data": {"path": str(train.parent), "num_workers": 0}}
    )
    assert load_calibration(config).images.shape == (6, 3, 224, 224)


def with_a_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no image")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda t: t.rename(t.parent / "x"), {}, "train folder .*/train: No such file or directory"),
        (lambda t: None, {"num": 3}, "--num is 3, allowed is at least one image for each of 4 classes"),
        (lambda t: None, {"num": 16}, "--num is 16, allowed is at most 15"),
        (lambda t: None, {"seed": -1}, "--seed is -1, allowed is an integer of at least 0"),
        (lambda t: (t / "n99999999").mkdir(), {}, "n99999999 is none of ImageNet's 1,000 wnids"),
        (lambda t: (t / WNIDS[0] / "0.JPEG").unlink(), {}, f"{WNIDS[0]} holds no image"),
        (lambda t: with_a_file(t / imagenet_wnids()[9] / "a.txt"), {}, "holds no image"),
        (
            lambda t: (t / WNIDS[0]).rename(t / "manifest.json"),
            {"classes": "folders"},
            "/train: class folder manifest.json, allowed is another name",
        ),
        (lambda t: (t.parent / "sel_5_4classes").mkdir(), {}, "sel_5_4classes: exists already"),
        (lambda t: (t.parent / "sel_5_4classes").symlink_to("nowhere"), {}, "exists already"),
        (lambda t: None, {"out": "train/sel"}, "allowed is a folder outside of the train folder"),
        (lambda t: with_a_file(t.parent / "file"), {"out": "file/sel"}, "cannot be written: Not a dir"),
    ],
)
def test_what_is_wrong_is_one_clear_line(train: Path, prepare, options: dict, message: str) -> None:
    prepare(train)
    before = sorted(train.parent.iterdir())
    if "out" in options:
        options = {**options, "out": train.parent / options["out"]}
    with pytest.raises(UserError, match=message) as caught:
        select_calibration(train, **{"num": 5, **options})
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(train.parent.iterdir()) == before


def test_a_set_inside_of_the_train_folder_is_refused_where_that_is_a_link(train: Path) -> None:
    link = train.parent / "link"
    link.symlink_to("train")
    for inside in (link / "sel", train / "sel"):
        with pytest.raises(UserError, match="allowed is a folder outside of the train folder"):
            select_calibration(link, inside, num=5)


def test_a_place_that_takes_no_file_is_named_before_any_image_is_read(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise UserError(f"{folder}: cannot be written: Read-only file system")

    monkeypatch.setattr(module, "require_writable", refuse)
    monkeypatch.setattr(module, "keep_readable", lambda *_: pytest.fail("images were read first"))
    with pytest.raises(UserError, match=f"{train.parent}: cannot be written"):
        select_calibration(train, num=5)


def test_an_empty_train_folder_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "flat.JPEG", 0)
    with pytest.raises(UserError, match="holds no class folder"):
        select_calibration(tmp_path / "train")


def test_class_folders_of_any_name_where_they_are_asked_for(tmp_path: Path) -> None:
    train = write_train(tmp_path / "train", ["cat", "dog", "golden retriever", "x"])
    folder = select_calibration(train, num=5, classes="folders")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(names(train))


def test_files_that_are_left_out_are_named(train: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_a_file(train / WNIDS[1] / "notes.txt")
    write_image(train / "stray.JPEG", 0)
    (train / WNIDS[1] / "more").symlink_to(train / WNIDS[2])
    assert "notes.txt" not in str(list_candidates(train, "imagenet"))
    for name in ("notes.txt", "stray.JPEG", "more"):
        assert any(f"/{name}: ignored" in message for message in caplog.messages)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_half_built_set_never_appears(
    train: Path, monkeypatch: pytest.MonkeyPatch, copy: bool, error: BaseException
) -> None:
    made = []

    def place(path: Path, target: object) -> None:
        assert not (train.parent / "sel_9_4classes").exists()
        if len(made) == 4:
            raise error
        made.append(path)

    monkeypatch.setattr(Path, "symlink_to", place)
    monkeypatch.setattr(module.shutil, "copyfile", place)
    with pytest.raises((UserError, KeyboardInterrupt)):
        select_calibration(train, num=9, copy=copy)
    assert len(made) == 4
    assert names(train.parent) == ["train"]


def test_a_set_made_meanwhile_is_not_overwritten(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train.parent / "sel_5_4classes"
    monkeypatch.setattr(module, "_check_place", lambda *_: with_a_file(folder / "precious"))
    with pytest.raises(UserError, match="cannot be written"):
        select_calibration(train, num=5)
    assert names(folder) == ["precious"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def stretch(path: Path) -> None:
    Image.new("RGB", (1, 3000)).save(path)


SPOIL = pytest.mark.parametrize(
    "spoil", [truncate, dangle, stretch, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"GIF89a")]
)


@SPOIL
def test_an_unreadable_image_gives_way_to_another_of_its_class(
    train: Path, spoil, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = sorted(train.glob(f"{WNIDS[2]}/*.JPEG"))[:3]
    for path in spoiled:
        spoil(path)
    for seed in range(5):
        folder = select_calibration(train, train.parent / str(seed), num=4, seed=seed)
        assert f"{WNIDS[2]}/3.JPEG" in images_of(folder)
        assert len(images_of(folder)) == len(manifest_of(folder)["files"]) == 4
    assert {record.levelno for record in caplog.records if "replaced" in record.message} == {
        logging.WARNING
    }
    for path in spoiled:
        assert any(message.startswith(f"{path}: cannot be read (") for message in caplog.messages)


def test_another_class_steps_in_where_a_class_has_no_other_image(train: Path) -> None:
    truncate(train / WNIDS[1] / "0.JPEG")
    folder = select_calibration(train, num=14, strategy="class_balanced")
    assert images_of(folder) == [f for f in images_of(train) if f != f"{WNIDS[1]}/0.JPEG"]


def test_names_of_files_reach_the_terminal_on_one_printable_line(
    train: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(train / "stray\n\x1b[31m.JPEG", 0)
    (train / WNIDS[0] / "0.JPEG").rename(train / WNIDS[0] / "0\x1b[2J.JPEG")
    (train / WNIDS[0] / "1\x1b[2J.JPEG").write_bytes(b"no image")
    for seed in range(5):
        select_calibration(train, train.parent / str(seed), num=4, seed=seed)
    assert any("replaced by" in message for message in caplog.messages)
    assert all(message.isprintable() for message in caplog.messages), caplog.messages


@pytest.mark.parametrize("num", [4, 12])
def test_a_class_without_a_readable_image_is_an_error(train: Path, num: int) -> None:
    for path in train.glob(f"{WNIDS[1]}/*.JPEG"):
        truncate(path)
    with pytest.raises(UserError, match=f"no image of class folder {WNIDS[1]} can be read"):
        select_calibration(train, num=num)
    assert names(train.parent) == ["train"]


def test_too_few_readable_images_are_an_error(train: Path) -> None:
    truncate(train / WNIDS[1] / "0.JPEG")
    with pytest.raises(UserError, match=r"0\.JPEG: cannot be read, and no image is left .* lower --num"):
        select_calibration(train, num=15)


def test_the_script_runs_as_a_file(train: Path) -> None:
    script = "./calibquant/solver/select_calibration.py"
    command = [sys.executable, script, "--train", str(train), "--num", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == f"{train.parent / 'sel_5_4classes'}: 5 images of 4 classes"
    assert second.startswith(f"{train.parent / 'sel'} -> sel_5_4classes: linked")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_script_runs_as_a_module_and_ends_with_one_line_and_code_2(
    train: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--train", str(train), "--num", "3"])
    with pytest.raises(SystemExit) as exit_code:
        runpy.run_module(module.__name__, run_name="__main__", alter_sys=True)
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --num is 3, allowed is at least one") and error.count("\n") == 1


def test_the_options_reach_the_set(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--num=7", "--seed=3", "--strategy=class_balanced", "--classes=folders", "--copy"]
    monkeypatch.setattr(sys, "argv", ["select_calibration.py", "--train", str(train), *options])
    with pytest.raises(SystemExit) as exit_code:
        run_script(module.main)
    assert exit_code.value.code == 0
    manifest = SimpleNamespace(**manifest_of(train.parent / "sel_7_4classes"))
    assert (manifest.num, manifest.seed, manifest.strategy) == (7, 3, "class_balanced")
    assert not any(path.is_symlink() for path in (train.parent / "sel_7_4classes").rglob("*"))
