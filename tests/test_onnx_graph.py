"""The exported graph: what ONNX's checker and ONNX Runtime, which know nothing of this code, make of it."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from calibquant.errors import UserError
from calibquant.model.onnx_graph import Graph, add, lowest_opset, onnx_model
from calibquant.model.onnx_types import STORAGES, pack_little_endian, storage_of
from calibquant.model.quant_layer import harden, layers
from calibquant.model.resnet import ARCHITECTURES
from calibquant.quantization.affine import broadcastable
from calibquant.quantization.fake_quant import FixedFakeQuantize, Role
from calibquant.quantization.observer import MinMaxObserver
from calibquant.quantization.state import quantizers
from tests.onnx_tools import assert_every_unit_is_the_same, relative_difference, run_onnx
from tests.small import calibrated_model, small_config

QUICK = {"quant__w_qconfig__observer": "MinMaxObserver", "quant__a_qconfig__observer": "MinMaxObserver"}
WHOLE_STEM = {"model__kwargs__small_images": False, "model__kwargs__num_classes": 10}


def images(count, side=32, seed=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def hardened(side=32, **changes):
    """A small network with random weights, quantized; the stem has its pooling."""
    config = small_config(**{**QUICK, **WHOLE_STEM, **changes})
    model = calibrated_model(config, images(8, side))
    harden(model)
    return model


def layer_bytes(model, opset):
    """What the layers take by their bit-widths: codes, then scales, zero-points and biases."""
    total = 0
    for _, layer in layers(model):
        integers = layer.weight_quantizer
        width = storage_of(integers.bits, opset).bits
        channels = integers.scale.numel()
        total += -(-integers.codes.numel() * width // 8) + 4 * channels - (-channels * width // 8)
        total += 4 * layer.bias.numel()
    return total


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_network_of_the_family_computes_the_same_in_onnx_runtime(kind):
    width = max(8, -(-64 // ARCHITECTURES[kind].width_per_group))
    model = hardened(64, model__type=kind, model__kwargs__base_width=width)
    exported = onnx_model(model, 64, {})
    onnx.checker.check_model(exported, full_check=True)
    assert {node.domain for node in exported.graph.node} == {""}
    assert_every_unit_is_the_same(model, exported, images(4, 64))
    batch = images(7, 64, seed=4)
    (logits,) = run_onnx(exported, batch)
    with torch.no_grad():
        expected = model(batch)
    exact = relative_difference(logits, expected) < 1e-5
    assert exact.float().mean() > 0.5  # of the others a value fell on the other side of an edge
    assert torch.equal(logits.argmax(1)[exact], expected.argmax(1)[exact])
    overhead = exported.ByteSize() - layer_bytes(model, 21)
    assert 0 < overhead < 700 * len(exported.graph.node), "more than names and attributes"


@pytest.mark.parametrize("changes", [
    {"quant__w_qconfig__bit": 2},
    {"quant__w_qconfig__bit": 3, "quant__a_qconfig__bit": 3},
    {"quant__w_qconfig__bit": 2, "quant__a_qconfig__bit": 2},
    {"quant__w_qconfig__bit": 8, "quant__a_qconfig__bit": 4},
    {"quant__w_qconfig__bit": 8, "quant__a_qconfig__bit": 8},
    {"quant__a_qconfig__bit": 6, "quant__w_qconfig__ch_axis": -1},
    {"quant__a_qconfig__quantizer": "LSQPlusFakeQuantize"},
    {"quant__w_qconfig__quantizer": "LSQFakeQuantize"},
    {"quant__a_qconfig__ch_axis": 1, "quant__w_qconfig__quantizer": "FixedFakeQuantize"},
])  # fmt: skip
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("opset", [13, 21, 25])
def test_bits_signs_and_granularities_survive_onnx_runtimes_optimizations(changes, symmetric, opset):
    model = hardened(
        quant__ends_8bit=[],
        quant__w_qconfig__symmetric=symmetric,
        quant__a_qconfig__symmetric=symmetric,
        **changes,
    )
    exported = onnx_model(model, 32, {}, opset)
    assert exported.opset_import[0].version == opset
    batch = images(6)
    (logits,) = run_onnx(exported, batch)
    with torch.no_grad():
        assert (relative_difference(logits, model(batch)) < 1e-5).float().mean() > 0.5


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("opset", [13, 21, 25])
def test_weights_are_stored_as_the_integers_they_are(bits, symmetric, opset):
    model = hardened(
        quant__w_qconfig__bit=bits,
        quant__w_qconfig__symmetric=symmetric,
        quant__w_qconfig__ch_axis=-1 if bits % 2 else 0,
    )
    stored = {tensor.name: tensor for tensor in onnx_model(model, 32, {}, opset).graph.initializer}
    layer = model.blocks[0].branch.conv1
    codes = stored["layer1.0.conv1.weight.codes"]
    assert TensorProto.DataType.Name(codes.data_type) in {
        f"{'' if symmetric else 'U'}INT{s.bits}" for s in STORAGES if s.bits >= bits and s.opset <= opset
    }
    assert len(codes.raw_data) == -(-layer.weight.numel() * storage_of(bits, opset).bits // 8)
    real = [
        torch.from_numpy(numpy_helper.to_array(stored[f"layer1.0.conv1.weight.{part}"]).astype(np.float32))
        for part in ("codes", "scale", "zero_point")
    ]
    scale, zero_point = (q if q.ndim == 0 else broadcastable(q, 4, 0) for q in real[1:])
    assert torch.equal((real[0] - zero_point) * scale, layer.weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers_are_what_the_onnx_package_unpacks(bits):
    values = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).repeat(3)[1:]
    kind = getattr(TensorProto, f"INT{bits}")
    tensor = TensorProto(data_type=kind, dims=[len(values)])
    tensor.raw_data = pack_little_endian(values, bits).tobytes()
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int64), values)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ch_axis", [-1, 1])
@pytest.mark.parametrize("opset", [13, 21, 25])
def test_an_activation_grid_clips_and_rounds_as_the_quantizer_does(bits, symmetric, ch_axis, opset):
    quantizer = FixedFakeQuantize(bits, symmetric, ch_axis, MinMaxObserver, Role.ACTIVATION)
    high = torch.tensor([1.0] if ch_axis < 0 else [1.0, 0.3, 7.0])
    quantizer.set_range(-0.4 * high, high)
    x = torch.linspace(-9, 9, 4500).view(1, 3, 30, 50)
    graph = Graph(opset)
    result = add(quantizer, graph, "images", "grid")
    shape = ["batch", 3, 30, 50]
    value = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("images", result)]
    body = onnx.helper.make_graph(graph.nodes, "one", value[:1], value[1:], graph.initializers)
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        body, opset_imports=imports, ir_version=onnx.helper.find_min_ir_version_for(imports)
    )
    (found,) = run_onnx(model, x, [result])
    ratio = x / quantizer.qparams(4)[0]
    between = (ratio - ratio.floor() - 0.5).abs() < 1e-4  # a tie, which a division may round elsewhere
    assert between.float().mean() < 0.01
    assert torch.equal(found[~between], quantizer(x)[~between])


@pytest.mark.parametrize(
    ("weight", "activation", "opset"), [(8, 8, 13), (4, 4, 21), (3, 8, 21), (2, 4, 25)]
)
def test_the_opset_is_the_lowest_that_has_a_type_for_each_bit_width(weight, activation, opset):
    model = hardened(quant__w_qconfig__bit=weight, quant__a_qconfig__bit=activation)
    assert lowest_opset(model) == opset == onnx_model(model, 32, {}).opset_import[0].version


@pytest.mark.parametrize("opset", [0, 12, 99])
def test_an_opset_that_cannot_be_written_is_refused(opset):
    with pytest.raises(UserError, match=f"opset is {opset}, allowed are 13 to"):
        onnx_model(hardened(), 32, {}, opset)


def test_a_network_that_is_not_hardened_or_not_known_is_refused():
    model = calibrated_model(small_config(**QUICK), images(8, 16))
    with pytest.raises(ValueError, match="hardened"):
        onnx_model(model, 16, {})
    with pytest.raises(ValueError, match="no ONNX operators are known for GELU"):
        add(torch.nn.GELU(), Graph(21), "x", "gelu")


def test_every_batch_size_runs_and_another_image_size_does_not():
    exported = onnx_model(hardened(), 32, {})
    for count in (1, 2, 5):
        assert run_onnx(exported, images(count))[0].shape == (count, 10)
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(exported, images(2, 16))


def test_each_quantizer_is_in_the_graph_once():
    model = hardened()
    nodes = [node.op_type for node in onnx_model(model, 32, {}).graph.node]
    assert nodes.count("QuantizeLinear") == len(quantizers(model))
    assert nodes.count("DequantizeLinear") == len(quantizers(model)) + len(layers(model))
