"""How near a saved quantized network is to its float network, on the val images: label-free, little noise.

python ./benchmarks/compare_to_float.py --config ./exp/w4a4/rs50_msra/config.yaml \\
    --quantized_model_path resnet50_w4_a4_12345.pth

Prints one JSON object: top-1 of both, the share of images on which both predict the same class, and the
mean Kullback-Leibler divergence KL(float || quantized) of their softmax outputs in nats.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn import functional as F

from calibquant.solver.checkpoint import find_checkpoint, load_checkpoint, require_agreement
from calibquant.solver.config import load_config
from calibquant.solver.imagenet_util import batches, report_unreadable, validation_loader
from calibquant.solver.pipeline import float_model
from calibquant.solver.run_log import versions
from calibquant.solver.script import choose_device, config_parser, run_script


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument("--quantized_model_path", required=True)
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
    """Sums over the val images, in float64."""
    images = float_hits = quantized_hits = agreements = 0
    divergence = 0.0
    for batch in batches(validation_loader(config), "compare"):
        report_unreadable(batch, config.data.skip_unreadable)
        x, targets = batch.images.to(device), batch.targets.to(device)
        ours, theirs = quantized(x), reference(x)
        predicted, expected = ours.argmax(1), theirs.argmax(1)
        images += len(x)
        float_hits += int((expected == targets).sum())
        quantized_hits += int((predicted == targets).sum())
        agreements += int((predicted == expected).sum())
        log_ours, log_theirs = F.log_softmax(ours.double(), 1), F.log_softmax(theirs.double(), 1)
        divergence += float(F.kl_div(log_ours, log_theirs, reduction="sum", log_target=True))
    return {
        "images": images,
        "float_top1": 100 * float_hits / images,
        "quantized_top1": 100 * quantized_hits / images,
        "agreement": 100 * agreements / images,
        "kl": divergence / images,
    }


if __name__ == "__main__":
    run_script(main)
