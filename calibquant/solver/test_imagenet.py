"""Score a saved quantized network on ImageNet's validation images.

python ./calibquant/solver/test_imagenet.py --config ./exp/w4a4/rs101/config.yaml \\
    --quantized_model_path resnet101_w4_a4_57283.pth
"""

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

from calibquant.solver.checkpoint import find_checkpoint, load_checkpoint, require_agreement
from calibquant.solver.config import load_config
from calibquant.solver.imagenet_util import evaluate, validation_loader
from calibquant.solver.run_log import start_run
from calibquant.solver.script import add_saved_model, choose_device, config_parser, run_script

logger = logging.getLogger("calibquant")


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config)
    path = find_checkpoint(args.quantized_model_path, config)
    with start_run("test_log", config) as run:
        device = choose_device(args.device)
        model, saved, metadata = load_checkpoint(path)
        require_agreement(config, saved, path)
        logger.info("quantized model %s", path)
        logger.debug("made with %s", metadata)
        validation = validation_loader(config, device)
        with run.stage("evaluate_quantized"):
            score = evaluate(model.to(device), validation, device, config.data.skip_unreadable)
            logger.info("%s", score.in_full)
        run.record(quantized=score.as_dict(), checkpoint=str(path), metadata=metadata)


def parse_arguments() -> argparse.Namespace:
    parser = config_parser(__doc__, "the YAML that the network was quantized with")
    add_saved_model(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
