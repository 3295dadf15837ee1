"""Score the float network on ImageNet's validation images.

python ./calibquant/solver/test.py --config ./exp/w4a4/rs101/config.yaml
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

from calibquant.solver.config import load_config
from calibquant.solver.imagenet_util import evaluate, validation_loader
from calibquant.solver.pipeline import float_model
from calibquant.solver.run_log import start_run
from calibquant.solver.script import choose_device, config_parser, run_script

logger = logging.getLogger("calibquant")


def main() -> None:
    args = config_parser(__doc__).parse_args()
    config = load_config(args.config)
    with start_run("test_log", config) as run:
        device = choose_device(args.device)
        model = float_model(config).to(device)
        validation = validation_loader(config, device)
        with run.stage("evaluate_float"):
            score = evaluate(model, validation, device, config.data.skip_unreadable)
            logger.info("%s", score.in_full)
        run.record(float=score.as_dict())


if __name__ == "__main__":
    run_script(main)
