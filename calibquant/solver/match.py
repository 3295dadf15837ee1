"""Before the classifier learns: its weights fitted to inputs smaller and noisier than the float ones.

Squared error, by which units learn, does not show what is done here: it is least for outputs that are too
small. The matched classifier is therefore what the classifier's unit then learns to give.
"""

import torch
from torch import Tensor

from calibquant.model.quant_layer import QuantLinear
from calibquant.model.quant_resnet import QuantClassifier, QuantResNet
from calibquant.quantization.state import full_precision
from calibquant.solver.augment import view_of
from calibquant.solver.caches import Store, UnitData, run_batched
from calibquant.solver.peers import Peers

WIDEST = 2.0
"""Largest factor, and its inverse the smallest, by which an input is matched."""
CONSTANT = 1e-6
"""Share of an input's mean square below which its variance is rounding: there is nothing to match."""


class UnlearnedViews:
    """Views that no unit learns from, as the classifier reads them: units fit them as they fit new images.

    They are not carried from unit to unit: the float network sees them once before anything is learned, the
    quantized one once behind the last block. A view is drawn when it is needed, each time the same.

    Args:
        model: the calibrated network, nothing of it reconstructed yet, on the device to work on.
        images: ``[N, 3, H, W]``, normalised, on any device.
        numbers: of the views, as in :func:`~calibquant.solver.augment.view_of`.
        seed: of the views.
        batch: images run at once.
    """

    def __init__(self, model: QuantResNet, images: Tensor, numbers: range, seed: int, batch: int) -> None:
        self.model, self.images, self.numbers, self.seed, self.batch = model, images, numbers, seed, batch
        with full_precision(model):
            self.full = self._features()

    def features(self) -> tuple[Tensor, Tensor]:
        """What the classifier's layer reads in the float and in the present network, ``[N * views, C]``."""
        return self.full, self._features()

    @torch.no_grad()
    def _features(self) -> Tensor:
        device = next(self.model.buffers()).device
        views = (view_of(self.images, number, self.seed) for number in self.numbers)
        batches = (rows for view in views for rows in view.split(self.batch))
        return torch.cat([self.model.features(rows.to(device)) for rows in batches])


@torch.no_grad()
def cached_features(
    classifier: QuantClassifier, data: UnitData, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the classifier's layer reads in the float and in the quantized network, ``[N, C]``."""
    full, quantized = (
        torch.cat([classifier.pool(rows.to(device, torch.float32)) for rows in x.split(batch)])
        for (x,) in (data.full, data.quantized)
    )
    return full, quantized


@torch.no_grad()
def match_classifier(
    classifier: QuantClassifier,
    data: UnitData,
    features: tuple[Tensor, Tensor],
    batch: int,
    device: torch.device,
    peers: Peers,
) -> UnitData:
    """Match the inputs of a classifier that is a unit of its own.

    Args:
        data: what its unit learns from.
        features: what its layer reads in the float and in the quantized network, ``[N, C]``; of any images.
        batch: images run at once.
        device: to work on.
        peers: processes whose moments are averaged.

    Returns:
        The unit's data, its target the output of the matched classifier, nothing of which is quantized.
    """
    match_inputs(classifier.fc, *features, peers)
    peers.match(classifier)  # the same to the last bit
    with full_precision(classifier):
        store = Store(data.target.device, data.target.dtype)
        target = run_batched(classifier, data.quantized, batch, device, store)
    return UnitData(data.quantized, data.quantized, target)


def match_inputs(layer: QuantLinear, full: Tensor, quantized: Tensor, peers: Peers) -> None:
    """Fold into a layer what makes each of its inputs rise and fall with the float network's, one for one.

    Each layer that was fitted to noisy inputs gives a little less than the float one, as every regression
    does: at the end of a real ResNet-50 pooled features were a tenth too small, and predictions too unsure.
    Another regression of the float inputs on these would make them smaller still. Here, therefore, these
    are regressed on the float ones, and divided by the slope: their noise adds to their spread, but stands
    for nothing of the float input's (the classical estimator of calibration, Eisenhart 1939).

    Args:
        full, quantized: inputs ``[N, K]`` of the layer in both networks.
        peers: processes whose moments are averaged.
    """
    moments = [x.mean(0) for x in (full, quantized, full * full, full * quantized)]
    peers.average(moments)
    mean, mean_quantized, square, product = moments
    spread, shared = square - mean**2, product - mean * mean_quantized
    factor = (spread / torch.maximum(shared, CONSTANT * spread)).clamp(1 / WIDEST, WIDEST)
    factor = torch.where(spread > CONSTANT * square, factor, 1.0)
    layer.bias += layer.weight @ (mean - factor * mean_quantized)
    layer.weight *= factor
    layer.calibrate_weight()
