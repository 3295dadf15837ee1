"""Modes are scopes: each does what it says inside and leaves the model as it was."""

import pytest
import torch
from torch import Tensor, nn

from calibquant.model.quant_layer import calibrate_weights
from calibquant.model.quant_resnet import QuantResNet, QuantSpec
from calibquant.model.resnet import Architecture, ResNet
from calibquant.quantization.drop import Draws
from calibquant.quantization.fake_quant import QuantizerConfig, Role
from calibquant.quantization.state import (
    calibrating,
    dropping,
    full_precision,
    quantizer_inputs,
    quantizers,
)


def float_model(architecture: Architecture) -> ResNet:
    """A small network with random batch-norm statistics."""
    torch.manual_seed(0)
    model = ResNet(architecture, num_classes=10, small_images=True, base_width=8).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for statistic in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            statistic.uniform_(0.3, 1.3)
    return model


def quantized(model: ResNet, observer: str = "MinMaxObserver") -> QuantResNet:
    """The model at 2 bits, weights calibrated."""
    weight = QuantizerConfig("AdaRoundFakeQuantize", "MinMaxObserver", 2, False, 0)
    activation = QuantizerConfig("LSQFakeQuantize", observer, 2, False, -1)
    quantized = QuantResNet(model, QuantSpec(weight, activation, frozenset())).eval()
    calibrate_weights(quantized)
    return quantized


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def activation_scales(model: nn.Module) -> Tensor:
    return torch.cat([q.scale.detach() for _, q in quantizers(model, Role.ACTIVATION)])


@pytest.fixture
def small_float() -> ResNet:
    return float_model(Architecture(True, (1, 1, 1, 1)))


@pytest.fixture
def small(small_float) -> QuantResNet:
    return quantized(small_float)


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(True, (2, 1, 1, 1)),
        Architecture(False, (2, 1, 1, 1)),
        Architecture(True, (1, 1, 1, 1), groups=4, width_per_group=32),
    ],
    ids=["bottleneck", "basic", "grouped"],
)
def test_with_quantizers_off_the_quantized_model_equals_the_float_one(architecture):
    model = float_model(architecture)
    q = quantized(model)
    with torch.no_grad(), full_precision(q):
        torch.testing.assert_close(q(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_after_full_precision_every_quantizer_is_as_before(small):
    (_, first), *_ = quantizers(small)
    first.enabled = False
    with pytest.raises(KeyError), full_precision(small):
        assert not any(q.enabled for _, q in quantizers(small))
        raise KeyError
    assert [q.enabled for _, q in quantizers(small)] == [False] + [True] * (len(quantizers(small)) - 1)


def test_calibrating_sets_every_activation_range_and_leaves_no_hook(small):
    assert activation_scales(small).isnan().all()
    with calibrating(small):
        small(images())
    assert activation_scales(small).isfinite().all()
    assert hooks(small) == 0
    assert all(q.enabled for _, q in quantizers(small))


def test_ranges_are_those_of_the_float_activations(small, small_float):
    with calibrating(small):
        small(images(seed=0))
        small(images(seed=1))
    with torch.no_grad():
        seen = [torch.relu(small_float.bn1(small_float.conv1(images(seed=seed)))) for seed in (0, 1)]
    expected = torch.cat(seen).max() / 3
    assert small.stem.output_quantizer.scale.item() == pytest.approx(expected.item())


def test_an_interrupted_calibration_changes_no_range_and_leaves_no_hook(small):
    with calibrating(small):
        small(images())
    before = activation_scales(small)
    with pytest.raises(KeyError), calibrating(small):
        small(3 * images())
        raise KeyError
    assert torch.equal(activation_scales(small), before)
    assert hooks(small) == 0
    assert all(q.enabled for _, q in quantizers(small))


def test_calibrating_without_images_names_the_quantizer(small):
    with pytest.raises(ValueError, match=r"stem\.output_quantizer: .*no data"), calibrating(small):
        pass


def test_calibrating_on_nan_names_the_quantizer(small):
    with pytest.raises(ValueError, match=r"stem\.output_quantizer: .*NaN"), calibrating(small):
        small(images() * float("nan"))
    assert hooks(small) == 0


def drops(model, chance):
    """A drop for each activation quantizer, with bytes drawn once."""
    sites = quantizer_inputs(model, [images()])
    draws = Draws(sites, chance, torch.Generator().manual_seed(0))
    draws.refill()
    return draws.drops


def test_quantizer_inputs_are_what_each_quantizer_is_given_in_their_order(small):
    with calibrating(small):
        small(images())
    expected, modules = {}, [q for _, q in quantizers(small, Role.ACTIVATION)]
    handles = [
        q.register_forward_pre_hook(lambda q, args: expected.update({q: args[0].clone()})) for q in modules
    ]
    seen = quantizer_inputs(small, [images()])
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, expected[q]) for a, q in zip(seen, modules, strict=True))
    assert hooks(small) == 0


def test_dropping_reaches_activations_only_and_is_undone_on_exceptions(small):
    with calibrating(small):
        small(images())
    given, (_, first) = drops(small, 0.5), quantizers(small, Role.ACTIVATION)[0]
    first.drop = outer = given[3]
    with pytest.raises(KeyError), dropping(small, given):
        assert [q.drop for _, q in quantizers(small, Role.ACTIVATION)] == given
        assert all(q.drop is None for _, q in quantizers(small, Role.WEIGHT))
        raise KeyError
    left = [q.drop for _, q in quantizers(small, Role.ACTIVATION)]
    assert left[0] is outer and left[1:] == [None] * (len(left) - 1)


def test_dropping_everything_equals_float_activations_and_dropping_nothing_equals_none(small):
    with calibrating(small):
        small(images())
    with torch.no_grad():
        plain = small(images())
        with dropping(small, drops(small, 1.0)):
            assert torch.equal(small(images()), plain)
        with dropping(small, drops(small, 0.0)):
            all_float = small(images())
        for _, quantizer in quantizers(small, Role.ACTIVATION):
            quantizer.enabled = False
        assert torch.equal(small(images()), all_float)
    assert not torch.equal(plain, all_float)


def test_quantizers_can_be_listed_by_role(small):
    weights, activations = quantizers(small, Role.WEIGHT), quantizers(small, Role.ACTIVATION)
    assert len(quantizers(small)) == len(weights) + len(activations)
    assert {q.role for _, q in weights} == {Role.WEIGHT}
    assert dict(small.named_modules())[weights[0][0]] is weights[0][1]
