"""Several processes on torch.distributed: one network, each process with its part of the images.

Gradients are averaged between the backward pass and the optimizer's step, so parameters stay equal in all
processes. The first process alone writes and speaks. Tensors on GPUs travel by NCCL, all else by gloo.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from easydict import EasyDict
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from calibquant.errors import UserError, printable
from calibquant.model.quant_layer import harden
from calibquant.model.quant_resnet import Unit
from calibquant.parent import end_with_parent
from calibquant.solver.checkpoint import checksum
from calibquant.solver.imagenet_util import Score
from calibquant.solver.peers import Peers
from calibquant.solver.recon import UnitResult
from calibquant.solver.resume import RunState, run_state
from calibquant.solver.run_log import RunLog, start_run
from calibquant.solver.script import choose_device, for_user, one_line

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""The longest that a process waits for another: the first one finds ranges on all images meanwhile.

One that ends is noticed at once, by its closed connections."""
JOINING = timedelta(minutes=5)
"""The longest that a process looks for torchrun, which was there first but may have been killed since."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes."""
UNHEARD = 20.0
"""Seconds after a signal until a process that did not end of it is ended; torchrun kills after 30."""
_INTERRUPTED = 130
_END = "calibquant_end"
"""The store's key under which the first process to end early leaves its exit code and its words."""


class Team(Peers):
    """The processes of a torchrun job.

    Args:
        store: what they can all read and write, held by torchrun.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._flat: dict[torch.device, Tensor] = {}

    def average(self, tensors: list[Tensor]) -> None:
        """Average float32 tensors: one sum over all processes, in a buffer that stays in place.

        After its first call for tensors of a size it allocates nothing, and it never waits for the
        host, so that a CUDA graph can hold it.
        """
        if not tensors:
            return
        sizes = [tensor.numel() for tensor in tensors]
        flat = self._buffer(sum(sizes), tensors[0].device)
        parts = [p.view(t.shape) for p, t in zip(flat.split(sizes), tensors, strict=True)]
        with torch.no_grad(), talking():
            for part, tensor in zip(parts, tensors, strict=True):
                part.copy_(tensor)
            dist.all_reduce(flat)
            flat.div_(self.size)
            for part, tensor in zip(parts, tensors, strict=True):
                tensor.copy_(part)

    def _buffer(self, count: int, device: torch.device) -> Tensor:
        kept = self._flat.get(device)
        if kept is None or kept.numel() < count:
            kept = self._flat[device] = torch.empty(count, device=device)
        return kept[:count]

    def mean(self, value: float, count: int) -> float:
        weighted = torch.tensor([value * count, count], dtype=torch.float64)
        with talking():
            dist.all_reduce(weighted)
        return float(weighted[0] / weighted[1])

    def total(self, counts: list[int]) -> list[int]:
        summed = torch.tensor(counts, dtype=torch.int64)
        with talking():
            dist.all_reduce(summed)
        return [int(each) for each in summed]

    def from_first(self, make: Callable[[], T]) -> T:
        made: list[Any] = [make() if self.leads else None]
        with talking():
            dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        first: T = made[0]
        return first

    @torch.no_grad()
    def match(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        shapes = self.from_first(lambda: [tensor.shape for tensor in tensors])
        for tensor, shape in zip(tensors, shapes, strict=True):
            value = tensor.detach().contiguous() if self.leads else tensor.new_empty(shape)
            with talking():
                dist.broadcast(value, src=0)
            if tensor.shape == shape:
                tensor.copy_(value)  # keeps the layout
            else:  # a range per channel where there was none yet
                tensor.data = value

    def require_equal(self, module: nn.Module, what: str) -> None:
        """Hold a module's state against that of the other processes.

        Raises:
            UserError: in all of them, where it differs.
        """
        found: list[Any] = [None] * self.size
        with talking():
            dist.all_gather_object(found, checksum(dict(module.state_dict())))
        differ = [rank for rank, each in enumerate(found) if each != found[0]]
        if differ:
            raise UserError(f"{what}: process {differ[0]} holds other values than process 0")

    def device(self, wanted: str | None) -> torch.device:
        """This process's device: a GPU of its own, else the CPU.

        Raises:
            UserError: CUDA was asked for and there is none, or there are more processes than GPUs.
        """
        device = choose_device(wanted)
        if device.type == "cpu":
            return device
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise UserError(
                f"--nproc_per_node: allowed is at most {here}, a process per GPU, or --device cpu"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def end(self, error: BaseException) -> NoReturn:
        """End early, all with the exit code of the first to do so; only process 0 says why.

        Raises:
            UserError: in process 0, with the words of the process that ended first.
            BaseException: in process 0, the error itself where there are no such words.
        """
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun's, who ends us because another has ended
            signal.signal(number, signal.SIG_IGN)
        code, words = self._first_end(error)
        if self.leads:
            if words:
                raise UserError(words)
            raise KeyboardInterrupt if code == _INTERRUPTED else error
        # nothing else: an interpreter's usual end would wait for NCCL, which waits for the others
        sys.stdout.flush()
        os._exit(code)

    def _first_end(self, error: BaseException) -> tuple[int, str]:
        """Exit code and words of whichever process ended first, this one if no other has."""
        lost = isinstance(error, PeerLostError)
        mine = (2, one_line(error)) if isinstance(error, UserError) else (_exit_code(error), "")
        try:
            kept = self.store.check([_END]) if lost else True
            if kept:
                first = self.store.compare_set(_END, "", json.dumps(mine))
                code, words = json.loads(first)
                return int(code), str(words)
        except RuntimeError:  # torchrun, which holds the store, is gone
            pass
        return mine


class PeerLostError(UserError):
    """Another process of the job is gone."""


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    return _INTERRUPTED


@contextmanager
def talking() -> Iterator[None]:
    """Inside, a process that is gone is one line; memory that lacks here is not taken for one."""
    try:
        yield
    except RuntimeError as error:
        if for_user(error):
            raise
        reason = one_line(error)[:200]
        raise PeerLostError(
            f"another process of this job has ended or cannot be reached ({reason}); "
            "finished units are kept, the same command (without --fresh) continues with them"
        ) from error


@contextmanager
def team() -> Iterator[Team]:
    """The team of this torchrun job, joined; who ends early ends all.

    Raises:
        UserError: torchrun did not start this process, or the others cannot be reached.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment variable {missing[0]} is not set; this script is started by torchrun: "
            "torchrun --nproc_per_node 2 ./calibquant/solver/main_distributed.py --config ..."
        )
    for name in VARIABLES:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            value = printable(os.environ[name], 80)
            raise UserError(f"the environment variable {name} is {value}, allowed is an integer")
    end_with_parent()
    end_though_waiting(UNHEARD)
    with talking():
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
        store.set_timeout(TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    joined = Team(store, rank, size)
    if not joined.leads:
        logging.getLogger("calibquant").setLevel(logging.CRITICAL + 1)
        warnings.simplefilter("ignore")
    try:
        yield joined
        dist.destroy_process_group()
    except (UserError, KeyboardInterrupt, SystemExit) as error:
        joined.end(error)
    except Exception as error:
        words = for_user(error)
        if words is None:
            raise
        joined.end(UserError(words))


def end_though_waiting(seconds: float) -> None:
    """End this process so many seconds after SIGTERM or SIGINT if it has not ended of it by then.

    Python handles signals between its own instructions alone. A process that waits in NCCL for one that
    is gone never gets there, and would keep its GPU.
    """
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # written to at once, whatever Python does
    # what ends a data-loading process, a fork of this one, is not meant for this one
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        while os.read(heard, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        time.sleep(seconds)
        os._exit(_INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


class TeamState(RunState):
    """An unfinished run's state on the first process's disk: every process takes the same decisions."""

    def __init__(self, folder: Path, team: Team) -> None:
        super().__init__(folder)
        self.team = team

    def require_same(self, now: dict[str, str]) -> None:
        self.team.from_first(lambda: super(TeamState, self).require_same(now))

    def logs_to(self, folder: Path) -> None:
        self.team.from_first(lambda: super(TeamState, self).logs_to(folder))

    def score(self, key: str) -> Score | None:
        return self.team.from_first(lambda: super(TeamState, self).score(key))

    def keep_score(self, key: str, score: Score) -> None:
        if self.team.leads:
            super().keep_score(key, score)

    def recall(self, unit: Unit) -> UnitResult | None:
        self.team.require_equal(unit.module, f"unit {unit.name}, calibrated")
        result = self.team.from_first(lambda: super(TeamState, self).recall(unit))
        if result is not None:
            harden(unit.module)
            self.team.match(unit.module)
        return result

    def remember(self, unit: Unit, result: UnitResult) -> None:
        self.team.require_equal(unit.module, f"unit {unit.name}, reconstructed")
        if self.team.leads:
            super().remember(unit, result)

    def forget(self) -> None:
        if self.team.leads:
            super().forget()


@contextmanager
def team_state(config_path: str, fresh: bool, team: Team) -> Iterator[TeamState]:
    """The state of a config file's unfinished run, held by the first process."""
    if not team.leads:
        yield TeamState(team.from_first(Path), team)
        return
    with run_state(config_path, fresh) as state:
        yield TeamState(team.from_first(lambda: state.folder), team)


class SilentRun(RunLog):
    """What a run leaves behind where another process writes it: nothing."""

    def record(self, **values: Any) -> None:
        pass


@contextmanager
def team_run(config: EasyDict, team: Team) -> Iterator[RunLog]:
    """The first process's run log; a silent one elsewhere."""
    if not team.leads:
        yield SilentRun(team.from_first(Path), config)
        return
    with start_run("train_log", config) as run:
        team.from_first(lambda: run.folder)
        yield run
