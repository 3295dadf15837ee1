"""The fast searches against exhaustive ones, written here independently, and against SciPy."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from calibquant.quantization.affine import choose_qparams_affine, quant_bounds
from calibquant.quantization.range_search import (
    Grid,
    Samples,
    golden_section_search,
    grid_search,
    quantization_error,
)


def gaussian(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


DATA = {
    "normal": gaussian(400),
    "shifted": gaussian(400) + 0.7,
    "skewed": gaussian(400).exp() - 0.5,
    "uniform": torch.rand(400, generator=torch.Generator().manual_seed(0)) * 2 - 0.6,
    "outliers": torch.cat([gaussian(400), torch.tensor([15.0, -9.0])]),
    "few": gaussian(9),
    "positive": gaussian(400).relu(),
    "negative": -gaussian(400).abs() - 0.1,
}


def samples_of(rows: Tensor) -> Samples:
    return Samples(rows, None, rows.amin(1), rows.amax(1))


def grid_of(bits: int, symmetric: bool) -> Grid:
    return Grid(*quant_bounds(bits, symmetric), symmetric)


def loss(x: Tensor, scale: float, zero_points: Tensor, grid: Grid) -> Tensor:
    """The L2.4 error of each zero-point, in float64."""
    x, zero_points = x.double(), zero_points.double()[:, None]
    codes = torch.clamp(torch.round(x / scale) + zero_points, grid.quant_min, grid.quant_max)
    return ((codes - zero_points) * scale - x).abs().pow(2.4).sum(1)


def exhaustive_search(x: Tensor, grid: Grid) -> tuple[float, float, int]:
    """Least error, its width and its zero-point over the published grid."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    full = 2 * max(-low, high) if grid.symmetric else high - low
    if grid.symmetric:
        zero_points = torch.tensor([0])
    elif low < 0 < high:
        zero_points = torch.arange(grid.quant_min, grid.quant_max + 1)
    else:
        zero_points = torch.tensor([grid.quant_min if high > 0 else grid.quant_max])
    best = (float("inf"), 0.0, 0)
    for step in range(1, 101):
        width = full * step / 100
        errors = loss(x, width / (grid.quant_max - grid.quant_min), zero_points, grid)
        best = min(best, (float(errors.min()), width, int(zero_points[errors.argmin()])))
    return best


def assert_as_good_as_exhaustive(x: Tensor, grid: Grid) -> None:
    low, high = grid_search(samples_of(x[None]), grid)
    scale, zero_point = choose_qparams_affine(low, high, grid.quant_min, grid.quant_max, grid.symmetric)
    error, width, best_zero_point = exhaustive_search(x, grid)
    one_step = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 100
    assert float(loss(x, float(scale), zero_point, grid)) <= error * (1 + 1e-4)
    assert float(high - low) == pytest.approx(width, abs=2 * one_step if grid.symmetric else one_step)
    assert abs(int(zero_point) - best_zero_point) <= 1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_grid_search_finds_the_optimum_of_the_published_grid(name, symmetric, bits):
    assert_as_good_as_exhaustive(DATA[name], grid_of(bits, symmetric))


@pytest.mark.parametrize("name", ["positive", "negative", "few"])
def test_grid_search_finds_the_eight_bit_optimum(name):
    assert_as_good_as_exhaustive(DATA[name], grid_of(8, symmetric=False))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["half-normal", "exponential", "negative half-normal"])
def test_golden_section_search_is_as_good_as_scipys(name, bits):
    half_normal = gaussian(20_000).abs()
    x = {
        "half-normal": half_normal,
        "exponential": half_normal.square(),
        "negative half-normal": -half_normal,
    }[name]
    grid = grid_of(bits, symmetric=False)
    zero_point = torch.tensor([grid.quant_max if name.startswith("negative") else grid.quant_min])

    def error(width: float) -> float:
        return float(loss(x, width / (grid.quant_max - grid.quant_min), zero_point, grid))

    full = float(x.abs().max())
    reference = minimize_scalar(error, bounds=(full * 1e-3, full), method="bounded")
    low, high = golden_section_search(samples_of(x[None]), grid)
    assert error(float(high - low)) <= reference.fun * 1.01


@pytest.mark.parametrize("name", DATA)
def test_golden_section_search_never_loses_to_the_full_range(name):
    x, grid = DATA[name][None], grid_of(4, symmetric=False)
    ranges = golden_section_search(samples_of(x), grid), (x.amin(1), x.amax(1))
    found, full = (
        quantization_error(samples_of(x), *choose_qparams_affine(*r, 0, 15, False), grid) for r in ranges
    )
    assert float(found) <= float(full) * (1 + 1e-5)


@pytest.mark.parametrize("search", [grid_search, golden_section_search])
def test_rows_are_searched_independently_of_how_many_there_are(search):
    rows = gaussian(17 * 2**13).view(17, -1) * torch.linspace(0.1, 10, 17)[:, None]  # two chunks
    rows[15] = rows[15].relu()
    counts = 1.0 + torch.arange(17)[:, None] * (torch.arange(2**13) % 2)
    grid = grid_of(2, symmetric=False)
    together = search(Samples(rows, counts, rows.amin(1), rows.amax(1)), grid)
    for i in (0, 15, 16):
        row = rows[i : i + 1]
        alone = search(Samples(row, counts[i : i + 1], row.amin(1), row.amax(1)), grid)
        torch.testing.assert_close((together[0][i : i + 1], together[1][i : i + 1]), alone)


@pytest.mark.parametrize("search", [grid_search, golden_section_search])
def test_a_counted_value_weighs_as_much_as_its_copies(search):
    values, counts = gaussian(60).round(decimals=2), torch.arange(60) % 7 + 1
    copies = samples_of(values.repeat_interleave(counts)[None])
    counted = Samples(values[None], counts[None].float(), copies.min_val, copies.max_val)
    grid = grid_of(3, symmetric=False)
    torch.testing.assert_close(search(counted, grid), search(copies, grid))


def test_quantization_error_equals_its_definition():
    grid, scale, zero_point = grid_of(4, symmetric=False), torch.tensor([0.3]), torch.tensor([6.0])
    expected = loss(DATA["skewed"], 0.3, zero_point, grid)
    actual = quantization_error(samples_of(DATA["skewed"][None]), scale, zero_point, grid)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("search", [grid_search, golden_section_search])
def test_values_that_fit_the_grid_keep_their_range(search):
    x = torch.arange(-3.0, 13)[None]
    torch.testing.assert_close(search(samples_of(x), grid_of(4, symmetric=False)), (x.amin(1), x.amax(1)))


@pytest.mark.parametrize("search", [grid_search, golden_section_search])
def test_an_all_zero_row_gets_a_finite_range_around_zero(search):
    low, high = search(samples_of(torch.zeros(1, 8)), grid_of(4, symmetric=False))
    assert -1e-5 < float(low) <= 0 <= float(high) < 1e-5
