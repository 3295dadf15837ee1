"""From a ResNet in memory, ours or torchvision's, to the float network that is quantized here.

Which architecture it is follows from its modules; that it was read right is checked on the outputs.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from calibquant.errors import UserError, printable
from calibquant.model.load import build_model
from calibquant.model.resnet import ARCHITECTURES, Architecture, ResNet

TOLERANCE = 1e-2
"""Of outputs over the largest of them; another stride changes them by far more."""


def describe_network(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """``model.type`` and ``model.kwargs`` of the config that builds a network like the given one.

    Raises:
        UserError: it is no ResNet of the family.
    """
    if isinstance(model, ResNet):
        architecture, stride_in_1x1 = model.architecture, model.stride_in_1x1
    elif isinstance(model, TorchvisionResNet):
        architecture, stride_in_1x1 = _torchvision_architecture(model), False
    else:
        kind = f"{type(model).__module__.partition('.')[0]}'s {type(model).__name__}"
        raise UserError(f"the model is {kind}, allowed are calibquant's and torchvision's ResNet")
    names = [name for name, known in ARCHITECTURES.items() if known == architecture]
    if not names:
        raise UserError(
            f"the model is a ResNet of {architecture}, which is none of {', '.join(ARCHITECTURES)}"
        )
    if not isinstance(model.conv1, nn.Conv2d) or not isinstance(model.fc, nn.Linear):
        raise UserError(
            f"the model's conv1 is a {type(model.conv1).__name__} and its fc a {type(model.fc).__name__}, "
            "allowed are Conv2d and Linear"
        )
    return names[0], {
        "num_classes": model.fc.out_features,
        "stride_in_1x1": stride_in_1x1,
        "small_images": isinstance(model.maxpool, nn.Identity),
        "base_width": model.conv1.out_channels,
    }


def _torchvision_architecture(model: TorchvisionResNet) -> Architecture:
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    kinds = {type(block) for stage in stages for block in stage}
    if kinds not in ({BasicBlock}, {Bottleneck}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"the model's blocks are {found}, allowed are torchvision's BasicBlock or Bottleneck"
        )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "relu" and type(module) is not nn.ReLU:
            raise UserError(f"the model's {name} is a {type(module).__name__}, allowed is ReLU")
    one, two, three, four = (len(stage) for stage in stages)
    return Architecture(kinds == {Bottleneck}, (one, two, three, four), model.groups, model.base_width)


@torch.no_grad()
def float_copy(model: nn.Module, images: Tensor) -> ResNet:
    """The network as one of ours, in float32 and evaluation mode, on its device; the given one stays as is.

    Args:
        images: a few inputs ``[N, 3, H, W]`` on which both must agree.

    Raises:
        UserError: its weights do not fit, or it computes something else than a ResNet of the family.
    """
    kind, kwargs = describe_network(model)
    ours = build_model(kind, kwargs).float()
    try:
        ours.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise UserError(f"the model does not fit {kind}: {printable(str(error), 300)}") from error
    for name, norm in ours.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = getattr(model.get_submodule(name), "eps", norm.eps)  # which is in no state dict
    device = next(model.parameters()).device
    ours.to(device)
    theirs = copy.deepcopy(model).float().eval()
    images = images.to(device)
    expected, found = theirs(images), ours(images)
    alike = isinstance(expected, Tensor) and expected.shape == found.shape
    if alike and not bool(expected.isfinite().all()):
        raise UserError("the model's outputs on these images hold NaN or infinity")
    if not (alike and float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())):
        raise UserError(
            f"the model does not compute what a {kind} does with its weights: it was changed in a way that "
            "cannot be taken over (strides, dilation, activations or forward)"
        )
    return ours
