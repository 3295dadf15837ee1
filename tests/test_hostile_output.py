"""Where an output cannot be written, one line says so: nothing is overwritten or left half-written."""

import errno
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from calibquant.errors import UserError
from calibquant.model.quant_layer import harden
from calibquant.solver import test
from calibquant.solver.checkpoint import load_checkpoint, save_checkpoint
from calibquant.solver.files import require_writable, write_atomically, write_json
from calibquant.solver.run_log import start_run
from calibquant.solver.script import for_user, run_script
from tests.figures import record
from tests.small import calibrated_model, random_float_model, small_config, some_wnids, write_images
from tests.test_end_to_end import script, write_config

SEEN = {"refused": 0, "runs at once": 0}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def file_system(folder: Path, options: str) -> Iterator[Path]:
    if not mounted(folder, options):
        pytest.skip("needs root and mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    yield from file_system(tmp_path / "disk", "size=1m")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes no file, not even root's."""
    yield from file_system(tmp_path / "read_only", "ro,size=1m")


def refused(write: Any, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        write()
    assert len(str(caught.value).splitlines()) == 1
    SEEN["refused"] += 1


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small_model(**changes: Any) -> tuple[Any, Any]:
    config = small_config(**changes)
    model = calibrated_model(config, IMAGES)
    harden(model)
    return model, config


WRITERS = {
    "bytes": lambda file: (file.write(b"x" * 3_000_000), None)[1],
    "one tensor": lambda file: torch.save({"a": torch.zeros(10**6)}, file),
    "many tensors": lambda file: torch.save({str(i): torch.zeros(1000) for i in range(500)}, file),
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_named_and_loses_nothing(small_disk: Path, what: str, overwrite: bool) -> None:
    path = small_disk / "folder" / "model.pth"
    write_json(path, {"old": 1})
    before = everything(small_disk)
    target = path if overwrite else path.with_name("other.pth")
    refused(
        lambda: write_atomically(target, WRITERS[what], overwrite),
        r"\.pth: cannot be written: No space left on device",
    )
    assert everything(small_disk) == before
    write_json(target, {"new": 2})


def test_a_checkpoint_on_a_full_disk_is_refused_until_there_is_room(small_disk: Path) -> None:
    model, config = small_model()
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 1_000_000)
    refused(lambda: save_checkpoint(model, config, {}, small_disk / "out"), "No space left on device")
    assert [path for path in everything(small_disk / "out")] == []
    filler.unlink()
    load_checkpoint(save_checkpoint(model, config, {}, small_disk / "out"))


def test_a_read_only_folder_is_named(read_only: Path) -> None:
    config = small_config()
    for path in (read_only / "a.json", read_only / "new" / "a.json"):
        refused(lambda path=path: write_json(path, {}), "a.json: cannot be written: Read-only file system")
    refused(lambda: require_writable(read_only), "cannot be written: Read-only file system")
    refused(lambda: start_run(str(read_only), config).__enter__(), "cannot be made: Read-only file system")


def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = small_model()
    root, inside = tmp_path / "model_quantized", tmp_path / "other" / "resnet18_imagenet_w4_a4"
    inside.parent.mkdir()
    for path in (root, inside):
        path.write_bytes(b"mine")
    draws = iter(range(9))  # names are not tried without end
    monkeypatch.setattr("calibquant.solver.checkpoint.secrets.randbelow", lambda _: next(draws))
    refused(lambda: save_checkpoint(model, config, {}, root), "cannot be written: Not a directory")
    refused(lambda: save_checkpoint(model, config, {}, inside.parent), "cannot be written: Not a directory")
    refused(lambda: start_run(str(root), config).__enter__(), "cannot be made: Not a directory")
    refused(lambda: require_writable(root), "cannot be written: Not a directory")
    assert everything(tmp_path) == {str(root): b"mine", str(inside): b"mine"}


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_name_that_is_taken_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def write(path: Path) -> bool:
        return write_atomically(path, lambda file: (file.write(b"new"), None)[1], overwrite=False)

    for links in (True, False):  # the second time as on a file system that knows none
        folder = tmp_path / str(links)
        (folder / "folder").mkdir(parents=True)
        (folder / "file").write_bytes(b"mine")
        (folder / "dangling").symlink_to(folder / "nowhere")
        if not links:
            monkeypatch.setattr(os, "link", no_links)
        assert not any(write(folder / name) for name in ("file", "folder", "dangling"))
        assert write(folder / "free") and (folder / "free").read_bytes() == b"new"
        assert sorted(p.name for p in folder.iterdir()) == ["dangling", "file", "folder", "free"]
        assert (folder / "file").read_bytes() == b"mine" and not (folder / "nowhere").exists()


def test_a_new_file_has_its_name_at_once_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two names would leave the first."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    except (OSError, AttributeError):
        pytest.skip("needs files without a name")
    names, link = [], os.link

    def noting(source: str, name: Path, **settings: Any) -> None:
        link(source, name, **settings)
        names.append(name)

    monkeypatch.setattr(os, "link", noting)
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("it had another name before"))
    write_json(tmp_path / "new.json", {"a": 1})
    assert names == [tmp_path / "new.json"] == [*tmp_path.iterdir()]


def _one_of_many(place: Path, number: int, start: Any) -> None:
    """What a run does at its two ends, in a process of its own, with names that collide often."""
    torch.set_num_threads(1)
    digits = iter(range(1000))
    import calibquant.solver.checkpoint as module

    module.secrets = type("Few", (), {"randbelow": staticmethod(lambda _: next(digits) // 2)})
    model, config = small_model()
    start.wait()
    with start_run(str(place / "train_log"), config) as run:
        logging.getLogger("calibquant").info("run %d", number)
        for _ in range(3):
            save_checkpoint(model, config, {"run": number}, place / "model_quantized")
        run.record(number=number)


def test_runs_at_once_leave_whole_files_and_logs_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    runs = [context.Process(target=_one_of_many, args=(tmp_path, i, start)) for i in range(4)]
    for run in runs:
        run.start()
    start.set()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0] * 4
    files = [path for path in (tmp_path / "model_quantized").rglob("*") if path.is_file()]
    makers = [load_checkpoint(path)[2]["run"] for path in files]
    assert sorted(makers) == sorted([0, 1, 2, 3] * 3) and {path.suffix for path in files} == {".pth"}
    logs = [path.read_text() for path in (tmp_path / "train_log").rglob("calibquant.log")]
    assert len(logs) == 4 and all(sum(f"run {i}\n" in log for log in logs) == 1 for i in range(4))
    SEEN["runs at once"] = len(runs)


# The real script


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    write_images(folder / "imagenet" / "val", some_wnids(2), 1)
    write_images(folder / "imagenet" / "sel", some_wnids(2), 1)
    torch.save(random_float_model(small_config()).state_dict(), folder / "float.pth")
    return folder


@pytest.mark.parametrize("room", [0, 20_000, 90_000])
def test_the_script_ends_with_one_line_when_the_disk_fills_up(
    data: Path, small_disk: Path, room: int
) -> None:
    config = write_config(data, quant__recon__iters=1)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"x" * (free - room))
    done = script("main_imagenet", "--config", str(config), cwd=small_disk)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert not list(small_disk.rglob("*.tmp")) and not list(small_disk.rglob("model_quantized/*/*"))
    SEEN["refused"] += 1


def test_figures() -> None:
    record(
        f"outputs that cannot be written: {SEEN['refused']} refused in one line with nothing lost; "
        f"{SEEN['runs at once']} runs at once ended with whole files and logs of their own"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("> /dev/full", 2, b"error: an output cannot be written: [Errno 28] No space left on device\n"),
        ("| true", 1, b""),
        (">&-", 0, b""),
        (">&- 2>&-", 0, b""),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_goes_nowhere_is_no_traceback(redirected, code, said, unbuffered):
    """Also where the output ends only when the interpreter does."""
    body = "import time; time.sleep(0.3); print('a' * 9)"
    program = f"from calibquant.solver.script import run_script; run_script(lambda: exec({body!r}))"
    line = f'"$0" -c "$1" {redirected}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, program], env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_names_that_cannot_be_used_are_one_line(monkeypatch, capsys):
    def fail() -> None:
        Path("a" * 300).stat()

    with pytest.raises(SystemExit) as stopped:
        run_script(fail)
    assert (
        stopped.value.code == 2 and capsys.readouterr().err == f"error: {'a' * 300}: File name too long\n"
    )


def test_an_accuracy_is_told_before_anything_that_can_fail_is_written(data, monkeypatch, capsys):
    """On a full disk the score of hours must not be lost."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = write_config(data)
    monkeypatch.chdir(data)
    monkeypatch.setattr("calibquant.solver.run_log.write_json", full)
    monkeypatch.setattr(sys, "argv", ["test", "--config", str(config)])
    with pytest.raises(SystemExit) as stopped:
        run_script(test.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "No space left" in err and " * Acc@1 " in out


def test_what_a_terminal_cannot_show_is_no_traceback():
    code = "from calibquant.solver.script import run_script; run_script(lambda: print('a \u2212 b'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"a \\u2212 b\n"), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",  # page-locked
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_whatever_memory_lacks_is_one_line_that_says_what_to_lower(words: str) -> None:
    line = for_user(RuntimeError(words))
    assert line is not None and line.startswith("out of memory") and "lower data.batch_size" in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible. Please"),
    ],
)
def test_too_many_open_files_are_one_line_that_says_what_to_lower(error: Exception) -> None:
    """Each data-loading process takes some: 128 of them more than the usual limit of 1,024."""
    line = for_user(error)
    assert line is not None and line.startswith("too many files are open") and "num_workers" in line
