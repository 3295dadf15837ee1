"""Weights load from what people have on disk, and whatever else is on disk is refused in one line."""

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibquant.errors import UserError
from calibquant.model.load import build_model, load_weights, read_state_dict
from calibquant.model.resnet import ResNet

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse")
TINY = {"num_classes": 3, "base_width": 4}


def tiny(seed: int) -> ResNet:
    torch.manual_seed(seed)
    model = build_model("resnet18", TINY)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


SOURCE = tiny(0).state_dict()


def load(path: Path) -> ResNet:
    model = tiny(1)
    load_weights(model, "resnet18", str(path))
    return model


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        OrderedDict,
        prefixed,
        lambda s: {"state_dict": s, "epoch": 90, "best_acc1": 77.4},
        lambda s: {"model": s, "args": None},
        lambda s: {"model_state_dict": s, "loss": 0.5},
        lambda s: {key: v.half() if "num_batches" in key else v for key, v in s.items()},
        lambda s: {"state_dict": prefixed(s), "arch": "resnet18"},
        lambda s: {key: value for key, value in s.items() if "num_batches" not in key},
        lambda s: {key: torch.nn.Parameter(v) if v.is_floating_point() else v for key, v in s.items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_loads_however_it_was_wrapped(tmp_path: Path, wrap: Any, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap(SOURCE), path, _use_new_zipfile_serialization=zipped)
    loaded = load(path).state_dict()
    for key, value in SOURCE.items():
        assert torch.equal(loaded[key], value), key


def test_loaded_weights_compute_what_their_source_does(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(load(save(SOURCE, tmp_path / "w.pth"))(images), tiny(0)(images))


def test_keys_and_logits_are_torchvisions() -> None:
    theirs = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    ours = build_model("resnet18", {"num_classes": 5})
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_float16_weights_become_float32(tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in SOURCE.items()}
    loaded = load(save(half, tmp_path / "half.pth")).state_dict()
    for key, value in half.items():
        assert loaded[key].dtype == SOURCE[key].dtype
        assert torch.equal(loaded[key], value.to(SOURCE[key].dtype))


def test_a_path_may_name_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(SOURCE, tmp_path / "w.pth")
    monkeypatch.setenv("CALIBQUANT_TEST_FOLDER", str(tmp_path))
    load_weights(tiny(1), "resnet18", "${CALIBQUANT_TEST_FOLDER}/w.pth")
    monkeypatch.delenv("CALIBQUANT_TEST_FOLDER")
    with pytest.raises(UserError, match=r"^model\.path \$.* variable CALIBQUANT_TEST_FOLDER is not set"):
        load_weights(tiny(1), "resnet18", "${CALIBQUANT_TEST_FOLDER}/w.pth")
    save(SOURCE, tmp_path / "cheap$10.pth")
    load_weights(tiny(1), "resnet18", str(tmp_path / "cheap$10.pth"))


def changed(**values: Any) -> dict[str, Any]:
    """The source's state dict with other values; None drops the key. Dots are written as ``__``."""
    values = {key.replace("__", "."): value for key, value in values.items()}
    return {k: v for k, v in {**SOURCE, **values}.items() if v is not None}


def holding(value: float) -> Tensor:
    bias = torch.zeros(3)
    bias[1] = value
    return bias


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(fc__bias=None), r"does not fit resnet18: 1 missing \(fc\.bias\)"),
        (changed(fc__scale=torch.ones(3)), r"does not fit resnet18: 1 unexpected \(fc\.scale\)"),
        ({"fc.weight": torch.ones(3, 32)}, r"missing \(bn1\.bias, bn1\.running_mean, .*, \.\.\.\)"),
        (changed(fc__bias=None, x=torch.ones(1)), r"1 missing \(fc\.bias\) and 1 unexpected \(x\)"),
        (changed(fc__bias=torch.ones(4)), r"fc\.bias is \[4\], allowed is \[3\]"),
        (changed(bn1__running_var=torch.ones(1)), r"bn1\.running_var is \[1\], allowed is \[4\]"),
        (changed(fc__bias=holding(float("nan"))), r"fc\.bias holds NaN or infinity"),
        (changed(fc__bias=holding(-float("inf")).half()), r"fc\.bias holds NaN or infinity"),
        (
            changed(fc__bias=1e300 * holding(1.0).double()),
            r"fc\.bias holds NaN or infinity, or what float32",
        ),
        (changed(bn1__running_var=-torch.ones(4)), r"bn1\.running_var holds -1, allowed are variances"),
        (changed(fc__bias=holding(float("nan")).to(torch.float8_e4m3fn)), r"fc\.bias holds NaN"),
        (changed(fc__bias="text"), r"'fc\.bias' is no named tensor"),
        ({1: torch.ones(1)}, "1 is no named tensor"),
        ({}, "holds no state dict"),
        ([torch.ones(1)], "holds no state dict"),
        (torch.ones(1), "holds no state dict"),
        ({"state_dict": {}}, "holds no state dict"),
        ({"line\nbreak": 1}, "is no named tensor"),
    ],
)
def test_another_content_is_named(tmp_path: Path, content: Any, message: str) -> None:
    refused(save(content, tmp_path / "other.pth"), message)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    refused(save(changed(fc__bias=torch.ones(3, dtype=dtype)), tmp_path / "w.pth"), r"fc\.bias")


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    refused(save(changed(fc__bias=torch.ones(3).to_sparse()), tmp_path / "w.pth"), r"fc\.bias")


def test_nothing_is_loaded_where_something_is_wrong(tmp_path: Path) -> None:
    model = tiny(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = save(changed(fc__bias=holding(float("nan"))), tmp_path / "nan.pth")
    with pytest.raises(UserError):
        load_weights(model, "resnet18", str(path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.pth", "no such file")
    refused(tmp_path, "is a folder")


class Code:
    """A pickle of this runs a command when it is loaded the unsafe way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"state_dict": SOURCE, "extra": c}])
@pytest.mark.parametrize("how", ["pickle", "torch", "legacy"])
def test_a_pickle_with_code_never_runs(tmp_path: Path, how: str, wrap: Any) -> None:
    marker, path = tmp_path / "ran", tmp_path / "code.pth"
    content = wrap(Code(marker))
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    refused(path, "refused: not a file of tensors alone")
    assert not marker.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    refused(save(tiny(0), tmp_path / "module.pth"), "refused: not a file of tensors alone")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "truncated.pth"
    torch.save(SOURCE, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "truncated")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_any_damage_is_a_user_error_or_harmless(tmp_path: Path, data: st.DataObject, zipped: bool) -> None:
    path = tmp_path / "damaged.pth"
    torch.save({"a": torch.ones(3), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        state = read_state_dict(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(isinstance(value, Tensor) for value in state.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_a_foreign_file_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "it is empty"), (b"a b c", "it is no file that torch.save wrote whole")],
)
def test_of_a_foreign_file_it_is_said_what_it_is_not(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"foreign: {words}"):
        read_state_dict(path)


class Running:
    """Unpickled with trust, it makes a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(os.environ["TORCH_HOME"], "ran"),))


def cut(path: Path) -> None:
    torch.save(SOURCE, path)
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    "write",
    [
        Path.touch,
        lambda path: path.write_text("<html>Not found</html>"),
        lambda path: torch.save([1], path),
        lambda path: torch.save({"a": 1}, path),
        lambda path: torch.save(Running(), path),
        cut,
    ],
    ids=["empty", "a page", "a list", "no tensors", "code", "cut"],
)
def test_a_damaged_file_among_torchvisions_downloads_is_named_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"].url
    kept = tmp_path / "hub" / "checkpoints" / Path(url).name
    kept.parent.mkdir(parents=True)
    write(kept)
    with pytest.raises(UserError, match=f"weights {kept}: cannot be read .*; remove it, and") as caught:
        load_weights(tiny(1), "resnet18", None)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "ran").exists()


def test_what_a_file_holds_beside_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": SOURCE, "args": argparse.Namespace()}, path)
    with pytest.raises(UserError, match=r"it holds argparse\.Namespace: save a state dict alone"):
        load(path)


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    weights = torchvision.models.get_model_weights("resnet18")
    monkeypatch.setattr(weights, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route.*give model\.path") as caught:
        load_weights(tiny(1), "resnet18", None)
    assert len(str(caught.value).splitlines()) == 1
