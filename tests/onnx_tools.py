"""ONNX Runtime as the oracle: run an exported network, and look inside it."""

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from calibquant.model.onnx_graph import INPUT, OUTPUT
from calibquant.model.quant_resnet import QuantResNet


def run_onnx(model: onnx.ModelProto, images: Tensor, outputs: list[str] | None = None) -> list[Tensor]:
    """Outputs of ONNX Runtime on the CPU with its default optimizations, of inner values too."""
    wanted = outputs or [OUTPUT]
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for name in set(wanted) - {OUTPUT}:
        shown.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(y) for y in session.run(wanted, {INPUT: images.numpy()})]


def codes_apart(found: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """By how many steps of a per-tensor scale two tensors on one grid differ, element by element."""
    steps = ((found - expected) / scale).abs()
    assert float((steps - steps.round()).max()) < 1e-3, "a value lies off the grid"
    return steps.round()


@torch.no_grad()
def assert_every_unit_is_the_same(model: QuantResNet, exported: onnx.ModelProto, images: Tensor) -> None:
    """Each unit, given what ONNX Runtime gives it, computes what ONNX Runtime computes.

    But for values on the edge between two codes, which float32 sums in another order push over: at most
    one in a thousand, and by one step. Feeding each unit keeps them from growing through the network.
    """
    units = model.units("block")
    names = [f"{unit.name}.output_quantizer" for unit in units[:-1]]
    found = run_onnx(exported, images, [*names, OUTPUT])
    x = images
    for unit, output in zip(units[:-1], found, strict=False):
        expected = unit.module(x)
        quantizer = dict(unit.module.named_modules()).get("output_quantizer")
        quantizer = unit.module.join.output_quantizer if quantizer is None else quantizer
        apart = codes_apart(output, expected, quantizer.scale)
        assert float((apart > 0).float().mean()) < 1e-3, unit.name
        assert float(apart.max()) <= 1, unit.name
        assert len(expected.unique()) > 4, f"{unit.name}: too few values to show anything"
        x = output
    np.testing.assert_allclose(found[-1], units[-1].module(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def relative_difference(found: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of each image's logits, over their range."""
    spread = expected.amax(1) - expected.amin(1)
    return (found - expected).abs().amax(1) / spread
