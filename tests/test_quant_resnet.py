"""The quantized network: what is quantized, at how many bits, and the units it is made of."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.quant_layer import QuantConv2d, calibrate_weights, harden, layers
from calibquant.model.quant_resnet import End, QuantResNet, QuantSpec, Unit
from calibquant.model.resnet import Architecture, ResNet
from calibquant.quantization.fake_quant import (
    AdaRoundFakeQuantize,
    FakeQuantize,
    FixedFakeQuantize,
    IntegerWeight,
    QuantizerConfig,
    Role,
)
from calibquant.quantization.rounding import ROUNDINGS
from calibquant.quantization.state import calibrating, full_precision, quantizers, settled

BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
BOTH_BLOCKS = pytest.mark.parametrize("bottleneck", [True, False], ids=["bottleneck", "basic"])


def float_model(bottleneck: bool) -> ResNet:
    """Five blocks, the second with an identity shortcut, and random batch-norm statistics."""
    torch.manual_seed(0)
    architecture = Architecture(bottleneck, (2, 1, 1, 1))
    model = ResNet(architecture, num_classes=10, small_images=True, base_width=8).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for statistic in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            statistic.uniform_(0.3, 1.3)
    return model


def spec(
    weight: str = "AdaRoundFakeQuantize",
    activation: str = "LSQFakeQuantize",
    ends: frozenset[End] = frozenset(),
) -> QuantSpec:
    return QuantSpec(
        QuantizerConfig(weight, "MinMaxObserver", 3, False, 0),
        QuantizerConfig(activation, "MinMaxObserver", 4, False, -1),
        ends,
    )


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def calibrated(bottleneck: bool, **options: str) -> QuantResNet:
    model = QuantResNet(float_model(bottleneck), spec(**options)).eval()
    calibrate_weights(model)
    with calibrating(model):
        model(images())
    return model


def run_as_program(units: list[Unit], x: Tensor) -> Tensor:
    """Execute units as a straight-line program over named activations."""
    memory = {"x": x}
    for unit in units:
        memory[unit.writes] = unit.module(*(memory[name] for name in unit.reads))
    return memory["x"]


@BOTH_BLOCKS
def test_block_units_are_stem_blocks_and_classifier_in_order(bottleneck):
    units = QuantResNet(float_model(bottleneck), spec()).units("block")
    assert [unit.name for unit in units] == ["stem", *BLOCKS, "classifier"]


def test_layer_units_of_bottlenecks_are_their_layers_in_order():
    units = QuantResNet(float_model(bottleneck=True), spec()).units("layer")
    projected, plain = ["shortcut", "conv1", "conv2", "join"], ["conv1", "conv2", "join"]
    blocks = [f"{b}.{layer}" for b in BLOCKS for layer in (plain if b == "layer1.1" else projected)]
    assert [unit.name for unit in units] == ["stem", *blocks, "classifier"]


def test_layer_units_of_basic_blocks_are_their_layers_in_order():
    units = QuantResNet(float_model(bottleneck=False), spec()).units("layer")
    projected, plain = ["shortcut", "conv1", "join"], ["conv1", "join"]
    blocks = [f"{b}.{layer}" for b in BLOCKS for layer in (plain if "layer1" in b else projected)]
    assert [unit.name for unit in units] == ["stem", *blocks, "classifier"]


@BOTH_BLOCKS
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_units_run_one_after_another_equal_the_model(bottleneck, granularity):
    model = calibrated(bottleneck)
    with torch.no_grad():
        assert torch.equal(run_as_program(model.units(granularity), images()), model(images()))


@BOTH_BLOCKS
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_no_unit_changes_what_it_reads(bottleneck, granularity):
    model, memory = calibrated(bottleneck), {"x": images()}
    with torch.no_grad(), full_precision(model):
        for unit in model.units(granularity):
            inputs = [memory[name] for name in unit.reads]
            before = [x.clone() for x in inputs]
            memory[unit.writes] = unit.module(*inputs)
            assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@BOTH_BLOCKS
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_every_layer_and_quantizer_belongs_to_exactly_one_unit(bottleneck, granularity):
    model = QuantResNet(float_model(bottleneck), spec())
    units = model.units(granularity)
    for find in (layers, quantizers):
        in_units = [id(found) for unit in units for _, found in find(unit.module)]
        assert sorted(in_units) == sorted(id(found) for _, found in find(model))


@pytest.mark.parametrize(("bottleneck", "per_block"), [(True, 3), (False, 2)])
def test_activations_are_quantized_after_each_relu_and_nowhere_else(bottleneck, per_block):
    model = calibrated(bottleneck)
    assert len(quantizers(model, Role.ACTIVATION)) == 1 + per_block * len(BLOCKS)
    seen = []
    for _, quantizer in quantizers(model, Role.ACTIVATION):
        quantizer.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    with torch.no_grad(), full_precision(model):
        model(images())
    assert len(seen) == 1 + per_block * len(BLOCKS)
    assert all(bool((x >= 0).all() and (x == 0).any()) for x in seen)  # a ReLU's output


@BOTH_BLOCKS
def test_a_branchs_last_convolution_its_projection_and_the_logits_stay_unquantized(bottleneck):
    model = QuantResNet(float_model(bottleneck), spec())
    bare = [name for name, layer in layers(model) if isinstance(layer.output_quantizer, nn.Identity)]
    projected = [0, 2, 3, 4] if bottleneck else [2, 3, 4]
    expected = {f"blocks.{i}.join.last" for i in range(5)} | {f"blocks.{i}.shortcut" for i in projected}
    # the stem's quantizer comes after its pooling
    assert set(bare) == expected | {"classifier.fc", "stem.conv1"}


def test_quantizing_after_the_stems_pooling_equals_pooling_quantized_values():
    architecture = Architecture(False, (1, 1, 1, 1))
    model = QuantResNet(ResNet(architecture, num_classes=10, base_width=8).eval(), spec())
    calibrate_weights(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with calibrating(model):
        model(x)
    stem = model.stem
    with torch.no_grad():
        pooled_last = stem.maxpool(stem.output_quantizer(stem.conv1(x)))
        assert torch.equal(stem(x), pooled_last)


@BOTH_BLOCKS
def test_every_convolution_and_the_classifier_have_their_own_weight_quantizer(bottleneck):
    model, original = QuantResNet(float_model(bottleneck), spec()), float_model(bottleneck)
    weighted = [m for m in original.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers(model)) == len(quantizers(model, Role.WEIGHT)) == len(weighted)


ENDS = [frozenset(c) for n in range(len(End) + 1) for c in itertools.combinations(End, n)]


@pytest.mark.parametrize("ends", ENDS, ids=lambda ends: "+".join(sorted(e.value for e in ends)) or "none")
def test_exactly_the_named_ends_have_8_bits(ends):
    model = QuantResNet(float_model(bottleneck=True), spec(ends=ends))
    names = {
        End.STEM_WEIGHT: "stem.conv1.weight_quantizer",
        End.STEM_OUTPUT: "stem.output_quantizer",
        End.CLASSIFIER_INPUT: "blocks.4.join.output_quantizer",
        End.CLASSIFIER_WEIGHT: "classifier.fc.weight_quantizer",
    }
    bits = {name: q.bits for name, q in quantizers(model)}
    assert {name for name, b in bits.items() if b == 8} == {names[end] for end in ends}
    inner = {q.bits for name, q in quantizers(model, Role.ACTIVATION) if name not in names.values()}
    assert inner == {4}


@BOTH_BLOCKS
@pytest.mark.parametrize("weight", ["AdaRoundFakeQuantize", "FixedFakeQuantize", "LSQFakeQuantize"])
@pytest.mark.parametrize("activation", ["LSQFakeQuantize", "LSQPlusFakeQuantize", "FixedFakeQuantize"])
def test_hardening_keeps_the_logits_bit_for_bit_and_leaves_nothing_to_learn(bottleneck, weight, activation):
    model = calibrated(bottleneck, weight=weight, activation=activation)
    with torch.no_grad():
        before = model(images())
        harden(model)
        assert torch.equal(model(images()), before)
    assert {type(layer.weight_quantizer) for _, layer in layers(model)} == {IntegerWeight}
    assert {type(m) for m in model.modules() if isinstance(m, FakeQuantize)} == {FixedFakeQuantize}
    assert not list(model.parameters())


@pytest.mark.parametrize("kind", ROUNDINGS.values())
def test_hardening_settles_learned_rounding_and_forgets_what_it_learned(kind):
    model = calibrated(bottleneck=True)
    for _, layer in layers(model):
        assert isinstance(layer.weight_quantizer, AdaRoundFakeQuantize)
        learned = layer.weight_quantizer.start_rounding(layer.weight, kind).learned
        learned.data = torch.where(torch.rand_like(learned) < 0.5, -5.0, 5.0)
    with torch.no_grad():
        before = model(images())
        harden(model)
        torch.testing.assert_close(model(images()), before, rtol=1e-4, atol=1e-4)
    assert not [key for key in model.state_dict() if "rounding" in key]


def test_a_hardened_layers_weight_is_what_its_integers_stand_for():
    model = calibrated(bottleneck=False)
    harden(model)
    for _, layer in layers(model):
        assert torch.equal(layer.weight, layer.weight_quantizer.dequantize())
        assert int(layer.weight_quantizer.codes.max()) < 2**3


def test_hardening_twice_changes_nothing():
    model = calibrated(bottleneck=True)
    harden(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    harden(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@BOTH_BLOCKS
@pytest.mark.parametrize("activation", ["LSQFakeQuantize", "LSQPlusFakeQuantize", "FixedFakeQuantize"])
@torch.no_grad()
def test_settled_qparams_give_the_same_logits_without_a_relu_before_each_quantizer(
    bottleneck, activation, monkeypatch
):
    model = calibrated(bottleneck, activation=activation)
    for _, quantizer in quantizers(model, Role.ACTIVATION):
        quantizer.scale.data *= 0.3  # so that some values are clipped
    before = model(images())
    rectified = []
    monkeypatch.setattr(F, "relu_", lambda x: rectified.append(x.shape) or torch.relu_(x))
    with settled(model):
        assert torch.equal(model(images()), before)
        assert len(rectified) == 1  # the stem's, whose quantizer stands behind the pooling
    model(images())
    assert len(rectified) == 1 + len(quantizers(model, Role.ACTIVATION))


@torch.no_grad()
def test_a_quantizer_that_has_values_below_zero_or_is_off_does_not_stand_in_for_its_relu():
    model = calibrated(bottleneck=True, activation="LSQPlusFakeQuantize")
    for number, (_, quantizer) in enumerate(quantizers(model, Role.ACTIVATION)):
        quantizer.zero_point.data.fill_(number % 3)
    before = model(images())
    with full_precision(model):
        full = model(images())
    with settled(model):
        assert torch.equal(model(images()), before)
        with full_precision(model):
            assert torch.equal(model(images()), full)
    for _, quantizer in quantizers(model, Role.ACTIVATION):
        quantizer.zero_point.data.fill_(3)
    assert not torch.equal(model(images()), before)  # nothing of it stays


def test_hardening_before_calibration_is_refused():
    with pytest.raises(ValueError, match="before its range was calibrated"):
        harden(QuantResNet(float_model(bottleneck=True), spec()))


def test_calibrating_an_integer_weight_is_refused_by_name():
    model = calibrated(bottleneck=True)
    harden(model)
    with pytest.raises(ValueError, match=r"stem\.conv1: .*integer already"):
        calibrate_weights(model)


def test_a_nan_weight_is_refused_by_its_layers_name():
    model = float_model(bottleneck=True)
    model.layer3[0].conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.3\.branch\.conv2: .*NaN"):
        calibrate_weights(QuantResNet(model, spec()))


def test_only_steps_and_never_weights_or_biases_are_parameters():
    model = calibrated(bottleneck=True)
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_parameters()} == {"scale"}
    assert not any(p.requires_grad for p in model.parameters())


def test_building_the_quantized_model_leaves_the_float_one_alone():
    model = float_model(bottleneck=True)
    with torch.no_grad():
        before = model(images())
        quantized = QuantResNet(model, spec()).eval()
        calibrate_weights(quantized)
        with calibrating(quantized):
            quantized(images())
        harden(quantized)
        assert torch.equal(model(images()), before)


@pytest.mark.parametrize("size", [16, 15])
@pytest.mark.parametrize("channels", [4, 8])
def test_a_strided_projection_has_the_gradients_of_the_definition(channels, size):
    """Channels-last, where with under 8 channels the library's own overwrite memory on some CPUs."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, 6, 1, stride=2)
    layer = QuantConv2d(convolution, nn.BatchNorm2d(6).eval(), spec().weight_quantizer())
    for _ in range(20):
        x = torch.randn(8, channels, size, size).contiguous(memory_format=torch.channels_last)
        weight = layer.weight.clone().requires_grad_()
        layer.operate(x, weight).square().sum().backward()
        expected = layer.weight.double().contiguous().requires_grad_()
        y = F.conv2d(x.double().contiguous(), expected, layer.bias.double(), 2)
        y.square().sum().backward()
        torch.testing.assert_close(weight.grad.double(), expected.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_of_a_single_place_a_strided_convolution_has_the_gradient_it_has_in_float32(kernel):
    """In bfloat16 oneDNN's was whatever lay in memory, up to 1e36."""
    torch.manual_seed(4)
    convolution = nn.Conv2d(16, 32, kernel, 2, kernel // 2, bias=False)
    layer = QuantConv2d(convolution, nn.BatchNorm2d(32).eval(), spec().weight_quantizer())
    x = torch.randn(5, 16, 1, 1).to(memory_format=torch.channels_last)

    def found(narrow: bool) -> tuple[Tensor, Tensor]:
        weight = layer.weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = layer.operate(x, weight).float()
        y.square().sum().backward()
        return y.detach(), weight.grad

    output, gradient = found(False)
    torch.testing.assert_close(output, F.conv2d(x, layer.weight, layer.bias, 2, kernel // 2))
    for size in range(1, 4000, 97):
        noise = [torch.full((size,), 1e30) for _ in range(20)]
        del noise
        assert (found(True)[1] - gradient).abs().max() < 0.02 * gradient.abs().max()
