"""Dropping: how often, how independently, and in which layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibquant.quantization.drop import Draws, chance_as_bits


def draws_like(*tensors, chance=0.5, seed=0):
    draws = Draws(tensors, chance, torch.Generator().manual_seed(seed))
    draws.refill()
    return draws


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0])
def test_a_mask_is_true_about_as_often_as_asked_at_every_use(chance):
    draws = Draws([torch.empty(50_001)], chance, torch.Generator().manual_seed(0))
    for _ in range(9):
        draws.refill()
        mask = draws.drops[0].mask()
        assert mask.dtype == torch.bool
        assert float(mask.float().mean()) == pytest.approx(chance, abs=0.01)


@given(st.integers(0, 256))
def test_a_chance_takes_as_few_bits_as_it_can(parts):
    bits, threshold = chance_as_bits(parts / 256)
    assert threshold / 2**bits == parts / 256
    assert bits == 0 or threshold % 2 == 1


def test_masks_of_neighbouring_elements_of_other_tensors_and_of_other_uses_are_independent():
    draws = draws_like(*2 * [torch.empty(50_000)])
    mask, other = (drop.mask().float() for drop in draws.drops)
    pairs = [(mask[:-lag], mask[lag:]) for lag in range(1, 10)] + [(mask, other)]
    for _ in range(20):
        draws.refill()
        pairs.append((mask, draws.drops[0].mask().float()))
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    assert max(map(abs, correlations)) < 0.03


def test_a_mask_is_laid_out_as_its_tensor():
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for drop in draws_like(torch.empty(3), x, x).drops[1:]:
        assert drop.mask().shape == x.shape and drop.mask().stride() == x.stride()


def test_a_generator_decides_the_masks():
    first, again, other = (draws_like(torch.empty(64), seed=seed).drops[0].mask() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_compiled_mask_is_the_same_mask():
    (drop,) = draws_like(torch.empty(1000), chance=0.3).drops
    compiled = torch.compile(drop.mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), drop.mask())
