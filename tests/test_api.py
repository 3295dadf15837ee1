"""Use from Python: torchvision's networks and own data, no YAML and no folders."""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
import yaml
from torch import nn

import calibquant
from calibquant.model.convert import describe_network, float_copy
from calibquant.model.load import build_model
from calibquant.model.resnet import ARCHITECTURES
from calibquant.solver import api
from calibquant.solver.api import _checked_config
from calibquant.solver.config import check_config
from calibquant.solver.pipeline import quantize_model
from tests.onnx_tools import relative_difference, run_onnx
from tests.small import random_float_model, small_config

ROOT = Path(__file__).resolve().parents[1]
OBSERVER = {"observer": "MinMaxObserver"}
RECON = {"iters": 3, "batch_size": 4, "round_lr": 0.1}
QUICK = {"quant": {"w_qconfig": OBSERVER, "a_qconfig": OBSERVER, "recon": RECON}}
SMALL = {"num_classes": 4, "small_images": True, "base_width": 4}


def images(count=8, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    """A narrow network of ours and the same quantized."""
    model = random_float_model(small_config(model__kwargs__num_classes=4))
    return model, calibquant.quantize(model, images(side=16), QUICK)


def test_a_torchvision_network_is_quantized_and_left_as_it_was():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    before = copy.deepcopy(model.state_dict())
    quantized = calibquant.quantize(model, images(4), QUICK)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not quantized.training
    with torch.no_grad():
        assert quantized(images(4)).shape == (4, 5)
    assert quantized.config.model.type == "resnet18" and quantized.config.data.input_size == 32
    assert quantized.metadata["calibration"]["count"] == 4


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_torchvision_network_of_the_family_is_known(kind):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(kind, num_classes=7)
        found, kwargs = describe_network(theirs)
        ours = build_model(found, kwargs)
    assert found == kind and kwargs["num_classes"] == 7
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


def test_the_float_copy_computes_what_torchvisions_network_does():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    with torch.no_grad():
        ours = float_copy(theirs, images(2))
        torch.testing.assert_close(ours(images(4)), theirs(images(4)), rtol=1e-4, atol=1e-4)


def test_what_batch_norm_adds_to_the_variance_is_taken_over():
    model = torchvision.models.resnet18(num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.3
    assert torch.allclose(float_copy(model, images())(images()), model(images()), atol=1e-5)


def test_what_is_saved_and_loaded_gives_equal_logits_and_the_same_file(small, tmp_path):
    _, quantized = small
    path = tmp_path / "deep" / "own.pth"
    calibquant.save_quantized(quantized, path)
    loaded = calibquant.load_quantized(str(path))
    with torch.no_grad():
        assert torch.equal(loaded(images(side=16)), quantized(images(side=16)))
    assert loaded.config == quantized.config and loaded.metadata == quantized.metadata
    calibquant.save_quantized(loaded, path)  # replaced
    with torch.no_grad():
        assert torch.equal(calibquant.load_quantized(path)(images(side=16)), quantized(images(side=16)))


def test_at_8_bits_the_network_is_nearly_the_float_one(small):
    model, _ = small
    grids = {"w_qconfig": {**OBSERVER, "bit": 8}, "a_qconfig": {**OBSERVER, "bit": 8}}
    quantized = calibquant.quantize(model, images(side=16), {"quant": {**grids, "recon": {"iters": 0}}})
    with torch.no_grad():
        assert relative_difference(quantized(images(side=16)), model(images(side=16))).max() < 0.05


@contextmanager
def by_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "scope",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(by_default, torch.float64),
        partial(by_default, torch.bfloat16),
        partial(torch.device, "meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "float64", "bfloat16", "another device"],
)
def test_the_result_is_the_same_each_time_and_in_whatever_scope(small, scope):
    (model, quantized), given = small, images(side=16)
    with scope():
        again = calibquant.quantize(model, given, QUICK)
        assert torch.equal(again(given), quantized(given))


def test_the_config_may_be_a_dict_a_file_or_nothing(small, tmp_path):
    model, _ = small
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(QUICK))
    from_file = _checked_config(path, model, images(side=16))
    assert from_file == _checked_config(QUICK, model, images(side=16))
    assert from_file.model.kwargs == {**SMALL, "stride_in_1x1": False}
    untouched = _checked_config(None, model, images(side=16))
    assert untouched.quant.recon == check_config({"model": {"type": "resnet18"}}).quant.recon
    dotted = _checked_config({"quant.recon.iters": 7}, model, images(side=16))
    assert dotted.quant.recon.iters == 7


def mistakes():
    """What is given instead of a small network, images and a config, and words of the one line."""
    resnet = torchvision.models.resnet
    changed = torchvision.models.resnet18(num_classes=4)
    changed.layer2[0].conv1.stride = (1, 1)
    changed.layer2[0].downsample[0].stride = (1, 1)
    head = torchvision.models.resnet18(num_classes=4)
    head.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 4))
    clipped = torchvision.models.resnet18(num_classes=4)
    clipped.layer3[1].relu = nn.ReLU6()  # which these images do not tell from ReLU
    named, features = (torchvision.models.resnet18(num_classes=4) for _ in range(2))
    named.register_forward_hook(lambda module, given, logits: {"logits": logits})
    features.fc.register_forward_hook(lambda module, given, logits: given[0])
    broken = build_model("resnet18", SMALL)
    broken.fc.weight.data[0, 0] = torch.nan
    biased = build_model("resnet18", SMALL)
    biased.fc.bias.data[0] = torch.nan
    shallow = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    empty = build_model("resnet18", SMALL).to("meta")
    return {
        "a linear layer": ({"model": nn.Linear(2, 2)}, "the model is torch's Linear, allowed are"),
        "other depths": ({"model": shallow}, "depths=(1, 1, 1, 1)"),
        "other strides": ({"model": changed}, "does not compute what a resnet18 does"),
        "outputs with names": ({"model": named}, "does not compute what a resnet18 does"),
        "features for outputs": ({"model": features}, "does not compute what a resnet18 does"),
        "another activation": ({"model": clipped}, "model's layer3.1.relu is a ReLU6, allowed is ReLU"),
        "another head": ({"model": head}, "its fc a Sequential, allowed are Conv2d and Linear"),
        "a network without values": ({"model": empty}, "model's conv1.weight is on the meta device"),
        "NaN in weights": ({"model": broken}, "NaN"),
        "NaN in a bias": ({"model": biased}, "outputs on these images hold NaN"),
        "no tensor": ({"calibration_images": [1]}, "calibration_images is a list"),
        "one image": ({"calibration_images": images()[0]}, "calibration_images is [3, 32, 32]"),
        "grey images": ({"calibration_images": images()[:, :1]}, "calibration_images is [8, 1, 32, 32]"),
        "no image": ({"calibration_images": images(0)}, "calibration_images is [0, 3, 32, 32]"),
        "oblong images": ({"calibration_images": images()[..., :16]}, "allowed is [N, 3, H, H]"),
        "images without values": ({"calibration_images": images().to("meta")}, "is on the meta device"),
        "sparse images": ({"calibration_images": images().to_sparse()}, "calibration_images is sparse_coo"),
        "bytes": ({"calibration_images": images().byte()}, "calibration_images is uint8"),
        "NaN in images": ({"calibration_images": images() * torch.nan}, "NaN"),
        "an unknown key": (
            {"config": {"quant": {"recon": {"iter": 3}}}},
            "did you mean quant.recon.iters?",
        ),
        "a bad value": ({"config": {"quant.w_qconfig.bit": 1}}, "quant.w_qconfig.bit is 1, allowed is"),
        "another network": ({"config": {"model.type": "resnet34"}}, "model.type is resnet34, but what is"),
        "another size": ({"config": {"data.input_size": 16}}, "data.input_size is 16, but what is given"),
        "no file": ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        "a name with NUL": ({"config": "a\0b"}, "cannot be read: embedded null byte"),
        "a number": ({"config": 3}, "config: the file is 3"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_every_mistake_is_one_clear_line(name):
    changes, words = mistakes()[name]
    given = {"model": build_model("resnet18", SMALL), "calibration_images": images(), "config": QUICK}
    with pytest.raises(calibquant.UserError) as refused:
        calibquant.quantize(**{**given, **changes})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_only_what_quantize_returns_is_saved_or_exported(tmp_path):
    for refuse in (calibquant.save_quantized, calibquant.export_onnx):
        with pytest.raises(calibquant.UserError, match="allowed is what calibquant"):
            refuse(nn.Linear(2, 2), tmp_path / "x.onnx")
    with pytest.raises(calibquant.UserError, match=r"nowhere\.pth: No such file"):
        calibquant.load_quantized(tmp_path / "nowhere.pth")
    for path, words in ((None, "path is a NoneType"), ("a\0b", "allowed is a name without NUL")):
        with pytest.raises(calibquant.UserError, match=words):
            calibquant.load_quantized(path)


@pytest.mark.parametrize(("changes", "words"), [
    ({"score": np.float64(98.5)}, "it holds a float64 that is no plain value"),
    ({"score": torch.ones(1)}, "Tensor is not JSON serializable"),
    ({"shape": (3, 4)}, "it holds a tuple"),
    ({"names": {"a"}}, "it holds a set"),
    ({1: "note"}, "a key that is no text"),
    (None, "it is a NoneType"),
])  # fmt: skip
def test_metadata_that_could_not_be_loaded_again_is_not_saved(small, tmp_path, changes, words):
    """And what stood there stays."""
    quantized, path = copy.copy(small[1]), tmp_path / "model.onnx"
    path.write_bytes(b"before")
    quantized.metadata = changes and quantized.metadata | changes
    for write in (calibquant.save_quantized, calibquant.export_onnx):
        with pytest.raises(calibquant.UserError, match=f"metadata cannot be saved: .*{words}"):
            write(quantized, path)
    assert path.read_bytes() == b"before"
    quantized.metadata = small[1].metadata | {"score": 98.5, "notes": ["a", None]}
    calibquant.save_quantized(quantized, path)
    assert calibquant.load_quantized(path).metadata == quantized.metadata


def test_a_network_that_could_not_be_loaded_again_is_not_saved(small, tmp_path):
    broken, other = (copy.deepcopy(small[1]) for _ in range(2))
    broken.network.classifier.fc.bias[0] = torch.nan
    other.config.quant.w_qconfig.bit = 8
    for model, words in ((broken, "bias holds NaN"), (other, "is not the network's")):
        with pytest.raises(calibquant.UserError, match=words):
            calibquant.save_quantized(model, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_what_was_changed_after_quantization_is_neither_saved_nor_exported(small, tmp_path):
    scaled, replaced, off, bare = (copy.deepcopy(small[1]) for _ in range(4))
    scaled.network.classifier.fc.weight.mul_(2)
    replaced.network.stem.output_quantizer = nn.Identity()
    off.network.stem.output_quantizer.enabled = False
    bare.config = type(bare.config)()
    soft = calibquant.QuantizedModel(quantize_model(small[0], small[1].config), small[1].config, {})
    cases = [
        (scaled, "classifier.fc.weight was changed after"),
        (replaced, "layers are not those"),
        (off, "stem.output_quantizer is switched off"),
        (bare, "the model"),
        (soft, "only a hardened model"),
    ]
    for model, words in cases:
        for write in (calibquant.save_quantized, calibquant.export_onnx):
            with pytest.raises(calibquant.UserError, match=words):
                write(model, tmp_path / "x.onnx")
    shifted = copy.deepcopy(small[1])
    shifted.network.classifier.fc.bias += 1
    calibquant.save_quantized(shifted, tmp_path / "x.pth")
    loaded = calibquant.load_quantized(tmp_path / "x.pth")
    assert torch.equal(loaded(images(side=16)), shifted(images(side=16)))


def test_what_was_converted_after_quantization_is_neither_saved_nor_exported(small, tmp_path):
    half, empty = copy.deepcopy(small[1]).half(), copy.deepcopy(small[1]).to("meta")
    for write in (calibquant.save_quantized, calibquant.export_onnx):
        with pytest.raises(calibquant.UserError, match="is float16, allowed is float32"):
            write(half, tmp_path / "x.onnx")
        with pytest.raises(calibquant.UserError, match="is on the meta device, which holds no values"):
            write(empty, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_of_few_images_a_step_takes_all_as_the_script_does(small, monkeypatch):
    seen = []
    reconstruct = api.reconstruct
    monkeypatch.setattr(
        api, "reconstruct", lambda *args, **more: seen.append(args[2]) or reconstruct(*args, **more)
    )
    many = {"quant": {**QUICK["quant"], "recon": {"iters": 1, "batch_size": 32}}}
    calibquant.quantize(small[0], images(side=16), many)
    assert seen[0].batch_size == 8


def test_the_exported_network_names_its_classes(small, tmp_path):
    _, quantized = small
    path = tmp_path / "own.onnx"
    calibquant.export_onnx(quantized, path, np.array(["a", "b", "c", "d"]))
    exported = onnx.load(path)
    assert {p.key: p.value for p in exported.metadata_props}["classes"] == '["a", "b", "c", "d"]'
    for classes in ("abcd", set("abcd"), [1, 2, 3, 4], 4):
        with pytest.raises(calibquant.UserError, match="allowed is a list of the outputs' names"):
            calibquant.export_onnx(quantized, path, classes)
    with pytest.raises(calibquant.UserError, match="opset is '21', allowed is an integer"):
        calibquant.export_onnx(quantized, path, opset="21")
    (logits,) = run_onnx(exported, images(side=16))
    with torch.no_grad():
        assert relative_difference(logits, quantized(images(side=16))).median() < 1e-5


def test_importing_the_package_loads_nothing_heavy():
    words = "import calibquant, sys; print(calibquant.__version__, 'torch' in sys.modules, dir(calibquant))"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"{calibquant.__version__} False") and "quantize" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = calibquant.quantise


def test_the_example_runs_as_the_readme_says(tmp_path):
    script = ROOT / "examples" / "quantize_own_data.py"
    few_threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in conftest.py
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, env=few_threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = {
        line.split(":")[0]: float(line.split()[1]) for line in done.stdout.splitlines() if " %" in line
    }
    assert scores["float"] > 80 and scores["W4A4"] > scores["float"] - 5
    assert scores["loaded"] == scores["W4A4"] and "ONNX: " in done.stdout
    assert not list(tmp_path.iterdir())
