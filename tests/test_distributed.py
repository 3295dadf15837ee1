"""Several processes: the arithmetic of one, the same decisions everywhere, one voice, and no hanging."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from calibquant.errors import UserError
from calibquant.solver import distributed, imagenet_util, main_imagenet, recon
from calibquant.solver.checkpoint import load_checkpoint
from calibquant.solver.config import load_config
from calibquant.solver.distributed import PeerLostError, Team, talking
from calibquant.solver.learn import Engine
from calibquant.solver.main_distributed import main, require_equal_shares
from calibquant.solver.peers import Peers
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import reconstruct
from calibquant.solver.resume import run_state
from calibquant.solver.run_log import start_run
from calibquant.solver.script import run_script
from tests.small import (
    SOON_CALIBRATED,
    calibrated_model,
    random_float_model,
    small_config,
    some_wnids,
    write_images,
)
from tests.test_end_to_end import SOLVER, only, script, write_config

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
WHOLE_BATCHES = {
    "quant__ends_8bit": [],
    "quant__w_qconfig__bit": 2,
    "quant__recon__batch_size": 12,
    "quant__recon__drop_prob": 1,
    "quant__recon__iters": 20,
    "quant__recon__cache": "fp32",
}
"""Every step sees all images and nothing is random: what several processes do must be what one does."""


class Straying(Engine):
    """After each of its steps a process has a little more than was learned: the others would differ."""

    def __init__(self, rank: int) -> None:
        self.factor = 1 + 1e-6 * rank

    def optimizer(self, groups, device):
        adam = super().optimizer(groups, device)
        adam.register_step_post_hook(self.stray)
        return adam

    @torch.no_grad()
    def stray(self, adam, *_):
        for group in adam.param_groups:
            for parameter in group["params"]:
                parameter.mul_(self.factor)


DISTILLED = {
    "quant__distil__after": ["layer1.1"],
    "quant__distil__iters": 6,
    "quant__distil__round_lr": 0.02,
}


def learned_by(
    peers: Peers, images: torch.Tensor, engine: Engine | None = None, **changes
) -> dict[str, torch.Tensor]:
    """Everything that a full reconstruction learns, unit by unit, as it is before hardening."""
    config, learned = small_config(**WHOLE_BATCHES, **changes), {}
    settings = recon_settings(config, len(IMAGES), peers.size)
    model = calibrated_model(config, IMAGES)
    harden = recon.harden

    def spy(module):
        parameters = {f"{len(learned)} {name}": p.detach().clone() for name, p in module.named_parameters()}
        learned.update(parameters)
        harden(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recon, "harden", spy)
        results = list(reconstruct(model, images, settings, 7, peers=peers, engine=engine))
    for result in results:
        learned |= {f"{result.name} error": torch.tensor([result.error_before, result.error_after])}
        learned |= {f"{result.name} loss": torch.tensor([point.reconstruction for point in result.trace])}
    return learned


def one_of_two(rank: int, folder: Path) -> None:
    """What a process of two does; its results go to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    team = Team(store, rank, 2)
    found = {
        "learned": learned_by(team, IMAGES[rank::2]),
        "compensated": learned_by(team, IMAGES[rank::2], quant__recon__compensate=True),
        "straying": learned_by(team, IMAGES[rank::2], Straying(rank)),
        "distilled": learned_by(team, IMAGES[rank::2], **DISTILLED),
        "mean": team.mean(float(rank), 1 + 2 * rank),
        "total": team.total([rank, 10]),
        "first": team.from_first(lambda: f"made by {rank}"),
    }
    tensors = [torch.full((2, 3), float(rank)), torch.arange(8.0).view(1, 2, 2, 2) * (1 + rank)]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    team.average(tensors)
    found["averaged"] = tensors
    config = small_config()
    model = calibrated_model(config, IMAGES * (1 + rank))
    team.match(model)
    found["matched"] = {name: value.clone() for name, value in model.state_dict().items()}
    team.require_equal(model, "matched")
    model.stem.conv1.bias += rank
    try:
        team.require_equal(model.stem, "unit stem")
    except UserError as error:
        found["unequal"] = str(error)
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_two_processes_that_see_all_images_together_learn_what_one_learns(two):
    alone = learned_by(Peers(), IMAGES)
    first, second = (each["learned"] for each in two)
    assert alone.keys() == first.keys() == second.keys() and len(alone) > 50
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        difference = (first[name] - expected).abs()
        # Adam turns the last bits of a gradient near zero into a step, so single logits may stray;
        # all move by about 0.2
        assert float(difference.mean()) < 2e-5 and float(difference.max()) < 0.02, name


def test_two_processes_learn_by_the_networks_output_what_one_learns(two):
    alone = learned_by(Peers(), IMAGES, **DISTILLED)
    first, second = (each["distilled"] for each in two)
    assert alone.keys() == first.keys() == second.keys()
    stage = [name for name in alone if " parts." in name]
    assert len(stage) >= 10 and len([name for name in alone if name.startswith("up_to_layer1.1")]) == 2
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name in stage:  # integers' places move by up to 0.02 here
            assert float((first[name] - expected).abs().mean()) < 5e-4, name


def test_two_processes_compensate_weights_alike_and_gain_by_it(two):
    first, second = (each["compensated"] for each in two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    plain = two[0]["learned"]
    assert float(first["classifier error"][1]) < float(plain["classifier error"][1])


def test_processes_whose_steps_are_not_the_same_to_the_last_bit_end_with_the_same_network(two):
    """As where one of them cannot compile."""
    first, second = (each["straying"] for each in two)
    expected = two[0]["learned"]
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.allclose(value, expected[name], atol=0.05), name


def test_collectives_are_plain_arithmetic(two):
    for found in two:
        assert found["mean"] == pytest.approx(3 / 4)
        assert found["total"] == [1, 20] and found["first"] == "made by 0"
        assert torch.equal(found["averaged"][0], torch.full((2, 3), 0.5))
        assert torch.equal(found["averaged"][1], torch.arange(8.0).view(1, 2, 2, 2) * 1.5)
        assert found["unequal"] == "unit stem: process 1 holds other values than process 0"
    expected = calibrated_model(small_config(), IMAGES).state_dict()
    for name, value in expected.items():
        assert all(torch.equal(found["matched"][name], value) for found in two), name


def test_while_units_learn_a_process_holds_its_own_images_alone(place, monkeypatch, tmp_path):
    """Of as many processes as there may be, each would else hold all of them."""

    class First(Peers):
        size = 4

    whole, seen, told = [], [], []

    def load(config):
        found = imagenet_util.load_calibration(config)
        whole.append(weakref.ref(found.images))
        return found

    def learn(model, images, *_):
        gc.collect()
        seen.append((whole[0](), len(images)))
        return iter(())

    def save(model, config, story) -> Path:
        told.append(story["calibration"]["count"])
        return Path("float.pth")

    monkeypatch.chdir(place)
    monkeypatch.setattr(main_imagenet, "load_calibration", load)
    monkeypatch.setattr(main_imagenet, "reconstruct", learn)
    monkeypatch.setattr(main_imagenet, "save_checkpoint", save)
    config = load_config(team_config(place, "alone"))
    with run_state("here", True, tmp_path) as state, start_run(str(tmp_path), config) as run:
        main_imagenet.quantize(config, torch.device("cpu"), run, state, First())
    ((kept, images),) = seen
    assert kept is None and images == 3 and told == [12]


def test_parts_hold_every_image_once_and_batches_are_shared_out():
    class Third(Peers):
        rank, size = 2, 3

    assert [*range(10)][Third().share(10, "val")] == [2, 5, 8]
    with pytest.raises(UserError, match="3 processes, but val has 2 images"):
        Third().share(2, "val")
    assert recon_settings(small_config(), 12, 2).batch_size == 4
    assert recon_settings(small_config(quant__recon__batch_size=32), 13, 2).batch_size == 6
    assert recon_settings(small_config(), 12).batch_size == 8
    held_out = small_config(quant__recon__held_out=0.5)
    assert recon_settings(held_out, 4, 2).held_out == 0.5
    with pytest.raises(UserError, match=r"held_out is 0\.5, allowed with 2 processes and 3 .* is 0"):
        recon_settings(held_out, 3, 2)


def torchrun(
    config: Path, *arguments: str, processes: int = 2, script: Path = SOLVER / "main_distributed.py"
) -> subprocess.Popen:
    """A torchrun job left running."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    target = [str(script), "--config", str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command, *target],
        cwd=config.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: subprocess.Popen) -> tuple[str, str]:
    try:
        return job.communicate(timeout=300)
    finally:
        job.kill()


def wait_for(job: subprocess.Popen, beginning: str) -> list[str]:
    """The job's lines up to one with this beginning."""
    lines = []
    assert job.stdout is not None
    for line in job.stdout:
        lines.append(line)
        if line.startswith(beginning):
            break
    return lines


def processes_of(job: subprocess.Popen) -> list[int]:
    """Process ids of a job's processes, in the order they were started in."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for someone to ask how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images of five classes, float weights for them, and nothing else."""
    folder = tmp_path_factory.mktemp("team")
    write_images(folder / "imagenet" / "val", some_wnids(5), 5)
    write_images(folder / "imagenet" / "sel", some_wnids(5), 3, seed=1)
    network = small_config(model__kwargs__num_classes=5)
    torch.save(random_float_model(network).state_dict(), folder / "float.pth")
    return folder


def team_config(place: Path, name: str, **changes) -> Path:
    few = {"quant__recon__iters": 40, "quant__recon__compile": "never"}
    classes = {"model__kwargs__num_classes": 5, "data__classes": "folders"}
    return write_config(place, data__type=name, **{**SOON_CALIBRATED, **few, **classes, **changes})


@pytest.fixture(scope="module")
def whole(place) -> tuple[Path, dict]:
    """A job that ran through: its config, and its metrics."""
    config = team_config(place, "whole")
    job = torchrun(config)
    out, err = finish(job)
    assert job.returncode == 0, err
    assert out.count("float: * Acc@1") == 1 and out.count("unit stem") == 1, "one voice"
    return config, metrics_of(place, "whole")


def metrics_of(place: Path, name: str) -> dict:
    newest = max((place / f"train_log/resnet18_{name}_w2_a4").glob("*/metrics.json"))
    return json.loads(newest.read_text())


def test_a_job_leaves_one_log_and_one_file_near_those_of_a_single_process(place, whole):
    _, team = whole
    alone = script("main_imagenet", "--config", str(team_config(place, "alone")), cwd=place)
    assert alone.returncode == 0, alone.stderr
    expected = metrics_of(place, "alone")
    assert team["processes"] == 2 and expected["processes"] == 1
    assert team["float"] == expected["float"] and team["range_only"] == expected["range_only"]
    assert team["quantized"]["images"] == 25 and team["calibration"] == expected["calibration"]
    for a, b in zip(team["units"], expected["units"], strict=True):
        assert a["error_after"] == pytest.approx(b["error_after"], rel=0.3), a["name"]
    only((place / "train_log/resnet18_whole_w2_a4").iterdir())
    saved = [only((place / f"model_quantized/resnet18_{n}_w2_a4").iterdir()) for n in ("whole", "alone")]
    logits = []
    for path in saved:
        model, _, metadata = load_checkpoint(path)
        with torch.no_grad():
            logits.append(model(IMAGES))
    assert metadata["processes"] == 1
    float_model = random_float_model(small_config(model__kwargs__num_classes=5))
    float_model.load_state_dict(torch.load(place / "float.pth", weights_only=True))
    with torch.no_grad():
        distance = (logits[0] - logits[1]).norm() / (logits[1] - float_model(IMAGES)).norm()
    assert distance < 1, "two networks are nearer to each other than to the float one"


def test_a_job_that_loses_a_process_or_torchrun_ends_and_the_same_command_goes_on(place, whole):
    settings = yaml.safe_load(whole[0].read_text())
    settings["data"]["type"] = "killed"
    config = place / "killed.yaml"
    config.write_text(yaml.safe_dump(settings))
    job = torchrun(config)
    wait_for(job, "unit stem")
    os.kill(processes_of(job)[1], signal.SIGKILL)
    finish(job)
    assert job.returncode not in (0, None)

    job = torchrun(config)
    lines = wait_for(job, "unit layer3.0")
    assert any(line.startswith("continuing an unfinished run: ") for line in lines)
    processes = processes_of(job)
    job.kill()  # torchrun alone: its processes end by themselves
    deadline = time.monotonic() + 120
    while any(alive(process) for process in processes):
        assert time.monotonic() < deadline, "its processes go on without it"
        time.sleep(0.1)
    finish(job)
    assert len(processes) == 2 and not list((place / "model_quantized").glob("resnet18_killed_w2_a4/*.pth"))

    job = torchrun(config)
    out, err = finish(job)
    assert job.returncode == 0 and "continuing an unfinished run: " in out, err
    files = [only((place / f"model_quantized/resnet18_{n}_w2_a4").iterdir()) for n in ("whole", "killed")]
    networks = [load_checkpoint(path)[0].state_dict() for path in files]
    for (name, a), b in zip(networks[0].items(), networks[1].values(), strict=True):
        assert torch.equal(a, b), name
    assert not [path for path in (place / "train_log/unfinished").rglob("*") if path.is_file()]


def test_a_mistake_that_one_process_meets_is_told_once(place):
    root = place / "broken"
    write_images(root / "val", some_wnids(5), 1)
    write_images(root / "sel", some_wnids(5), 1)
    victim = sorted((root / "val").rglob("*.JPEG"))[1]  # of the second process
    victim.write_bytes(victim.read_bytes()[:300])
    job = torchrun(team_config(place, "mistake", data__path=str(root)))
    _, err = finish(job)
    assert job.returncode not in (0, None)
    assert f"image {victim}: cannot be read" in only(errors(err))
    assert 'main_distributed.py", line' not in err, "no traceback of ours"


def test_memory_that_one_process_lacks_is_told_once(tmp_path):
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(SOLVER.parents[1])!r})",
        "from calibquant.solver.distributed import team",
        "from calibquant.solver.script import run_script",
        "def main():",
        "    with team() as peers:",
        "        peers.total([1])",
        "        if not peers.leads:",
        "            raise MemoryError('no room for 9 GB')",
        "        peers.total([1])",
        "run_script(main)",
    ]
    (tmp_path / "job.py").write_text("\n".join(lines))
    job = torchrun(tmp_path / "config.yaml", script=tmp_path / "job.py")
    _, err = finish(job)
    assert job.returncode not in (0, None)
    assert only(errors(err)).startswith("error: out of memory: no room for 9 GB; lower ")


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    require_equal_shares(small_config(), 4)
    with pytest.raises(UserError, match=r"quant\.recon\.batch_size is 8, allowed is a multiple of 3"):
        require_equal_shares(small_config(), 3)


def test_without_torchrun_help_is_shown(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["main_distributed.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 0 and "--fresh" in capsys.readouterr().out


def test_without_torchrun_one_line_says_how_to_start(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["main_distributed.py", "--config", "config.yaml"])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    assert "torchrun --nproc_per_node" in only(errors(capsys.readouterr().err))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot tell how far another process is")
def test_processes_that_still_import_torch_end_with_torchrun(tmp_path):
    job = torchrun(tmp_path / "nowhere.yaml")
    deadline = time.monotonic() + 120
    try:
        while len(processes := processes_of(job)) < 2:
            time.sleep(0.01)
        maps = [Path(f"/proc/{process}/maps") for process in processes]
        while not all("libtorch" in each.read_text() for each in maps):
            time.sleep(0.01)
    finally:
        job.kill()
    while any(alive(process) for process in processes):
        assert time.monotonic() < deadline, "its processes go on without it"
        time.sleep(0.01)
    _, err = job.communicate()
    assert "Traceback" not in err and not errors(err)


def test_a_process_whose_torchrun_was_killed_while_it_started_does_not_look_for_it_for_a_day(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # where nobody listens any more
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for each in ("end_with_parent", "end_though_waiting"):  # not of the process that tests
        monkeypatch.setattr(distributed, each, lambda *_: None)
    assert distributed.JOINING <= timedelta(minutes=5) < distributed.TIMEOUT
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=30))
    began = time.monotonic()
    with pytest.raises(PeerLostError, match="cannot be reached"), distributed.team():
        pass
    assert time.monotonic() - began < 25


WAITING = """
import ctypes, os, signal, sys, time
from calibquant.solver.distributed import end_though_waiting
from calibquant.solver.script import run_script

def wait():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without it
    end_though_waiting(1.0)
    print("ready", flush=True)
    if sys.argv[1] == "in Python":
        time.sleep(60)
    if sys.argv[1] == "with a fork":
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(0))
            print("ready", flush=True)
            time.sleep(60)
        sys.stdin.readline()
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        time.sleep(3)
        return
    lock, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)  # without end, and no signal interrupts it

run_script(wait)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("where", "words"), [("in Python", "interrupted\n"), ("in a library", "")])
def test_a_signal_ends_a_process_that_waits_where_python_handles_none(number, where, words):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    state = Path(f"/proc/{process.pid}/stat")
    while state.read_text().rpartition(") ")[2][0] == "R":  # it goes to wait, and does not yet
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, words)


def test_a_data_loading_process_that_is_ended_does_not_end_the_one_that_it_works_for():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "with a fork"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    _, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_memory_that_lacks_in_this_process_is_not_told_as_a_lost_one():
    full, gone = torch.OutOfMemoryError("no room"), RuntimeError("Connection closed by peer")
    for error, expected in ((full, torch.OutOfMemoryError), (gone, PeerLostError)):
        with pytest.raises(expected), talking():
            raise error
