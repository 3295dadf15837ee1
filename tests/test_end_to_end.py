"""The real scripts, as a person runs them, on generated JPEGs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from calibquant.solver.config import plain
from tests.small import random_float_model, small_config, some_wnids, write_images

ROOT = Path(__file__).resolve().parents[1]
SOLVER = ROOT / "calibquant" / "solver"


def script(
    name: str, *arguments: str, cwd: Path, as_module: bool = False, gpu: bool = False
) -> subprocess.CompletedProcess:
    process = start(name, *arguments, cwd=cwd, as_module=as_module, gpu=gpu)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(
    name: str, *arguments: str, cwd: Path, as_module: bool = False, gpu: bool = False
) -> subprocess.Popen:
    """A script left running, its output and errors in pipes."""
    target = ["-m", f"calibquant.solver.{name}"] if as_module else [str(SOLVER / f"{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    if as_module:
        environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, *target, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_config(folder: Path, **changes) -> Path:
    config = plain(
        small_config(
            **{
                "data__path": str(folder / "imagenet"),
                "model__path": str(folder / "float.pth"),
                "quant__w_qconfig__bit": 2,
                **changes,
            }
        )
    )
    path = folder / f"config{len(list(folder.glob('config*')))}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a partial val of 5 of the 1,000 classes, a calibration set and float weights."""
    folder = tmp_path_factory.mktemp("run")
    write_images(folder / "imagenet" / "val", some_wnids(5), 3)
    write_images(folder / "imagenet" / "sel", some_wnids(4), 3, seed=1)
    model = random_float_model(small_config())
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "float.pth"
    )
    return folder


@pytest.fixture(scope="module")
def finished(place) -> tuple[Path, subprocess.CompletedProcess, Path]:
    config = write_config(place, quant__equalize__iters=5)
    return place, script("main_imagenet", "--config", str(config), cwd=place), config


def only(paths) -> Path:
    (path,) = paths
    return path


def test_main_leaves_a_log_metrics_and_a_model(finished):
    place, done, _ = finished
    assert done.returncode == 0, done.stderr
    assert "no CUDA device: running on the CPU" in done.stdout
    folder = only((place / "train_log" / "resnet18_imagenet_w2_a4").iterdir())
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("float", "range_only", "quantized"):
        assert metrics[key]["images"] == 15
        assert 0 <= metrics[key]["top1"] <= metrics[key]["top5"] <= 100
    assert [unit["name"] for unit in metrics["units"]][::9] == ["stem", "classifier"]
    assert all(unit["seconds"] > 0 and unit["error_after"] > 0 for unit in metrics["units"])
    assert metrics["calibration"]["count"] == 12 and len(metrics["calibration"]["sha256"]) == 64
    assert metrics["seed"] == 1005 and metrics["peak_memory_gib"] > 0
    assert {"load", "calibrate", "reconstruct", "save"} <= metrics["seconds"].keys()
    assert metrics["config"]["quant"]["w_qconfig"]["bit"] == 2 and "torch" in metrics["versions"]
    checkpoint = place / metrics["checkpoint"]
    assert checkpoint.parent == place / "model_quantized" / "resnet18_imagenet_w2_a4"
    assert checkpoint.stem.rpartition("_")[2].isdigit()
    log = (folder / "calibquant.log").read_text()
    assert "equalized layer1.0 to layer1.1: error" in log
    assert "unit layer4.1" in log and str(metrics["checkpoint"]) in log and "\r" not in log
    left = ["calibquant.log", "metrics.json", "report.html", "report.json"]
    assert sorted(p.name for p in folder.iterdir()) == left


@pytest.mark.parametrize(("as_module", "bare"), [(False, True), (True, False)])
def test_a_saved_model_scores_the_same_from_its_path_or_its_bare_name(finished, as_module, bare):
    place, _, config = finished
    saved = only((place / "model_quantized" / "resnet18_imagenet_w2_a4").iterdir())
    name = saved.name if bare else str(saved)
    done = script(
        "test_imagenet",
        "--config",
        str(config),
        "--quantized_model_path",
        name,
        cwd=place,
        as_module=as_module,
    )
    assert done.returncode == 0, done.stderr
    trained = json.loads(only((place / "train_log").glob("*/*/metrics.json")).read_text())
    tested = json.loads(max((place / "test_log").glob("*/*/metrics.json")).read_text())
    assert tested["quantized"] == trained["quantized"]
    score = trained["quantized"]
    assert f" * Acc@1 {score['top1']:.3f} Acc@5 {score['top5']:.3f}" in done.stdout


def test_the_saved_model_needs_no_float_weights(finished, tmp_path):
    place, _, config = finished
    settings = yaml.safe_load(config.read_text())
    settings["model"]["path"] = str(tmp_path / "gone.pth")
    elsewhere = tmp_path / "config.yaml"
    elsewhere.write_text(yaml.safe_dump(settings))
    saved = only((place / "model_quantized" / "resnet18_imagenet_w2_a4").iterdir())
    done = script(
        "test_imagenet", "--config", str(elsewhere), "--quantized_model_path", str(saved), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_the_float_model_is_scored_by_its_own_script(finished):
    place, _, config = finished
    done = script("test", "--config", str(config), cwd=place)
    assert done.returncode == 0 and " * Acc@1 " in done.stdout, done.stderr


def _broken_image(place: Path, name: str) -> Path:
    """A copy of the data with one truncated JPEG in the given folder."""
    root = place / f"broken_{name}"
    if not root.exists():
        write_images(root / "val", some_wnids(2), 2)
        write_images(root / "sel", some_wnids(2), 2)
        victim = next((root / name).rglob("*.JPEG"))
        victim.write_bytes(victim.read_bytes()[:300])
    return root


@pytest.mark.parametrize("folder", ["val", "sel"])
def test_an_unreadable_image_is_named_before_any_work_or_skipped_and_counted(place, folder):
    root = _broken_image(place, folder)
    strict = write_config(place, data__path=str(root), data__type=f"strict-{folder}")
    done = script("main_imagenet", "--config", str(strict), cwd=place)
    line = only(done.stderr.strip().splitlines())
    assert done.returncode == 2 and ".JPEG: cannot be read" in line
    assert not list((place / "model_quantized").glob(f"*strict-{folder}*/*"))
    relaxed = write_config(
        place,
        data__path=str(root),
        data__type=f"relaxed-{folder}",
        data__skip_unreadable=True,
        quant__recon__iters=0,
    )
    done = script("main_imagenet", "--config", str(relaxed), cwd=place)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(only((place / "train_log").glob(f"*relaxed-{folder}*/*/metrics.json")).read_text())
    assert metrics["calibration"]["skipped"] == (folder == "sel")
    assert metrics["quantized"]["skipped"] == (folder == "val")


def _mistakes(place: Path) -> dict[str, tuple[list[str], str]]:
    """Scripts' arguments that must end in exit code 2 and one line holding the given words."""
    (place / "empty" / "val").mkdir(parents=True, exist_ok=True)
    (place / "empty" / "sel").mkdir(parents=True, exist_ok=True)
    alien = place / "alien"
    write_images(alien / "val", ["cats"], 1)
    write_images(alien / "sel", ["cats"], 1)
    wrong = place / "wrong.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, wrong)
    unknown = place / "unknown.yaml"
    unknown.write_text("model: {type: resnet18}\nquant: {recon: {iterations: 5}}\n")
    mistyped = place / "mistyped.yaml"
    mistyped.write_text("model: {type: resnet18}\nquant: {recon: {iters: many}}\n")

    def config(**changes) -> list[str]:
        return ["main_imagenet", "--config", str(write_config(place, **changes))]

    return {
        "missing config": (["main_imagenet", "--config", "nowhere.yaml"], "nowhere.yaml"),
        "unknown key": (
            ["main_imagenet", "--config", str(unknown)],
            "quant.recon.iterations; did you mean",
        ),
        "mistyped value": (
            ["main_imagenet", "--config", str(mistyped)],
            "quant.recon.iters is 'many', allowed",
        ),
        "missing data": (config(data__path=str(place / "nowhere")), "nowhere"),
        "empty set": (config(data__path=str(place / "empty")), "holds no image"),
        "no wnid": (config(data__path=str(alien)), "class folder cats"),
        "missing weights": (config(model__path="gone.pth"), "gone.pth: no such file"),
        "wrong architecture": (config(model__type="resnet34"), "does not fit resnet34"),
        "foreign weights": (config(model__path=str(wrong)), "missing"),
        "unset variable": (config(data__path="${NO_SUCH_VARIABLE}/x"), "NO_SUCH_VARIABLE"),
        "no gpu": ([*config(), "--device", "cuda"], "--device cuda"),
        "unknown device": ([*config(), "--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
        "unknown argument": ([*config(), "--frech"], "--frech"),
        "no config": (["main_imagenet"], "--config"),
        "missing model": (
            ["test_imagenet", "--config", config()[2], "--quantized_model_path", "none.pth"],
            "none.pth",
        ),
    }


def test_every_mistake_is_one_clear_line_and_exit_code_2(place, monkeypatch, capsys):
    import importlib

    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, (arguments, words) in _mistakes(place).items():
        module = importlib.import_module(f"calibquant.solver.{arguments[0]}")
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            module.run_script(module.main)
        captured = capsys.readouterr()
        line = only(captured.err.strip().splitlines())
        assert stopped.value.code == 2, (name, line)
        assert line.startswith("error: ") and words in line, (name, line)


def test_a_config_that_contradicts_the_saved_model_is_refused(finished):
    place, _, _ = finished
    saved = only((place / "model_quantized" / "resnet18_imagenet_w2_a4").iterdir())
    other = write_config(place, quant__w_qconfig__bit=4)
    done = script("test_imagenet", "--config", str(other), "--quantized_model_path", str(saved), cwd=place)
    assert done.returncode == 2
    assert "config says quant.w_qconfig.bit 4, but quantized model" in only(
        done.stderr.strip().splitlines()
    )


def test_a_greyscale_image_is_read_as_three_channels(place):
    root = place / "grey"
    write_images(root / "val", some_wnids(2), 1)
    for path in (root / "val").rglob("*.JPEG"):
        Image.open(path).convert("L").save(path)
    config = write_config(place, data__path=str(root))
    done = script("test", "--config", str(config), cwd=place)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_deterministic_run_gives_the_same_file_twice(place):
    config = write_config(place, data__type="gpu", process__deterministic=True)
    for _ in range(2):
        done = script("main_imagenet", "--config", str(config), "--device", "cuda", cwd=place, gpu=True)
        assert done.returncode == 0, done.stderr
    first, second = (place / "model_quantized" / "resnet18_gpu_w2_a4").glob("*.pth")
    assert first.read_bytes() == second.read_bytes()


def test_two_runs_with_workers_and_random_crops_give_the_same_file(place):
    changes = {"data__num_workers": 2, "data__augment": "crop_flip", "quant__recon__iters": 3}
    config = write_config(place, data__type="twice", **changes)
    for _ in range(2):
        done = script("main_imagenet", "--config", str(config), cwd=place)
        assert done.returncode == 0, done.stderr
    first, second = (place / "model_quantized" / "resnet18_twice_w2_a4").glob("*.pth")
    assert first.read_bytes() == second.read_bytes()
