"""Imagenette is fetched once, whole, and gets a calibration set; a failed download is one line."""

import sys
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from calibquant.errors import UserError
from calibquant.solver import imagenette
from calibquant.solver.imagenette import prepare_imagenette
from calibquant.solver.script import run_script

WNIDS = ["n01440764", "n02102040", "n02979186"]


class FakeImagenette:
    """Writes a tiny tree where torchvision would extract its archive."""

    downloads = 0
    failure: Exception | None = None

    def __init__(self, root: Path, split: str, size: str, download: bool) -> None:
        assert (split, size, download) == ("train", "full", True)
        type(self).downloads += 1
        for split_folder in ("train", "val"):
            for number, wnid in enumerate(WNIDS):
                folder = Path(root) / "imagenette2" / split_folder / wnid
                folder.mkdir(parents=True)
                if self.failure and split_folder == "val":
                    raise self.failure
                for i in range(4):
                    Image.new("RGB", (8, 8), (number, i, 0)).save(folder / f"{i}.JPEG")
        (Path(root) / "imagenette2.tgz").write_bytes(b"archive")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeImagenette]:
    class Fake(FakeImagenette):
        pass

    monkeypatch.setattr(torchvision.datasets, "Imagenette", Fake)
    return Fake


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def images(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.JPEG") if path.is_file()]


def test_train_val_and_a_calibration_set_are_made(tmp_path: Path, fake: type[FakeImagenette]) -> None:
    folder = prepare_imagenette(tmp_path / "imagenet", num=7)
    assert folder == tmp_path / "imagenet" / "imagenette2"
    assert names(folder) == ["sel", "train", "val"]
    assert [len(images(folder / name)) for name in ("train", "val", "sel")] == [12, 12, 7]
    assert {path.name for path in (folder / "sel").iterdir() if path.is_dir()} == set(WNIDS)
    assert all(path.is_symlink() for path in images(folder / "sel"))
    assert names(folder.parent) == ["imagenette2"], "neither archive nor half of it remains"


def test_what_is_there_already_is_left_alone(
    tmp_path: Path, fake: type[FakeImagenette], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = prepare_imagenette(tmp_path, num=7)
    manifest = (folder / "sel" / "manifest.json").stat()
    prepare_imagenette(tmp_path, num=7)
    assert fake.downloads == 1
    assert (folder / "sel" / "manifest.json").stat() == manifest
    assert caplog.messages[-2:] == [
        f"{folder}: train and val are there",
        f"{folder / 'sel'}: is there already",
    ]


def test_a_missing_set_is_made_without_another_download(tmp_path: Path, fake: type[FakeImagenette]) -> None:
    fake(tmp_path, "train", "full", True)
    prepare_imagenette(tmp_path, num=3)
    assert fake.downloads == 1
    assert len(images(tmp_path / "imagenette2" / "sel")) == 3


@pytest.mark.parametrize(
    "failure", [OSError("no route\nto host"), RuntimeError("File not found"), EOFError()]
)
def test_a_failed_download_is_one_line_and_leaves_nothing_that_looks_whole(
    tmp_path: Path,
    fake: type[FakeImagenette],
    failure: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.failure = failure
    monkeypatch.setattr(sys, "argv", ["imagenette.py", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_code:
        run_script(imagenette.main)
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Imagenette could not be downloaded") and error.count("\n") == 1
    assert names(tmp_path) == []

    fake.failure = None
    assert len(images(prepare_imagenette(tmp_path, num=5) / "val")) == 12


def test_of_two_runs_at_once_neither_spoils_what_the_other_extracts(
    tmp_path: Path, fake: type[FakeImagenette], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overtaken(FakeImagenette):
        def __init__(self, root: Path, split: str, size: str, download: bool) -> None:
            (Path(root) / "imagenette2" / "train" / "half").mkdir(parents=True)
            monkeypatch.setattr(torchvision.datasets, "Imagenette", fake)
            prepare_imagenette(tmp_path, num=7)
            super().__init__(root, split, size, download)

    monkeypatch.setattr(torchvision.datasets, "Imagenette", Overtaken)
    folder = prepare_imagenette(tmp_path, num=7)
    assert [len(images(folder / name)) for name in ("train", "val", "sel")] == [12, 12, 7]
    assert names(folder / "train") == WNIDS
    assert names(tmp_path) == ["imagenette2"]


def test_a_set_that_another_run_makes_meanwhile_is_kept(
    tmp_path: Path, fake: type[FakeImagenette], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(train: Path, out: Path, num: int) -> Path:
        monkeypatch.setattr(imagenette, "select_calibration", select)
        prepare_imagenette(tmp_path, num=7)
        return select(train, out, num)

    select = imagenette.select_calibration
    monkeypatch.setattr(imagenette, "select_calibration", overtaken)
    assert len(images(prepare_imagenette(tmp_path, num=7) / "sel")) == 7


def test_an_incomplete_folder_is_named(tmp_path: Path, fake: type[FakeImagenette]) -> None:
    (tmp_path / "imagenette2" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="imagenette2: incomplete, it holds no val; remove it"):
        prepare_imagenette(tmp_path)
    assert fake.downloads == 0
