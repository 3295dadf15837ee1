"""Calibration as a whole: what it refuses, and what it reports."""

import logging

import pytest
import torch

from calibquant.errors import UserError
from calibquant.solver.pipeline import calibrate, quantize_model, recon_settings
from tests.small import SOON_CALIBRATED, random_float_model, small_config

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_a_dead_channel_and_a_dead_activation_are_named_and_harm_nothing(caplog):
    config = small_config()
    model = random_float_model(config)
    model.layer1[0].conv1.weight.data[1] = 0
    model.layer2[0].bn1.weight.data.zero_()
    model.layer2[0].bn1.bias.data.fill_(-1)
    quantized = quantize_model(model, config)
    with caplog.at_level(logging.WARNING, "calibquant"):
        calibrate(quantized, IMAGES, config)
    assert "blocks.0.branch.conv1.weight_quantizer: 1 of 4 channels are zero throughout" in caplog.text
    assert "or too small for the least step size" in caplog.text
    assert "blocks.2.branch.conv1.output_quantizer: 1 of 1 channels" in caplog.text
    with torch.no_grad():
        assert torch.isfinite(quantized(IMAGES)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_qconfig__quantizer": "LSQFakeQuantize", "recon__round_mode": "straight_through"},
         ["quant.recon.round_mode: changes nothing with quant.w_qconfig.quantizer LSQFakeQuantize"]),
        ({"w_qconfig__quantizer": "FixedFakeQuantize", "recon__weight_scale_lr": 0.01},
         ["quant.recon.weight_scale_lr: changes nothing with quant.w_qconfig.quantizer FixedFakeQuantize"]),
        ({"recon__round_mode": "nearest", "recon__weight_scale_lr": 0.01},
         ["quant.recon.weight_scale_lr: changes nothing with quant.recon.round_mode nearest"]),
        ({"recon__round_mode": "straight_through", "recon__weight_scale_lr": 0.01}, []),
        ({"equalize__iters": 2, "w_qconfig__ch_axis": -1},
         ["quant.equalize.iters: changes nothing with quant.w_qconfig.ch_axis -1 and"]),
        ({"equalize__iters": 2, "a_qconfig__ch_axis": 1},
         ["quant.a_qconfig.ch_axis 1, but with 0 and -1"]),
        ({"equalize__iters": 2}, []),
    ],
)  # fmt: skip
def test_what_is_set_and_changes_nothing_is_named(caplog, changes, words):
    config = small_config(**SOON_CALIBRATED, **{f"quant__{key}": value for key, value in changes.items()})
    with caplog.at_level(logging.WARNING, "calibquant"):
        calibrate(quantize_model(random_float_model(config), config), IMAGES, config)
        recon_settings(config)
    said = [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]
    assert len(said) == len(words) and all(word in text for word, text in zip(words, said, strict=True))


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("weight", "classifier.fc"),
        ("bias", "blocks.2.branch.conv1"),
        ("images", "stem.output_quantizer"),
    ],
)
def test_numbers_that_are_none_are_refused_where_they_arise(where, named):
    config = small_config()
    quantized = quantize_model(random_float_model(config), config)
    images = IMAGES.clone()
    if where == "weight":
        quantized.classifier.fc.weight[3, 3] = torch.inf
    elif where == "bias":
        quantized.blocks[2].branch.conv1.bias[0] = -torch.inf  # the ReLU behind it makes this zero
    else:
        images[4, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=rf"calibration: {named}: .* holds NaN or infinity"):
        calibrate(quantized, images, config)
