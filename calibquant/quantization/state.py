"""Modes as scopes, and the one traversal that finds quantizers.

Each scope restores what it found on the way out, also when left by an exception.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from calibquant.quantization.drop import Drop
from calibquant.quantization.fake_quant import FakeQuantize, Role, SharedRangeFakeQuantize
from calibquant.quantization.observer import Observer, clipping_ranges, naming

M = TypeVar("M", bound=nn.Module)


def quantizers(module: nn.Module, role: Role | None = None) -> list[tuple[str, FakeQuantize]]:
    """Named quantizers inside a module, in order, optionally of one role only."""
    return [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, FakeQuantize) and role in (None, child.role)
    ]


@contextmanager
def full_precision(module: nn.Module) -> Iterator[None]:
    """Inside, no quantizer of the module does anything."""
    saved = [(quantizer, quantizer.enabled) for _, quantizer in quantizers(module)]
    try:
        for quantizer, _ in saved:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in saved:
            quantizer.enabled = enabled


@contextmanager
def quantizing_only(module: nn.Module, chosen: Iterable[FakeQuantize]) -> Iterator[None]:
    """Inside, of the module's quantizers the chosen ones act and no others."""
    with full_precision(module):
        for quantizer in chosen:
            quantizer.enabled = True
        yield


@contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Inside, activations' qparams must not change: what follows from them is worked out once."""
    saved = [(quantizer, quantizer.settled) for _, quantizer in quantizers(module, Role.ACTIVATION)]
    try:
        for quantizer, _ in saved:
            quantizer.settled = quantizer.settle()
        yield
    finally:
        for quantizer, before in saved:
            quantizer.settled = before


@contextmanager
def watching(viewers: Mapping[M, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each of the modules, quantizers or others, shows its input to its viewer."""

    def show(module: M, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        viewers[module](inputs[0])

    with hooked(dict.fromkeys(viewers, show)):
        yield


@contextmanager
def hooked(hooks: Mapping[M, Callable[[M, tuple[Tensor, ...], Tensor], Tensor | None]]) -> Iterator[None]:
    """Inside, each of the modules has a forward hook, which may replace its output."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calibrating(module: nn.Module, again: bool = False) -> Iterator[None]:
    """Inside, activations flow in full precision and are observed; at the end ranges are set.

    Args:
        again: ranges were set before, and those of a :class:`SharedRangeFakeQuantize` stay.

    Raises:
        ValueError: an activation was never seen or holds NaN; the message names its quantizer. If
            the body itself raises, no range is changed.
    """
    found = quantizers(module, Role.ACTIVATION)
    if again:
        found = [(name, q) for name, q in found if not isinstance(q, SharedRangeFakeQuantize)]
    watched = [(name, q, q.make_observer()) for name, q in found]
    viewers = {q: _observe_into(name, seen) for name, q, seen in watched}
    with watching(viewers), full_precision(module), torch.no_grad():
        yield
    ranges = clipping_ranges({name: seen for name, _, seen in watched})
    for name, quantizer, _ in watched:
        quantizer.set_range(*ranges[name])


def _observe_into(name: str, seen: Observer) -> Callable[[Tensor], None]:
    """Shows a quantizer's input to its observer."""

    def view(x: Tensor) -> None:
        with naming(name):
            seen.observe(x)

    return view


@contextmanager
def dropping(module: nn.Module, drops: Sequence[Drop | None]) -> Iterator[None]:
    """Inside, each activation quantizer, in order, leaves some elements unquantized (QDrop)."""
    saved = [(quantizer, quantizer.drop) for _, quantizer in quantizers(module, Role.ACTIVATION)]
    try:
        for (quantizer, _), drop in zip(saved, drops, strict=True):
            quantizer.drop = drop
        yield
    finally:
        for quantizer, before in saved:
            quantizer.drop = before


@torch.no_grad()
def quantizer_inputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What each activation quantizer of a module is given in one forward pass, in their order."""
    sites = [quantizer for _, quantizer in quantizers(module, Role.ACTIVATION)]
    seen: dict[FakeQuantize, Tensor] = {}
    with watching({q: partial(seen.__setitem__, q) for q in sites}):
        module(*inputs)
    return [seen[quantizer] for quantizer in sites]
