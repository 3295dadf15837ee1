"""The whole job on a GPU, as far as a machine without one can tell: see `pretend_gpu.py`."""

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch
from torch import nn

from calibquant.quantization.observer import OBSERVERS, clipping_ranges
from calibquant.quantization.range_search import Grid
from calibquant.solver import export_onnx, main_imagenet, sensitivity, test, test_imagenet
from calibquant.solver.caches import UnitData, staged_batches
from calibquant.solver.fast import STEPS_BEFORE_CAPTURE, CapturedStep
from calibquant.solver.learn import Engine
from calibquant.solver.pipeline import calibrate, quantize_model, recon_settings
from calibquant.solver.recon import reconstruct
from tests.pretend_gpu import CPU, GPU, Gpu, Idle, pretended_gpu
from tests.small import SOON_CALIBRATED, random_float_model, small_config
from tests.test_end_to_end import only, place, write_config

__all__ = ["place"]

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
SMALLER = {"num_classes": 1000, "small_images": True, "base_width": 2}
OURS = {
    "quant__equalize__iters": 3,
    "quant__equalize__shift": True,
    "quant__recon__compensate": True,
    "quant__recon__round_mode": "straight_through",
    "quant__recon__weight_scale_lr": 0.002,
    "quant__distil__after": ["layer2.1"],
    "quant__distil__iters": 6,
}
STEPS = ("quant__recon__round_mode", "quant__recon__weight_scale_lr", "quant__distil__after")
LEARNED = {name: OURS[name] for name in (*STEPS, "quant__distil__iters")}
REST = {
    "quant__a_qconfig__quantizer": "LSQPlusFakeQuantize",
    "quant__recon__keep_gpu": False,
    "quant__recon__ranges": "quantized",
    "quant__recon__views": 2,
    "quant__recon__held_out": 0.25,
}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda here, there: here + there, r"add: tensors of the CPU \[\(3, 3\)\]"),
        (lambda here, there: there.add_(here), "the CPU"),
        (lambda here, there: torch.cat([there, here]), "the CPU"),
        (lambda here, there: torch.stack([there.sum(), torch.tensor(1.0)]), "the CPU"),
        (lambda here, there: nn.functional.linear(there, here), "the CPU"),
        (lambda here, there: here[there.long()], "the CPU"),
        (lambda here, there: there.__setitem__(torch.tensor([0]), here[:1]), "the CPU"),
        (lambda here, there: nn.Linear(3, 3).to(GPU)(here), "the CPU"),
        (lambda here, there: there.numpy(), "NumPy"),
    ],
)
def test_what_a_gpu_refuses_is_refused(wrong, words):
    with pretended_gpu(), torch.no_grad():
        here = torch.zeros(3, 3)
        with pytest.raises(AssertionError, match=words):
            wrong(here, here.to(GPU))


@pytest.mark.parametrize(
    ("step", "waits"),
    [
        (lambda here, there: there + 1, False),
        (lambda here, there: there * torch.tensor(2.0), False),
        (lambda here, there: there[torch.tensor([0])], False),
        (lambda here, there: there.copy_(here), False),
        (lambda here, there: there.__setitem__(slice(0, 3), here), False),
        (lambda here, there: torch.zeros(2, device=there.device) + there.new_ones(2), False),
        (lambda here, there: float(there.sum()), True),
        (lambda here, there: bool((there > 0).any()), True),
        (lambda here, there: there[there > 0], True),
        (lambda here, there: there.cpu(), True),
        (lambda here, there: here.copy_(there), True),
        (lambda here, there: here.__setitem__(slice(0, 3), there), True),
    ],
)
def test_what_makes_the_host_wait_is_seen(step, waits):
    before = torch.cuda.is_available(), torch.cuda.is_initialized()
    with pretended_gpu() as gpu:
        here = torch.zeros(3, 3)
        step(here, here.to(GPU))
        assert bool(gpu.waits) is waits
    assert torch.zeros(2).device == CPU
    assert (torch.cuda.is_available(), torch.cuda.is_initialized()) == before


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    main()


def test_all_scripts_keep_to_one_device_and_the_file_is_read_without_it(monkeypatch, place):
    changes = {"data__type": "gpu", "data__pin_memory": False, **SOON_CALIBRATED, **OURS, **REST}
    config = write_config(place, **changes)
    given = "--config", config
    monkeypatch.chdir(place)
    with pretended_gpu() as gpu:
        monkeypatch.setattr(
            main_imagenet, "choose_engine", lambda wanted: Engine()
        )  # steps as they are written
        run(monkeypatch, main_imagenet.main, *given)
        saved = "--quantized_model_path", only(Path("model_quantized").glob("resnet18_gpu_*/*.pth"))
        run(monkeypatch, test_imagenet.main, *given, *saved)
        run(monkeypatch, test.main, *given)
        run(monkeypatch, sensitivity.main, *given)
        run(monkeypatch, export_onnx.main, *given, *saved, "--out", "gpu.onnx")
        assert len(gpu.calls) > 10_000
    run(monkeypatch, test_imagenet.main, *given, *saved, "--device", "cpu")


class WatchedSteps(Engine):
    """Notes what each step calls, and what in it waits."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.steps: list[list[str]] = []
        self.waits: list[str] = []

    def step(self, step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        self.steps = []

        def watched() -> None:
            calls, waits = len(self.gpu.calls), len(self.gpu.waits)
            step()
            self.steps.append(self.gpu.calls[calls:])
            self.waits += self.gpu.waits[waits:]

        return watched


@pytest.mark.parametrize("keep_gpu", [True, False])
@pytest.mark.parametrize("changes", [{}, LEARNED])
def test_a_step_waits_for_nothing_and_always_calls_the_same(changes, keep_gpu):
    """A captured step is what one of them called, over and over, and the host is not asked."""
    config = small_config(**SOON_CALIBRATED, **changes, quant__recon__keep_gpu=keep_gpu)
    network = random_float_model(config)
    with pretended_gpu() as gpu:
        model = quantize_model(network.to(GPU), config)
        calibrate(model, IMAGES, config)
        engine = WatchedSteps(gpu)
        for result in reconstruct(model, IMAGES, recon_settings(config), seed=7, engine=engine):
            first, *others = engine.steps[1:]  # the first of all sets the optimiser up
            assert len(first) > 20 and len(others) == 4
            assert all(calls == first for calls in others), result.name
        assert engine.waits == []


def test_the_thread_that_gathers_rows_works_for_their_gpu(monkeypatch):
    """Else each of several processes would take memory of the first GPU."""
    threads = []
    with pretended_gpu():
        monkeypatch.setattr(
            torch.cuda, "set_device", lambda device: threads.append((current_thread(), device))
        )
        rows = IMAGES.flatten(1)
        order = torch.zeros(2, 3, dtype=torch.int64).to(GPU)
        with staged_batches(UnitData([rows], [rows], rows), order, GPU) as staged:
            staged.stage(0)
    ((thread, device),) = threads
    assert thread is not main_thread() and device == GPU


def test_garbage_is_not_collected_while_a_step_is_captured(monkeypatch):
    """What it would free, such as a kernel of code gone by, must not be freed then."""
    collects = []
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Idle)
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
        step = CapturedStep(lambda: collects.append(gc.isenabled()), torch.Generator(GPU))
        for _ in range(STEPS_BEFORE_CAPTURE + 2):
            step()
    assert collects == [True] * STEPS_BEFORE_CAPTURE + [False] and gc.isenabled()


@pytest.mark.parametrize("observer", ["MSEObserver", "MSEFastObserver"])
def test_searches_wait_no_oftener_for_more_layers(observer):
    """Of a GPU's time for a few thousand values most is the host's, which each step of a search asks."""
    waits = []
    for layers in (1, 12):
        torch.manual_seed(0)
        seen = {str(number): OBSERVERS[observer](Grid(0, 15, False)) for number in range(layers)}
        with pretended_gpu() as gpu:
            for one in seen.values():
                one.observe(torch.randn(4, 3, 8, 8).to(GPU))
            before = len(gpu.waits)
            clipping_ranges(seen)
            waits.append(len(gpu.waits) - before)
    assert waits[0] > 20 and waits[1] < 3 * waits[0]


def test_a_gpus_network_is_the_cpus():
    """With nothing drawn at random that devices draw differently, and the same observers."""
    config = small_config(quant__recon__drop_prob=1.0, model__kwargs=SMALLER, **SOON_CALIBRATED, **OURS)
    networks = []
    for device in (CPU, GPU):
        network = random_float_model(config)
        with pretended_gpu() if device == GPU else nullcontext():
            model = quantize_model(network.to(device), config)
            calibrate(model, IMAGES, config)
            errors = [r.error_after for r in reconstruct(model, IMAGES, recon_settings(config), seed=7)]
            networks.append((errors, model(IMAGES.to(device)).cpu()))
    (here, one), (there, other) = networks
    assert there == pytest.approx(here, rel=1e-3)
    assert torch.allclose(one, other, atol=1e-3 * float(one.abs().max()))
