"""Whatever lies in an image folder ends as an image of three channels or as a named unreadable one."""

import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from calibquant.errors import UserError
from calibquant.solver.imagenet_util import (
    ImageDataset,
    evaluation_transform,
    load_calibration,
    read_image,
)
from tests.figures import record
from tests.peak import growth
from tests.small import small_config, some_wnids

RAMP = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
"""A 16-bit ramp from 0 to nearly 65535."""
PICTURE = Image.fromarray(np.stack([RAMP >> 8, RAMP >> 9, RAMP % 256], axis=2).astype(np.uint8))


def png_of(width: int, height: int, path: Path, depth: int = 8) -> None:
    """A PNG of greyscale that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def part_of(path: Path, share: float, **options: str) -> None:
    """The first part of an image's file."""
    PICTURE.save(path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def frames(path: Path, kind: str) -> None:
    others = [Image.new("RGB", PICTURE.size, colour) for colour in ("red", "blue")]
    PICTURE.save(path, format=kind, save_all=True, append_images=others, duration=100, lossless=True)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    PICTURE.save(path, exif=exif)


def transparent_palette(path: Path) -> None:
    PICTURE.convert("P").save(path, format="PNG", transparency=bytes(range(256)))


READABLE: dict[str, Callable[[Path], None]] = {
    "greyscale.JPEG": lambda p: PICTURE.convert("L").save(p),
    "cmyk.JPEG": lambda p: PICTURE.convert("CMYK").save(p),
    "bilevel.png": lambda p: PICTURE.convert("1").save(p),
    "grey_alpha.png": lambda p: PICTURE.convert("LA").save(p),
    "alpha.png": lambda p: PICTURE.convert("RGBA").save(p),
    "alpha.webp": lambda p: PICTURE.convert("RGBA").save(p),
    "palette.png": lambda p: PICTURE.convert("P").save(p),
    "transparent_palette.png": transparent_palette,
    "16bit.png": lambda p: Image.fromarray(RAMP).save(p),
    "16bit.tif": lambda p: Image.fromarray(RAMP).save(p),
    "16bit.pgm": lambda p: Image.fromarray(RAMP).save(p),
    "10bit.pgm": lambda p: p.write_bytes(b"P5 64 48 1023\n" + (RAMP >> 6).astype(">u2").tobytes()) and None,
    "moving.webp": lambda p: frames(p, "WEBP"),
    "moving_gif.JPEG": lambda p: frames(p, "GIF"),
    "rotated.JPEG": rotated,
    "png.JPEG": lambda p: PICTURE.save(p, format="PNG"),
    "lab.tiff": lambda p: PICTURE.convert("RGB").convert("YCbCr").save(p),
    "one_pixel.png": lambda p: Image.new("RGB", (1, 1)).save(p),
    "link.JPEG": lambda p: p.symlink_to(_other(p)),
}
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "empty.JPEG": lambda p: p.write_bytes(b""),
    "text.JPEG": lambda p: p.write_text("no image"),
    "zeros.png": lambda p: p.write_bytes(bytes(10**6)),
    "cut_at_10.JPEG": lambda p: part_of(p, 0.1),
    "cut_at_90.JPEG": lambda p: part_of(p, 0.9),
    "cut.png": lambda p: part_of(p, 0.5),
    "cut.webp": lambda p: part_of(p, 0.5),
    "cut.bmp": lambda p: part_of(p, 0.5),
    "cut.tif": lambda p: part_of(p, 0.5),
    "bomb.png": lambda p: png_of(50_000, 50_000, p),
    "bomb_that_pillow_only_warns_of.png": lambda p: png_of(12_000, 12_000, p),
    "bomb_of_one_column.png": lambda p: Image.new("L", (1, 60_000)).save(p),
    "bomb_of_one_row.png": lambda p: Image.new("L", (60_000, 1)).save(p),
    "bomb.bmp": lambda p: p.write_bytes(
        b"BM" + struct.pack("<IIIIiiHHII", 54, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0)
    ),
    "claims_more_than_it_holds.png": lambda p: png_of(4_000, 4_000, p),
    "no_size.png": lambda p: png_of(0, 0, p),
    "floats.tif": lambda p: Image.fromarray(RAMP.astype(np.float32)).save(p),
    "32bit.tif": lambda p: Image.fromarray(RAMP.astype(np.int32)).save(p),
    "postscript.JPEG": lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"),
    "folder.JPEG": lambda p: p.mkdir(),
    "pipe.JPEG": lambda p: os.mkfifo(p),
    "nowhere.JPEG": lambda p: p.symlink_to(p.parent / "missing"),
    "loop.JPEG": lambda p: p.symlink_to(p),
    "zero_device.JPEG": lambda p: p.symlink_to("/dev/zero"),
    "not_utf8_\udcff.JPEG": lambda p: p.write_bytes(b"broken"),
    "escape_\x1b[2J\n.JPEG": lambda p: p.write_bytes(b"broken"),
}


def _other(path: Path) -> Path:
    target = path.parent.parent / "target"
    PICTURE.save(target, format="JPEG")
    return target


CONFIG = small_config(data__input_size=32, data__test_resize=64)


def decoded(path: Path) -> object:
    return ImageDataset([(path, 0)], evaluation_transform(CONFIG.data), 0)[0][0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", READABLE)
def test_it_is_decoded_to_three_channels(tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder" / name
    path.parent.mkdir()
    READABLE[name](path)
    image = decoded(path)
    assert isinstance(image, Tensor) and image.shape == (3, 32, 32) and torch.isfinite(image).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", UNREADABLE)
def test_it_is_unreadable_for_a_reason_at_once(tmp_path: Path, name: str) -> None:
    UNREADABLE[name](tmp_path / name)
    grown, started = growth(), time.process_time()
    item = decoded(tmp_path / name)
    assert not isinstance(item, Tensor) and item.path == tmp_path / name
    assert item.reason and item.reason.isprintable() and len(item.reason) <= 300
    assert time.process_time() - started < 5
    assert grown() < 500_000, "KiB"


@pytest.mark.parametrize("name", ["16bit.png", "16bit.tif", "16bit.pgm"])
def test_16_bits_become_their_upper_8(tmp_path: Path, name: str) -> None:
    READABLE[name](tmp_path / name)
    pixels = np.asarray(read_image(tmp_path / name))
    assert np.array_equal(pixels, np.repeat((RAMP >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("name", ["moving.webp", "moving_gif.JPEG"])
def test_of_what_moves_the_first_frame_counts(tmp_path: Path, name: str) -> None:
    READABLE[name](tmp_path / name)
    difference = np.asarray(read_image(tmp_path / name)).astype(int) - np.asarray(PICTURE)
    assert np.abs(difference).mean() < 8, "a GIF has but 256 colours"


def test_orientation_is_ignored_as_by_torchvisions_folders(tmp_path: Path) -> None:
    rotated(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").size == PICTURE.size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A calibration folder that holds everything above."""
    place = tmp_path / "imagenet" / "sel" / some_wnids(1)[0]
    place.mkdir(parents=True)
    for name, make in {**READABLE, **UNREADABLE}.items():
        make(place / name)
    return tmp_path / "imagenet"


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_unreadable_is_skipped_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    changes = {"data__num_workers": workers, "data__test_resize": 64, "quant__calibrate": 1000}
    config = small_config(data__path=str(folder), data__skip_unreadable=True, **changes)
    calibration = load_calibration(config)
    assert calibration.skipped == len(UNREADABLE)
    assert sorted(Path(name).name for name in calibration.files) == sorted(READABLE)
    assert calibration.images.shape[:2] == (len(READABLE), 3)
    skipped = [message for message in caplog.messages if "skipped" in message]
    assert len(skipped) == len(UNREADABLE) and all(message.isprintable() for message in skipped)


def test_or_it_stops_and_names_the_first(folder: Path) -> None:
    with pytest.raises(UserError, match=r"image .*/32bit\.tif: cannot be read \(pixels of 32") as caught:
        load_calibration(small_config(data__path=str(folder), quant__calibrate=1000))
    assert "data.skip_unreadable: true" in str(caught.value)


def test_a_list_of_classes_that_is_a_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "classes.txt")
    with pytest.raises(UserError, match=r"classes\.txt: cannot be read"):
        load_calibration(small_config(data__path=str(folder), data__classes=str(folder / "classes.txt")))


def test_figures() -> None:
    record(f"hostile images: {len(READABLE)} kinds decoded, {len(UNREADABLE)} kinds named as unreadable")
