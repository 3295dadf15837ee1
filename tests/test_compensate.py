"""Compensated rounding: against least squares and brute force, and what it does for whole units."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from calibquant.model.quant_layer import QuantConv2d, QuantLinear, layers
from calibquant.model.quant_resnet import layer_units
from calibquant.quantization.compensation import (
    Moments,
    WeightGrid,
    added_error,
    best_scale,
    compensated_steps,
    damped,
    descent,
    regression,
    wanted_steps,
)
from calibquant.quantization.fake_quant import (
    AdaRoundFakeQuantize,
    IntegerWeight,
    QuantizerConfig,
    Role,
)
from calibquant.quantization.rounding import (
    FARTHEST,
    NEAREST,
    REACH,
    SoftRounding,
    StraightThroughRounding,
)
from calibquant.quantization.state import full_precision, watching
from calibquant.solver import compensate as compensate_module
from calibquant.solver.caches import UnitData
from calibquant.solver.compensate import (
    Given,
    compensate,
    compensate_layer,
    groups_of,
    layer_sums,
    lowest,
    some_rows,
    windows,
)
from calibquant.solver.peers import Peers
from tests import test_recon
from tests.small import random_float_model, small_config
from tests.test_quant_resnet import BOTH_BLOCKS, calibrated, images
from tests.test_recon import IMAGES, run


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs ``[rows, inputs]`` of which each is much like the others, at unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) + 2
    scales = torch.exp(torch.randn(inputs, generator=generator))
    return torch.randn(rows, inputs, generator=generator) @ mixing * scales


def second_moment(b: Tensor) -> Tensor:
    return (b.T @ b / len(b))[None]


def loss(weight: Tensor, rounded: Tensor, b: Tensor) -> float:
    return float(((b @ (weight - rounded).T) ** 2).mean())


SCALE = torch.tensor([0.25])
GRID = WeightGrid(SCALE, torch.tensor([8.0]), 0, 15)


def weight(outputs: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.5


def nearest(w: Tensor) -> Tensor:
    return GRID.steps(w) * SCALE


def compensated(w: Tensor, second: Tensor, damping: float, cross: Tensor | None = None) -> Tensor:
    """The rounded weight, ``[O, K]``, by default for inputs that are as in the float network."""
    missing = torch.zeros_like(w)[None] if cross is None else w @ cross
    found = compensated_steps(w[None], Moments(second, missing), damping, GRID)
    assert found is not None
    return found[0] * SCALE


@pytest.mark.parametrize("seed", range(8))
def test_rounding_lies_between_nearest_and_the_best_there_is(seed):
    b, w = correlated(200, 4, seed), weight(1, 4, seed)
    mine = loss(w, compensated(w, second_moment(b), 1e-4), b)
    every = torch.cartesian_prod(*[torch.arange(-8.0, 8.0)] * 4) * SCALE
    best = float((((w - every) @ b.T) ** 2).mean(1).min())
    assert best * 0.999 <= mine <= loss(w, nearest(w), b) * 1.001


def test_rounding_is_far_better_than_nearest_where_inputs_are_correlated():
    b, w = correlated(2000, 40), weight(20, 40)
    assert loss(w, compensated(w, second_moment(b), 1e-3), b) < 0.1 * loss(w, nearest(w), b)


def test_each_rounding_leaves_to_the_rest_what_least_squares_would():
    """The same by solving for the remaining weights anew after each column: the definition itself."""
    b, w, damping = correlated(300, 9), weight(5, 9), 0.05
    second = second_moment(b)[0].double()
    regular = second + damping * second.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    left, fixed = w.double().clone(), torch.zeros(5, 9, dtype=torch.float64)
    order = second.diagonal().argsort(descending=True).tolist()
    for place, column in enumerate(order):
        fixed[:, column] = (left[:, column] / 0.25).round().clamp(-8, 7) * 0.25
        rest = order[place + 1 :]
        if rest:  # the change of the rest that makes up best for the change of this column
            moved = (left[:, column] - fixed[:, column])[:, None]
            left[:, rest] += moved * torch.linalg.solve(regular[rest][:, rest], regular[rest, column])
    torch.testing.assert_close(compensated(w, second_moment(b), damping), fixed.float())


def test_many_columns_are_passed_on_in_blocks_as_one_by_one(monkeypatch):
    b, w = correlated(900, 50), weight(4, 50)
    found = []
    for block in (7, 1000):
        monkeypatch.setattr("calibquant.quantization.compensation.BLOCK", block)
        found.append(compensated(w, second_moment(b), 0.1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("second", [torch.eye(12), torch.zeros(12, 12)], ids=["uncorrelated", "dead"])
def test_inputs_that_tell_nothing_of_each_other_leave_nearest_rounding(second):
    w = weight(7, 12)
    assert torch.equal(compensated(w, second[None], 0.3), nearest(w))


def test_moments_that_are_no_numbers_round_nothing():
    moments = Moments(torch.full((1, 4, 4), torch.nan), torch.zeros(1, 3, 4))
    assert compensated_steps(weight(3, 4)[None], moments, 0.1, GRID) is None


def test_a_weight_is_fitted_as_ridge_regression_does():
    a, w, damping = correlated(300, 8), weight(5, 8), 0.2
    b = (a / 2).round() * 2
    second, cross = second_moment(b), ((a - b).T @ b / len(b))[None]
    ridge = (damping * second[0].diagonal().mean() * len(b)).sqrt() * torch.eye(8)
    stacked, wanted = torch.cat([b, ridge]), torch.cat([a @ w.T, ridge @ w.T])
    expected = torch.linalg.lstsq(stacked.double(), wanted.double()).solution.T.float()
    factor = torch.linalg.cholesky(damped(second, damping))
    fitted = w + regression(w @ cross, factor)[0]
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-4)


def test_a_fitted_weight_s_error_is_what_the_inputs_themselves_say():
    a, w, other = correlated(300, 8), weight(5, 8), weight(5, 8, 9)
    b = (a / 2).round() * 2
    moments = Moments(second_moment(b), (w @ (a - b).T @ b / len(b))[None])
    expected = ((a @ w.T - b @ other.T) ** 2).sum(1).mean() - ((a @ w.T - b @ w.T) ** 2).sum(1).mean()
    assert added_error(w[None], other[None], moments) == pytest.approx(float(expected), rel=1e-3)


def problem(inputs: int = 12, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, WeightGrid, Tensor]:
    """What descent takes: a weight, damped second moments, a grid by channel, nearest rounding."""
    w, second = (
        weight(outputs, inputs, seed)[None],
        damped(second_moment(correlated(300, inputs, seed)), 0.05),
    )
    scale = 0.2 + 0.1 * torch.rand(1, outputs, 1, generator=torch.Generator().manual_seed(seed))
    grid = WeightGrid(scale, torch.full((1, outputs, 1), 3.0), 0, 7)
    return w, second, grid, grid.steps(w)


def misfit(w: Tensor, second: Tensor, grid: WeightGrid, steps: Tensor) -> Tensor:
    """Expected squared error of each output, ``[g, O]``, in float64."""
    left = (w - steps * grid.scale).double()
    return ((left @ second.double()) * left).sum(2)


@pytest.mark.parametrize("seed", range(5))
def test_descent_never_makes_an_output_worse_and_ends_where_no_weight_alone_could_do_better(seed):
    w, second, grid, steps = problem(seed=seed)
    before = misfit(w, second, grid, steps)
    for number, (found, moved) in enumerate(descent(w, second, grid, steps)):
        error = misfit(w, second, found, moved)
        assert (error <= before * 1.0001).all()
        same = number and torch.equal(moved, steps)
        before, steps, grid = error, moved, found
        if same:
            break
    assert number < 100
    assert steps.min() >= -3 and steps.max() <= 4 and torch.equal(steps, steps.round())
    for column in range(w.shape[2]):
        for other in range(-3, 5):
            changed = steps.clone()
            changed[:, :, column] = other
            assert (misfit(w, second, grid, changed) >= before * 0.9999).all()


def test_descent_ends_nearer_to_the_best_rounding_than_compensation_alone():
    gained = []
    for seed in range(20):
        b, w = correlated(200, 4, seed), weight(1, 4, seed)
        second = damped(second_moment(b), 1e-4)
        first = compensated(w, second_moment(b), 1e-4)
        grid = WeightGrid(SCALE.view(1, 1, 1), torch.tensor([[[8.0]]]), 0, 15)
        *_, (found, steps) = islice(descent(w[None], second, grid, first[None] / SCALE), 4)
        every = torch.cartesian_prod(*[torch.arange(-8.0, 8.0)] * 4) * SCALE
        best = float((((w - every) @ b.T) ** 2).mean(1).min())
        gained.append((loss(w, first, b) / best, loss(w, (steps * found.scale)[0], b) / best))
    before, after = torch.tensor(gained).log().mean(0).exp().tolist()
    assert after < 0.8 * before


def test_the_best_step_size_is_that_of_least_squares():
    w, second, grid, steps = problem()
    root = torch.linalg.cholesky(second[0].double())
    expected = [
        float(torch.linalg.lstsq((s.double() @ root)[:, None], (v.double() @ root)[:, None]).solution)
        for v, s in zip(w[0], steps[0], strict=True)
    ]
    assert best_scale(w, second, grid, steps).flatten().tolist() == pytest.approx(expected, rel=1e-4)
    whole = WeightGrid(torch.tensor([0.25]), torch.tensor([3.0]), 0, 7)
    together = torch.linalg.lstsq(
        (steps[0].double() @ root).reshape(-1, 1), (w[0].double() @ root).reshape(-1, 1)
    ).solution
    assert float(best_scale(w, second, whole, steps)) == pytest.approx(float(together), rel=1e-4)


def test_a_step_size_that_least_squares_cannot_tell_stays():
    w, second, grid, steps = problem()
    assert torch.equal(best_scale(w, second, grid, torch.zeros_like(steps)), grid.scale)
    assert torch.equal(best_scale(-w, second, grid, steps), grid.scale)
    assert torch.equal(best_scale(9 * w, second, grid, steps), 2 * grid.scale)


def test_descent_in_blocks_is_descent_one_by_one(monkeypatch):
    w, second, grid, steps = problem(inputs=50)
    found = []
    for block in (7, 1000):
        monkeypatch.setattr("calibquant.quantization.compensation.BLOCK", block)
        found.append(next(descent(w, second, grid, steps))[1])
    assert torch.equal(*found)


class Launches(TorchDispatchMode):
    """Counts operations that are kernels on a GPU, which are all that make no view."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("work", "most"), [("compensated_steps", 8), ("descent", 12)])
def test_few_kernels_are_launched_for_a_column(work, most):
    counts = []
    for inputs in (20, 60):
        w, second, grid, steps = problem(inputs=inputs)
        moments = Moments(second, torch.zeros_like(w))
        with Launches() as launches:
            if work == "descent":
                next(descent(w, second, grid, steps))
            else:
                assert compensated_steps(w, moments, 0.1, grid) is not None
        counts.append(launches.count)
    assert counts[1] - counts[0] <= 40 * most


def test_a_weight_waits_where_it_would_be_were_it_alone_not_rounded():
    w, second, grid, steps = problem()
    wanted = wanted_steps(w, second, grid, steps)
    for column in range(w.shape[2]):
        free = steps.clone()
        free[:, :, column] = wanted[:, :, column]
        best = misfit(w, second, grid, free)
        for nudge in (-0.01, 0.01):
            free[:, :, column] = wanted[:, :, column] + nudge
            assert (misfit(w, second, grid, free) > best).all()


def test_groups_are_each_their_own_matter():
    b = torch.stack([correlated(300, 6, seed) for seed in (0, 1)])
    w = torch.stack([weight(3, 6, seed) for seed in (2, 3)])
    second = b.mT @ b / 300
    together = compensated_steps(w, Moments(second, w @ (0.1 * second)), 0.1, GRID)
    assert together is not None
    for g in range(2):
        alone = compensated(w[g], second[g : g + 1], 0.1, 0.1 * second[g : g + 1])
        torch.testing.assert_close(together[g] * SCALE, alone)


@pytest.mark.parametrize(
    ("stride", "padding", "kernel", "groups"), [(1, 1, 3, 1), (2, 0, 1, 1), (2, 3, 7, 1), (2, 1, 3, 3)]
)
def test_windows_are_what_a_convolution_reads(stride, padding, kernel, groups):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(6, 9, kernel, stride, padding, groups=groups)
    layer = QuantConv2d(convolution, torch.nn.BatchNorm2d(9).eval(), None)
    x = torch.randn(2, 6, 11, 8)
    read = windows(layer, x)
    b = read.reshape(*read.shape[:3], groups_of(layer), -1)
    by_group = layer.weight.reshape(groups, 9 // groups, -1)
    mine = torch.einsum("nhwgk,gok->nhwgo", b, by_group).flatten(3).movedim(3, 1)
    theirs = F.conv2d(x, layer.weight, None, stride, padding, 1, groups)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_reads_all_of_its_input():
    layer = QuantLinear(torch.nn.Linear(5, 3), None)
    assert windows(layer, torch.randn(4, 5)).shape == (4, 5, 1, 1)


def test_few_images_are_all_looked_at_and_many_only_where_maps_are_small(monkeypatch):
    monkeypatch.setattr(compensate_module, "IMAGES", 5)
    monkeypatch.setattr(compensate_module, "PLACES", 64)
    draw = torch.Generator().manual_seed(0)

    def seen(*shape: int) -> list[int]:
        return torch.cat(some_rows(torch.zeros(shape), shape[0], draw)).tolist()

    assert sorted(seen(4, 2, 9, 9)) == [0, 1, 2, 3]
    assert len(set(seen(50, 2, 9, 9))) == 5
    assert len(set(seen(50, 2, 2, 2))) == 16
    assert sorted(seen(50, 2)) == [*range(50)]


@pytest.mark.parametrize(("images", "views", "places"), [(40, 2, 9), (40, 3, 2), (12, 1, 1), (3, 2, 1)])
def test_no_image_is_both_learned_from_and_held_out_in_any_of_its_views(images, views, places, monkeypatch):
    monkeypatch.setattr(compensate_module, "IMAGES", 32)
    monkeypatch.setattr(compensate_module, "PLACES", 128)
    draw = torch.Generator().manual_seed(0)
    learned, held_out = some_rows(torch.zeros(images * views, 2, places, places), images, draw)
    count = len(learned) + len(held_out)
    assert (
        count
        == min(images * views, max(32, 128 // places**2))
        == len({*learned.tolist(), *held_out.tolist()})
    )
    assert len(held_out) == (count // 4 if images > 3 else 0)
    assert not {*(learned % images).tolist()} & {*(held_out % images).tolist()}
    firsts = int((learned < images).sum())  # a second view only where all first ones are taken
    assert firsts == min(len(learned), images - images // 4)


@pytest.mark.parametrize("best", range(7))
def test_the_lowest_place_of_a_valley_is_found_from_anywhere(best):
    heights = [abs(place - best) + 0.5 for place in range(7)]
    for start in range(7):
        asked: list[int] = []

        def height(place: int, asked=asked) -> float:
            asked.append(place)
            return heights[place] if 0 <= place < 7 else float("inf")

        assert lowest(height, start) == best
        assert len(set(asked)) <= abs(best - start) + 3


def test_averages_of_two_parts_are_those_of_all_places():
    layer, given = convolution_given()
    parts = [Given(*(x[some] for x in (given.full, given.quantized)), late) for some, late in HALVES]
    draws = torch.Generator().manual_seed(0)
    learned, held_out = layer_sums(layer, parts, 1e9, 1.0, draws)
    both, same = layer_sums(layer, [given], 1e9, 1.0, draws)
    assert same is both and float(both.places) == 600 == float(learned.places + held_out.places)
    for found, expected in zip(
        vars(learned.with_those_of(held_out)).values(), vars(both).values(), strict=True
    ):
        torch.testing.assert_close(found, expected)


HALVES = (slice(4), False), (slice(4, 6), True)


def test_a_weight_is_chosen_by_what_is_held_out_and_then_improved_by_all():
    """Where the held-out part contradicts the rest, nearest rounding is left; else all moments count."""
    b, w = correlated(400, 30), weight(8, 30)
    some, rest = (Moments(second_moment(part), torch.zeros(1, 8, 30)) for part in (b[:300], b[300:]))
    every = Moments(second_moment(b), torch.zeros(1, 8, 30))
    found = compensate_module.compensated(w[None], some, rest, every, GRID)
    alone = compensate_module.compensated(w[None], some, rest, some, GRID)
    assert found is not None and alone is not None
    errors = [added_error(w[None], each.steps * each.grid.scale, every) for each in (found, alone)]
    assert errors[0] < errors[1] < 0.2 * added_error(w[None], nearest(w)[None], every)
    twice, never = Moments(some.second, w[None] @ some.second), Moments(rest.second, -w[None] @ rest.second)
    assert compensate_module.compensated(w[None], twice, never, every, GRID) is None


@pytest.mark.parametrize("failing", [1, 2])
def test_moments_that_can_be_factored_in_one_order_of_columns_only_leave_the_weight(monkeypatch, failing):
    """Whether rounding leaves a matrix positive depends on the order, and on whose library factors it."""
    b, w = correlated(400, 30), weight(8, 30)
    moments = Moments(second_moment(b), torch.zeros(1, 8, 30))
    assert compensate_module.compensated(w[None], moments, moments, moments, GRID) is not None
    fitted, calls = compensate_module.fitted, []

    def fails_once(*given):
        calls.append(given)
        return None if len(calls) == failing else fitted(*given)

    monkeypatch.setattr(compensate_module, "fitted", fails_once)
    assert compensate_module.compensated(w[None], moments, moments, moments, GRID) is None
    assert len(calls) == failing


def blocks(bottleneck: bool):
    """Units of a calibrated network with what each is given: quantized inputs, float inputs, target."""
    model, x = calibrated(bottleneck), images()
    quantized = full = x
    with torch.no_grad():
        for unit in model.units("block"):
            with full_precision(unit.module):
                target = unit.module(full)
            yield unit, UnitData([quantized], [full], target)
            quantized, full = unit.module(quantized), target


@BOTH_BLOCKS
def test_a_unit_s_layers_run_one_after_the_other_are_the_unit(bottleneck):
    for unit, data in blocks(bottleneck):
        values = {"x": data.quantized[0]}
        with torch.no_grad():
            for part in layer_units(unit):
                ((_, _layer),) = layers(part.module)
                values[part.writes] = part.module(*(values[name] for name in part.reads))
            torch.testing.assert_close(values["x"], unit.module(data.quantized[0]))


@BOTH_BLOCKS
@pytest.mark.parametrize(
    ("kind", "nearest", "farthest"),
    [(SoftRounding, NEAREST, FARTHEST), (StraightThroughRounding, 0, REACH)],
)
def test_learning_starts_at_the_grid_points_that_compensation_gave(bottleneck, kind, nearest, farthest):
    moved = 0
    for unit, data in blocks(bottleneck):
        before = [layer.weight.clone() for _, layer in layers(unit.module)]
        compensate(unit, data, len(data.target), 4, 0.5, kind, torch.Generator().manual_seed(0), Peers())
        for (_, layer), old in zip(layers(unit.module), before, strict=True):
            if torch.equal(layer.weight, old):
                continue  # nearest rounding served it better
            moved += 1
            quantizer = layer.weight_quantizer
            assert isinstance(quantizer, AdaRoundFakeQuantize)
            scale, zero_point = quantizer.hard_qparams(layer.weight.ndim)
            codes = quantizer.codes(layer.weight)
            apart = (layer.weight / scale + zero_point - codes).abs()
            assert float(apart.max()) < farthest + 1e-3 and float(apart.min()) > nearest - 1e-3
            quantizer.start_rounding(layer.weight, kind)
            assert torch.equal(quantizer.codes(layer.weight), codes)
    assert moved > 3


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("quantizer", ["AdaRoundFakeQuantize", "FixedFakeQuantize", "LSQFakeQuantize"])
def test_a_network_is_far_better_before_anything_is_learned(granularity, quantizer):
    changes = dict(
        quant__recon__iters=0,
        quant__recon__granularity=granularity,
        quant__w_qconfig__quantizer=quantizer,
    )
    plain_model, plain = run(**changes)
    model, found = run(quant__recon__compensate=True, **changes)
    for result in found:
        assert result.error_after == pytest.approx(result.error_start)
        assert result.error_start <= result.error_before
    first = 2 if granularity == "layer" else 1  # of those at 2 bits that end a block
    assert found[first].error_after < 0.9 * plain[first].error_after
    with torch.no_grad():
        wanted = random_float_model(small_config())(IMAGES)
        theirs, ours = (float((each(IMAGES) - wanted).square().mean()) for each in (plain_model, model))
    assert ours < 0.5 * theirs
    assert all(isinstance(layer.weight_quantizer, IntegerWeight) for _, layer in layers(model))


def test_learning_goes_on_from_there(monkeypatch):
    """Of many images: a dozen can be fitted so well beforehand that steps under dropping find no better."""
    many = torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(test_recon, "IMAGES", many)
    _, found = run(quant__recon__compensate=True, quant__recon__iters=200, quant__recon__round_lr=0.003)
    assert all(result.error_after <= result.error_start <= result.error_before for result in found)
    assert sum(result.error_after < result.error_start for result in found) > len(found) / 2


@BOTH_BLOCKS
def test_every_layer_is_compared_with_the_float_network_also_behind_weights_already_replaced(
    bottleneck, monkeypatch
):
    seen = []

    def spy(layer, given, *args):
        kept = list(given)
        seen.append(torch.cat([x.full for x in kept]))
        return layer_sums(layer, kept, *args)

    monkeypatch.setattr(compensate_module, "layer_sums", spy)
    for unit, data in blocks(bottleneck):
        expected: dict = {}
        viewers = {layer: partial(expected.setdefault, layer) for _, layer in layers(unit.module)}
        with full_precision(unit.module), watching(viewers):
            unit.module(*data.full)
        if unit.name == "classifier":
            break  # its inputs are matched first
        seen.clear()
        draws = torch.Generator().manual_seed(0)
        compensate(unit, data, len(data.target), len(data.target), 0.5, SoftRounding, draws, Peers())
        for x in expected.values():
            assert any(x.shape == y.shape and same_rows(x, y) for y in seen)


def same_rows(x: Tensor, y: Tensor) -> bool:
    """Whether two batches hold the same images, in any order."""
    return torch.allclose(*(z.flatten(1).sum(1).sort().values for z in (x, y)), rtol=1e-4, atol=1e-4)


def convolution_given() -> tuple[QuantConv2d, Given]:
    """A convolution of 1x1 to 2 bits, and its inputs: positive, and rounded for the quantized network."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig("AdaRoundFakeQuantize", "MSEObserver", 2, False, 0).build(Role.WEIGHT)
    layer = QuantConv2d(torch.nn.Conv2d(8, 5, 1), torch.nn.BatchNorm2d(5).eval(), quantizer)
    layer.calibrate_weight()
    full = correlated(600, 8).abs().view(6, 10, 10, 8).movedim(3, 1)
    return layer, Given(full, (full / 2).floor() * 2)


@pytest.mark.parametrize("drop_prob", [0.5, 1.0])
def test_outputs_are_right_on_average(drop_prob):
    layer, given = convolution_given()
    wanted = layer.operate(given.full, layer.weight)
    sums = layer_sums(layer, [given], 100, drop_prob, torch.Generator().manual_seed(0))
    compensate_layer(layer, *sums, SoftRounding)
    off = (layer(given.quantized) - wanted).mean((0, 2, 3)).abs()
    assert float(off.max()) < 1e-3 * float(wanted.abs().mean())


def test_the_last_layer_of_a_block_makes_up_for_what_the_shortcut_lost():
    errors = []
    for known in (True, False):
        layer, given = convolution_given()
        lost = given.quantized[:, :5] - 3 + torch.rand(6, 5, 10, 10)
        wanted = layer.operate(given.full, layer.weight) + lost
        given = Given(given.full, given.quantized, lost=lost if known else None)
        sums = layer_sums(layer, [given], 100, 1.0, torch.Generator().manual_seed(0))
        compensate_layer(layer, *sums, SoftRounding)
        errors.append(float((layer(given.quantized) - wanted).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_straight_through_a_few_steps_reach_other_grid_points_than_compensation_gave():
    for unit, data in blocks(bottleneck=True):
        draws = torch.Generator().manual_seed(0)
        compensate(unit, data, len(data.target), 4, 0.5, StraightThroughRounding, draws, Peers())
        for _, layer in layers(unit.module):
            quantizer = layer.weight_quantizer
            learned = quantizer.start_rounding(layer.weight, StraightThroughRounding).learned
            inside = learned.detach()[quantizer.codes(layer.weight) != quantizer.quant_max]
            assert float(((inside - inside.round()).abs() > 0.4).float().mean()) > 0.02


def test_the_same_seed_gives_the_same_network():
    (first, _), (again, _) = (run(quant__recon__compensate=True, quant__recon__iters=3) for _ in range(2))
    for (name, a), (_, b) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_what_makes_a_unit_worse_is_taken_back(monkeypatch):
    def spoil(unit, *_):
        for _, layer in layers(unit.module):
            layer.weight.neg_()

    plain, _ = run(quant__recon__iters=0)
    monkeypatch.setattr("calibquant.solver.recon.compensate", spoil)
    monkeypatch.setattr("calibquant.solver.recon.match_classifier", lambda classifier, data, *_: data)
    kept, results = run(quant__recon__iters=0, quant__recon__compensate=True)
    assert all(result.error_start == result.error_before for result in results)
    for (name, a), (_, b) in zip(plain.state_dict().items(), kept.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
