"""Write a saved quantized network as a standard ONNX file, with its integers as integers.

python ./calibquant/solver/export_onnx.py --config ./exp/w4a4/rs101/config.yaml \\
    --quantized_model_path resnet101_w4_a4_57283.pth --out resnet101_w4a4.onnx
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start

from easydict import EasyDict

import calibquant
from calibquant.errors import UserError
from calibquant.model.quant_resnet import QuantResNet
from calibquant.paths import is_dir
from calibquant.solver.checkpoint import find_checkpoint, load_checkpoint, require_agreement
from calibquant.solver.config import load_config, plain
from calibquant.solver.files import write_bytes
from calibquant.solver.imagenet_util import class_names
from calibquant.solver.script import add_saved_model, config_parser, run_script


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config)
    require_onnx_name("--out", args.out)
    path = find_checkpoint(args.quantized_model_path, config)
    model, saved, metadata = load_checkpoint(path)
    require_agreement(config, saved, path)
    description = describe(saved, metadata, classes_if_known(config))
    size = write_onnx(model, args.out, description, args.opset)
    print(f"saved {args.out}: {size / 1e6:.2f} MB (quantized model: {path.stat().st_size / 1e6:.2f} MB)")


def classes_if_known(config: EasyDict) -> list[str] | None:
    """Names of the outputs as `data.classes` says; a warning and None where they cannot be read."""
    try:
        return class_names(config.data)
    except UserError as error:
        print(f"warning: the ONNX file will name no classes: {error}", file=sys.stderr)
        return None


def require_onnx_name(what: str, path: Path) -> None:
    """Refuse a name that would replace something else than an ONNX file, before any work.

    Raises:
        UserError: the name does not end in ``.onnx``, or is a folder's.
    """
    if path.suffix != ".onnx" or is_dir(path):
        words = "is a folder, " if is_dir(path) else ""
        raise UserError(f"{what} {path}: {words}allowed is the name of a file that ends in .onnx")


def write_onnx(model: QuantResNet, path: Path, description: dict[str, str], opset: int | None) -> int:
    """Write a hardened network as ONNX, whole or not at all, in the place of a file of that name.

    Args:
        description: from :func:`describe`.
        opset: of the file; None for the lowest that has a type for each bit-width.

    Returns:
        The file's size in bytes.

    Raises:
        UserError: onnx is not installed, the opset is not known, or the file cannot be written.
    """
    from calibquant.model.onnx_graph import onnx_model  # here, since onnx is optional

    size = json.loads(description["input.size"])
    content: bytes = onnx_model(model, size, description, opset).SerializeToString(deterministic=True)
    write_bytes(path, content)
    return len(content)


def describe(config: EasyDict, metadata: dict[str, Any], classes: list[str] | None) -> dict[str, str]:
    """What the ONNX file says of its input, its outputs and its making; values other than texts as JSON.

    Args:
        config, metadata: of the saved network.
        classes: names of the outputs in order, None where they are not known.

    Raises:
        UserError: there are not as many classes as outputs.
    """
    data, outputs = config.data, config.model.kwargs.num_classes
    if classes is not None and len(classes) != outputs:
        raise UserError(f"{len(classes)} classes are named, but the network has {outputs} outputs")
    values = {
        "input": "RGB images in [0, 1], minus input.mean, over input.std",
        "input.mean": data.mean,
        "input.std": data.std,
        "input.size": data.input_size,
        "input.resize_shorter_side": data.test_resize,
        "network": config.model.type,
        "quant": plain(config.quant),
        "made_with": metadata,
        "calibquant": calibquant.__version__,
        **({} if classes is None else {"classes": classes}),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def parse_arguments() -> argparse.Namespace:
    parser = config_parser(__doc__, "the YAML that the network was quantized with", device=False)
    add_saved_model(parser)
    parser.add_argument(
        "--out", required=True, type=Path, help="the ONNX file; one that exists is replaced"
    )
    parser.add_argument(
        "--opset",
        type=int,
        help="default: the lowest with a type for each bit-width: 25 for 2 bits, 21 for 3 and 4, else 13",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
