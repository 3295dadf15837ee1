"""Quantize a pretrained ResNet as main_imagenet.py does, with a process per GPU or several on CPUs.

torchrun --nproc_per_node 2 ./calibquant/solver/main_distributed.py --config ./exp/w4a4/rs101/config.yaml
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401
    from calibquant.parent import end_with_parent

    if "RANK" in os.environ:
        end_with_parent()  # already while torch is imported

from easydict import EasyDict

from calibquant.errors import UserError
from calibquant.solver.config import load_config
from calibquant.solver.distributed import team, team_run, team_state
from calibquant.solver.main_imagenet import interruptible, parse_arguments, quantize
from calibquant.solver.report import write_report
from calibquant.solver.script import run_script


def main() -> None:
    if "RANK" not in os.environ:
        parse_arguments(__doc__)  # shows --help without torchrun, too
    with team() as peers:
        args = peers.from_first(lambda: parse_arguments(__doc__))
        config = peers.from_first(lambda: load_config(args.config))
        require_equal_shares(config, peers.size)
        with team_state(args.config, args.fresh, peers) as state, team_run(config, peers) as run:
            state.logs_to(run.folder)
            with interruptible(args.fresh):
                quantize(config, peers.device(args.device), run, state, peers)
            if peers.leads:
                write_report(run.folder)
            state.forget()


def require_equal_shares(config: EasyDict, processes: int) -> None:
    """Refuse a batch that cannot be shared out equally.

    Raises:
        UserError: naming the key.
    """
    batch = config.quant.recon.batch_size
    if batch % processes:
        raise UserError(
            f"quant.recon.batch_size is {batch}, allowed is a multiple of {processes}, "
            "the number of processes that share it"
        )


if __name__ == "__main__":
    run_script(main)
