"""The same steps, faster: the objective compiled, and on a GPU the whole step captured as one CUDA graph.

Compiling fuses what stands between two convolutions (fake quantization, dropping, residual addition,
ReLU, loss, and their gradients) into single passes over memory. Capturing removes the launches. What
is computed stays what `learn.py` says: a test holds the losses of both together, unit type by unit type.
"""

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from calibquant.errors import printable
from calibquant.solver.learn import Engine, Objective

logger = logging.getLogger("calibquant")

WORTH_COMPILING = {"cpu": 4e8, "cuda": 1e8}
"""Output elements of a unit over all steps from which compiling, some seconds, is soon earned back."""
STEPS_BEFORE_CAPTURE = 3
"""Steps that run as they are written, so that every library has set itself up before the capture."""


class FastEngine(Engine):
    """Compiles objectives and captures steps.

    Args:
        always: compile however small the work is.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.compiles: bool | None = None  # found out when it is first needed: it takes seconds

    def objective(self, objective: Objective, work: float, device: torch.device) -> Objective:
        if not self.always and work < WORTH_COMPILING[device.type]:
            return objective
        if self.compiles is None:
            problem = why_not_compile(device)
            self.compiles = problem is None
            if problem:
                logger.warning("steps run uncompiled, several times slower: %s", problem)
        if not self.compiles:
            return objective
        torch.compiler.reset()  # a unit's compiled code holds on to its caches
        compiled: Objective = torch.compile(objective, dynamic=False, fullgraph=True)
        return compiled

    def step(self, step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        return CapturedStep(step, generator) if generator.device.type == "cuda" else step


class CapturedStep:
    """A step that runs as written a few times, is captured as a CUDA graph, and from then on replayed."""

    def __init__(self, step: Callable[[], None], generator: torch.Generator) -> None:
        self.written, self.generator = step, generator
        self.calls = 0
        self.stream = torch.cuda.Stream(generator.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.calls < STEPS_BEFORE_CAPTURE:
            self._run_beside()
        else:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.written()
            self.graph.replay()
        self.calls += 1

    def _run_beside(self) -> None:
        """Run on the stream of the later capture, as CUDA graphs ask of what they capture."""
        current = torch.cuda.current_stream(self.generator.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.written()
        current.wait_stream(self.stream)


def choose_engine(wanted: str) -> Engine:
    """The engine that `quant.recon.compile` names.

    Args:
        wanted: ``auto`` compiles what is worth it, ``always`` all, ``never`` nothing.
    """
    return Engine() if wanted == "never" else FastEngine(always=wanted == "always")


def why_not_compile(device: torch.device) -> str | None:
    """What keeps torch.compile from working here: no C++ compiler, no Triton; None if it works."""

    def tiny(x: Tensor) -> Tensor:
        return x * 2 + 1

    # on a machine without CUDA it says so on the terminal
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(tiny, fullgraph=True)(torch.ones(32, device=device))
    except Exception as error:  # whatever a backend, a compiler or a linker may raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        return printable(first[0], 200)
    return None
