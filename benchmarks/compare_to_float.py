"""How near a saved quantized network is to its float network, on the val images: label-free, little noise.

python ./benchmarks/compare_to_float.py --config ./exp/w4a4/rs50_msra/config.yaml \\
    --quantized_model_path resnet50_w4_a4_12345.pth

Prints one JSON object: top-1 of both, the share of images on which both predict the same class, and the
mean Kullback-Leibler divergence KL(float || quantized) of their softmax outputs in nats.
"""

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the repository is a folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import calibquant.quiet_start  # noqa: F401

import torch

from calibquant.errors import UserError
from calibquant.solver.checkpoint import find_checkpoint, load_checkpoint, require_agreement
from calibquant.solver.config import load_config
from calibquant.solver.imagenet_util import batches, report_unreadable, validation_loader
from calibquant.solver.pipeline import float_model
from calibquant.solver.probe import Reference
from calibquant.solver.run_log import versions
from calibquant.solver.script import add_saved_model, choose_device, config_parser, run_script


def main() -> None:
    parser = config_parser(__doc__)
    add_saved_model(parser)
    args = parser.parse_args()
    config = load_config(args.config)
    device = choose_device(args.device)
    path = find_checkpoint(args.quantized_model_path, config)
    quantized, saved, _ = load_checkpoint(path)
    require_agreement(config, saved, path)
    reference = float_model(config).to(device)
    print(json.dumps(compare(reference, quantized.to(device), config, device) | {"versions": versions()}))


@torch.no_grad()
def compare(reference, quantized, config, device) -> dict[str, float]:
    """Both networks over the val images, against each other and against the classes."""
    expected, found, targets = [], [], []
    for batch in batches(validation_loader(config, device), "compare"):
        report_unreadable(batch, config.data.skip_unreadable)
        if not len(batch.images):
            continue
        x = batch.images.to(device)
        expected.append(reference(x))
        found.append(quantized(x))
        targets.append(batch.targets.clone().to(device))
    if not targets:
        raise UserError("val folder: no image in it can be read")
    known = Reference(expected, targets)
    cost = known.compare(found)
    return {
        "images": sum(len(each) for each in targets),
        "float_top1": known.compare(expected).top1,
        "quantized_top1": cost.top1,
        "agreement": cost.agreement,
        "kl": cost.kl,
    }


if __name__ == "__main__":
    run_script(main)
