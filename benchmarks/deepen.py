"""A ResNet-101 out of a ResNet-50's weights, to measure time and memory where no ResNet-101's are at hand.

python ./benchmarks/deepen.py --config ./exp/w4a4/rs50_msra/config.yaml \\
    --quant ./exp/w4a4/rs101/config.yaml --out ./train_log/deepened
python ./calibquant/solver/main_imagenet.py --config ./train_log/deepened/config.yaml

Blocks that ResNet-50 lacks repeat the last one of their stage, what they add scaled down, so that
activations keep their range. Shapes, and with them time and memory, are ResNet-101's.
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the repository is a folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import calibquant.quiet_start  # noqa: F401

import torch
import yaml
from torch import Tensor

from calibquant.errors import UserError
from calibquant.model.resnet import ARCHITECTURES
from calibquant.solver.config import load_config, plain
from calibquant.solver.files import require_writable, write_atomically, write_bytes
from calibquant.solver.pipeline import float_model
from calibquant.solver.script import config_parser, run_script

SHARE = 0.01
"""Of what a repeated block adds, what is left."""


def main() -> None:
    args = arguments()
    config, other = load_config(args.config), load_config(args.quant)
    if config.model.type != "resnet50":
        raise UserError(f"--config {args.config}: model.type is {config.model.type}, allowed is resnet50")
    require_writable(args.out)
    state = deepened(float_model(config).state_dict(), ARCHITECTURES["resnet101"].depths)
    path = args.out / "resnet101.pth"
    write_atomically(path, lambda file: torch.save(state, file))
    raw = plain(config) | {"quant": plain(other)["quant"]}
    raw["model"] |= {"type": "resnet101", "path": str(path)}
    write_bytes(args.out / "config.yaml", yaml.safe_dump(raw, sort_keys=False).encode())
    print(args.out / "config.yaml")


def deepened(state: dict[str, Tensor], depths: tuple[int, ...]) -> dict[str, Tensor]:
    """A state dict with so many blocks in each stage, those that it lacks made of the stage's last one."""
    result = dict(state)
    for stage, depth in enumerate(depths, start=1):
        last = max(int(m[1]) for key in state if (m := re.match(rf"layer{stage}\.(\d+)\.", key)))
        start = f"layer{stage}.{last}."
        block = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        block |= {name: block[name] * SHARE for name in ("bn3.weight", "bn3.bias")}
        for number in range(last + 1, depth):
            result |= {f"layer{stage}.{number}.{name}": value.clone() for name, value in block.items()}
    return result


def arguments() -> argparse.Namespace:
    parser = config_parser(__doc__, "YAML of a ResNet-50 and its images", device=False)
    parser.add_argument("--quant", required=True, help="YAML whose quant section is taken")
    parser.add_argument("--out", type=Path, required=True, help="folder for resnet101.pth and config.yaml")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
