"""A GPU for machines without one: tensors of the CPU that say they are on one, held to a GPU's rules.

What is computed is what the CPU computes. What is watched is where tensors are, when the host has to
wait for them, and what is called. Kernels, streams, precision and memory are not imitated.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from calibquant.quantization.columns import loops_for

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
QUESTIONS = (torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type)
"""What only reads its arguments."""
PLACES: dict[Any, Any] = {
    Tensor.device.__get__: GPU,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
}
COPIES = (Tensor.copy_, Tensor.to, Tensor.cpu, Tensor.type_as)
"""What tensors of both devices may meet in."""
ITEMS = (Tensor.__getitem__, Tensor.__setitem__)
JOINS = (torch.cat, torch.stack)
"""What takes no single number of the CPU beside tensors of a GPU, as arithmetic does."""
READ_BY_HOST = (
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__,
    Tensor.nonzero, torch.nonzero, torch.masked_select, Tensor.masked_select, torch.equal, Tensor.equal,
    torch.unique, Tensor.unique, torch.repeat_interleave, Tensor.repeat_interleave,
)  # fmt: skip
"""What ends only when the host knows what is in a tensor."""


@dataclass
class Gpu:
    """What is watched.

    Attributes:
        calls: names of the functions that were given tensors of the GPU.
        waits: names of those that made the host wait for it.
    """

    calls: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


watched = Gpu()


class OnGpu(Tensor):
    """A tensor that says it is on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        found: Tensor = memo[id(self)]
        return found


class Watch(TorchFunctionMode):
    """Sees also what is given no tensor of the GPU, such as what makes the first ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of torch, held to the rules.

    Raises:
        AssertionError: it would end with an error on a real GPU.
    """
    leaves = [] if func in QUESTIONS else [*leaves_of(args), *leaves_of(kwargs.values())]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    there = any(isinstance(x, OnGpu) for x in tensors)
    if there and func in PLACES:
        return PLACES[func]
    to_gpu = any(names(x, "cuda") for x in leaves)
    to_cpu = func is Tensor.cpu or any(names(x, "cpu") for x in leaves)
    if there:
        require_one_device(func, args, tensors)
        watched.calls.append(func.__name__)
        if to_cpu or waits(func, args):
            watched.waits.append(func.__name__)
    if to_gpu:
        args, kwargs = tree_map(lambda x: CPU if names(x, "cuda") else x, (args, kwargs))
    kwargs.pop("pin_memory", None)
    with torch._C.DisableTorchFunction():
        found = func(*args, **kwargs)
        if to_gpu and not there and tensors and found is tensors[0]:  # already of the CPU: not copied
            found = found.clone()
        if isinstance(found, torch.Size) or not (to_gpu or there):
            return found
        back = brought_back if to_cpu else placed
        return back(found) if isinstance(found, Tensor) else tree_map(back, found)


def leaves_of(some: Iterable[Any]) -> Iterator[Any]:
    """What stands in nested sequences; of most functions' arguments faster than pytrees' way."""
    for x in some:
        if isinstance(x, tuple | list):
            yield from leaves_of(x)
        else:
            yield x


def require_one_device(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of both devices, but for the few that may meet."""
    if torch._C._current_autograd_node() is not None:  # gradients come without their subclass
        return
    if func in (Tensor.numpy, Tensor.__array__):
        raise AssertionError("NumPy reads a tensor of the GPU")
    here = [x for x in tensors if not isinstance(x, OnGpu) and (x.ndim or func in JOINS)]
    if here and func not in COPIES and not (func in ITEMS and items_may_differ(*args)):
        shapes = [tuple(x.shape) for x in here]
        raise AssertionError(f"{func.__name__}: tensors of the CPU {shapes} among those of the GPU")


def items_may_differ(of: Tensor, indices: Any, value: Any = None) -> bool:
    """Whether a GPU's items may be read or written: indices may be the CPU's, slices are copied to."""
    found = [x for x in leaves_of([indices]) if isinstance(x, Tensor)]
    if not isinstance(of, OnGpu) and any(isinstance(x, OnGpu) for x in found):
        return False
    return not found or not isinstance(value, Tensor) or isinstance(value, OnGpu) == isinstance(of, OnGpu)


def waits(func: Any, args: Any) -> bool:
    """Whether the host waits until the GPU is done."""
    if func in (Tensor.copy_, Tensor.__setitem__) and not isinstance(args[0], OnGpu):
        return True
    masks = [x for x in leaves_of([args[1]]) if isinstance(x, Tensor)] if func is Tensor.__getitem__ else []
    return func in READ_BY_HOST or any(x.dtype == torch.bool for x in masks)


def names(x: Any, kind: str) -> bool:
    """Whether an argument names a device of that kind."""
    return (isinstance(x, torch.device) and x.type == kind) or (isinstance(x, str) and x[:4] == kind)


def placed(x: Any) -> Any:
    """The same, on the GPU if it is a tensor."""
    if not isinstance(x, Tensor) or isinstance(x, OnGpu):
        return x
    if x.requires_grad and x.is_leaf:
        return x.detach().as_subclass(OnGpu).requires_grad_()
    return x.as_subclass(OnGpu)


def brought_back(x: Any) -> Any:
    """The same, copied to the CPU if it is a tensor."""
    return x.as_subclass(Tensor).clone() if isinstance(x, Tensor) else x


class Generator(torch.Generator):
    """Draws what one of the CPU does; made for the GPU, it says that it is there."""

    def __new__(cls, device: Any = CPU) -> torch.Generator:
        return super().__new__(cls) if names(device, "cuda") else torch._C.Generator(device)

    def __init__(self, device: Any = CPU) -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return GPU


def by_device(groups: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """torch's grouping of an optimiser's tensors, which looks past what they say of their device."""

    def grouped(tensors: Any, with_indices: bool) -> dict[Any, Any]:
        found = groups(tensors, with_indices)
        there = any(isinstance(x, OnGpu) for x in leaves_of(tensors))
        return {(GPU if there else device, dtype): group for (device, dtype), group in found.items()}

    return grouped


class Idle:
    """A stream or an event: everything has been done by then."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda **_: True,
    "is_current_stream_capturing": lambda: False,
    "empty_cache": lambda: None,
    "mem_get_info": lambda *_: (2**37, 2**37),
    "max_memory_reserved": lambda *_: 2**30,
    "get_device_name": lambda *_: "a pretended GPU",
    "current_stream": Idle,
    "set_device": lambda *_: None,
    "stream": nullcontext,
    "Stream": Idle,
    "Event": Idle,
}
"""What `torch.cuda` says and gives there."""


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """Inside, there is a GPU; yields what is watched, from the beginning."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else parameters keep their types
    loops_for.cache_clear()  # of the GPU that there may be
    watched.calls.clear()
    watched.waits.clear()
    grouped = by_device(torch._C._group_tensors_by_device_and_dtype)
    try:
        with pytest.MonkeyPatch.context() as patch, Watch():
            for name, change in CUDA.items():
                patch.setattr(torch.cuda, name, change)
            patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
            patch.setattr(torch.accelerator, "current_stream", Idle)
            patch.setattr(torch, "Generator", Generator)
            yield watched
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        loops_for.cache_clear()
