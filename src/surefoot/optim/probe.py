"""The loss of the same batch again, at other weights: with the same dropout masks, and leaving no trace.

A probe must see the loss change because the weights moved and for no other reason, and training must go on as if it had
never been made. So the random state from before the training's forward pass is replayed, and afterwards the random
streams, the gradients and the buffers of every module that was called (BatchNorm's statistics) are put back.

Modules are watched by hooks that ``torch.compile`` leaves out of its graphs; it refuses them under ``fullgraph=True``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor as is_inside_vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from surefoot.optim.precision import is_short

Hook = TypeVar("Hook", bound=Callable[..., None])


def uncompiled(hook: Hook) -> Hook:
    """The hook, left out of the graphs of ``torch.compile``."""
    return cast(Hook, torch.compiler.disable(hook))


class RandomState:
    """The state of torch's random streams, the processor's and those of the devices in use, at one moment."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        # The processor's is always kept, and the meta device has none.
        self._devices = sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)
        self._host = torch.get_rng_state()
        self._states = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Put the streams back to that moment."""
        torch.set_rng_state(self._host)
        for device, state in zip(self._devices, self._states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    def is_now(self) -> bool:
        """Whether the streams are at that moment: nothing has been drawn since."""
        now = self.now()
        pairs = zip([self._host, *self._states], [now._host, *now._states], strict=True)
        return all(_bytes(a) == _bytes(b) for a, b in pairs)

    def now(self) -> RandomState:
        """The state of the same streams now."""
        return RandomState(self._devices)


def _bytes(state: Tensor) -> bytes:
    """A generator's state, which is always on the host, without one of torch's operations."""
    return ctypes.string_at(state.data_ptr(), state.numel())


@dataclass
class Seen:
    """What a probe has shown beside the loss."""

    short: set[torch.dtype] = field(default_factory=set)
    """The 16-bit dtypes that modules gave out: those of autocast too."""
    drew: bool = False
    """Whether random numbers were drawn."""

    def look(self, output: Any) -> None:
        """Take note of the dtypes of a tensor, or of those in a collection."""
        if isinstance(output, Tensor):
            if is_short(output):
                self.short.add(output.dtype)
        elif isinstance(output, (tuple, list, Mapping)):
            for part in output.values() if isinstance(output, Mapping) else output:
                self.look(part)


@contextmanager
def called_modules() -> Iterator[set[nn.Module]]:
    """The modules that are called in the block."""
    called: set[nn.Module] = set()

    @uncompiled
    def keep(module: nn.Module, _: Any) -> None:
        called.add(module)

    hook = register_module_forward_pre_hook(keep)
    try:
        yield called
    finally:
        hook.remove()


@contextmanager
def leaving_no_trace(
    parameters: Sequence[Tensor], replay: RandomState, *, in_part: bool = False
) -> Iterator[Seen]:
    """Whatever is computed in the block starts from the random state ``replay``, and nothing remembers it.

    With ``in_part`` it computes the loss of a part of the batch, which has to be the same alone as among the rest.

    Raises:
        ValueError: it isn't: a module normalises over the batch, or random numbers were drawn.
    """
    shown = Seen()
    streams = replay.now()
    gradients = [p.grad for p in parameters]
    buffers: dict[int, tuple[Tensor, Tensor]] = {}
    replaced: dict[tuple[nn.Module, str], Tensor] = {}
    seen: set[nn.Module] = set()
    # The buffers in each of the outermost modules when it was last called.
    held: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}

    @uncompiled
    def keep(module: nn.Module, _: Any) -> None:
        if in_part and module.training and isinstance(module, _BatchNorm):
            raise ValueError(
                "a part of the batch cannot be probed: BatchNorm makes its loss depend on the rest; evaluate all of it."
            )
        if module in seen and module not in held:
            return
        seen.update(module.modules())
        # Inside torch.func's vmap buffers are views of a stack, which whoever stacked them looks after.
        held[module] = [
            (part, name, buffer)
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and not is_inside_vmap(buffer) and not _is_expanded(buffer)
        ]
        for *_, buffer in held[module]:
            if id(buffer) not in buffers:
                buffers[id(buffer)] = buffer, buffer.clone()

    @uncompiled
    def look(module: nn.Module, _: Any, output: Any) -> None:
        shown.look(output)
        # A buffer that is another by now was put there by forward; what functional_call lends goes afterwards.
        for part, name, buffer in held.get(module, ()):
            if getattr(part, name, None) is not buffer:
                replaced.setdefault((part, name), buffer)

    hooks = register_module_forward_pre_hook(keep), register_module_forward_hook(look, always_call=True)
    for p in parameters:
        p.grad = None  # a closure may zero the gradients in place, or add to them
    replay.restore()
    try:
        yield shown
        shown.drew = not replay.is_now()
        if in_part and shown.drew:
            raise ValueError(
                "a part of the batch cannot be probed: the model draws random numbers (dropout), which would be others "
                "than the whole batch had; evaluate all of it."
            )
    finally:
        for hook in hooks:
            hook.remove()
        streams.restore()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers.values():
                buffer.copy_(before)
        for (part, name), buffer in replaced.items():
            part._buffers[name] = buffer


def _is_expanded(buffer: Tensor) -> bool:
    """Whether entries share their memory: torch writes into no such tensor, so there is nothing to put back."""
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )
