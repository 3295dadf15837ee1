"""Images get the right class and torchvision's pixels, none is lost unnamed, accuracy is counted right."""

import contextlib
import errno
import gc
import io
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import DataLoader, dataloader
from torchvision.models import ResNet101_Weights

from calibquant.errors import UserError
from calibquant.solver.config import check_config
from calibquant.solver.imagenet_util import (
    Batch,
    ImageDataset,
    RandomSharpness,
    Score,
    Unreadable,
    calibration_transform,
    class_names,
    evaluate,
    evaluation_transform,
    imagenet_wnids,
    list_samples,
    load_calibration,
    make_loader,
    validation_loader,
)

WNIDS = imagenet_wnids()
SOME = [WNIDS[999], WNIDS[0], WNIDS[482]]
CPU = torch.device("cpu")


def noise(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(path)
    return path


def make_config(root: Path, calibrate: int = 1024, seed: int = 1005, **data: Any) -> EasyDict:
    sizes = {"input_size": 6, "test_resize": 8, "num_workers": 0, "batch_size": 4}
    return check_config(
        {
            "model": {"type": "resnet18"},
            "data": {"path": str(root), **sizes, **data},
            "quant": {"calibrate": calibrate},
            "process": {"seed": seed},
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``val/`` and ``sel/`` of three classes with 3 images each."""
    folder = tmp_path / "imagenet"
    for split, first in (("val", 0), ("sel", 100)):
        for number, wnid in enumerate(SOME):
            for i in range(3):
                write_image(folder / split / wnid / f"{i}.JPEG", first + 3 * number + i)
    return folder


class Listed(nn.Module):
    """A network whose logits are known: rows of a table, in the order in which images come."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        start = sum(self.sizes)
        self.sizes.append(len(x))
        return self.logits[start : start + len(x)]


# Classes


def test_the_thousand_wnids_are_in_index_order() -> None:
    assert len(WNIDS) == len(set(WNIDS)) == 1000
    assert sorted(WNIDS) == WNIDS
    assert (WNIDS[0], WNIDS[482], WNIDS[999]) == ("n01440764", "n02979186", "n15075141")


def test_a_class_is_the_wnids_index_not_the_folders_place(root: Path) -> None:
    samples = list_samples(root / "val", WNIDS, "val folder")
    assert {path.parent.name: target for path, target in samples} == dict(
        zip(SOME, (999, 0, 482), strict=True)
    )
    assert samples == sorted(samples) and len(samples) == 9
    targets = torch.cat([batch.targets for batch in validation_loader(make_config(root))])
    assert targets.tolist() == [0] * 3 + [482] * 3 + [999] * 3


def test_a_folder_that_cannot_be_read_is_an_error_not_fewer_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, shut = os.scandir, root / "val" / SOME[1]

    def refusing(path: str | os.PathLike[str]) -> Any:
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=f"{shut}: cannot be read: Permission denied"):
        list_samples(root / "val", WNIDS, "val folder")


def test_a_link_to_a_folder_inside_a_class_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "val" / SOME[0] / "more").symlink_to(root / "sel" / SOME[1])
    assert len(list_samples(root / "val", WNIDS, "val folder")) == 9
    assert "more: ignored, a link to a folder" in caplog.text


def test_images_that_are_kept_keep_no_files_open(root: Path) -> None:
    for number in range(60):
        write_image(root / "sel" / SOME[0] / f"more_{number}.JPEG", number)
    config = make_config(root, batch_size=1, num_workers=1)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, before[1]))
    try:
        assert len(load_calibration(config).images) == 69
        loader = make_loader(
            list_samples(root / "sel", WNIDS, "x"), evaluation_transform(config.data), config
        )
        kept = [batch.to_keep() for batch in loader]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(kept) == 69


def test_batches_are_page_locked_for_a_gpu_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--device cpu`` a GPU that may be full or broken is not touched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, gpu = make_config(root, pin_memory=True), torch.device("cuda", 0)
    assert not validation_loader(config).pin_memory and not validation_loader(config, CPU).pin_memory
    assert validation_loader(config, gpu).pin_memory
    assert not validation_loader(make_config(root, pin_memory=False), gpu).pin_memory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_processes_start_ends_the_run_once_they_have(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Raised inside of a fork, it would only be printed."""
    started = []

    def start(_loader: Any) -> Any:
        signal.raise_signal(number)
        started.append(True)
        return iter([])

    monkeypatch.setattr(DataLoader, "__iter__", start)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            iter(validation_loader(make_config(root, num_workers=1)))
        assert started and signal.getsignal(number) is signal.default_int_handler
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.filterwarnings("error")  # as pytest calls what Python prints of half-made objects
@pytest.mark.parametrize("started", [0, 1])
def test_processes_that_cannot_be_started_are_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    """A batch system may allow too few processes, or too little memory to fork."""
    iterator, fork, forks = dataloader._MultiProcessingDataLoaderIter, os.fork, []

    def refuse() -> int:
        forks.append(None)
        if len(forks) > started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(iterator, "__del__", iterator.__del__)
    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UserError, match=r"started \(Resource temporarily unavailable\).*data\.num_workers"):
        iter(validation_loader(make_config(root, num_workers=2)))
    gc.collect()
    for child in multiprocessing.active_children():
        child.terminate()


def test_classes_by_folders_or_by_a_list(root: Path, tmp_path: Path) -> None:
    assert class_names(make_config(root, classes="folders").data) == sorted(SOME)
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(SOME) + "\n")
    config = make_config(root, classes=str(listed))
    assert class_names(config.data) == SOME
    config.model.kwargs.num_classes = 3
    targets = torch.cat([batch.targets for batch in validation_loader(config)])
    assert targets.tolist() == [1] * 3 + [2] * 3 + [0] * 3


def test_a_class_folder_in_a_list_may_hold_a_space(root: Path, tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("golden retriever\ntench\n", encoding="utf-8-sig")  # as some editors write it
    assert class_names(make_config(root, classes=str(listed)).data) == ["golden retriever", "tench"]


@pytest.mark.parametrize("content", [None, "", "a\nb\na\n", b"\xff\xfe"])
def test_a_bad_list_of_classes_is_named(root: Path, tmp_path: Path, content: str | bytes | None) -> None:
    listed = tmp_path / "classes.txt"
    if content is not None:
        listed.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = {"": "lists no class", "a\nb\na\n": "lists a twice"}.get(content, "cannot be read")
    with pytest.raises(UserError, match=rf"data\.classes .*classes\.txt: {words}"):
        class_names(make_config(root, classes=str(listed)).data)


def test_a_network_of_another_number_of_classes_is_refused(root: Path) -> None:
    config = make_config(root, classes="folders")
    with pytest.raises(UserError, match=r"num_classes is 1000, but data\.classes \(folders\) lists 3"):
        validation_loader(config)


# Folders


def test_a_missing_or_empty_folder_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val folder .*/nowhere: No such file or directory"):
        list_samples(root / "nowhere", WNIDS, "val folder")
    (tmp_path / "empty" / WNIDS[3]).mkdir(parents=True)
    with pytest.raises(UserError, match=r"val folder .*/empty: holds no image \(.*\.jpeg"):
        list_samples(tmp_path / "empty", WNIDS, "val folder")


def test_a_class_folder_that_is_no_class_is_named(root: Path) -> None:
    write_image(root / "val" / "cat" / "0.JPEG")
    with pytest.raises(UserError, match="class folder cat is none of the 1000 classes"):
        list_samples(root / "val", WNIDS, "val folder")


def test_what_is_no_image_is_named_and_subfolders_are_read(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "val" / SOME[0] / "notes.txt").write_text("")
    nested = write_image(root / "val" / SOME[0] / "deep" / "er.png")
    samples = list_samples(root / "val", WNIDS, "val folder")
    assert (nested, 999) in samples and len(samples) == 10
    assert [message for message in caplog.messages if "notes.txt: ignored" in message]


def test_a_flat_folder_serves_for_calibration_but_not_as_val(root: Path) -> None:
    for i in range(5):
        write_image(root / "flat" / f"{i}.JPEG", i)
    calibration = load_calibration(make_config(root, calibration="flat"))
    assert calibration.files == [f"{i}.JPEG" for i in range(5)]
    assert len(calibration.images) == 5
    stray = write_image(root / "val" / "stray.JPEG")
    with pytest.raises(UserError, match=f"val folder .*: {stray.name} is in no class folder"):
        validation_loader(make_config(root))


# Pixels


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (256, 256), (224, 250), (50, 640)])
def test_evaluation_sees_the_pixels_of_torchvisions_preset(size: tuple[int, int]) -> None:
    data = check_config({"model": {"type": "resnet101"}}).data
    image = noise(7, *size)
    preset = ResNet101_Weights.IMAGENET1K_V1.transforms()
    torch.testing.assert_close(evaluation_transform(data)(image), preset(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_any_colour_mode_becomes_three_channels(root: Path, mode: str) -> None:
    suffix = "jpeg" if mode in ("L", "CMYK") else "png"
    path = root / f"image.{suffix}"
    (noise(1).convert("L").convert("I;16") if mode == "I;16" else noise(1).convert(mode)).save(path)
    image, _ = ImageDataset([(path, 0)], evaluation_transform(make_config(root).data), 0)[0]
    assert isinstance(image, Tensor) and image.shape == (3, 6, 6)


@pytest.mark.parametrize("random", [{"augment": "crop_flip"}, {"sharpness": [0.5, 4]}])
def test_random_changes_do_not_depend_on_the_number_of_workers(root: Path, random: dict[str, Any]) -> None:
    several = [
        load_calibration(make_config(root, num_workers=workers, **random)).images for workers in (0, 1, 2)
    ]
    assert torch.equal(several[0], several[1]) and torch.equal(several[0], several[2])


def test_random_crops_differ_by_seed_by_image_and_from_the_centre(root: Path) -> None:
    same = write_image(root / "a.png")
    transform = calibration_transform(make_config(root, augment="crop_flip").data)
    dataset = ImageDataset([(same, 0)] * 2, transform, seed=1)
    other = ImageDataset([(same, 0)], transform, seed=2)
    views = [dataset[0][0], dataset[1][0], other[0][0]]
    assert torch.equal(views[0], dataset[0][0])
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2)))


def test_sharpness_is_pillows_by_factors_that_fill_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    pillow = ImageEnhance.Sharpness.enhance

    def enhance(self: ImageEnhance.Sharpness, factor: float) -> Image.Image:
        factors.append(factor)
        return pillow(self, factor)

    monkeypatch.setattr(ImageEnhance.Sharpness, "enhance", enhance)
    image, change = noise(1), RandomSharpness(0.5, 4)
    torch.manual_seed(0)
    changed = [change(image) for _ in range(200)]
    assert 0.5 <= min(factors) < 0.55 and 3.6 < max(factors) <= 4
    assert sum(factor < 2**0.5 for factor in factors) / 200 == pytest.approx(0.5, abs=0.1)  # in octaves
    monkeypatch.undo()
    for found, factor in zip(changed[:5], factors, strict=False):
        assert found.tobytes() == ImageEnhance.Sharpness(image).enhance(factor).tobytes()


def test_sharpness_is_of_calibration_images_alone_and_a_factor_of_1_keeps_them(root: Path) -> None:
    plain, kept, changed = (
        make_config(root, sharpness=sharpness) for sharpness in ([1, 1], [0.9999999, 1], [2, 2])
    )
    images = [load_calibration(config).images for config in (plain, kept, changed)]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0.02)  # one grey value
    steps = [image.diff(dim=3).abs().mean(dim=(1, 2, 3)) for image in images]
    assert (steps[2] > 1.2 * steps[0]).all()
    scored = [next(iter(validation_loader(config))).images for config in (plain, changed)]
    assert torch.equal(*scored)


def test_reading_images_leaves_the_global_random_numbers_alone(root: Path) -> None:
    before = torch.get_rng_state()
    load_calibration(make_config(root, augment="crop_flip", calibrate=5))
    assert torch.equal(before, torch.get_rng_state())


# Calibration


def test_every_calibration_image_is_used_in_order(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(root)
    calibration = load_calibration(config)
    samples = list_samples(root / "sel", WNIDS, "calibration folder")
    assert calibration.files == [str(path.relative_to(root / "sel")) for path, _ in samples]
    for image, (path, _) in zip(calibration.images, samples, strict=True):
        with Image.open(path) as opened:
            assert torch.equal(image, evaluation_transform(config.data)(opened.convert("RGB")))
    assert "holds 9 images, fewer than quant.calibrate, 1024: all are used" in caplog.text
    assert calibration.manifest() == {"count": 9, "sha256": calibration.sha256, "skipped": 0}


def test_a_subset_is_drawn_by_the_seed(root: Path) -> None:
    def files(seed: int) -> list[str]:
        return load_calibration(make_config(root, calibrate=5, seed=seed)).files

    assert files(1) == files(1) and len(set(files(1))) == 5
    assert len({tuple(files(seed)) for seed in range(5)}) > 1


def test_the_hash_is_of_contents_and_names_not_of_the_place(root: Path, tmp_path: Path) -> None:
    def sha256(folder: Path) -> str:
        return load_calibration(make_config(folder)).sha256

    first = sha256(root)
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "data")
    assert sha256(moved) == first
    image = moved / "sel" / SOME[0] / "0.JPEG"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    assert sha256(moved) != first
    image.write_bytes(content)
    assert sha256(moved) == first
    image.rename(image.with_name("9.JPEG"))
    assert sha256(moved) != first


def test_a_folder_of_links_hashes_as_the_images_themselves(root: Path) -> None:
    expected = load_calibration(make_config(root)).sha256
    for path in (root / "sel").rglob("*.JPEG"):
        link = root / "links" / path.relative_to(root / "sel")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
    assert load_calibration(make_config(root, calibration="links")).sha256 == expected
    assert load_calibration(make_config(root, calibration=str(root / "links"))).sha256 == expected


# Unreadable images


def truncated() -> bytes:
    buffer = io.BytesIO()
    noise(0).save(buffer, "JPEG")
    return buffer.getvalue()[:-100]


SPOILED = pytest.mark.parametrize("content", [b"", b"no image", truncated()])


@SPOILED
def test_an_unreadable_calibration_image_stops_the_run_by_name(root: Path, content: bytes) -> None:
    spoiled = root / "sel" / SOME[2] / "1.JPEG"
    spoiled.write_bytes(content)
    with pytest.raises(UserError, match=f"image {spoiled}: cannot be read .*data.skip_unreadable: true"):
        load_calibration(make_config(root))


@SPOILED
def test_or_is_skipped_named_and_counted(
    root: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = root / "sel" / SOME[2] / "1.JPEG"
    spoiled.write_bytes(content)
    calibration = load_calibration(make_config(root, skip_unreadable=True))
    assert (len(calibration.images), len(calibration.files), calibration.skipped) == (8, 8, 1)
    assert f"{SOME[2]}/1.JPEG" not in calibration.files
    assert [r.levelno for r in caplog.records if str(spoiled) in r.message] == [logging.WARNING]


def test_a_broken_link_is_unreadable_too_not_silently_dropped(root: Path) -> None:
    dangling = root / "sel" / SOME[2] / "1.JPEG"
    dangling.unlink()
    dangling.symlink_to("../../train/nowhere.JPEG")
    with pytest.raises(UserError, match=f"image {dangling}: cannot be read"):
        load_calibration(make_config(root))


def test_nothing_readable_is_an_error(root: Path) -> None:
    for path in root.rglob("*.JPEG"):
        path.write_bytes(b"")
    config = make_config(root, skip_unreadable=True)
    with pytest.raises(UserError, match=r"calibration folder .*: no image in it can be read"):
        load_calibration(config)
    with pytest.raises(UserError, match=r"val folder.*no image in it can be read"):
        evaluate(Listed(torch.zeros(9, 1000)), validation_loader(config), CPU, skip_unreadable=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_val_image_is_named_or_skipped_and_counted(root: Path, workers: int) -> None:
    first_batch = sorted((root / "val").rglob("*.JPEG"))[:4]
    for path in first_batch:
        path.write_bytes(b"")
    loader = validation_loader(make_config(root, num_workers=workers))
    with pytest.raises(UserError, match=f"image {first_batch[0]}: cannot be read"):
        evaluate(Listed(torch.zeros(9, 1000)), loader, CPU)
    model = Listed(nn.functional.one_hot(torch.tensor([482] * 2 + [999, 0, 0]), 1000).float())
    score = evaluate(model, loader, CPU, skip_unreadable=True)
    assert model.sizes == [4, 1], "a batch without a readable image is not run"
    assert (score.images, score.skipped) == (5, 4)
    assert score.top1 == pytest.approx(60)


# Accuracy


def test_top1_and_top5_of_known_logits_with_a_tail_batch(root: Path) -> None:
    targets = [0] * 3 + [482] * 3 + [999] * 3
    ranks = [1, 2, 5, 6, 1, 1000, 5, 1, 4]  # of the true class, by image
    logits = torch.empty(9, 1000)
    for row, (target, rank) in enumerate(zip(targets, ranks, strict=True)):
        others = [label for label in range(1000) if label != target]
        order = [*others[: rank - 1], target, *others[rank - 1 :]]
        logits[row, torch.tensor(order)] = torch.arange(1000, 0, -1).float()
    model = Listed(logits)
    score = evaluate(model, validation_loader(make_config(root)), CPU)
    assert model.sizes == [4, 4, 1]
    assert score == Score(pytest.approx(100 * 3 / 9), pytest.approx(100 * 7 / 9), 9, 0)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 7])
def test_top5_of_few_classes_is_over_all_of_them(classes: int) -> None:
    targets = torch.tensor([0, classes - 1, 0])
    logits = torch.arange(classes).float().expand(3, -1)
    loader = [Batch(torch.zeros(3, 3, 2, 2), targets, [])]
    score = evaluate(Listed(logits), loader, CPU)
    assert score.top1 == pytest.approx(100 if classes == 1 else 100 / 3)
    assert score.top5 == pytest.approx(100 if classes <= 5 else 100 / 3)


def test_the_score_reads_as_in_the_published_logs() -> None:
    assert str(Score(73.4484, 91.0, 50000)) == " * Acc@1 73.448 Acc@5 91.000"
    assert Score(1.0, 2.0, 3, 4).as_dict() == {"top1": 1.0, "top5": 2.0, "images": 3, "skipped": 4}


def test_an_unreadable_image_never_raises_inside_a_loader(root: Path) -> None:
    path = root / "val" / SOME[0] / "0.JPEG"
    path.write_bytes(truncated())
    item, target = ImageDataset([(path, 7)], evaluation_transform(make_config(root).data), 0)[0]
    assert isinstance(item, Unreadable) and item.path == path and target == 7
    assert item.reason and "\n" not in item.reason


LOADING = """
import os, sys, time
from pathlib import Path
from easydict import EasyDict
from calibquant.solver.imagenet_util import make_loader
from calibquant.solver.script import run_script

def slow(image):
    print(os.getpid(), flush=True)
    time.sleep(100)

config = EasyDict(data={"batch_size": 1, "num_workers": 1, "pin_memory": False}, process={"seed": 0})
run_script(lambda: list(make_loader([(Path(sys.argv[1]), 0)], slow, config)))
"""


UNSHARED = """
import torch
from torch.utils.data import DataLoader
from calibquant.solver.imagenet_util import end_with_the_job
from calibquant.solver.script import run_script

class NotHandedOver:
    def __reduce__(self):
        raise OSError(28, "No space left on device")

run_script(lambda: list(DataLoader(
    [0], num_workers=1, collate_fn=lambda items: NotHandedOver(), worker_init_fn=end_with_the_job)))
"""


def test_a_batch_that_cannot_be_handed_over_is_one_line() -> None:
    """As with too little shared memory: without more ado the main process would wait without end."""
    command = [sys.executable, "-c", UNSHARED]
    job = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert job.returncode == 2 and job.stderr.startswith("error: a data-loading process has ended")
    assert "/dev/shm" in job.stderr and len(job.stderr.splitlines()) == 1


def test_a_network_whose_logits_are_no_numbers_has_no_score(root: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 1000), float("nan"))

    with pytest.raises(UserError, match="logits hold NaN or infinity"):
        evaluate(Broken(), validation_loader(make_config(root)), torch.device("cpu"))


@pytest.mark.parametrize("whole_job", [True, False])
def test_a_killed_data_loading_process_is_one_line(tmp_path: Path, whole_job: bool) -> None:
    image = write_image(tmp_path / "image.png")
    command = [sys.executable, "-c", LOADING, str(image)]
    job = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        worker = int(job.stdout.readline())
        if whole_job:
            os.killpg(job.pid, signal.SIGTERM)
        else:
            os.kill(worker, signal.SIGKILL)
        _, lines = job.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    (line,) = lines.splitlines()
    assert (
        line == "interrupted" if whole_job else line.startswith("error: a data-loading process has ended")
    )
    assert job.returncode == (130 if whole_job else 2)
