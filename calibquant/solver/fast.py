"""The same steps, faster: the objective compiled, and on a GPU the whole step captured as one CUDA graph.

Compiling fuses what stands between two convolutions (fake quantization, dropping, residual addition,
ReLU, loss, and their gradients) into single passes over memory. Capturing removes the launches. What
is computed stays what `learn.py` says: a test holds the losses of both together, unit type by unit type.
"""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.utils import fresh_cache
from torch.optim.adam import adam

from calibquant.errors import printable
from calibquant.solver.learn import Engine, Objective, Problem, objective

logger = logging.getLogger("calibquant")

Call = Callable[[], object]

WORTH_COMPILING = {"cpu": 4e8, "cuda": 1e8}
"""Output elements of a unit over all steps from which compiling, some seconds, is soon earned back."""
STEPS_BEFORE_CAPTURE = 3
"""Steps that run as they are written, so that every library has set itself up before the capture."""
MOST_GROUPS = 64
"""Of parameters of different shapes that are compiled for, in one unit; torch's own limit is 8."""
NOT_COMPILED = (TorchDynamoException, FailOnRecompileLimitHit)
"""What is raised where something cannot be compiled."""
NOTHING_TO_ACT_ON = ("TensorFloat32 tensor cores", "bf16 and fp16 are mixed")
"""How warnings of the compiler begin that a user can do nothing about."""


class FastEngine(Engine):
    """Compiles objectives and captures steps.

    Args:
        always: compile however small the work is.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.compiles: bool | None = None  # found out when it is first needed: it takes seconds
        self.kind: object = None  # of the units that the compiled code now at hand is of
        for message in NOTHING_TO_ACT_ON:
            warnings.filterwarnings("ignore", message)

    def objective(self, problem: Problem, work: float, device: torch.device) -> Objective:
        if not self.always and work < WORTH_COMPILING[device.type]:
            return objective
        if self.compiles is None:
            self.compiles = True
            why = why_not_compile(device)
            if why:
                self.give_up(why)
        if not self.compiles:
            return objective
        if self.kind != kind_of(problem):
            torch.compiler.reset()  # code of units gone by
            self.kind = kind_of(problem)
        compiled: Objective = torch.compile(objective, dynamic=False, fullgraph=True)
        return compiled

    def optimizer(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        compiled = self.compiles and device.type == "cuda"
        return CompiledAdam(groups, self.compiling) if compiled else super().optimizer(groups, device)

    def step(self, step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        if self.compiles:
            step = partial(self.compiling, step)
        return CapturedStep(step, generator) if generator.device.type == "cuda" else step

    def compiling(self, call: Call) -> None:
        """Call what compiles parts of itself the first times; where they cannot be compiled, as written.

        It is called anew where an attempt failed: a step, which then draws at random anew, or the optimizer
        in it, which fails before anything is changed, and so does not let the step be called twice.
        """
        if self.compiles:
            why = compile_trouble(call)
            if why is None:
                return
            self.give_up(why)
        with torch.compiler.set_stance("force_eager"):
            call()

    def give_up(self, why: str) -> None:
        """Compile nothing more, and say so."""
        self.compiles = False
        logger.warning("steps run uncompiled, several times slower: %s", why)


def kind_of(problem: Problem) -> object:
    """Equal for units that compiled code may serve alike; whether it does, the compiler checks itself."""
    batches = problem.batches
    shapes = [(x.shape, x.dtype) for x in (*batches.quantized, *batches.full, batches.target)]
    return repr(problem.module), shapes, batches.order.shape


class CompiledAdam(torch.optim.Optimizer):
    """Adam as torch computes it, compiled.

    On a GPU torch's fused one gives each thread block 65,536 elements, so that a unit's weights keep a
    tenth of the chip busy: of a step of ResNet-50's layer3.1, 0.51 ms on an H200, it took 0.08 ms.

    Args:
        compiling: calls what compiles itself, as :meth:`FastEngine.compiling` does.
    """

    def __init__(self, groups: list[dict[str, Any]], compiling: Callable[[Call], None]) -> None:
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8})
        for group in self.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            for parameter in group["params"]:
                zeros = [torch.zeros_like(parameter) for _ in range(2)]
                self.state[parameter] = (*zeros, torch.zeros((), device=device))
        self.compiling, self.update = compiling, torch.compile(adam, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        with dynamo_config.patch(recompile_limit=MOST_GROUPS):
            for group in self.param_groups:
                moved = [p for p in group["params"] if p.grad is not None]
                if not moved:
                    continue
                means, squares, steps = (list(x) for x in zip(*(self.state[p] for p in moved), strict=True))
                self.compiling(partial(
                    self.update, moved, [p.grad for p in moved], means, squares, [], steps,
                    foreach=True, capturable=True, amsgrad=False, beta1=group["betas"][0],
                    beta2=group["betas"][1], lr=group["lr"], weight_decay=0.0, eps=group["eps"],
                    maximize=False,
                ))  # fmt: skip


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
            # another thread may wait for a copy meanwhile, which the usual mode forbids
            graph = torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local")
            with not_collecting(), graph:
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


@contextmanager
def not_collecting() -> Iterator[None]:
    """Inside, reference cycles stay: in one there may be a kernel, whose end would end a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = torch.ones(32, device=device)
            return compile_trouble(lambda: torch.compile(tiny, fullgraph=True)(x))
        except Exception as error:  # whatever a backend, a compiler or a linker may raise
            return first_line(error)


def compile_trouble(call: Call) -> str | None:
    """Call what compiles parts of itself, a second time if that fails, then into an empty cache.

    A process killed while it compiles leaves a file cut short in torch's cache, on which every later one
    fails.

    Returns:
        Why it failed again; None where it did not.
    """
    why = trouble(call)
    if why is None:
        return None
    logger.info("compiling again, into an empty cache: %s", why)
    torch.compiler.reset()
    try:
        with fresh_cache():
            return trouble(call)
    except OSError as error:  # a full disk has no room for a cache
        return first_line(error)


def trouble(call: Call) -> str | None:
    """Call something; returns why it cannot be compiled, None where it can."""
    try:
        call()
    except NOT_COMPILED as error:
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """Of an error's message, for a terminal; the error's type where it has none."""
    if isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    first = str(error).strip().splitlines() or [type(error).__name__]
    return printable(first[0], 200)
