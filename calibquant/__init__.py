"""CalibQuant: low-bit post-training quantization of ResNets, from one YAML or from Python.

What can be used from Python is loaded when it is first asked for, so that the import itself is cheap.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibquant.errors import UserError
    from calibquant.solver.api import (
        QuantizedModel,
        export_onnx,
        load_quantized,
        quantize,
        save_quantized,
    )

__version__ = "0.1.0"
__all__ = [
    "QuantizedModel",
    "UserError",
    "export_onnx",
    "load_quantized",
    "quantize",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "UserError":
        from calibquant import errors

        return errors.UserError
    from calibquant.solver import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
