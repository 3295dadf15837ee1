"""The quantized network as a standard ONNX graph: integer weights, QuantizeLinear and DequantizeLinear.

Built straight from the modules with ``onnx.helper``: the network is a line of ten operators, so that
neither tracing nor another intermediate representation would add anything. Every weight is an integer
initializer behind a DequantizeLinear, every activation quantizer a QuantizeLinear and a DequantizeLinear.
"""

from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import calibquant
from calibquant.errors import UserError
from calibquant.model.onnx_types import Storage, pack_little_endian, storage_of
from calibquant.model.quant_layer import QuantConv2d, QuantLayer, QuantLinear, layers
from calibquant.model.quant_resnet import (
    QuantClassifier,
    QuantResidualBlock,
    QuantResNet,
    QuantStem,
    ResidualJoin,
)
from calibquant.quantization.affine import PER_TENSOR, quant_bounds
from calibquant.quantization.fake_quant import FakeQuantize, IntegerWeight
from calibquant.quantization.state import quantizers

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise UserError(
        "ONNX export needs the package onnx, which is not installed: pip install -r requirements-onnx.txt"
    ) from error

INPUT, OUTPUT = "images", "logits"
LOWEST_OPSET = 13
"""The first whose QuantizeLinear knows channels."""


def lowest_opset(model: QuantResNet) -> int:
    """The first opset in which each weight and activation of a model has the narrowest type there is."""
    newest = onnx.defs.onnx_opset_version()
    weights = [layer.weight_quantizer for _, layer in layers(model)]
    activations = [quantizer for _, quantizer in quantizers(model)]
    widths = {q.bits for q in (*weights, *activations) if isinstance(q, IntegerWeight | FakeQuantize)}
    return max(storage_of(bits, newest).opset for bits in widths)


def onnx_model(
    model: QuantResNet, image_size: int, properties: dict[str, str], opset: int | None = None
) -> onnx.ModelProto:
    """The ONNX model of a hardened network, checked by ``onnx.checker``.

    Args:
        image_size: side of the input ``images``, ``[batch, 3, image_size, image_size]``.
        properties: what the file says of itself, by name.
        opset: of the file; by default the lowest with a type for each bit-width, which older readers
            know best. Codes that an opset has no type for are stored in the next wider one.

    Raises:
        UserError: the onnx package does not know the opset, or an opset too low is asked for.
        ValueError: the model is not hardened.
    """
    newest = onnx.defs.onnx_opset_version()
    opset = lowest_opset(model) if opset is None else opset
    if not LOWEST_OPSET <= opset <= newest:
        raise UserError(
            f"opset is {opset}, allowed are {LOWEST_OPSET} to {newest} (onnx {onnx.__version__})"
        )
    graph = Graph(opset)
    logits = add(model, graph, INPUT, "")
    graph.nodes[-1].output[0] = OUTPUT
    assert graph.nodes[-1].name == logits
    images = helper.make_tensor_value_info(
        INPUT, TensorProto.FLOAT, ["batch", 3, image_size, image_size], properties.get("input", "")
    )
    classes = model.classifier.fc.bias.numel()
    scores = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])
    body = helper.make_graph(graph.nodes, "calibquant", [images], [scores], graph.initializers)
    imports = [helper.make_opsetid("", opset)]
    result: onnx.ModelProto = helper.make_model(
        body,
        opset_imports=imports,
        producer_name="calibquant",
        producer_version=calibquant.__version__,
        ir_version=helper.find_min_ir_version_for(imports),
    )
    helper.set_model_props(result, properties)
    onnx.checker.check_model(result, full_check=True)
    return result


class Graph:
    """Nodes and initializers in the order in which they are added; a node's output has its name."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def floats(self, values: Tensor, name: str) -> str:
        """Add float32 values and return their name."""
        return self._initializer(TensorProto.FLOAT, values, values.cpu().numpy().astype("<f4"), name)

    def integers(self, values: Tensor, storage: Storage, signed: bool, name: str) -> str:
        """Add integers in a type's own width and return their name."""
        kind = getattr(TensorProto, storage.signed if signed else storage.unsigned)
        return self._initializer(kind, values, pack_little_endian(values, storage.bits), name)

    def _initializer(self, kind: int, values: Tensor, content: np.ndarray, name: str) -> str:
        self.initializers.append(
            TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=content.tobytes())
        )
        return name


@singledispatch
def add(module: nn.Module, graph: Graph, x: str, name: str) -> str:
    """Add a module's nodes, which read ``x`` and are named after the module; return its output's name.

    Raises:
        ValueError: no operator is known for this type of module.
    """
    raise ValueError(f"{name}: no ONNX operators are known for {type(module).__name__}")


@add.register
def _(module: QuantResNet, graph: Graph, x: str, name: str) -> str:
    for unit in module.units("block"):
        x = add(unit.module, graph, x, unit.name)
    return x


@add.register
def _(module: QuantStem, graph: Graph, x: str, name: str) -> str:
    for child_name, child in module.named_children():
        x = add(child, graph, x, f"{name}.{child_name}")
    return x


@add.register
def _(module: nn.Sequential, graph: Graph, x: str, name: str) -> str:
    for child_name, child in module.named_children():
        x = add(child, graph, x, f"{name}.{child_name}")
    return x


@add.register
def _(module: nn.Identity, graph: Graph, x: str, name: str) -> str:
    return x


@add.register
def _(module: nn.MaxPool2d, graph: Graph, x: str, name: str) -> str:
    kernel, stride = list(_pair(module.kernel_size)), list(_pair(module.stride))
    pads = list(_pair(module.padding)) * 2
    return graph.node("MaxPool", [x], name, kernel_shape=kernel, strides=stride, pads=pads)


@add.register
def _(module: QuantResidualBlock, graph: Graph, x: str, name: str) -> str:
    """The only place where the graph branches: the join reads the branch and the shortcut."""
    join: ResidualJoin = module.join
    skip = add(module.shortcut, graph, x, f"{name}.shortcut")
    h = add(module.branch, graph, x, name)
    h = add(join.last, graph, h, f"{name}.last")
    summed = graph.node("Add", [h, skip], f"{name}.sum")
    rectified = graph.node("Relu", [summed], f"{name}.relu")
    return add(join.output_quantizer, graph, rectified, f"{name}.output_quantizer")


@add.register
def _(module: QuantClassifier, graph: Graph, x: str, name: str) -> str:
    pooled = graph.node("GlobalAveragePool", [x], f"{name}.pool")
    return add(module.fc, graph, graph.node("Flatten", [pooled], f"{name}.flatten"), f"{name}.fc")


@add.register
def _(module: QuantConv2d, graph: Graph, x: str, name: str) -> str:
    """A convolution and, added to its result in float32 as here, its bias.

    Inside the Conv node ONNX Runtime would round the bias to steps of input scale times weight scale,
    which are coarse at 4 bits, and it would make 8-bit weights on narrower activations a QLinearConv,
    which it then refuses to load (1.32).
    """
    y = graph.node(
        "Conv",
        [x, _add_weight(module, graph, name)],
        f"{name}.conv",
        kernel_shape=list(module.weight.shape[2:]),
        strides=list(module.stride),
        pads=[*module.padding, *module.padding],
        group=module.groups,
    )
    bias = graph.floats(module.bias[:, None, None], f"{name}.bias")
    return _add_activation(module, graph, graph.node("Add", [y, bias], name), name)


@add.register
def _(module: QuantLinear, graph: Graph, x: str, name: str) -> str:
    inputs = [x, _add_weight(module, graph, name), graph.floats(module.bias, f"{name}.bias")]
    return _add_activation(module, graph, graph.node("Gemm", inputs, name, transB=1), name)


def _add_activation(layer: QuantLayer, graph: Graph, y: str, name: str) -> str:
    if layer.relu:
        y = graph.node("Relu", [y], f"{name}.relu")
    return add(layer.output_quantizer, graph, y, f"{name}.output_quantizer")


def _add_weight(layer: QuantLayer, graph: Graph, name: str) -> str:
    """Add a layer's integer weight; return the name of its real values."""
    integers = layer.weight_quantizer
    if not isinstance(integers, IntegerWeight):
        raise ValueError("only a hardened model can be exported")
    quant_min, _ = quant_bounds(integers.bits, integers.symmetric)
    storage, signed = storage_of(integers.bits, graph.opset), integers.symmetric
    codes = integers.codes.to(torch.int16) + quant_min
    weight = f"{name}.weight"
    codes_name = graph.integers(codes, storage, signed, f"{weight}.codes")
    qparams = _add_qparams(graph, integers, (integers.scale, integers.zero_point), storage, weight)
    axis = _axis(integers.ch_axis)
    return graph.node("DequantizeLinear", [codes_name, *qparams], weight, axis=axis)


@add.register
def _(module: FakeQuantize, graph: Graph, x: str, name: str) -> str:
    qparams = module.hard_qparams()
    if not bool(torch.isfinite(qparams[0]).all()):
        raise ValueError(f"{name}: its range was never calibrated")
    storage, axis = storage_of(module.bits, graph.opset), _axis(module.ch_axis)
    if module.bits < 8:
        x = _add_clip(module, graph, x, name)
    names = _add_qparams(graph, module, qparams, storage, name)
    codes = graph.node("QuantizeLinear", [x, *names], f"{name}.codes", axis=axis)
    return graph.node("DequantizeLinear", [codes, *names], name, axis=axis)


def _add_clip(module: FakeQuantize, graph: Graph, x: str, name: str) -> str:
    """Keep an activation ``[N, C, H, W]`` in the range of its grid, by Max and Min.

    A QuantizeLinear saturates at its type's bounds only, which may be wider. Where they are not, this
    keeps ONNX Runtime (1.32) right: it drops a Relu before int4 without looking at the zero-point, and
    swaps MaxPool with uint4, which it then refuses. Clip would take no bounds per channel.
    """
    scale, zero_point = module.hard_qparams(ndim=4)
    if module.symmetric:  # an unsigned type ends at 0 as its grid does
        low = graph.floats((module.quant_min - zero_point) * scale, f"{name}.lowest")
        x = graph.node("Max", [x, low], f"{name}.raised")
    high = graph.floats((module.quant_max - zero_point) * scale, f"{name}.highest")
    return graph.node("Min", [x, high], f"{name}.lowered")


def _add_qparams(
    graph: Graph,
    grid: FakeQuantize | IntegerWeight,
    qparams: tuple[Tensor, Tensor],
    storage: Storage,
    name: str,
) -> list[str]:
    """Add scale and zero-point, ``[C]``, or scalars for one range per tensor; return their names."""
    scale, zero_point = (q[0] if grid.ch_axis == PER_TENSOR else q for q in qparams)
    return [
        graph.floats(scale, f"{name}.scale"),
        graph.integers(zero_point, storage, grid.symmetric, f"{name}.zero_point"),
    ]


def _axis(ch_axis: int) -> int | None:
    """The attribute of that name, which one range per tensor has not."""
    return None if ch_axis == PER_TENSOR else ch_axis


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
