"""How the models of a stack are computed together.

Two ways: torch's ``vmap`` for any model that it takes, and for a sequence of well-known layers the same sums written with
the models side by side, which is faster. K is the number of models, B that of patterns in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from surefoot.lab.streams import Streams

Tensors = dict[str, Tensor]
"""A stack's parameters and buffers by name, each ``[K, ...]``."""

_IN_CACHE = 1_000_000
"""Numbers: where a layer's output for all models is much larger, evaluation is twice as slow."""


class UnsuitedError(Exception):
    """A model that a lowering cannot compute; the message says why, as the end of a sentence."""


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Refuse hooks that see or change gradients: in a stack the model's own tensors get none.

    Raises:
        UnsuitedError: there is such a hook.
    """
    for name, p in model.named_parameters():
        own: Any = p
        if own._backward_hooks or own._post_accumulate_grad_hooks:
            raise UnsuitedError(f"parameter {name} has a hook on its gradient, which would not be called")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            what = _called(module, name)
            raise UnsuitedError(f"{what} has a backward hook, which would not get each run's own gradient")


def _called(module: nn.Module, name: str) -> str:
    """A part of a model as a sentence names it."""
    return f"{type(module).__name__} {name}".strip()


class Lowering(ABC):
    """One way of computing K models at once, made from one of them, which lends its layers and keeps its own weights.

    Raises:
        UnsuitedError: it is a model that this way does not take.
    """

    name: ClassVar[str]
    patterns_first: ClassVar[bool] = False
    """Whether it would rather have its inputs lie in memory pattern by pattern than model by model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def arranged(self, name: str, tensor: Tensor) -> Tensor:
        """A stacked parameter, or what belongs to it, in the memory layout that is fastest."""
        return tensor.contiguous()

    @abstractmethod
    def train(self, tensors: Tensors, inputs: Tensor, streams: Streams) -> Any:
        """Each model's outputs ``[K, B, ...]`` for its own inputs ``[K, B, ...]``, in training mode.

        The buffers in ``tensors`` are changed or replaced, and ``streams`` is drawn from.
        """

    @abstractmethod
    def evaluate(self, tensors: Tensors, inputs: Tensor, streams: Streams) -> Sequence[Any]:
        """Each model's outputs for the same inputs ``[B, ...]``, in evaluation mode."""


# ---------------------------------------------------------------------------------------------------------------- vmap


class Vmapped(Lowering):
    """Any model, by ``torch.func``: training for all at once, evaluation (where batches are large) one after another."""

    name = "vmap"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase):
                what = _called(module, name)
                raise UnsuitedError(f"{what} is one operation to torch, and one that its vmap does not take")
        self._buffers = [name for name, _ in model.named_buffers()]

    def train(self, tensors: Tensors, inputs: Tensor, streams: Streams) -> Any:
        def one(own: Tensors, inputs: Tensor) -> tuple[Any, Tensors]:
            own = dict(own)
            outputs = functional_call(self.model, own, (inputs,))
            return outputs, {name: own[name] for name in self._buffers}

        if not self.model.training:
            self.model.train()
        outputs, buffers = each(one, streams, tensors, inputs)
        tensors.update(buffers)
        return outputs

    def evaluate(self, tensors: Tensors, inputs: Tensor, streams: Streams) -> Sequence[Any]:
        if self.model.training:
            self.model.eval()
        models = len(next(iter(tensors.values())))
        outputs = []
        for k in range(models):
            with streams.of(k):
                own = {name: tensor[k] for name, tensor in tensors.items()}
                outputs.append(functional_call(self.model, own, (inputs.clone(),)))
        return outputs


def each(function: Callable[..., Any], streams: Streams, *arguments: Any) -> Any:
    """The function of each model's arguments (their first axis is the models), with each model's own random numbers."""

    def one(token: Tensor, *own: Any) -> Any:
        with _OwnNumbers(streams, token):
            return function(*own)

    # Random numbers that are not drawn through the streams would be others than in a run by itself: an error.
    tokens = torch.arange(streams.runs)
    return vmap(one, randomness="error")(tokens, *arguments)


class _OwnNumbers(TorchFunctionMode):
    """Inside a ``vmap``, the common random functions draw each model's numbers from its own stream.

    What ``vmap`` would do wrongly without a word is put right here too, or refused.
    """

    DROPPING = frozenset(
        {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d}
    )
    FROM_SHAPE = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm})
    FROM_LIKE = frozenset({torch.rand_like, torch.randn_like, torch.randint_like})
    OF_THE_GRAPH = frozenset(
        cast(Any, getter).__get__ for getter in (Tensor.requires_grad, Tensor.grad_fn, Tensor.is_leaf)
    )
    """Inside, every tensor seems to be one that needs no gradient."""

    def __init__(self, streams: Streams, token: Tensor) -> None:
        super().__init__()
        self._streams, self._token = (
            streams,
            token,
        )  # the token is a number of each model, and so brings vmap in

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = named or {}
        if function in self.DROPPING:
            return self._dropped(function, *arguments, **named)
        if function in self.FROM_SHAPE:
            return self._drawn(lambda: function(*arguments, **named))
        if function in self.FROM_LIKE:
            like, *others = arguments
            return self._drawn(lambda: function(_ones_like(like), *others, **named))
        if function is functional.embedding:
            return self._embedded(*arguments, **named)
        if function in self.OF_THE_GRAPH:
            raise UnsuitedError(
                "its code asks whether a tensor needs a gradient, which cannot be told for several runs at once"
            )
        return function(*arguments, **named)

    def _embedded(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **named: Any
    ) -> Tensor:
        rows = functional.embedding(input, weight, None, *others, **named)
        if padding_idx is None:
            return rows
        padding = input == padding_idx % len(weight)  # whose row vmap would train
        return torch.where(padding.unsqueeze(-1), rows.detach(), rows)

    def _dropped(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0:
            return input
        kept = self._drawn(lambda: function(_ones_like(input), p, True))
        return input.mul_(kept) if inplace else input * kept

    def _drawn(self, draw: Callable[[], Tensor]) -> Tensor:
        return cast(Tensor, _Draw.apply(self._token, self._streams, draw))


class _Draw(torch.autograd.Function):
    """A draw for each model, seen from inside a ``vmap`` over the models."""

    @staticmethod
    def forward(token: Tensor, streams: Streams, draw: Callable[[], Tensor]) -> Tensor:
        raise RuntimeError("only inside a vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        _, streams, draw = args
        return torch.stack(streams.draw(draw)), 0


def _ones_like(tensor: Tensor) -> Tensor:
    """Ones of one model's shape, free of the vmap."""
    return torch.ones(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)


# ------------------------------------------------------------------------------------------------------------- grouped

_POINTWISE = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.LogSigmoid),
    nn.Identity,
)
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_OVER_AN_AXIS = {nn.LogSoftmax: functional.log_softmax, nn.Softmax: functional.softmax}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_DROPOUTS = {nn.Dropout: functional.dropout, nn.Dropout2d: functional.dropout2d}


class Grouped(Lowering):
    """An ``nn.Sequential`` of well-known layers: batched matrix products, and convolutions with a group for each model."""

    name = "grouped"
    patterns_first = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        names = {name for name, _ in model.named_parameters()}
        self._layers = list(_layers_of(model, "", names))
        self._convolved = {f"{name}weight" for name, layer in self._layers if type(layer) is nn.Conv2d}
        self._multiplied = {f"{name}weight" for name, layer in self._layers if type(layer) is nn.Linear}
        self._widest = 1  # numbers of one model and pattern in the largest signal so far

    def arranged(self, name: str, tensor: Tensor) -> Tensor:
        if name in self._multiplied:  # so lies its gradient, which then need not be copied
            return tensor.mT.contiguous().mT
        if name not in self._convolved:
            return tensor.contiguous()
        return _channels_last(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

    def train(self, tensors: Tensors, inputs: Tensor, streams: Streams) -> Tensor:
        return self._through(_Signal(inputs, len(inputs), "apart"), tensors, streams)

    def evaluate(self, tensors: Tensors, inputs: Tensor, streams: Streams) -> Sequence[Tensor]:
        models = len(next(iter(tensors.values())))
        # In evaluation mode every layer here takes patterns one by one, so they can be cut as the cache likes it.
        at_once = max(8, _IN_CACHE // (models * self._widest))
        parts = [
            self._through(_Signal(part, models, "common"), tensors, None) for part in inputs.split(at_once)
        ]
        return torch.cat(parts, dim=1).unbind(0)

    def _through(self, signal: _Signal, tensors: Tensors, streams: Streams | None) -> Tensor:
        """Through all layers, in training mode where there are streams."""
        for name, layer in self._layers:
            self._apply(name, layer, signal, tensors, streams)
            self._widest = max(self._widest, signal.width())
        return signal.apart()

    def _apply(
        self, name: str, layer: Any, signal: _Signal, tensors: Tensors, streams: Streams | None
    ) -> None:
        kind = type(layer)
        weight, bias = (tensors.get(f"{name}{part}") for part in ("weight", "bias"))
        if kind is nn.Linear:
            signal.multiply(cast(Tensor, weight), bias)
        elif kind is nn.Conv2d:
            signal.convolve(cast(Tensor, weight), bias, layer)
        elif kind in _POINTWISE:
            signal.values = layer(signal.values)
        elif kind in _POOLING:
            signal.values = layer(signal.in_channels())
        elif kind is nn.Flatten:
            signal.flatten()
        elif kind in _OVER_AN_AXIS:
            axis = layer.dim if layer.dim < 0 else layer.dim + 1
            signal.values = _OVER_AN_AXIS[kind](signal.apart(), axis)
        elif kind in _DROPOUTS and streams is not None and layer.p > 0:
            signal.drop(lambda ones: _DROPOUTS[kind](ones, layer.p, True), streams)
        elif kind in _NORMS:
            mean, var = (tensors[f"{name}running_{part}"].flatten() for part in ("mean", "var"))
            if streams is not None:
                tensors[f"{name}num_batches_tracked"].add_(1)
            scale, shift = (None if t is None else t.flatten() for t in (weight, bias))
            x = signal.in_channels(own=True)
            training = streams is not None
            signal.values = functional.batch_norm(
                x, mean, var, scale, shift, training, layer.momentum, layer.eps
            )


def _layers_of(model: nn.Module, prefix: str, parameters: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """The layers in order, with what their parameters' names begin with."""
    what = _called(model, prefix.rstrip("."))
    if type(model) is nn.Sequential:
        _refuse_changes(model, what)
        for name, layer in model._modules.items():  # named_children() would pass over one that comes twice
            yield from _layers_of(cast(nn.Module, layer), f"{prefix}{name}.", parameters)
        return
    known = (nn.Linear, nn.Conv2d, nn.Flatten, *_POINTWISE, *_POOLING, *_OVER_AN_AXIS, *_NORMS, *_DROPOUTS)
    layer: Any = model
    kind = type(layer)
    if kind not in known:
        raise UnsuitedError(f"{what} is no layer that can be written for several models side by side")
    _refuse_changes(layer, what)
    if any(f"{prefix}{name}" not in parameters for name, _ in layer.named_parameters()):
        raise UnsuitedError(f"{what} has the weights of another layer")
    usual = (
        (kind is not nn.Conv2d or layer.padding_mode == "zeros")
        and (kind is not nn.MaxPool2d or not layer.return_indices)
        and (kind is not nn.Flatten or (layer.start_dim, layer.end_dim) == (1, -1))
        and (kind not in _OVER_AN_AXIS or (layer.dim is not None and (layer.dim == -1 or layer.dim > 0)))
        and (kind not in _NORMS or (layer.running_mean is not None and layer.momentum is not None))
    )
    if not usual:
        raise UnsuitedError(
            f"{what} has options with which it cannot be written for several models side by side"
        )
    yield prefix, layer


def _refuse_changes(layer: nn.Module, what: str) -> None:
    own = vars(layer)
    if "forward" in own or any(value for key, value in own.items() if key.endswith("_hooks")):
        raise UnsuitedError(f"{what} has hooks")


class _Signal:
    """What goes from layer to layer, for K models.

    ``layout``: "apart" ``[K, B, ...]``; "beside", the models' channels side by side, ``[B, K C, ...]``; or, as long as it
    is the same for all models, "common" ``[B, ...]``.
    """

    def __init__(self, values: Tensor, models: int, layout: str) -> None:
        self.values, self._models, self._layout = values, models, layout

    def width(self) -> int:
        """Numbers of one model and one pattern."""
        patterns = self.values.shape[1 if self._layout == "apart" else 0]
        return self.values.numel() // (self._models * patterns)

    def apart(self) -> Tensor:
        """The values ``[K, B, ...]``, which they are from here on."""
        if self._layout == "beside":
            self.values = self.values.unflatten(1, (self._models, -1)).transpose(0, 1)
        elif self._layout == "common":
            self.values = self.values.expand(self._models, *self.values.shape)
        self._layout = "apart"
        return self.values

    def in_channels(self, own: bool = False) -> Tensor:
        """The values ``[B, C, ...]`` with all models' channels; if not ``own`` they may be one for all models."""
        if self._layout == "common" and own:
            self.apart()
        if self._layout == "apart":
            self.values, self._layout = self.values.transpose(0, 1).flatten(1, 2), "beside"
        return self.values

    def flatten(self) -> None:
        """Each pattern's own axes become one."""
        self.values = self.values.flatten(1) if self._layout == "common" else self.apart().flatten(2)

    def multiply(self, weight: Tensor, bias: Tensor | None) -> None:
        """x W^T + b, with the weights ``[K, O, I]``."""
        if self._layout == "common" and self.values.ndim == 2:
            self.values = functional.linear(
                self.values, weight.flatten(0, 1), None if bias is None else bias.flatten()
            )
            self._layout = "beside"
            return
        x = self.apart()
        rows = x.flatten(1, -2)
        if bias is None:
            product = torch.bmm(rows, weight.mT)
        else:
            product = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        self.values = product.unflatten(1, x.shape[1:-1])

    def convolve(self, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> None:
        """The convolution, with the weights ``[K, O, C, H, W]``."""
        own = self._layout != "common" or layer.groups > 1
        x = _channels_last(self.in_channels(own))
        groups = self._models * layer.groups if own else 1
        biases = None if bias is None else bias.flatten()
        self.values = functional.conv2d(
            x, weight.flatten(0, 1), biases, layer.stride, layer.padding, layer.dilation, groups
        )
        self._layout = "beside"

    def drop(self, dropout: Callable[[Tensor], Tensor], streams: Streams) -> None:
        """Dropout, with what each model would have drawn by itself."""
        x = self.apart()
        ones = torch.ones(x.shape[1:], dtype=x.dtype, device=x.device)
        self.values = x * torch.stack(streams.draw(lambda: dropout(ones)))


def _channels_last(x: Tensor) -> Tensor:
    """In the memory layout in which a processor's convolutions and poolings are about twice as fast."""
    if x.device.type != "cpu":
        return x
    if x.shape[1] == 1 and not x.requires_grad:  # either layout: its strides are to say this one
        height, width = x.shape[2:]
        return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------ the loss

_OVER_CLASSES = (functional.cross_entropy, functional.nll_loss)
_OVER_NUMBERS = (
    *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    functional.binary_cross_entropy_with_logits,
)
_IGNORED = -100  # a class that torch's losses leave out of the mean


def counts_all(targets: Tensor) -> bool:
    """Whether no pattern is left out of the mean that a loss is."""
    return targets.is_floating_point() or not bool((targets == _IGNORED).any())


def loss_of_each(
    loss: Callable[[Any, Tensor], Tensor], outputs: Any, targets: Tensor, streams: Streams, *, all_count: bool
) -> Tensor:
    """Each model's loss ``[K]``; torch's own common ones in one call, whatever others are by ``vmap``."""
    written: Any = loss
    if isinstance(outputs, Tensor):
        if loss in _OVER_NUMBERS and outputs.shape == targets.shape:
            return written(outputs, targets, reduction="none").flatten(1).mean(1)
        if loss in _OVER_CLASSES and all_count:
            each_pattern = written(outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none")
            return each_pattern.view(len(outputs), -1).mean(1)
    return each(loss, streams, outputs, targets)
