"""Seconds of one optimisation step, unit by unit: ours plain and fast, QDrop's own code, and the floor.

python ./benchmarks/speed.py --config ./exp/w4a4/rs50_msra/qdrop.yaml --peer ../QDrop \\
    --out ./benchmarks/results/speed_cpu.json

`--peer` is the folder of a checkout of github.com/wimh966/QDrop (branch qdrop); nothing of it is
needed otherwise. All paths learn the same unit from the same images; in each round each path runs some
steps, in turn, and the median over rounds counts. The floor is the unit's convolutions alone: forward, the
gradients of all weights, and those of inputs that something learns from.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the repository is a folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import calibquant.quiet_start  # noqa: F401

import torch
from torch import Tensor, nn

from benchmarks.peer_qdrop import PeerUnits
from calibquant.errors import UserError, printable
from calibquant.model.quant_layer import QuantConv2d, harden
from calibquant.model.quant_resnet import QuantResNet, Unit
from calibquant.quantization.state import quantizers, settled
from calibquant.solver.augment import Rows
from calibquant.solver.caches import Activations, UnitData, live_names, run_batched
from calibquant.solver.config import load_config
from calibquant.solver.fast import FastEngine
from calibquant.solver.files import require_no_folder, require_writable, write_json
from calibquant.solver.imagenet_util import load_calibration
from calibquant.solver.learn import (
    Engine,
    Loop,
    ReconSettings,
    bfloat16_instructions,
    bfloat16_pays,
    learn_unit,
    learning,
    start_rounding,
)
from calibquant.solver.peers import Peers
from calibquant.solver.pipeline import calibrate, float_model, quantize_model, recon_settings
from calibquant.solver.recon import (
    Means,
    channels_last,
    float32_precision,
    store_for,
    unit_data,
)
from calibquant.solver.run_log import versions
from calibquant.solver.script import choose_device, config_parser, run_script

Runner = Callable[[int], tuple[list[float], float]]
"""Runs some steps; gives the seconds of each and those of what came before the first."""
WARM_UP = 2
"""Steps of each round that do not count: they compile, and bring caches and pages in."""


def main() -> None:
    args = arguments()
    require_counts(args)
    if args.out:
        require_no_folder("--out", args.out)
        require_writable(args.out.parent)
    config = load_config(args.config)
    device = choose_device(args.device)
    config.quant.calibrate = args.images
    model = float_model(config)
    images = load_calibration(config).images
    if len(images) < args.batch:
        raise UserError(f"--batch is {args.batch}, but the calibration folder has {len(images)} images")
    quantized = quantize_model(model.to(device), config)
    wanted = wanted_units(args.units, [unit.name for unit in quantized.units("block")])
    calibrate(quantized, images, config)
    peer = PeerUnits(Path(args.peer), model, config, images[:32], device) if args.peer else None
    settings = replace(recon_settings(config), batch_size=args.batch, iters=0)
    rows = [
        measure(unit, data, settings, device, peer, args)
        for unit, data in units_with_data(quantized, images, settings, device, wanted)
    ]
    if rows:
        rows.append(in_all(rows))
        print(table(rows))
    result: dict[str, object] = {"batch": args.batch, "steps": args.steps, "units": rows}
    # by now every unit is hardened
    result["evaluation"] = evaluation(model, quantized, images[: args.batch].to(device), args.rounds)
    print(json.dumps(result["evaluation"]))
    if args.out:
        command = " ".join(["python", *sys.argv])
        about = {"command": command, "machine": machine(device), "versions": versions()}
        write_json(args.out, about | result)


def require_counts(args: argparse.Namespace) -> None:
    """Refuse numbers that nothing could be measured with.

    Raises:
        UserError: naming the option.
    """
    for name, least in (("batch", 1), ("images", args.batch), ("steps", 1), ("rounds", 1)):
        value = getattr(args, name)
        if value < least:
            why = ", the images of a batch" if name == "images" else ""
            raise UserError(f"--{name} is {value}, allowed is an integer of at least {least}{why}")


def wanted_units(wanted: str, names: list[str]) -> list[str]:
    """The units that ``--units`` asks for.

    Raises:
        UserError: there is no such unit.
    """
    if wanted in ("all", "none"):
        return names if wanted == "all" else []
    found = wanted.split(",")
    for name in found:
        if name not in names:
            raise UserError(f"--units {printable(name, 80)}: allowed are all, none, {', '.join(names)}")
    return found


@torch.no_grad()
def evaluation(model: nn.Module, hardened: nn.Module, images: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of scoring a batch with the float and with the hardened network, taking turns."""
    seconds: dict[str, list[float]] = {"float": [], "hardened": []}
    with settled(hardened):
        for _ in range(2 * rounds + 1):
            for name, network in (("float", model), ("hardened", hardened)):
                began = time.perf_counter()
                network(images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return medians | {"ratio": medians["hardened"] / medians["float"]}


def units_with_data(
    model: QuantResNet, images: Tensor, settings: ReconSettings, device: torch.device, wanted: list[str]
) -> Iterable[tuple[Unit, UnitData]]:
    """Each wanted unit, not yet hardened, and what it learns from."""
    store = store_for(settings, device)
    means = Means(settings, device, store, Rows(len(images), len(images), 0))
    activations = Activations(channels_last(images, device))
    units = model.units("block")
    for index, unit in enumerate(units):
        data = unit_data(unit, activations, means)
        if unit.name in wanted:
            yield unit, data
        harden(unit.module)
        over = activations.place(unit, data.target)
        output = run_batched(unit.module, data.quantized, settings.batch_size, device, store, over)
        activations.write(unit, output, data.target, live_names(units[index + 1 :]))


def measure(
    unit: Unit,
    data: UnitData,
    settings: ReconSettings,
    device: torch.device,
    peer: PeerUnits | None,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Median seconds of a step on each path; the paths take turns."""
    fast = FastEngine(always=True)  # of both precisions: each would throw away what the other has compiled
    paths: dict[str, Runner] = {
        "floor": lambda steps: floor(unit, data, settings, steps),
        "plain": lambda steps: ours(unit, data, settings, Engine(), device, steps),
        "fast": lambda steps: ours(unit, data, settings, fast, device, steps),
    }
    if bfloat16_pays(device):  # elsewhere it would be float32 once more
        narrow = replace(settings, precision="bf16")
        paths["fast_bf16"] = lambda steps: ours(unit, data, narrow, fast, device, steps)
    if peer is not None:
        paths["peer"] = lambda steps: peer.steps(unit.name, data, settings, steps)
    medians: dict[str, list[float]] = {name: [] for name in paths}
    before: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(args.rounds):
        for name, path in paths.items():
            seconds, first = path(args.steps + WARM_UP)
            medians[name].append(statistics.median(seconds[WARM_UP:]))
            before[name].append(first)
    row: dict[str, object] = {"unit": unit.name}
    row |= {name: statistics.median(values) for name, values in medians.items()}
    row["first_step_fast"] = before["fast"][0]
    print(json.dumps(row), flush=True)
    return row


class StepTimer:
    """A progress display that notes when steps begin and end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def __call__(self, name: str, steps: int) -> Iterable[int]:
        for step in range(steps):
            began = time.perf_counter()
            yield step
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds.append(time.perf_counter() - began)


def ours(
    unit: Unit, data: UnitData, settings: ReconSettings, engine: Engine, device: torch.device, steps: int
) -> tuple[list[float], float]:
    """Our own loop, on a copy of the unit."""
    timer = StepTimer(device)
    fresh = Unit(unit.name, copy.deepcopy(unit.module), unit.reads, unit.writes)
    generator = torch.Generator(device).manual_seed(0)
    with float32_precision(settings.precision):
        loop = Loop(generator, timer, engine, Peers())
        learn_unit(fresh, data, replace(settings, iters=steps), loop)
    return timer.seconds, timer.seconds[0]


def floor(unit: Unit, data: UnitData, settings: ReconSettings, steps: int) -> tuple[list[float], float]:
    """The unit's convolutions alone, on tensors of the same shapes and layouts."""
    module = copy.deepcopy(unit.module)
    device = next(module.buffers()).device
    calls: list[tuple[QuantConv2d, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
        assert isinstance(layer, QuantConv2d)
        calls.append((layer, args[0].detach().requires_grad_(args[0].requires_grad)))

    convolutions = [m for m in module.modules() if isinstance(m, QuantConv2d)]
    learned = [r.learned for r in start_rounding(module, replace(settings, iters=1)).values()]
    for convolution in convolutions:
        convolution.register_forward_hook(note)
    inputs = [x[: settings.batch_size].to(device).float() for x in data.quantized]
    qparams = [p for _, q in quantizers(module) for p in q.learned_qparams()]
    with learning([*learned, *qparams]):
        module(*inputs)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        for layer, x in calls:
            weight = layer.weight.detach().requires_grad_()
            y = layer.operate(x, weight)
            torch.autograd.grad(y, [weight, x] if x.requires_grad else [weight], y.detach())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds, seconds[0]


def in_all(rows: list[dict[str, object]]) -> dict[str, object]:
    """Sums over the units."""
    names = [name for name in rows[0] if name != "unit"]
    return {"unit": "all"} | {name: sum(float(str(row[name])) for row in rows) for name in names}


def table(rows: list[dict[str, object]]) -> str:
    """Milliseconds of a step as a Markdown table, and how much faster than the peer each path is."""
    paths = [name for name in rows[0] if name not in ("unit", "first_step_fast")]
    lines = ["| unit | " + " | ".join(f"{p}, ms" for p in paths) + " |", "|---" * (len(paths) + 1) + "|"]
    for row in rows:
        cells = []
        for path in paths:
            value, cell = float(str(row[path])), f"{1e3 * float(str(row[path])):.1f}"
            if "peer" in row and path != "peer":
                cell += f" ({float(str(row['peer'])) / max(value, 1e-9):.1f}x)"
            cells.append(cell)
        lines.append(f"| {row['unit']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, object]:
    """What it ran on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    described: dict[str, object] = {"cpu": cpu, "threads": torch.get_num_threads()}
    described["instructions"] = ", ".join(
        [torch.backends.cpu.get_cpu_capability(), *bfloat16_instructions()]
    )
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def arguments() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument("--peer", help="folder of a checkout of QDrop")
    parser.add_argument("--units", default="all", help="names, separated by commas; all, or none")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="steps of each round that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
