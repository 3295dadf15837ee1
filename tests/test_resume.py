"""A run that is killed goes on where it stopped and ends with the same file, bit for bit."""

import errno
import fcntl
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml

from calibquant.errors import UserError
from calibquant.model.quant_resnet import Unit
from calibquant.quantization.fake_quant import FixedFakeQuantize, IntegerWeight
from calibquant.solver import learn, main_imagenet
from calibquant.solver.cache_plan import Room, choose_store
from calibquant.solver.files import make_folder
from calibquant.solver.imagenet_util import Score
from calibquant.solver.main_imagenet import interruptible
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import UnitResult, reconstruct
from calibquant.solver.resume import RunState, identity, run_state
from tests.figures import record
from tests.small import SOON_CALIBRATED, calibrated_model, random_float_model, small_config
from tests.test_end_to_end import ROOT, SOLVER, place, script, start, write_config

__all__ = ["place"]

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
KILLS = 20
FORKS = """
import os, sys
from calibquant.solver import main_imagenet, script
for _ in sys.stdin:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        script.run_script(main_imagenet.main)
    print("\\nended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""The main script once for each line that comes in, without the imports, which take most of a small run."""


def run_until(beginning: str, config: Path, cwd: Path) -> tuple[subprocess.Popen, list[str]]:
    """The main script, running, once it has printed a line with this beginning; and its lines so far."""
    process = start("main_imagenet", "--config", str(config), cwd=cwd)
    assert process.stdout is not None
    return process, lines_until(beginning, process.stdout)


def lines_until(beginning: str, output: IO[str]) -> list[str]:
    """Lines of an output up to the first with this beginning, or to its end."""
    lines = []
    for line in output:
        lines.append(line)
        if line.startswith(beginning):
            break
    return lines


def checkpoints(folder: Path, name: str) -> list[Path]:
    return sorted((folder / "model_quantized" / f"resnet18_{name}_w2_a4").glob("*.pth"))


def test_runs_killed_at_random_moments_end_with_the_file_of_an_uninterrupted_one(place):
    changes = {"data__type": "killed", "quant__recon__iters": 25, "quant__recon__drop_prob": 0.5}
    config = write_config(place, **changes, **SOON_CALIBRATED)
    whole, _ = run_until("calibration: ", config, place)
    began = time.monotonic()
    assert whole.stdout is not None
    lines_until("evaluate_quantized: ", whole.stdout)
    length = 1.2 * (time.monotonic() - began)  # and into the report, which takes longer than all before
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    (expected,) = (path.read_bytes() for path in checkpoints(place, "killed"))
    (place / "model_quantized/resnet18_killed_w2_a4").joinpath(
        checkpoints(place, "killed")[0].name
    ).unlink()

    draw, kills, resumed = random.Random(11), 0, 0
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, "--config", str(config)],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None
        while kills < KILLS:
            print(file=forks.stdin, flush=True)
            started, *lines = lines_until("calibration: ", forks.stdout)
            resumed += any(
                line.startswith("continuing an unfinished run: ") and " 0 units" not in line
                for line in lines
            )
            time.sleep(draw.uniform(0, length))
            with suppress(ProcessLookupError):  # done by then
                os.kill(int(started), signal.SIGKILL)
            ended = lines_until("ended ", forks.stdout)[-1]
            kills += ended == f"ended {-signal.SIGKILL}\n"
        forks.stdin.close()
    done = script("main_imagenet", "--config", str(config), cwd=place)
    assert done.returncode == 0, done.stderr
    files = checkpoints(place, "killed")
    assert files and all(path.read_bytes() == expected for path in files)
    assert not list(place.rglob("*.tmp"))
    assert not [path for path in (place / "train_log/unfinished").rglob("*") if path.is_file()]
    assert resumed > 0
    record(
        f"kills survived: {kills} (SIGKILL at random moments), {resumed} runs went on with finished units, "
        f"final files bit-identical: {len(files)}"
    )


def finish_some_units(folder: Path, count: int, **changes):
    """The state that a run leaves when it dies after ``count`` units."""
    config = small_config(quant__recon__iters=8, **changes)
    model, state = calibrated_model(config, IMAGES), RunState(folder)
    units = reconstruct(model, IMAGES, recon_settings(config), 7, memory=state)
    return config, [next(units) for _ in range(count)]


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_recalled_units_give_the_network_of_an_uninterrupted_run(tmp_path, granularity):
    tmp_path.joinpath("a").mkdir()
    config, before = finish_some_units(tmp_path / "a", 4, quant__recon__granularity=granularity)
    settings = recon_settings(config)
    resumed, whole = calibrated_model(config, IMAGES), calibrated_model(config, IMAGES)
    results = list(reconstruct(resumed, IMAGES, settings, 7, memory=RunState(tmp_path / "a")))
    list(reconstruct(whole, IMAGES, settings, 7))
    assert results[:4] == before
    for (name, a), (_, b) in zip(resumed.state_dict().items(), whole.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_damaged_state_is_refused_in_one_line(tmp_path):
    config, _ = finish_some_units(tmp_path, 2)
    path = tmp_path / "unit_layer1.0.pth"
    content = path.read_bytes()
    bias = torch.load(path, weights_only=True)["state"]["join.last.bias"].numpy().tobytes()
    for broken in (content[:100], content.replace(bias, bias[::-1])):
        assert broken != content
        path.write_bytes(broken)
        model = calibrated_model(config, IMAGES)
        with pytest.raises(UserError, match=r"state of an unfinished run .*; remove that file, .*--fresh$"):
            list(reconstruct(model, IMAGES, recon_settings(config), 7, memory=RunState(tmp_path)))


def test_what_changed_since_the_run_died_is_named_and_fresh_starts_anew(tmp_path):
    with run_state("config.yaml", False, tmp_path) as state:
        state.require_same({"config quant.recon.iters": "10", "calibration set": "abc", "code": "1"})
        (state.folder / "unit_stem.pth").write_bytes(b"")
    now = {"config quant.recon.iters": "20", "calibration set": "def", "code": "1"}
    with (
        run_state("config.yaml", False, tmp_path) as state,
        pytest.raises(
            UserError, match=r"the calibration set changed; config quant\.recon\.iters was 10, is 20"
        ),
    ):
        state.require_same(now)
    with run_state("config.yaml", True, tmp_path) as state:
        state.require_same(now)
        assert [path.name for path in state.folder.glob("unit_*")] == []


def test_scores_outlive_an_interrupt_and_hinder_no_other_run(tmp_path):
    """They may have taken hours; but one who edits the config before any unit is done is not refused."""
    with pytest.raises(KeyboardInterrupt), run_state("a.yaml", False, tmp_path) as state:
        state.require_same({"config x": "1"})
        state.keep_score("float", Score(70.0, 90.0, 50))
        raise KeyboardInterrupt
    with run_state("a.yaml", False, tmp_path) as state:
        state.require_same({"config x": "1"})
        assert state.score("float") == Score(70.0, 90.0, 50)
        state.require_same({"config x": "2"})
        assert state.score("float") is None
        state.require_same({"config x": "2"})


@pytest.mark.parametrize("damaged", ["[", "[]", '{"top1": 1}', '{"top1": "a", "top5": 1, "images": 2}'])
def test_a_damaged_score_is_refused_in_one_line(tmp_path, damaged):
    with run_state("a.yaml", False, tmp_path) as state:
        (state.folder / "score_float.json").write_text(damaged)
        with pytest.raises(
            UserError, match=r"score_float\.json: damaged.*; remove that file, .* anew with --fresh"
        ):
            state.score("float")


def test_a_run_stopped_after_saving_saves_no_second_file(place, monkeypatch):
    config = write_config(place, data__type="stopped", quant__recon__iters=1, **SOON_CALIBRATED)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["main_imagenet.py", "--config", str(config)])
    scored, evaluate = [], main_imagenet.evaluate

    def interrupted(*args):
        scored.append(len(scored))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(main_imagenet, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main_imagenet.main()
    (saved,) = checkpoints(place, "stopped")
    report = main_imagenet.write_report

    def interrupted_in_the_report(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_imagenet, "write_report", interrupted_in_the_report)
    with pytest.raises(KeyboardInterrupt):
        main_imagenet.main()
    monkeypatch.setattr(main_imagenet, "write_report", report)
    main_imagenet.main()
    assert checkpoints(place, "stopped") == [saved] and len(scored) == 4
    main_imagenet.main()
    assert len(checkpoints(place, "stopped")) == 2, "a run of its own has a file of its own"


def test_ranges_outlive_a_kill_and_are_not_found_again(place, monkeypatch):
    changes = {"quant__recon__iters": 3, "quant__equalize__iters": 3, "quant__equalize__shift": True}
    config = write_config(place, data__type="ranged", **changes, **SOON_CALIBRATED)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["main_imagenet.py", "--config", str(config)])
    main_imagenet.main()
    (expected,) = (path.read_bytes() for path in checkpoints(place, "ranged"))
    with monkeypatch.context() as killed:
        killed.setattr(main_imagenet, "reconstruct", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main_imagenet.main()
    monkeypatch.setattr(main_imagenet, "calibrate", None)  # would fail if it were called
    main_imagenet.main()
    assert [path.read_bytes() for path in checkpoints(place, "ranged")] == [expected] * 2


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b""])
def test_damaged_ranges_are_refused_in_one_line(tmp_path, damage):
    config, state = small_config(), RunState(tmp_path)
    state.calibrated(calibrated_model(config, IMAGES), lambda: None)
    path = tmp_path / "calibrated.pth"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"state of an unfinished run .*calibrated\.pth.*; remove that file"
    ):
        state.calibrated(calibrated_model(config, IMAGES), lambda: None)
    path.unlink()
    torch.save({}, path)
    with pytest.raises(UserError, match=r"calibrated\.pth: damaged .*start anew with --fresh"):
        state.calibrated(calibrated_model(config, IMAGES), lambda: None)


def test_too_little_memory_is_told_before_anything_is_scored(place, monkeypatch):
    config = write_config(place, data__type="crowded", quant__recon__iters=1, **SOON_CALIBRATED)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["main_imagenet.py", "--config", str(config)])
    monkeypatch.setattr(main_imagenet, "evaluate", None)  # would fail if it were called
    crowded = partial(choose_store, free=lambda *_: Room(1000, 1000, 1000))
    monkeypatch.setattr(main_imagenet, "choose_store", crowded)
    with pytest.raises(UserError, match=r"a step of quant\.recon\.batch_size 8 needs about"):
        main_imagenet.main()


def test_a_saved_file_that_is_gone_is_saved_again(tmp_path):
    state = RunState(tmp_path)
    paths = [tmp_path / "one.pth", tmp_path / "two.pth"]
    for path in paths:
        assert state.saved(lambda path=path: (path.touch(), path)[1]) == path
        path.unlink()


def test_a_configs_path_need_not_be_utf8(tmp_path):
    folders = []
    for name in (b"caf\xe9.yaml", b"caf\xe8.yaml"):
        with run_state(os.fsdecode(name), False, tmp_path) as state:
            folders.append(state.folder)
    assert len(set(folders)) == 2


def test_of_long_settings_what_differs_is_named(tmp_path):
    entries = [{"match": f"layer{number}.*", "w_bit": 3} for number in range(60)]
    with run_state("a.yaml", False, tmp_path) as state:
        state.require_same({"config quant.overrides": json.dumps(entries)})
        (state.folder / "unit_stem.pth").touch()
        entries[57]["w_bit"] = 4
        words = (
            r"config quant\.overrides\[57\] was {.*3}, is {.*4}; change it back, or start anew with --fresh"
        )
        with pytest.raises(UserError, match=words):
            state.require_same({"config quant.overrides": json.dumps(entries)})


@pytest.mark.parametrize("damaged", ["[", 5, [1], {"a": 1}])
def test_a_damaged_identity_is_another_one(tmp_path, damaged):
    with run_state("a.yaml", False, tmp_path) as state:
        state.require_same({"config x": "1"})
        (state.folder / "unit_stem.pth").touch()
        (state.folder / "identity.json").write_text(json.dumps({"config x": damaged}))
        with pytest.raises(UserError, match=r"config x was .*, is 1; change it back, or start anew"):
            state.require_same({"config x": "1"})


def test_a_state_that_a_kill_left_half_forgotten_is_no_other_runs(tmp_path, monkeypatch):
    unlink, now = Path.unlink, {"config quant.recon.iters": "20"}
    for files_gone in range(4):
        with run_state("config.yaml", False, tmp_path) as state:
            state.require_same({"config quant.recon.iters": "10"})
            state.keep_score("float", Score(1.0, 2.0, 50))
            (state.folder / "unit_stem.pth").write_bytes(b"")
            (state.folder / "unit_a.pth").write_bytes(b"")
            gone: list[Path] = []

            def die_in_time(path: Path, *args, gone=gone, files_gone=files_gone, **kwargs) -> None:
                if len(gone) == files_gone:
                    raise KeyboardInterrupt
                gone.append(path)
                unlink(path, *args, **kwargs)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Path, "unlink", die_in_time)
                state.forget()
            if any(state.folder.glob("unit_*")):
                with pytest.raises(UserError, match="made from something else"):
                    state.require_same(now)
                (state.folder / "identity.json").unlink()  # as an older version might have left it
            state.require_same(now)
            assert state.score("float") is None and not list(state.folder.glob("unit_*"))
            state.forget()


def test_what_a_kill_left_beside_a_log_is_gone_once_the_run_goes_on(tmp_path):
    """A file that replaces another has a name of its own for a moment."""
    killed, next_one, other = (tmp_path / name for name in ("killed", "next", "other"))
    for folder in (killed, next_one, other):
        folder.mkdir()
        (folder / ".metrics.json.0123.tmp").touch()
        (folder / "metrics.json").touch()
    with run_state("a.yaml", False, tmp_path) as state:
        state.logs_to(killed)
        state.require_same({"config x": "1"})
        state.keep_score("float", Score(70.0, 90.0, 50))
    with run_state("a.yaml", False, tmp_path) as state:
        state.logs_to(next_one)
        state.forget()
    with run_state("a.yaml", False, tmp_path) as state:  # nothing is known of a run that ended
        state.logs_to(other)
    left = sorted(path.parent.name for path in tmp_path.rglob(".*.tmp"))
    assert left == ["next", "other"] and len(list(tmp_path.rglob("metrics.json"))) == 3
    assert not list(tmp_path.rglob("log.json"))


def test_a_unit_of_many_merged_ones_is_kept_under_a_name_that_fits(tmp_path):
    names = [f"layer3.{number}" for number in range(1, 60)]
    units = [Unit("+".join([*names, last]), torch.nn.Linear(1, 1), ("x",), "x") for last in ("a", "b")]
    for unit in units:
        RunState(tmp_path).remember(unit, UnitResult(unit.name, 1.0, 1.0))
    assert len(list(tmp_path.glob("unit_*.pth"))) == 2
    kept = RunState(tmp_path).recall(units[1])
    assert kept is not None and kept.name == units[1].name


def test_a_state_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with run_state("config.yaml", False, tmp_path) as state:
        state.keep_score("float", Score(1.0, 2.0, 50))
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=r"score_float\.json: cannot be"),
        ):
            patch.setattr(Path, "unlink", refuse)
            state.forget()


def test_where_nothing_can_be_locked_a_run_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("calibquant.solver.resume.fcntl.flock", no_locks)
    with run_state("a.yaml", False, tmp_path) as state:
        state.require_same({"code": "1"})
    assert "cannot be locked (No locks available)" in caplog.text


def test_other_images_to_score_are_another_run():
    network = random_float_model(small_config())
    names = [identity(small_config(), network, "", images, torch.device("cpu")) for images in ([], ["a 1"])]
    changed = [key for key in names[0] if names[0][key] != names[1][key]]
    assert changed == ["val folder"]


def test_the_same_weights_and_images_elsewhere_are_the_same_run():
    network, cpu = random_float_model(small_config()), torch.device("cpu")
    moved = {"data__path": "elsewhere", "data__calibration": "images", "model__path": "elsewhere.pth"}
    assert identity(small_config(**moved), network, "", [], cpu) == identity(
        small_config(), network, "", [], cpu
    )


def test_what_a_process_left_behind_does_not_hold_its_state(tmp_path):
    """After a kill, data-loading processes live on for some seconds."""
    with run_state("a.yaml", False, tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
    try:
        with run_state("a.yaml", False, tmp_path):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_two_runs_of_one_config_at_once_do_not_meet(tmp_path):
    with (
        run_state("a.yaml", False, tmp_path),
        pytest.raises(UserError, match="another run of it is in progress"),
        run_state("a.yaml", False, tmp_path),
    ):
        pass
    with run_state("a.yaml", False, tmp_path), run_state("b.yaml", False, tmp_path):
        pass


def test_a_run_that_begins_as_another_ends_holds_the_folder_that_is_there(tmp_path, monkeypatch):
    """The other one takes its folder away, with the lock that this one has opened and is about to hold."""
    real, ended = fcntl.flock, []

    def other_ends(file: IO[str], how: int) -> None:
        if not ended:
            ended.append(Path(file.name).parent)
            shutil.rmtree(ended[0])
        real(file, how)

    monkeypatch.setattr("calibquant.solver.resume.fcntl.flock", other_ends)
    with run_state("a.yaml", False, tmp_path) as state:
        state.require_same({"code": "1"})
        assert state.folder == ended[0]
        with (
            pytest.raises(UserError, match="another run of it is in progress"),
            run_state("a.yaml", False, tmp_path),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_goes_before_its_lock_is_opened_is_made_again(tmp_path, monkeypatch):
    def make_and_lose(folder: Path) -> None:
        make_folder(folder)
        if len(made) == 1:
            folder.rmdir()
        made.append(folder)

    made = [tmp_path]
    monkeypatch.setattr("calibquant.solver.resume.make_folder", make_and_lose)
    with run_state("a.yaml", False, tmp_path) as state:
        assert made[1:] == [state.folder] * 2
        assert state.folder.is_dir()


@pytest.fixture
def heeds_interrupts():
    """A shell's background job ignores Ctrl-C and its children inherit that; inside, they do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot tell how far another process is")
def test_an_interrupt_while_torch_is_imported_shows_no_traceback(tmp_path, heeds_interrupts):
    process = start("main_imagenet", "--help", cwd=tmp_path)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and not out + err


def test_every_script_is_quiet_while_torch_is_imported():
    scripts = [path for folder in (SOLVER, ROOT / "benchmarks") for path in folder.glob("*.py")]
    texts = {path.name: path.read_text() for path in scripts}
    started = {name: text for name, text in texts.items() if "if __package__ in (None" in text}
    assert len(started) >= 14
    for name, text in started.items():
        assert text.index("import calibquant.quiet_start") < text.index("\nfrom calibquant"), name


ENDING = """
import atexit, sys, time
from calibquant.errors import UserError
from calibquant.solver.script import run_script

atexit.register(lambda: (print("ending", flush=True), time.sleep(60)))
run_script(lambda: exec(sys.argv[1]))
"""
"""A script whose interpreter takes its time to end."""


@pytest.mark.parametrize(
    ("ends", "number", "words"),
    [
        ("pass", signal.SIGTERM, ""),
        ("raise KeyboardInterrupt", signal.SIGINT, "interrupted\n"),
        ("raise UserError('wrong')", signal.SIGINT, "error: wrong\n"),
    ],
)
def test_a_signal_while_a_script_ends_shows_no_traceback(heeds_interrupts, ends, number, words):
    """One who presses Ctrl-C twice: what torch and others do at the interpreter's end takes a moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING, ends], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ending\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-number, words)


def test_an_interrupt_keeps_the_state_and_says_how_to_go_on(place, heeds_interrupts):
    config = write_config(place, data__type="interrupted", quant__recon__iters=2000, **SOON_CALIBRATED)
    process, _ = run_until("unit stem", config, place)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "interrupted"
    assert "finished units are kept, the same command continues" in out
    changed = yaml.safe_load(config.read_text())
    changed["quant"]["recon"]["iters"] = 5
    config.write_text(yaml.safe_dump(changed))
    refused = script("main_imagenet", "--config", str(config), cwd=place)
    assert refused.returncode == 2 and "quant.recon.iters was 2000, is 5" in refused.stderr
    fresh = script("main_imagenet", "--config", str(config), "--fresh", cwd=place)
    assert fresh.returncode == 0, fresh.stderr


@pytest.mark.parametrize("fresh", [True, False])
def test_who_began_anew_is_told_how_to_go_on_instead(caplog, fresh):
    with caplog.at_level("INFO", "calibquant"), pytest.raises(KeyboardInterrupt), interruptible(fresh):
        raise KeyboardInterrupt
    assert ("the same command without --fresh continues" in caplog.text) == fresh
    assert ("the same command continues" in caplog.text) != fresh


def test_a_unit_that_learning_would_make_worse_is_kept_as_calibrated_and_reported():
    config = small_config(quant__recon__iters=6, quant__recon__scale_lr=50.0)
    model = calibrated_model(config, IMAGES)
    scale = model.stem.output_quantizer.scale.clone()
    results = list(reconstruct(model, IMAGES, recon_settings(config), seed=1))
    assert results[0].reverted
    assert all(result.error_after <= result.error_before for result in results)
    assert torch.equal(model.stem.output_quantizer.scale, scale)


@pytest.mark.parametrize("quantizer", ["AdaRoundFakeQuantize", "LSQFakeQuantize"])
def test_a_loss_that_is_no_number_ends_the_unit_not_the_run(monkeypatch, quantizer):
    honest = learn.reconstruction_loss
    monkeypatch.setattr(learn, "reconstruction_loss", lambda *tensors: honest(*tensors) * math.nan)
    config = small_config(quant__recon__iters=6, quant__w_qconfig__quantizer=quantizer)
    model = calibrated_model(config, IMAGES)
    with torch.no_grad():
        before = model(IMAGES)
    results = list(reconstruct(model, IMAGES, recon_settings(config), seed=1))
    assert all(result.reverted for result in results)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), before)
    for module in model.modules():
        assert not hasattr(module, "weight_quantizer") or isinstance(module.weight_quantizer, IntegerWeight)
    assert type(model.stem.output_quantizer) is FixedFakeQuantize


def test_metrics_of_a_resumed_run_are_complete(place):
    """The units of both halves, and the accuracies measured before the kill."""
    config = write_config(place, data__type="halves", quant__recon__iters=300, **SOON_CALIBRATED)
    process, _ = run_until("unit layer1.0", config, place)
    process.kill()
    process.communicate()
    done = script("main_imagenet", "--config", str(config), cwd=place)
    assert done.returncode == 0 and "continuing an unfinished run: " in done.stdout, done.stderr
    newest = max((place / "train_log/resnet18_halves_w2_a4").glob("*/metrics.json"))
    metrics = json.loads(newest.read_text())
    assert len(metrics["units"]) == 10 and {"float", "range_only", "quantized"} <= metrics.keys()
