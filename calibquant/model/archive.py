"""What a saved file is made of, checked before any of it is believed.

``torch.load(weights_only=True)`` runs no code, but it ignores a zip's checksums, unpacks compressed
entries of any size, and returns tensors that claim far more elements than they hold. Whoever loads a
stranger's file calls what is here first.
"""

import pickletools
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ZIP_MAGIC = b"PK\x03\x04"
MAX_ENTRIES = 10_000
"""Of a zip; the file of a ResNet-152 has about 1,000."""
MAX_PICKLE_BYTES = 2**22
"""Of what is no tensor; that of a ResNet-152 has about 150 kB."""
MAX_DEPTH = 16
_IN_64_BITS = 2**32 - 1
"""Stands in a zip's 32-bit fields for what is too large for them."""

_TENSORS_ALONE = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
_STORAGES = {f"torch {kind}Storage" for kind in ("Byte", "Short", "Int", "Long", "Half", "Float", "Double")}


def is_zip(path: Path) -> bool:
    """Whether ``torch.load`` would read a file as a zip (it goes by the first four bytes).

    Raises:
        OSError, ValueError: there is no file that could be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")  # a pipe would be waited for without end
    with path.open("rb") as file:
        return file.read(4) == ZIP_MAGIC


def check_zip(path: Path) -> None:
    """Refuse a zip that is cut short, damaged, compressed or larger unpacked than it is.

    Raises:
        ValueError: it is; other exceptions of ``zipfile`` say the same.
    """
    size = path.stat().st_size
    _check_end(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) != len(entries) or len(entries) > MAX_ENTRIES:
            raise ValueError(f"an entry stands twice, or there are more than {MAX_ENTRIES}")
        if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
            raise ValueError("an entry is compressed, which torch never does")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries claim more bytes than the file has")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"entry {damaged} does not match its checksum")


def _check_end(path: Path, size: int) -> None:
    """Make sure that a zip ends where its directory says, so that every reader sees the same entries."""
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read(98)
    end = tail[-22:]
    if not end.startswith(b"PK\x05\x06") or end[20:] != b"\0\0":
        raise ValueError("its end is missing")
    places = [struct.unpack("<II", end[12:20])]  # the directory's length and start
    expected = size - 22
    if tail[56:60] == b"PK\x06\x07":  # once more in 64 bits, as torch writes it
        places.append(struct.unpack("<QQ", tail[40:56]))
        expected = size - 98
        if not tail.startswith(b"PK\x06\x06") or struct.unpack("<Q", tail[64:72])[0] != expected:
            raise ValueError("its directory is not where its end says")
        if places[0] == (_IN_64_BITS, _IN_64_BITS):
            del places[0]
    if any(length + start != expected for length, start in places):
        raise ValueError("its directory is not where its end says")


def check_pickles(path: Path) -> None:
    """Refuse a zip whose pickles name anything but plain tensors, before they are unpickled.

    Raises:
        ValueError: they do, or are too long to be read in bounded time.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
        if sum(entry.file_size for entry in pickles) > MAX_PICKLE_BYTES:
            raise ValueError(f"what is no tensor takes more than {MAX_PICKLE_BYTES} bytes")
        for entry in pickles:
            for opcode, argument, _ in pickletools.genops(archive.read(entry)):
                if opcode.name == "GLOBAL" and argument in _TENSORS_ALONE | _STORAGES:
                    continue
                if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
                    raise ValueError(f"it names {argument or opcode.name}, and not tensors alone")


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is an ordinary dense tensor in host memory that has all its elements."""
    if type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu" or value.is_nested:
        return False
    if value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
        return False
    has_all: bool = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    return has_all


def check_content(content: Any, limit: int) -> None:
    """Refuse content that is more than nested dicts, lists, plain values and plain tensors.

    Args:
        limit: bytes that all of it may take together, each mention counted. Values that stand in
            several places take no space in a file, but time wherever they are read.

    Raises:
        ValueError: it is more, deeper than 16 levels or larger than the limit.
    """
    taken, open_values = 0, [(content, 0)]
    while open_values:
        value, depth = open_values.pop()
        if type(value) is dict:
            if any(type(key) is not str for key in value):
                raise ValueError("it has a key that is no text")
            children = [*value, *value.values()]
        elif type(value) is list:
            children = value
        else:
            children = []
        taken += 1 + len(children) + _bytes_of(value)
        if taken > limit or depth > MAX_DEPTH:
            raise ValueError("its content is larger or deeper than the file")
        open_values += [(child, depth + 1) for child in children]


def _bytes_of(value: Any) -> int:
    """Bytes that a value takes beside its children.

    Raises:
        ValueError: a kind of value that no saved network holds.
    """
    if is_plain_tensor(value):
        size: int = value.numel() * value.element_size()
        return size
    if type(value) is str:
        return len(value)
    big = type(value) is int and value.bit_length() > 64
    if big or (value is not None and type(value) not in (dict, list, bool, int, float)):
        raise ValueError(f"it holds a {type(value).__name__} that is no plain value")
    return 0
