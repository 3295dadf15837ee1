"""Before the classifier learns: its weights fitted to inputs smaller and noisier than the float ones.

Squared error, by which units learn, does not show what is done here: it is least for outputs that are too
small. The matched classifier is therefore what the classifier's unit then learns to give.
"""

import torch
from torch import Tensor

from calibquant.model.quant_layer import QuantLinear
from calibquant.model.quant_resnet import QuantClassifier
from calibquant.quantization.state import full_precision
from calibquant.solver.caches import Store, UnitData, run_batched
from calibquant.solver.peers import Peers

WIDEST = 2.0
"""Largest factor, and its inverse the smallest, by which an input is matched."""
CONSTANT = 1e-6
"""Share of an input's mean square below which its variance is rounding: there is nothing to match."""


@torch.no_grad()
def match_classifier(
    classifier: QuantClassifier,
    data: UnitData,
    learned: UnitData,
    batch: int,
    device: torch.device,
    peers: Peers,
) -> UnitData:
    """Match the inputs of a classifier that is a unit of its own.

    Args:
        data: of its unit, the images held out among it.
        learned: the part of it that is learned from, on which inputs are matched.
        batch: images run at once.
        device: to work on.
        peers: processes whose moments are averaged.

    Returns:
        The unit's data, its target the output of the matched classifier, nothing of which is quantized.
    """
    full, quantized = (
        torch.cat([classifier.pool(rows.to(device, torch.float32)) for rows in x.split(batch)])
        for (x,) in (learned.full, learned.quantized)
    )
    match_inputs(classifier.fc, full, quantized, peers)
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
