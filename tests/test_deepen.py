"""A ResNet-101 made of a ResNet-50: its shapes, and nearly its function."""

import torch

from benchmarks.deepen import deepened
from calibquant.model.load import build_model
from calibquant.model.resnet import ARCHITECTURES

SMALL = {"num_classes": 10, "stride_in_1x1": False, "small_images": False, "base_width": 8}


def test_a_deepened_network_has_the_shapes_of_the_deeper_one_and_nearly_its_own_outputs():
    torch.manual_seed(0)
    shallow, deep = build_model("resnet50", SMALL), build_model("resnet101", SMALL)
    deep.load_state_dict(deepened(shallow.state_dict(), ARCHITECTURES["resnet101"].depths))
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected, found = shallow(images), deep(images)
    assert float((found - expected).norm() / expected.norm()) < 0.5
    assert torch.equal(found.argmax(1), expected.argmax(1))
