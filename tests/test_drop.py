"""Dropping: how often, how independently, and in which layout."""

import pytest
import torch

from calibquant.quantization.drop import Draws, Drop


def draws_like(*tensors, seed=0):
    draws = Draws(tensors, torch.Generator().manual_seed(seed))
    draws.refill()
    return draws


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_a_mask_is_true_about_as_often_as_asked(chance):
    mask = Drop(chance, draws_like(torch.empty(50_001)).bytes[0]).mask()
    assert mask.dtype == torch.bool
    assert float(mask.float().mean()) == pytest.approx(chance, abs=0.01)


def test_neighbouring_elements_and_neighbouring_tensors_are_independent():
    mask, other = (Drop(0.5, b).mask().float() for b in draws_like(*2 * [torch.empty(50_000)]).bytes)
    lags = [torch.corrcoef(torch.stack([mask[:-lag], mask[lag:]]))[0, 1] for lag in range(1, 10)]
    lags.append(torch.corrcoef(torch.stack([mask, other]))[0, 1])
    assert max(abs(float(lag)) for lag in lags) < 0.03


def test_a_mask_is_laid_out_as_its_tensor():
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for mask in (Drop(0.5, each).mask() for each in draws_like(torch.empty(3), x, x).bytes[1:]):
        assert mask.shape == x.shape and mask.stride() == x.stride()


def test_a_generator_decides_the_bytes_and_each_refill_draws_others():
    x = torch.empty(64)
    first, again, other = (draws_like(x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.bytes[0], again.bytes[0])
    assert not torch.equal(first.bytes[0], other.bytes[0])
    first.refill()
    assert not torch.equal(first.bytes[0], again.bytes[0])


def test_a_compiled_mask_is_the_same_mask():
    drop = Drop(0.3, draws_like(torch.empty(1000)).bytes[0])
    compiled = torch.compile(drop.mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), drop.mask())
