"""The float networks against torchvision's, by name, shape and logits."""

import pytest
import torch
import torchvision
from torch import nn

from calibquant.model.resnet import ARCHITECTURES, Architecture, ResNet


def randomise(model: nn.Module) -> None:
    """Give every parameter and statistic a random value that keeps activations bounded."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**16, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            values = pool.repeat(module.weight.numel() // len(pool) + 1)[: module.weight.numel()]
            module.weight.data = values.view_as(module.weight) * fan_in**-0.5
        if isinstance(module, nn.Linear):
            module.bias.data.uniform_(-1, 1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (
                module.weight.data,
                module.bias.data,
                module.running_mean,
                module.running_var,
            ):
                statistic.uniform_(0.2, 0.8, generator=generator)
            module.num_batches_tracked.zero_()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_torchvisions_with_torchvisions_weights(name):
    with torch.device("meta"):  # skips two slow initialisations
        theirs, ours = torchvision.models.get_model(name, weights=None), ResNet(ARCHITECTURES[name])
    theirs = theirs.to_empty(device="cpu").eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-4)
    assert expected.isfinite().all() and expected.std() > 0.01


def tiny(bottleneck: bool = True, **options: bool) -> ResNet:
    return ResNet(Architecture(bottleneck, (2, 1, 1, 1)), num_classes=10, base_width=8, **options).eval()


def strides(model: ResNet, convolution: str) -> list[int]:
    return [getattr(block, convolution).stride[0] for _, block in model.blocks()]


def test_the_stride_of_a_stage_is_on_the_3x3_convolution():
    assert strides(tiny(), "conv1") == [1, 1, 1, 1, 1]
    assert strides(tiny(), "conv2") == [1, 1, 2, 2, 2]


def test_stride_in_1x1_moves_the_stride_to_the_first_convolution():
    model = tiny(stride_in_1x1=True)
    assert strides(model, "conv1") == [1, 1, 2, 2, 2]
    assert strides(model, "conv2") == [1, 1, 1, 1, 1]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(("small_images", "size"), [(True, 32), (False, 8)])
def test_small_images_keep_their_resolution_in_the_stem(small_images, size):
    model = tiny(small_images=small_images)
    sizes = []
    model.layer1.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [size]


def test_blocks_are_listed_in_dataflow_order():
    assert [name for name, _ in tiny().blocks()] == [
        "layer1.0",
        "layer1.1",
        "layer2.0",
        "layer3.0",
        "layer4.0",
    ]


@pytest.mark.parametrize(("bottleneck", "projected"), [(True, [0, 2, 3, 4]), (False, [2, 3, 4])])
def test_only_blocks_that_change_the_shape_have_a_projection(bottleneck, projected):
    blocks = [block for _, block in tiny(bottleneck).blocks()]
    assert [i for i, block in enumerate(blocks) if block.shortcut() is not None] == projected
