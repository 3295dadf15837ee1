"""What range each observer reports for batches that pass by, and for a weight at hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibquant.quantization.observer import (
    OBSERVERS,
    PER_TENSOR,
    AvgMinMaxObserver,
    Histogram,
    MinMaxObserver,
    MSEFastObserver,
    MSEObserver,
    clipping_ranges,
    search_together,
)
from calibquant.quantization.range_search import Grid

GRID = Grid(0, 15, symmetric=False)
ALL_OBSERVERS = pytest.mark.parametrize("observer", OBSERVERS.values())
AVERAGING = pytest.mark.parametrize("name", ["MinMaxObserver", "MSEObserver", "MSEFastObserver"])
SEARCHING = pytest.mark.parametrize("observer", [MSEObserver, MSEFastObserver])
BOTH_AXES = pytest.mark.parametrize("ch_axis", [PER_TENSOR, 1])


def images(count: int, seed: int = 0) -> Tensor:
    """Skewed activations ``[count, 3, 8, 8]`` whose channels differ in magnitude."""
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (x * 0.6).exp().sub(0.8) * torch.tensor([1.0, 0.2, 5.0]).view(3, 1, 1)


def range_over(observer: type, batches: list[Tensor], ch_axis: int = PER_TENSOR) -> Tensor:
    """Clipping range ``[2, rows]`` after the batches."""
    watching = observer(GRID, ch_axis)
    for batch in batches:
        watching.observe(batch)
    return torch.stack(watching.clipping_range())


def whole_range(x: Tensor, observer: type, ch_axis: int = PER_TENSOR) -> Tensor:
    """Clipping range ``[2, rows]`` of one tensor at hand."""
    looking = observer(GRID, ch_axis)
    return torch.stack(looking.search(looking.whole(x)))


def test_minmax_covers_all_batches():
    batches = [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, -4.0]])]
    assert range_over(MinMaxObserver, batches).tolist() == [[-4.0], [3.0]]
    assert range_over(MinMaxObserver, batches, ch_axis=1).tolist() == [[1.0, -4.0], [3.0, 0.0]]


def test_averaging_weighs_a_smaller_last_batch_by_its_images():
    batches = [torch.tensor([[-1.0, 4.0]] * 3), torch.tensor([[-5.0, 8.0]])]
    assert range_over(AvgMinMaxObserver, batches).tolist() == [[-2.0], [5.0]]
    assert range_over(AvgMinMaxObserver, batches, ch_axis=1).tolist() == [[-2.0, 5.0], [-2.0, 5.0]]


@BOTH_AXES
@AVERAGING
def test_an_averaging_observer_is_the_mean_of_its_plain_one_over_images(name, ch_axis):
    batches = [images(6, seed=1), images(6, seed=2) * 2, images(2, seed=3) * 5]
    plain = [whole_range(batch, OBSERVERS[name], ch_axis) for batch in batches]
    expected = (6 * plain[0] + 6 * plain[1] + 2 * plain[2]) / 14
    actual = range_over(OBSERVERS[f"Avg{name}"], batches, ch_axis)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@BOTH_AXES
@SEARCHING
def test_a_search_over_many_batches_equals_the_search_on_all_their_values(observer, ch_axis):
    batches = [images(4, seed) * (1 + seed % 3) for seed in range(6)]
    everything = torch.cat(batches)
    low, high = whole_range(everything, MinMaxObserver, ch_axis)
    difference = range_over(observer, batches, ch_axis) - whole_range(everything, observer, ch_axis)
    one_grid_step = (high - low) / 100
    assert bool((difference.abs() <= 1.01 * one_grid_step).all())


@SEARCHING
def test_a_searched_range_is_not_the_union_of_the_batches_ranges(observer):
    batches = [torch.randn(4096, generator=torch.Generator().manual_seed(0)), torch.tensor([-30.0, 30.0])]
    low, high = range_over(observer, batches).flatten()
    union_low, union_high = whole_range(batches[1], observer).flatten()
    assert float(high - low) < 0.8 * float(union_high - union_low)


@ALL_OBSERVERS
def test_the_order_of_axes_does_not_matter_to_a_channels_range(observer):
    x = images(2)
    per_channel = whole_range(x, observer, 1)
    assert torch.equal(per_channel, whole_range(x.movedim(1, 0).contiguous(), observer, 0))
    alone = torch.cat([whole_range(x[:, i], observer) for i in range(3)], dim=1)
    torch.testing.assert_close(per_channel, alone)


@ALL_OBSERVERS
@BOTH_AXES
def test_a_range_lies_inside_what_was_seen_up_to_one_step(observer, ch_axis):
    low, high = whole_range(images(2), observer, ch_axis)
    seen_low, seen_high = whole_range(images(2), MinMaxObserver, ch_axis)
    assert bool((low < high).all() and (high - low <= (seen_high - seen_low) * 1.0001).all())


@ALL_OBSERVERS
def test_an_activation_that_is_always_zero_gets_a_finite_range(observer):
    assert torch.isfinite(range_over(observer, [torch.zeros(2, 3), torch.zeros(1, 3)])).all()


@ALL_OBSERVERS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(observer, bad):
    x = torch.tensor([[1.0, bad]])
    with pytest.raises(ValueError, match="NaN or infinity"):
        observer(GRID).observe(x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        observer(GRID).whole(x)


@ALL_OBSERVERS
def test_a_range_without_data_is_refused(observer):
    with pytest.raises(ValueError, match="no data"):
        observer(GRID).clipping_range()


def skewed(count: int, size: int, seed: int) -> Tensor:
    """Activations ``[count, size, 4, 4]`` of which some channels never fall below zero."""
    x = torch.randn(count, size, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(size).view(-1, 1, 1) % 2 == 0, x.relu(), 3 * x)


@ALL_OBSERVERS
@BOTH_AXES
@pytest.mark.parametrize("at_once", [3_000, 2**24])
def test_ranges_found_together_are_those_found_alone(observer, ch_axis, at_once, monkeypatch):
    monkeypatch.setattr("calibquant.quantization.observer.AT_ONCE", at_once)
    grids = [GRID, GRID, GRID, Grid(0, 3, False), Grid(-8, 7, True)]
    seen, whole = {}, []
    for number, grid in enumerate(grids):
        watching = observer(grid, ch_axis)
        for batch in range(2):
            watching.observe(skewed(3 + batch, 2 + number % 4, 10 * number + batch))
        seen[str(number)] = watching
        weight = skewed(3, 2 + number % 2, number)
        whole.append((str(number), watching, watching.whole(weight)))
    seen["of zeros"] = observer(GRID, ch_axis)
    seen["of zeros"].observe(torch.zeros(2, 3))
    together, alone = clipping_ranges(seen), {name: one.clipping_range() for name, one in seen.items()}
    of_weights = search_together(whole), {name: one.search(samples) for name, one, samples in whole}
    for found, expected in ((together, alone), of_weights):
        assert found.keys() == expected.keys()
        for name, ends in found.items():
            torch.testing.assert_close(torch.stack(ends), torch.stack(expected[name]), rtol=1e-6, atol=0)


value = st.builds(lambda mantissa, power: mantissa * 10.0**power, st.integers(-99, 99), st.integers(-5, 5))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(value, min_size=1, max_size=20), min_size=1, max_size=5))
def test_a_growing_histogram_loses_no_value_and_keeps_the_mean(batches):
    histogram = Histogram(1, torch.device("cpu"))
    for batch in batches:
        rows = torch.tensor([batch], dtype=torch.float32)
        histogram.add(rows, rows.abs().amax(1))
    values = torch.tensor([x for batch in batches for x in batch], dtype=torch.float32)
    nonzero = values[values != 0]
    samples = histogram.samples(values.min()[None], values.max()[None])
    assert int(samples.counts.sum()) == len(nonzero)
    if len(nonzero):
        mean = (samples.values.double() * samples.counts).sum() / len(nonzero)
        half_a_bin = 0.501 * float(histogram.width)
        assert abs(float(mean - nonzero.double().mean())) <= half_a_bin


def test_rows_of_a_histogram_grow_on_their_own():
    histogram = Histogram(2, torch.device("cpu"))
    histogram.add(torch.tensor([[1.0, 0.5], [8.0, 2.0]]), torch.tensor([1.0, 8.0]))
    histogram.add(torch.tensor([[100.0, -3.0], [1.0, 0.0]]), torch.tensor([100.0, 1.0]))
    assert histogram.counts.sum(1).tolist() == [4, 3]
    assert histogram.width[0] * histogram.bins / 2 >= 100
    assert histogram.width[1] * histogram.bins / 2 == 8
