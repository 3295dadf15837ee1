"""The export script: one file, whole or not at all, that says what it is; mistakes are one line."""

import json
import sys

import onnx
import pytest
import torch
import yaml

import calibquant
from calibquant.errors import UserError
from calibquant.model.quant_layer import harden
from calibquant.solver import export_onnx
from calibquant.solver.checkpoint import save_checkpoint
from calibquant.solver.config import check_config, load_config, plain
from calibquant.solver.pipeline import calibrate, float_model, quantize_model
from tests.onnx_tools import assert_every_unit_is_the_same, relative_difference, run_onnx
from tests.small import calibrated_model, small_config
from tests.test_imagenet_sample import ROOT, SAMPLE

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a config, and the path of a network that was saved with it."""
    folder = tmp_path_factory.mktemp("export")
    config = small_config(model__kwargs__num_classes=1000)
    model = calibrated_model(config, IMAGES)
    harden(model)
    path = save_checkpoint(model, config, {"seed": 1005}, folder / "model_quantized")
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    return folder, path, model


def export(monkeypatch, folder, *arguments, config="config.yaml"):
    """Run the script in a folder as a person does; its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", "--config", config, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        export_onnx.run_script(export_onnx.main)
    return stopped.value.code


def test_the_script_writes_what_onnx_runtime_computes_like_the_saved_network(saved, tmp_path, monkeypatch):
    folder, path, model = saved
    out = tmp_path / "new_folder" / "model.onnx"
    assert export(monkeypatch, folder, "--quantized_model_path", path.name, "--out", out) == 0
    exported = onnx.load(out)
    (logits,) = run_onnx(exported, IMAGES)
    with torch.no_grad():
        assert (relative_difference(logits, model(IMAGES)) < 1e-5).float().mean() > 0.5
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]


def test_the_file_says_what_its_input_and_its_outputs_mean(saved, tmp_path, monkeypatch):
    folder, path, _ = saved
    out = tmp_path / "model.onnx"
    assert export(monkeypatch, folder, "--quantized_model_path", path, "--out", out) == 0
    said = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert json.loads(said["input.mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(said["input.std"]) == [0.229, 0.224, 0.225]
    assert json.loads(said["input.size"]) == json.loads(said["input.resize_shorter_side"]) == 16
    classes = json.loads(said["classes"])
    assert len(classes) == 1000 and classes[0] == "n01440764"
    assert said["calibquant"] == calibquant.__version__
    assert said["network"] == "resnet18" and json.loads(said["quant"])["w_qconfig"]["bit"] == 4
    assert json.loads(said["made_with"]) == {"seed": 1005}
    assert str(folder) not in out.read_bytes().decode("latin-1"), "a machine's path"


def test_an_existing_file_is_replaced_and_stays_whole_when_that_fails(saved, tmp_path, monkeypatch, capsys):
    folder, path, _ = saved
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an older export")
    arguments = ("--quantized_model_path", path, "--out", out)
    monkeypatch.setattr("calibquant.solver.files._write_synced", _fails_half_way)
    assert export(monkeypatch, folder, *arguments) == 2
    assert "model.onnx: cannot be written: No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"an older export" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    assert export(monkeypatch, folder, *arguments) == 0
    onnx.checker.check_model(onnx.load(out))
    first = out.read_bytes()
    assert export(monkeypatch, folder, *arguments) == 0 and out.read_bytes() == first


def _fails_half_way(file, write):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_every_mistake_is_one_clear_line_and_exit_code_2(saved, tmp_path, monkeypatch, capsys):
    folder, path, _ = saved
    (tmp_path / "folder.onnx").mkdir()
    other = plain(small_config(quant__w_qconfig__bit=2))
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    model = ("--quantized_model_path", path)
    good = ("--out", tmp_path / "model.onnx")
    mistakes = [
        ((*model, "--out", tmp_path / "model.pth"), {}, "allowed is the name of a file that ends in .onnx"),
        ((*model, "--out", tmp_path / f"{'a' * 300}.onnx"), {}, "cannot be written: File name too long"),
        ((*model, "--out", tmp_path / "folder.onnx"), {}, "folder.onnx: is a folder, allowed is"),
        ((*model, "--out", path / "inside.onnx"), {}, "cannot be written: "),
        ((*model, *good, "--opset", "12"), {}, "opset is 12, allowed are 13 to"),
        (("--quantized_model_path", "none.pth", *good), {}, "none.pth: no such file"),
        (("--quantized_model_path", folder / "config.yaml", *good), {}, "config.yaml: refused"),
        ((*model, *good), {"config": "other.yaml"}, "config says quant.w_qconfig.bit 2"),
        ((*model, *good), {"config": "nowhere.yaml"}, "nowhere.yaml"),
    ]
    for arguments, keywords, words in mistakes:
        assert export(monkeypatch, folder, *arguments, **keywords) == 2, words
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and words in line
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_without_the_onnx_package_one_line_says_what_to_install(saved, tmp_path, monkeypatch, capsys):
    folder, path, _ = saved
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "calibquant.model.onnx_graph")
    out = tmp_path / "model.onnx"
    assert export(monkeypatch, folder, "--quantized_model_path", path, "--out", out) == 2
    assert "pip install -r requirements-onnx.txt" in capsys.readouterr().err


def test_without_the_data_that_names_the_classes_the_file_is_written_with_a_warning(
    saved, tmp_path, monkeypatch, capsys
):
    folder, path, _ = saved
    changed = plain(small_config(data__classes="folders", data__path=str(tmp_path / "gone")))
    (folder / "folders.yaml").write_text(yaml.safe_dump(changed))
    out = tmp_path / "model.onnx"
    arguments = ("--quantized_model_path", path, "--out", out)
    assert export(monkeypatch, folder, *arguments, config="folders.yaml") == 0
    assert "warning: the ONNX file will name no classes" in capsys.readouterr().err
    assert "classes" not in {prop.key for prop in onnx.load(out).metadata_props}


def test_class_names_must_be_as_many_as_the_outputs():
    with pytest.raises(UserError, match="2 classes are named, but the network has 1000 outputs"):
        export_onnx.describe(small_config(), {}, ["cat", "dog"])


@pytest.mark.imagenet_sample
@pytest.mark.skipif(not SAMPLE, reason="CALIBQUANT_IMAGENET_SAMPLE is not set")
def test_the_real_resnet50_recognises_the_same_in_onnx_runtime(tmp_path):
    """At W4A4, with min-max ranges, which are quick to find."""
    raw = plain(load_config(ROOT / "exp/w4a4/rs50_msra/qdrop.yaml"))
    raw["quant"]["w_qconfig"]["observer"] = raw["quant"]["a_qconfig"]["observer"] = "MinMaxObserver"
    raw["data"]["num_workers"] = 0
    raw["quant"]["calibrate"] = 8
    config = check_config(raw)
    model = quantize_model(float_model(config), config)
    calibrate(model, export_onnx_images(config, 8, "sel"), config)
    harden(model)
    out = tmp_path / "resnet50.onnx"
    size = export_onnx.write_onnx(model, out, export_onnx.describe(config, {}, None), None)
    assert size == out.stat().st_size and 13.9e6 < size < 14.3e6  # float32: 102.23 MB
    exported = onnx.load(out)
    images = export_onnx_images(config, 16, "val")
    assert_every_unit_is_the_same(model, exported, images[:4])
    (logits,) = run_onnx(exported, images)
    with torch.no_grad():
        expected = model(images)
    assert (logits.argmax(1) == expected.argmax(1)).sum() >= 15
    assert relative_difference(logits, expected).median() < 0.05


def export_onnx_images(config, count, which):
    """Real images: of the calibration folder, or spread over val."""
    from calibquant.solver.imagenet_util import load_calibration, validation_loader

    if which == "sel":
        return load_calibration(config).images[:count]
    dataset = validation_loader(config).dataset
    return torch.stack([dataset[i][0] for i in range(0, len(dataset), len(dataset) // count)][:count])
