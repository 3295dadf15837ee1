"""A small piece of the real work: He et al.'s ResNet-50 on real ImageNet images."""

import os
from pathlib import Path

import pytest
import torch

from calibquant.quantization.observer import MSEFastObserver
from calibquant.quantization.state import calibrating, full_precision
from calibquant.solver.augment import rows_of
from calibquant.solver.caches import Activations
from calibquant.solver.config import check_config, load_config, plain
from calibquant.solver.imagenet_util import load_calibration, validation_loader
from calibquant.solver.pipeline import calibrate, float_model, quantize_model, recon_settings
from calibquant.solver.recon import Means, reconstruct_unit, store_for, unit_data

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = os.environ.get("CALIBQUANT_IMAGENET_SAMPLE")

pytestmark = [
    pytest.mark.imagenet_sample,
    pytest.mark.skipif(not SAMPLE, reason="CALIBQUANT_IMAGENET_SAMPLE is not set"),
]


def sample_config(**recon):
    """The published-budget config, with few images and min-max ranges, which are quick to find."""
    raw = plain(load_config(ROOT / "exp/w4a4/rs50_msra/qdrop.yaml"))
    raw["quant"]["w_qconfig"] |= {"observer": "MinMaxObserver", "bit": 8}
    raw["quant"]["a_qconfig"] |= {"observer": "MinMaxObserver", "bit": 8}
    raw["quant"]["calibrate"] = 16
    raw["quant"]["recon"] |= recon
    raw["data"] |= {"batch_size": 16, "num_workers": 0}
    return check_config(raw)


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def labelled(threads):
    """128 validation images with their classes, spread over the sample."""
    config = sample_config()
    dataset = validation_loader(config).dataset
    items = [dataset[index] for index in range(0, len(dataset), len(dataset) // 128)][:128]
    return torch.stack([image for image, _ in items]), torch.tensor([target for _, target in items])


@pytest.fixture(scope="module")
def network(threads):
    config = sample_config()
    return float_model(config), load_calibration(config).images


def predictions(model, images):
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(32)])


def test_the_real_network_recognises_real_images_and_keeps_doing_so_at_8_bits(network, labelled):
    model, calibration = network
    images, targets = labelled
    float_predictions = predictions(model, images)
    assert (float_predictions == targets).float().mean() > 0.7  # 81.4 % on all 800
    config = sample_config()
    quantized = quantize_model(model, config)
    with full_precision(quantized):
        assert torch.equal(predictions(quantized, images), float_predictions)
    calibrate(quantized, calibration, config)
    assert (predictions(quantized, images) == float_predictions).float().mean() > 0.93


def test_reconstructing_a_real_block_at_2_bits_takes_a_third_off_its_error(network):
    model, calibration = network
    config = sample_config(iters=40, batch_size=8)
    config.quant.w_qconfig.bit = 2
    quantized = quantize_model(model, config)
    names = [unit.name for unit in quantized.units("block")]
    index = names.index("layer3.1")
    with torch.no_grad():
        x = model.layer2(model.layer1(model.maxpool(torch.relu(model.bn1(model.conv1(calibration))))))
        x = model.layer3[0](x)
    unit = quantized.units("block")[index]
    for layer in [*unit.module.branch, unit.module.join.last]:
        layer.weight_quantizer.observer_type = MSEFastObserver
        layer.calibrate_weight()
    with calibrating(unit.module):
        unit.module(x)
    settings, device = recon_settings(config), torch.device("cpu")
    means = Means(settings, device, store_for(settings, device), rows_of(len(calibration), settings))
    data = unit_data(unit, Activations(x), means)
    result = reconstruct_unit(unit, data, means, torch.Generator().manual_seed(0))
    assert result.error_after < 2 / 3 * result.error_before  # hardened, after 40 steps
