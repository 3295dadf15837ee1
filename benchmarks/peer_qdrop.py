"""QDrop's published code, run unit by unit beside ours, from a checkout of its repository.

Nothing of it is copied: its modules are imported from the folder that the user gives, and its own
reconstruction loop runs, fed with our cached activations instead of re-running the network for them.
"""

import copy
import importlib
import itertools
import logging
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.errors import UserError
from calibquant.model.resnet import ResNet
from calibquant.solver.caches import UnitData
from calibquant.solver.learn import ReconSettings


class PeerUnits:
    """The peer's quantized network, with min-max ranges, as a list of its reconstruction units.

    Raises:
        UserError: the folder is no checkout of QDrop, or the config's rounding is none that QDrop has.
    """

    def __init__(
        self, folder: Path, model: ResNet, config: EasyDict, images: Tensor, device: torch.device
    ) -> None:
        if not (folder / "qdrop" / "solver" / "recon.py").is_file():
            raise UserError(f"--peer {folder}: holds no qdrop/solver/recon.py; allowed is a QDrop checkout")
        mode = config.quant.recon.round_mode
        if mode != "learned_hard_sigmoid":
            raise UserError(
                f"--peer: quant.recon.round_mode is {mode}, allowed is QDrop's own, learned_hard_sigmoid"
            )
        sys.path[1:1] = [str(folder), str(folder / "qdrop" / "solver")]
        logging.getLogger("qdrop").setLevel(logging.ERROR)
        self.code = _modules()
        self.device = device
        network = getattr(self.code.resnet, config.model.type)(num_classes=model.fc.out_features)
        network.load_state_dict(model.state_dict())
        if config.model.kwargs.stride_in_1x1:
            for block in network.modules():
                if isinstance(block, self.code.resnet.Bottleneck):
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
        self.code.main.search_fold_and_remove_bn(network)
        quant = copy.deepcopy(config.quant)
        quant.w_qconfig.observer = quant.a_qconfig.observer = "MinMaxObserver"
        self.network = self.code.main.quantize_model(network, quant).to(device).eval()
        self.reference = copy.deepcopy(self.network)
        self.code.state.disable_all(self.reference)
        with torch.no_grad():
            for kind in ("act_fake_quant", "weight_fake_quant"):
                self.code.state.enable_calibration_woquantization(self.network, quantizer_type=kind)
                self.network(images.to(device))
        self.code.state.enable_quantization(self.network)
        self.units = self._units(self.network)
        self.float_units = self._units(self.reference)

    def _units(self, module: nn.Module) -> list[nn.Module]:
        kinds = (self.code.main.QuantizedLayer, self.code.main.QuantizedBlock)
        found: list[nn.Module] = []
        for child in module.children():
            found += [child] if isinstance(child, kinds) else self._units(child)
        return found

    def steps(
        self, name: str, data: UnitData, settings: ReconSettings, steps: int
    ) -> tuple[list[float], float]:
        """Run the peer's own loop on a copy of its unit; the seconds of each step, and of the first."""
        index = self._index(name)
        unit, float_unit = copy.deepcopy(self.units[index]), self.float_units[index]
        first, last = index == 0, index == len(self.units) - 1
        prepare = (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)) if last else (lambda x: x)
        quantized, full = (prepare(x[0].float().contiguous()) for x in (data.quantized, data.full))
        with torch.no_grad():
            target = float_unit(full) if first else data.target.float().contiguous()
        given = iter([([quantized], []), ([full], [target])])

        def cached(*_: object, **__: object) -> tuple[Any, Any]:
            inputs, outputs = next(given)
            return (inputs[0], outputs[0] if outputs else None)

        marks = [time.perf_counter()]
        loop = self.code.recon
        honest_loss, honest_cache = loop.LossFunction, loop.save_inp_oup_data
        device = self.device

        class TimedLoss(honest_loss):  # type: ignore[misc, valid-type]
            def __call__(self, *args: Any) -> Any:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                marks.append(time.perf_counter())
                return super().__call__(*args)

        loop.LossFunction, loop.save_inp_oup_data = TimedLoss, cached
        try:
            options = EasyDict(
                batch_size=settings.batch_size, scale_lr=settings.scale_lr, warm_up=settings.warm_up,
                weight=settings.weight, iters=steps + 1, b_range=list(settings.b_range), keep_gpu=True,
                round_mode=settings.round_mode, drop_prob=settings.drop_prob,
            )  # fmt: skip
            loop.reconstruction(self.network, self.reference, unit, float_unit, None, options)
        finally:
            loop.LossFunction, loop.save_inp_oup_data = honest_loss, honest_cache
        seconds = [after - before for before, after in itertools.pairwise(marks[1:])]
        return seconds, seconds[0]

    def _index(self, name: str) -> int:
        """Place of one of our units among the peer's: the stem, the blocks in order, the classifier."""
        if name in ("stem", "classifier"):
            return 0 if name == "stem" else len(self.units) - 1
        names = [
            f"layer{stage}.{number}"
            for stage in range(1, 5)
            for number in range(len(getattr(self.network, f"layer{stage}")))
        ]
        return 1 + names.index(name)


def _modules() -> Any:
    """The peer's modules that are used here."""
    names = {
        "recon": "recon",
        "main": "main_imagenet",
        "resnet": "qdrop.model.resnet",
        "state": "qdrop.quantization.state",
    }
    return types.SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})
