"""A saved network or float weights, damaged or forged, are refused in one line or load as they were."""

import os
import pickle
import random
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibquant.errors import UserError
from calibquant.model.load import build_model, load_weights
from calibquant.model.quant_layer import harden
from calibquant.solver.checkpoint import checksum, load_checkpoint, save_checkpoint
from tests.figures import record
from tests.peak import growth
from tests.small import calibrated_model, small_config

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
TINY = {"num_classes": 3, "base_width": 2}
SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network's file."""
    config = small_config(model__kwargs__base_width=1, model__kwargs__num_classes=4)
    model = calibrated_model(config, IMAGES)
    harden(model)
    return save_checkpoint(model, config, {"seed": 1005}, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float network's state dict."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.pth"
    torch.save(build_model("resnet18", TINY).state_dict(), path)
    return path


def network(path: Path) -> dict[str, Any]:
    """All that a saved network's file says."""
    model, config, metadata = load_checkpoint(path)
    return {**model.state_dict(), "config": dict(config), "metadata": metadata}


def floats(path: Path) -> dict[str, Any]:
    """All that a float network's file says."""
    model = build_model("resnet18", TINY)
    load_weights(model, "resnet18", str(path))
    return dict(model.state_dict())


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a
    )


def is_refused(read: Callable[[Path], Any], path: Path, what: str, as_it_was: dict[str, Any]) -> bool:
    """Whether a file is refused in one line; else it must say what it said before."""
    SEEN[f"{what} tried"] += 1
    try:
        found = read(path)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 400 + len(str(path)) and path.name in message, (
            message
        )
        SEEN[f"{what} refused"] += 1
        return True
    assert equal(found, as_it_was)
    SEEN[f"{what} harmless"] += 1
    return False


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Any:
    """Nothing here may take more than 500 MB more, whatever it claims."""
    grown = growth()
    yield
    assert grown() < 500_000, "KiB"


# Damage


@pytest.mark.parametrize("kind", ["network", "floats"])
def test_a_flipped_bit_is_refused_or_harmless(
    tmp_path: Path, saved: Path, weights: Path, kind: str
) -> None:
    read, source, count = (network, saved, 400) if kind == "network" else (floats, weights, 150)
    as_it_was, whole = read(source), source.read_bytes()
    draw = random.Random(7)
    path = tmp_path / "flipped.pth"
    for _ in range(count):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        is_refused(read, path, f"{kind}: bit flips", as_it_was)


@pytest.mark.parametrize("kind", ["network", "floats"])
def test_a_file_cut_short_is_refused(tmp_path: Path, saved: Path, weights: Path, kind: str) -> None:
    read, source = (network, saved) if kind == "network" else (floats, weights)
    whole = source.read_bytes()
    path = tmp_path / "short.pth"
    lengths = [*range(0, 64, 7), *range(len(whole) - 120, len(whole), 11)]
    for length in lengths + [random.Random(length).randrange(len(whole)) for length in range(40)]:
        path.write_bytes(whole[:length])
        assert is_refused(read, path, f"{kind}: cut short", {})
    path.write_bytes(whole + b"more")
    assert is_refused(read, path, f"{kind}: cut short", {})


# Containers


def rezipped(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """A copy of a zip with other entries; their checksums are right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression, compresslevel=1) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def claiming(name: str, content: bytes) -> bytes:
    """The pickle of a tensor storage that says it had 2^30 elements."""
    return content.replace(b"K\x01tq", b"J\0\0\0\x40tq") if name.endswith("data.pkl") else content


@pytest.mark.parametrize("kind", ["network", "floats"])
def test_a_forged_zip_is_refused(tmp_path: Path, saved: Path, weights: Path, kind: str) -> None:
    read, source = (network, saved) if kind == "network" else (floats, weights)
    as_it_was, path = read(source), tmp_path / "forged.pth"

    def forged(target: Path) -> None:
        started = time.process_time()
        assert is_refused(read, target, "forged files", {})
        assert time.process_time() - started < 5

    assert not is_refused(read, rezipped(source, path, lambda _, c: c), "forged files", as_it_was)
    forged(rezipped(source, path, lambda _, c: c, zipfile.ZIP_DEFLATED))
    bomb = rezipped(
        source, path, lambda n, c: bytes(3 * 10**8) if n.endswith("/0") else c, zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 10**7
    forged(bomb)
    if kind == "network":
        forged(rezipped(source, path, claiming))
    forged(rezipped(source, path, lambda n, c: c[:-1] if "/data/" in n else c))
    forged(rezipped(source, path, lambda n, c: b"(" * 10**6 if n.endswith(".pkl") else c))
    forged(rezipped(source, path, lambda n, c: b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b"."))
    whole = source.read_bytes()
    for place in (-98, -58, -50, -34, -22, -10, -6, -2):  # fields of the records at the end
        content = bytearray(whole)
        content[place] ^= 0x41
        path.write_bytes(content)
        forged(path)
    path.write_bytes(b"MZ" + whole)
    forged(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "shared.pth"
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("a/data.pkl", bytes(10**6))
        new.filelist += [new.filelist[0]] * 3000
    assert is_refused(network, path, "forged files", {})


# Contents


def levels(depth: int, width: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] * width
    return value


LONG_TEXT = "x" * 10**6
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an expanded view": lambda c: c["layers"]["stem.conv1"].update(
        weight=torch.ones(1, dtype=torch.uint8).expand(10**6, 10**6)
    ),
    "an expanded view of the right shape": lambda c: c["layers"]["stem.conv1"].update(
        bias=torch.ones(1).expand(10**12)[:1].expand(10**12)
    ),
    "sparse": lambda c: c["layers"]["stem.conv1"].update(bias=torch.ones(1).to_sparse()),
    "quantized": lambda c: c["layers"]["stem.conv1"].update(
        bias=torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.quint8)
    ),
    "meta": lambda c: c["layers"]["stem.conv1"].update(bias=torch.ones(1, device="meta")),
    "huge meta": lambda c: c["layers"]["stem.conv1"].update(weight=torch.ones(10**15, device="meta")),
    "complex": lambda c: c["layers"]["stem.conv1"].update(scale=torch.ones(1, dtype=torch.complex64)),
    "conjugate": lambda c: c["layers"]["stem.conv1"].update(
        scale=torch.ones(1, dtype=torch.complex64).conj()
    ),
    "double": lambda c: c["layers"]["stem.conv1"].update(scale=torch.ones(1, dtype=torch.float64)),
    "a float for bytes": lambda c: c["layers"]["stem.conv1"].update(weight=torch.ones(147)),
    "a list for a tensor": lambda c: c["layers"]["stem.conv1"].update(scale=[1.0]),
    "a text for a tensor": lambda c: c["layers"]["stem.conv1"].update(bias="1"),
    "a tensor for a shape": lambda c: c["layers"]["stem.conv1"].update(shape=torch.ones(4)),
    "a huge shape": lambda c: c["layers"]["stem.conv1"].update(shape=[2**62] * 4),
    "a huge integer": lambda c: c["layers"]["stem.conv1"].update(bits=10**5000),
    "no bits": lambda c: c["layers"]["stem.conv1"].update(bits=None),
    "too many activation scales": lambda c: c["activations"]["stem.output_quantizer"].update(
        scale=torch.ones(7), zero_point=torch.zeros(7, dtype=torch.int16)
    ),
    "a million classes": lambda c: c["config"]["model"]["kwargs"].update(num_classes=10**6),
    "a huge network": lambda c: c["config"]["model"].update(type="resnet152", kwargs={"base_width": 1024}),
    "a network without channels": lambda c: c["config"]["model"].update(type="resnext50_32x4d"),
    "a config of lists": lambda c: c.update(config=levels(3, 3)),
    "layers of lists": lambda c: c.update(layers=[1, 2]),
    "metadata of numbers": lambda c: c.update(metadata=7),
    "deep": lambda c: c.update(metadata=levels(200, 1)),
    "a billion laughs": lambda c: c.update(metadata={"a": levels(12, 9)}),
    "one text a million times": lambda c: c.update(metadata={"a": [LONG_TEXT] * 10**5}),
    "one tensor many times": lambda c: c.update(metadata={"a": [torch.ones(10**5)] * 10**4}),
    "a set": lambda c: c.update(metadata={"a": {1, 2}}),
    "a tuple": lambda c: c.update(metadata={"a": (1, 2)}),
    "a counter": lambda c: c.update(metadata=Counter("aab")),
    "a type": lambda c: c.update(metadata={"a": torch.float32}),
    "a parameter": lambda c: c.update(metadata={"a": torch.nn.Parameter(torch.ones(1))}),
    "a key that is no text": lambda c: c.update(metadata={1: 2}),
    "another format": lambda c: c.update(format="calibquant2"),
    "a format of tensors": lambda c: c.update(format=torch.ones(3)),
    "no version": lambda c: c.pop("version"),
    "a version of True": lambda c: c.update(version=True),
    "a huge version": lambda c: c.update(version=10**5000),
    "a checksum of tensors": lambda c: c.update(checksum=torch.ones(3)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_refused_quickly(tmp_path: Path, saved: Path, name: str) -> None:
    content = torch.load(saved, weights_only=True)
    right = content["checksum"]
    HOSTILE[name](content)
    quick = name not in ("a billion laughs", "one text a million times", "one tensor many times")
    if quick and content["checksum"] is right:  # so that the checksum is not what refuses it
        with suppress(RuntimeError, TypeError, ValueError):
            content["checksum"] = checksum(content)
    path = tmp_path / "hostile.pth"
    torch.save(content, path)
    started = time.process_time()
    assert is_refused(network, path, "hostile contents", {})
    assert time.process_time() - started < 5


@pytest.mark.parametrize(("version", "words"), [(0, "it is older"), (2, "it is newer")])
def test_another_version_is_named(tmp_path: Path, saved: Path, version: int, words: str) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "version": version}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"has format version {version}, allowed is 1; {words}"):
        load_checkpoint(tmp_path / "other.pth")


class Code:
    """A pickle of this runs a command when it is loaded the unsafe way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("read", [network, floats])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_not_run_wherever_it_stands(
    tmp_path: Path, saved: Path, read: Callable[[Path], Any], protocol: int
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "code.pth"
    content = torch.load(saved, weights_only=True)
    for spoiled in (
        Code(marker),
        {**content, "metadata": Code(marker)},
        {"state_dict": {"a": Code(marker)}},
    ):
        torch.save(spoiled, path, pickle_protocol=protocol)
        assert is_refused(read, path, "code in the pickle", {})
    path.write_bytes(pickle.dumps(Code(marker), protocol))
    assert is_refused(read, path, "code in the pickle", {})
    assert not marker.exists()


FLOATS: dict[str, Callable[[Tensor], Any]] = {
    "expanded": lambda w: torch.ones(1).expand(w.shape),
    "hugely expanded": lambda w: torch.ones(1).expand(10**6, 10**9),
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "quantized": lambda w: torch.quantize_per_tensor(w, 1.0, 0, torch.quint8),
    "complex": lambda w: w.to(torch.complex64),
    "conjugate": lambda w: w.to(torch.complex64).conj(),
    "integers": lambda w: w.to(torch.int64),
    "infinite": lambda w: w / 0,
    "transposed": lambda w: w.t(),
    "a list": lambda w: w.tolist(),
}


@pytest.mark.parametrize("name", FLOATS)
def test_hostile_float_weights_are_refused(tmp_path: Path, weights: Path, name: str) -> None:
    state = torch.load(weights, weights_only=True)
    state["fc.weight"] = FLOATS[name](state["fc.weight"])
    path = tmp_path / "hostile.pth"
    torch.save(state, path)
    assert is_refused(floats, path, "hostile contents", {})


@pytest.mark.parametrize("key", ["\x1b[2J", "a\nb", "x" * 10_000, "module.fc.weight", 7, None])
def test_hostile_names_of_float_weights_are_one_line(tmp_path: Path, weights: Path, key: Any) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save({**state, key: torch.ones(1)}, tmp_path / "names.pth")
    assert is_refused(floats, tmp_path / "names.pth", "hostile contents", {})


def test_an_old_format_that_claims_too_much_is_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(77)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert struct.pack("<q", 77) in content and b"K\x4d" in content
    path.write_bytes(content.replace(b"K\x4d", b"J\0\0\0\x70"))
    assert is_refused(floats, path, "forged files", {})


@pytest.mark.parametrize("read", [network, floats])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        tmp_path / "pipe",
        tmp_path / "loop",
        tmp_path / "nowhere",
        tmp_path,
        tmp_path / ("x" * 300),
    ):
        assert is_refused(read, path, "no files", {})


def test_figures() -> None:
    for what in dict.fromkeys(key.rpartition(" ")[0] for key in SEEN):
        tried, refused, harmless = (SEEN[f"{what} {end}"] for end in ("tried", "refused", "harmless"))
        record(f"{what} tried: {tried}, refused: {refused}, loaded with every bit as it was: {harmless}")
