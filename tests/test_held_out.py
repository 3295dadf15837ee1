"""Images held out from learning: nothing is learned from them, and they decide what is kept."""

import copy
import dataclasses

import pytest
import torch

from calibquant.quantization.state import full_precision
from calibquant.report.page import unit_table
from calibquant.report.run_data import unit_row
from calibquant.solver.augment import arrange, rows_of
from calibquant.solver.learn import ReconSettings, reconstruction_loss
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import Errors, reconstruct
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(3))
SHARE = 0.25
HELD_OUT = [2, 6, 10]


def learn(images, model=None, **changes):
    config = small_config(**{"quant__w_qconfig__bit": 2, "quant__recon__held_out": SHARE} | changes)
    model = calibrated_model(config, IMAGES) if model is None else copy.deepcopy(model)
    return model, list(reconstruct(model, images, recon_settings(config), seed=7))


@pytest.mark.parametrize("count", [1, 2, 3, 12, 13, 1024])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.01, SHARE, 0.5])
def test_every_image_is_either_learned_from_or_held_out(count, views, share):
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    rows = rows_of(count, ReconSettings(views=views, held_out=share))
    arranged = arrange(images, rows, seed=1)
    learned, held_out = arranged[: rows.images], arranged[rows.views :]
    assert len(arranged) == rows.count and len(held_out) == rows.held_out
    assert sorted([*learned[:, 0, 0, 0].tolist(), *held_out[:, 0, 0, 0].tolist()]) == list(range(count))
    if count > 1 and share:
        assert rows.held_out == max(1, round(share * count))
        gaps = held_out[:, 0, 0, 0].diff()
        assert gaps.numel() == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"quant__recon__compensate": True}, {"quant__recon__ranges": "quantized"}],
    ids=["plain", "compensated", "ranges"],
)
def test_nothing_is_learned_from_images_held_out(changes, monkeypatch):
    monkeypatch.setattr(Errors, "deciding", property(lambda errors: errors.learned))  # or they would decide
    start = calibrated_model(small_config(quant__w_qconfig__bit=2), IMAGES)
    others = IMAGES.clone()
    others[HELD_OUT] = others[HELD_OUT].flip(2) * 3
    (model, results), (other, _) = (learn(images, start, **changes) for images in (IMAGES, others))
    assert not all(result.reverted for result in results)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_error_on_images_held_out_is_that_of_the_finished_network():
    model, results = learn(IMAGES, quant__recon__cache="fp32")
    unseen = IMAGES[HELD_OUT]
    float_twin = calibrated_model(small_config(), IMAGES)
    with torch.no_grad(), full_precision(float_twin):
        error = reconstruction_loss(model(unseen), float_twin(unseen))
    assert results[-1].held_out_after == pytest.approx(float(error), rel=1e-3)


def test_learning_that_is_worse_for_images_held_out_is_taken_back():
    images = IMAGES.clone()
    images[HELD_OUT] = images[HELD_OUT].flip(2) * 4  # unlike all that is learned from
    memorizing = {"quant__recon__iters": 60, "quant__recon__round_lr": 0.1}
    _, held_out = learn(images, **memorizing)
    _, by_itself = learn(images, **memorizing, quant__recon__held_out=0.0)
    assert all(result.held_out_after <= result.held_out_before for result in held_out)
    assert all(result.held_out_after is None for result in by_itself)
    assert sum(r.reverted for r in held_out) > sum(r.reverted for r in by_itself)


def test_the_report_shows_both_errors_where_images_are_held_out():
    _, results = learn(IMAGES)
    entry = dataclasses.asdict(results[-1])
    shown = unit_table([unit_row(entry)])
    assert "change, held out" in shown
    assert f"{100 * (entry['held_out_after'] / entry['held_out_before'] - 1):+.1f}" in shown
    assert "held out" not in unit_table(
        [unit_row(entry | {"held_out_before": None, "held_out_after": None})]
    )
