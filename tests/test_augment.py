"""Views of the calibration images: which there are, and that nothing else changes with them."""

import pytest
import torch

from calibquant.solver.augment import arrange, rows_of, split_off, view_of
from calibquant.solver.cache_plan import Need, Room, choose_store
from calibquant.solver.caches import Activations
from calibquant.solver.learn import ReconSettings
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import reconstruct
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_images_themselves_come_first_then_their_mirror_images():
    assert arrange(IMAGES, rows_of(5, ReconSettings()), seed=0) is IMAGES
    views = arrange(IMAGES, rows_of(5, ReconSettings(views=4)), seed=0)
    assert views.shape == (20, 3, 16, 16)
    assert torch.equal(views[:5], IMAGES)
    assert torch.equal(views[5:10], IMAGES.flip(3))
    assert torch.equal(views[10:15], view_of(IMAGES, 2, seed=0))
    assert torch.equal(views[15:], view_of(IMAGES, 3, seed=0))


def test_crops_are_parts_of_their_own_image_and_differ():
    ramp = torch.arange(5.0).view(5, 1, 1, 1) * 100 + torch.linspace(0, 1, 16).expand(3, 16, 16)
    crops = torch.stack([view_of(ramp, view, seed=1) for view in (2, 3, 4)])
    for number in range(5):
        of_one = crops[:, number] - 100 * number
        assert float(of_one.min()) > -1e-3 and float(of_one.max()) < 1 + 1e-3  # nothing of another image
        assert not torch.equal(of_one[0], of_one[1])
        assert all(float(view.max() - view.min()) > 0.4 for view in of_one)  # no crop is tiny


def test_a_seed_settles_the_crops_and_the_global_generator_stays():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (view_of(IMAGES, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, view_of(IMAGES, 3, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_reconstruction_learns_from_all_views():
    config = small_config(quant__recon__views=3)
    model = calibrated_model(config, IMAGES)
    carried = []
    write = Activations.write

    def spy(self, unit, quantized, full, still_read):
        carried.append(len(quantized))
        write(self, unit, quantized, full, still_read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Activations, "write", spy)
        list(reconstruct(model, IMAGES, recon_settings(config), seed=1))
    assert set(carried) == {15}


def test_views_to_learn_from_come_before_the_images_held_out():
    settings = ReconSettings(views=2, held_out=0.2)
    rows = rows_of(5, settings)
    assert (rows.images, rows.views, rows.held_out, rows.count) == (4, 8, 1, 9)
    arranged, learned = arrange(IMAGES, rows, seed=3), IMAGES[[0, 1, 3, 4]]
    assert torch.equal(arranged[:8], torch.cat([learned, learned.flip(3)]))
    assert torch.equal(arranged[8:], IMAGES[2:3])
    assert torch.equal(split_off(IMAGES, rows)[0], learned)


def test_the_memory_estimate_counts_views(tmp_path):
    model = calibrated_model(small_config(), IMAGES)
    asked = []
    for views in (1, 4):
        settings = recon_settings(small_config(quant__recon__views=views))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "calibquant.solver.cache_plan.estimate",
                lambda model, image, count, settings: asked.append(count) or Need(1, 1, 1, 1, 1),
            )
            choose_store(model, IMAGES, settings, tmp_path, free=lambda *_: Room(2**40, 2**40, 2**40))
    assert asked == [5, 20]
