"""Float networks by name, and their weights from a file or from torchvision."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from calibquant.errors import UserError, printable
from calibquant.model.archive import check_zip, is_plain_tensor, is_zip
from calibquant.model.resnet import ARCHITECTURES, ResNet
from calibquant.paths import expand, is_file, why_no_file

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save a state dict."""


def build_model(type: str, kwargs: dict[str, Any]) -> ResNet:
    """A float network of the given type, randomly initialised, in evaluation mode."""
    return ResNet(ARCHITECTURES[type], **kwargs).eval()


def load_weights(model: ResNet, type: str, path: str | None) -> None:
    """Load a state dict from a file, or torchvision's ``IMAGENET1K_V1`` weights where path is None.

    V1 on purpose: the V2 weights gain 1 to 4 points in float and lose far more at low bits.

    Raises:
        UserError: file missing, unsafe, truncated, of another architecture, or with NaN in it;
            or torchvision's download failed.
    """
    if path is None:
        state, name = _download(type), f"torchvision's {type} IMAGENET1K_V1 weights"
    else:
        state, name = read_state_dict(expand(path, "model.path")), f"model.path {path}"
    own = model.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # which no one needs
    state = {key: value for key, value in state.items() if key not in counters}
    missing = sorted(own.keys() - state.keys() - counters)
    unexpected = sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"{name}: does not fit {type}: {_differences(missing, unexpected)}")
    for key, value in state.items():
        if not is_plain_tensor(value):
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {key} is {kind} ({value.layout}, {value.device}), with parts missing or shared, "
                "allowed are dense floating-point weights"
            )
        if value.shape != own[key].shape:
            raise UserError(
                f"{name}: does not fit {type}: {key} is {list(value.shape)}, "
                f"allowed is {list(own[key].shape)}"
            )
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(
                f"{name}: {key} is {str(value.dtype).removeprefix('torch.')} ({value.layout}), "
                "allowed are dense floating-point weights"
            )
        numbers = value.float()
        if not bool(torch.isfinite(numbers).all()):
            raise UserError(f"{name}: {key} holds NaN or infinity, or what float32 cannot hold")
        if key.endswith("running_var") and bool((numbers < 0).any()):
            raise UserError(f"{name}: {key} holds {float(numbers.min()):g}, allowed are variances")
    model.load_state_dict({**{k: own[k] for k in counters}, **state})


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without executing anything; wrappers and a ``module.`` prefix are removed.

    Raises:
        UserError: the file cannot be read, holds more than tensors, or is no state dict.
    """
    if not is_file(path):
        raise UserError(f"model.path {path}: {why_no_file(path)}")
    content = safe_load(path, "model.path")
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    require_named_tensors(content, f"model.path {path}")
    state = {key.removeprefix("module."): value for key, value in content.items()}
    if len(state) != len(content):
        raise UserError(f"model.path {path}: a name stands twice, with and without `module.`")
    return state


def require_named_tensors(content: Any, name: str) -> None:
    """Refuse what is no state dict.

    Raises:
        UserError: naming what is none.
    """
    allowed = f"allowed is a mapping of names to tensors, or one under {', '.join(WRAPPERS)}"
    if not isinstance(content, dict) or not content:
        raise UserError(f"{name}: holds no state dict, {allowed}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{name}: {key!r:.60} is no named tensor, {allowed}")


def safe_load(path: Path, what: str, checked: bool = False) -> Any:
    """``torch.load`` of tensors and plain values only; whatever goes wrong is one line.

    Args:
        checked: the container has been through :func:`check_zip` already.

    Raises:
        UserError: truncated, damaged, foreign, or a pickle that wants to run code.
    """
    try:
        if not checked and is_zip(path):
            check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        more = f"; it holds {printable(held[1], 80)}: save a state dict alone" if held else ""
        raise UserError(
            f"{what} {path}: refused: not a file of tensors alone "
            f"(truncated, foreign, or a pickle that would run code){more}"
        ) from error
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch's readers raise almost anything on foreign bytes
        reason = "it is empty" if not path.stat().st_size else "it is no file that torch.save wrote whole"
        if is_zip(path):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} {path}: cannot be read, truncated, damaged or foreign: {printable(reason, 120)}"
        ) from error


def _download(type: str) -> dict[str, Tensor]:
    """Torchvision's weights, from its folder of downloads or the network; no code in them is run."""
    weights = torchvision.models.get_model_weights(type)["IMAGENET1K_V1"]
    kept = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    there = is_file(kept)
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        require_named_tensors(state, "what it holds")
    except Exception as error:  # a damaged file raises almost anything
        reason = printable(str(error), 300) or error.__class__.__name__
        if there:
            raise UserError(
                f"model.path null: torchvision's weights {kept}: cannot be read ({reason}); "
                "remove it, and it is downloaded again"
            ) from error
        raise UserError(
            f"model.path null: torchvision's weights could not be downloaded ({reason}); "
            "give model.path a state dict on disk"
        ) from error
    return state


def _differences(missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{len(names)} {what} ({printable(', '.join(names[:3]), 200)}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return " and ".join(parts)
