"""The loss of the same batch again, at other weights: with the same dropout masks, and leaving no trace.

A probe must see the loss change because the weights moved and for no other reason, and training must go on as if it had
never been made. So the random state from before the training's forward pass is replayed, and afterwards the random
streams, the gradients and the buffers of every module that was called (BatchNorm's statistics) are put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor as is_inside_vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook


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
        return all(torch.equal(a, b) for a, b in pairs)

    def now(self) -> RandomState:
        """The state of the same streams now."""
        return RandomState(self._devices)


@contextmanager
def leaving_no_trace(
    parameters: Sequence[Tensor], replay: RandomState, *, in_part: bool = False
) -> Iterator[None]:
    """Whatever is computed in the block starts from the random state ``replay``, and nothing remembers it.

    With ``in_part`` it computes the loss of a part of the batch, which has to be the same alone as among the rest.

    Raises:
        ValueError: it isn't: a module normalises over the batch, or random numbers were drawn.
    """
    streams = replay.now()
    gradients = [p.grad for p in parameters]
    buffers: dict[int, tuple[nn.Module, str, Tensor, Tensor]] = {}
    seen: set[nn.Module] = set()

    def keep(module: nn.Module, _: Any) -> None:
        if in_part and module.training and isinstance(module, _BatchNorm):
            raise ValueError(
                "a part of the batch cannot be probed: BatchNorm makes its loss depend on the rest; evaluate all of it."
            )
        if module in seen:
            return
        for part in module.modules():
            seen.add(part)
            for name, buffer in part._buffers.items():
                # Inside torch.func's vmap buffers are views of a stack, which whoever stacked them looks after.
                if buffer is not None and id(buffer) not in buffers and not is_inside_vmap(buffer):
                    buffers[id(buffer)] = (part, name, buffer, buffer.clone())

    hook = register_module_forward_pre_hook(keep)
    for p in parameters:
        p.grad = None  # a closure may zero the gradients in place, or add to them
    replay.restore()
    try:
        yield
        if in_part and not replay.is_now():
            raise ValueError(
                "a part of the batch cannot be probed: the model draws random numbers (dropout), which would be others "
                "than the whole batch had; evaluate all of it."
            )
    finally:
        hook.remove()
        streams.restore()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for part, name, buffer, before in buffers.values():
                buffer.copy_(before)
                part._buffers[name] = buffer
