"""What a run keeps for its report is what there was, bounded, and disturbs nothing."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibquant.quantization.fake_quant import Role
from calibquant.quantization.state import quantizers
from calibquant.report.page import run_page
from calibquant.report.record import (
    HISTOGRAM_IMAGES,
    THUMBNAILS,
    activation_quantizers,
    clipping_range,
    count_activations,
    spread,
    thumbnails,
)
from calibquant.report.run_data import read_run
from calibquant.solver.imagenet_util import Calibration, evaluation_transform, read_image
from calibquant.solver.pipeline import calibrate, quantize_model, recon_settings
from calibquant.solver.recon import reconstruct
from calibquant.solver.report import recorded_for_report
from tests.runs import metrics, unit, write_run
from tests.small import calibrated_model, random_float_model, small_config

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def test_histograms_are_those_of_the_activations_themselves() -> None:
    config = small_config()
    model = calibrated_model(config, IMAGES)
    seen: dict[str, list[torch.Tensor]] = {}
    found = activation_quantizers(model)
    for name, quantizer in found:
        quantizer.register_forward_hook(
            lambda _, x, __, name=name: seen.setdefault(name, []).append(x[0].clone())
        )
    counts = count_activations(model, IMAGES, 5)
    for (name, quantizer), count in zip(found, counts, strict=True):
        values = torch.cat([x.flatten() for x in seen[name]]).numpy()
        described = count.as_dict()
        assert described["elements"] == values.size and described["zeros"] == (values == 0).sum()
        expected, _ = np.histogram(
            values[values != 0], len(described["counts"]), (values.min(), values.max())
        )
        assert abs(np.array(described["counts"]) - expected).sum() < 0.05 * expected.sum() + 20
        edges = torch.tensor([-1e9, 1e9])
        with torch.no_grad():
            low, high = quantizer(edges).tolist()  # whatever is clipped ends there
        clipping = clipping_range(quantizer, count)
        assert (clipping.low, clipping.high) == pytest.approx((low, high))
        outside = ((values < low) | (values > high)).mean()
        assert clipping.clipped == pytest.approx(outside, abs=2e-3)
    assert len(found) == len(quantizers(model, Role.ACTIVATION)) == 17


def test_recording_changes_nothing_and_keeps_the_ranges_before_and_after(tmp_path: Path) -> None:
    config = small_config(quant__recon__scale_lr=0.01)
    models = [calibrated_model(config, IMAGES) for _ in range(2)]
    calibration = Calibration(IMAGES, [f"{i}.png" for i in range(12)], "")
    with recorded_for_report(tmp_path, models[0], calibration, config):
        list(reconstruct(models[0], IMAGES, recon_settings(config), 1))
    list(reconstruct(models[1], IMAGES, recon_settings(config), 1))
    assert torch.equal(models[0](IMAGES), models[1](IMAGES))
    assert not [module for module in models[0].modules() if module._forward_hooks]
    entries = json.loads((tmp_path / "report.json").read_text())["activations"]
    assert [entry["name"] for entry in entries[:3]] == ["stem", "layer1.0.conv1", "layer1.0.join"]
    now = [quantizer(torch.tensor(1e9)).item() for _, quantizer in activation_quantizers(models[0])]
    assert [entry["learned"]["high"] for entry in entries] == pytest.approx(now)
    assert any(entry["learned"] != entry["calibrated"] for entry in entries)


def test_pictures_are_the_images_as_the_network_is_given_them(tmp_path: Path) -> None:
    data = small_config(data__input_size=64, data__test_resize=64).data
    y, x = np.mgrid[0:64, 0:64]
    Image.fromarray(np.stack([4 * x, 4 * y, 255 - 4 * x], 2).astype(np.uint8)).save(tmp_path / "a.png")
    image = evaluation_transform(data)(read_image(tmp_path / "a.png"))
    (entry,) = thumbnails(image[None], ["a.png"], data.mean, data.std)
    shown = Image.open(io.BytesIO(base64.b64decode(entry["jpeg"])))
    original = Image.open(tmp_path / "a.png").resize(shown.size)
    assert shown.size == (64, 64) and entry["file"] == "a.png"
    assert np.abs(np.asarray(shown, float) - np.asarray(original, float)).mean() < 8


def test_what_is_recorded_is_bounded() -> None:
    assert spread(5, 200) == [0, 1, 2, 3, 4] and spread(0, 3) == []
    assert len(set(spread(1024, THUMBNAILS))) == THUMBNAILS and max(spread(1024, THUMBNAILS)) > 1000
    noise = torch.randn(THUMBNAILS + 5, 3, 90, 60)
    found = thumbnails(noise, [str(i) for i in range(len(noise))], [0.5] * 3, [0.3] * 3)
    assert len(found) == THUMBNAILS and sum(len(entry["jpeg"]) for entry in found) < 1_500_000
    model = calibrated_model(small_config(), IMAGES)
    many = IMAGES.repeat(HISTOGRAM_IMAGES, 1, 1, 1)
    stem = count_activations(model, many, 64)[0]
    assert stem.elements == HISTOGRAM_IMAGES * 4 * 16 * 16


def test_a_range_per_channel_and_an_activation_of_zeros_alone_are_recorded(tmp_path: Path) -> None:
    config = small_config(quant__a_qconfig__ch_axis=1)
    model = random_float_model(config)
    model.layer2[0].bn1.weight.data.zero_()
    model.layer2[0].bn1.bias.data.fill_(-1)
    quantized = quantize_model(model, config)
    calibrate(quantized, IMAGES, config)
    with recorded_for_report(tmp_path, quantized, Calibration(IMAGES, ["x"] * 12, ""), config):
        pass
    entries = {e["name"]: e for e in json.loads((tmp_path / "report.json").read_text())["activations"]}
    assert entries["stem"]["channels"] == 4 and entries["stem"]["learned"]["clipped"] is None
    dead = entries["layer2.0.conv1"]
    assert dead["zeros"] == dead["elements"] > 0 and not any(dead["counts"])
    page = run_page(read_run(write_run(tmp_path, metrics([unit("stem")]))))
    assert "4 channels, widest range" in page and "100 % zeros" in page and "not drawn" not in page
