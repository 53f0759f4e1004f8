"""Many runs at once: K of them, which differ in seed, rate and other numbers, trained as one stack.

Every parameter is ``[K, ...]`` and every loss ``[K]``. Each run has its own initial weights, order of data, random
numbers (dropout), hyper-parameters and buffers, all as :func:`surefoot.lab.train.train` would make them, and is what it
would be by itself, to rounding: sums are added up in another order, and float32 training amplifies that.
"""

from __future__ import annotations

import itertools
import math
import random
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from surefoot.lab import catalogue
from surefoot.lab.alike import difference
from surefoot.lab.course import Course
from surefoot.lab.errors import UserError
from surefoot.lab.lowering import (
    Grouped,
    Lowering,
    Tensors,
    UnsuitedError,
    Vmapped,
    counts_all,
    loss_of_each,
    refuse_gradient_hooks,
)
from surefoot.lab.packages import Rival
from surefoot.lab.runs import RunResult, RunSpec, digest_of
from surefoot.lab.schedules import scheduler
from surefoot.lab.streams import Streams, own_random_state, seed_everything, stream_seed
from surefoot.lab.tasks import explain
from surefoot.lab.tasks.base import Task
from surefoot.lab.train import Single, usable_device
from surefoot.optim import Rates
from surefoot.optim.probe import RandomState

LOWERINGS: dict[str, type[Lowering]] = {lowering.name: lowering for lowering in (Grouped, Vmapped)}
"""The ways of computing a stack by name, that which is faster where it can be used first."""


def kind_of(spec: RunSpec) -> str:
    """The same for runs that may be one stack, or, of another package's optimizer, that take the same time.

    They have one task, optimizer, batch size and number of epochs, and their settings differ only in numbers that the
    optimizer takes for each model.
    """
    key = catalogue.stack_key(spec.optimizer, spec.settings)
    return digest_of(
        {
            "task": spec.task,
            "version": spec.task_version,
            "optimizer": spec.optimizer,
            "settings": dict(spec.settings) if key is None else repr(key),
            "batch": spec.batch_size,
            "epochs": spec.epochs,
        }
    )


def train_stack(
    task: Task, specs: Sequence[RunSpec], device: str | torch.device = "cpu", lowering: str | None = None
) -> list[RunResult]:
    """Train runs of one kind (:func:`kind_of`) side by side; the results in their order.

    A run that diverges ends there, as it would by itself, and the stack goes on without it. ``seconds`` and
    ``step_seconds`` are a run's share: the time divided by the runs that were going on.

    Args:
        task: as for :func:`surefoot.lab.train.train`, like ``device``.
        specs: the runs.
        device: where the tensors live.
        lowering: one of :data:`LOWERINGS`; ``None``: the first that can be used.

    Raises:
        UserError: the runs cannot be a stack, for the reason that :func:`refusal` gives; and as
            :func:`surefoot.lab.train.train`.
    """
    device = usable_device(device)
    with own_random_state(device):
        return _stack(task, specs, device, lowering).run()


def stack_step_seconds(
    task: Task,
    specs: Sequence[RunSpec],
    device: str | torch.device = "cpu",
    lowering: str | None = None,
    moment: float = 0.3,
) -> float:
    """Seconds of one step of :func:`train_stack`, from about ``moment`` seconds of real steps.

    Raises:
        UserError: as :func:`train_stack`.
    """
    device = usable_device(device)
    with own_random_state(device):
        return _stack(task, specs, device, lowering).step_seconds(moment)


def refusal(
    task: Task, spec: RunSpec, device: str | torch.device = "cpu", lowering: str | None = None
) -> str | None:
    """Why such runs cannot be a stack (by this lowering), as the end of a sentence; ``None``: they can.

    It is tried: two models go through two batches and some validation data, together and each by itself.
    """
    entry = catalogue.CATALOGUE[spec.optimizer]
    if isinstance(entry, Rival):
        return f"optimizer {spec.optimizer} is another package's, which trains one model at a time"
    device = usable_device(device)
    names = list(LOWERINGS) if lowering is None else [lowering]
    reasons = [_tried(task, spec, device, name) for name in names]
    return None if None in reasons else reasons[-1]


def _stack(task: Task, specs: Sequence[RunSpec], device: torch.device, lowering: str | None) -> Stack:
    """The stack at its beginning, by that lowering or by the first that can be used."""
    if len(set(map(kind_of, specs))) != 1:
        raise UserError("These runs cannot be one stack: they differ in more than seeds, rates and numbers.")
    reason: str | None = None
    for name in LOWERINGS if lowering is None else [lowering]:
        reason = refusal(task, specs[0], device, name)
        if reason is None:
            try:
                return Stack(task, specs, device, LOWERINGS[name])
            except UnsuitedError as error:
                reason = str(error)
    raise UserError(f"Task {task.name} cannot be trained as a stack: {reason}.")


class Stack(Course):
    """K runs as one stack.

    Raises:
        UnsuitedError: the lowering does not take the model, or the models differ in more than parameters and buffers.
    """

    def __init__(
        self, task: Task, specs: Sequence[RunSpec], device: torch.device, lowering: type[Lowering]
    ) -> None:
        super().__init__(task, specs, device)
        self.engine = f"stack of {len(specs)}, {lowering.name}"
        models: dict[int, nn.Module] = {}
        for seed in dict.fromkeys(spec.seed for spec in specs):
            seed_everything(stream_seed(seed, "weights"), device)
            models[seed] = task.model().to(device).train()
            refuse_gradient_hooks(models[seed])
        first, *others = models.values()
        self.model, self._lowering = first, lowering(first)
        for other in others:
            if (what := difference(first, other)) is not None:
                raise UnsuitedError(f"{what} may be another from each seed")

        def stacked(kind: str) -> Tensors:
            own = {seed: dict(getattr(model, f"named_{kind}s")()) for seed, model in models.items()}
            return {
                name: self._lowering.arranged(
                    name, torch.stack([own[spec.seed][name].detach() for spec in specs])
                )
                for name in own[specs[0].seed]
            }

        trained = {name for name, p in first.named_parameters() if p.requires_grad}
        every = stacked("parameter")
        self._trained = {name: nn.Parameter(tensor) for name, tensor in every.items() if name in trained}
        self._held = {name: tensor for name, tensor in every.items() if name not in trained}
        self._buffers = stacked("buffer")
        self._all_count = counts_all(self.targets)
        self._build()
        self._shuffling = {seed: torch.Generator().manual_seed(stream_seed(seed, "order")) for seed in models}
        states = {}
        for seed in models:
            seed_everything(stream_seed(seed, "training"), device)
            states[seed] = RandomState([device])
        self._streams = self._before = Streams([states[spec.seed] for spec in specs])

    def _build(self) -> None:
        """The optimizer and its schedule, for the runs that are going on."""
        specs = [record.spec for record in self.going]
        settings, rates = [spec.settings for spec in specs], [spec.rate for spec in specs]
        self.optimizer = self._optimizer = catalogue.build_stack(
            self.parameters, specs[0].optimizer, settings, rates, self.device
        )
        self.schedule = scheduler(catalogue.schedule_of(settings[0]), self.steps_in_all, self.optimizer)

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are trained, each ``[K, ...]``."""
        return list(self._trained.values())

    @property
    def buffers(self) -> list[Tensor]:
        """Each ``[K, ...]``."""
        return list(self._buffers.values())

    def shuffled(self) -> Tensor:
        seeds = [record.spec.seed for record in self.going]
        orders = {
            seed: torch.randperm(len(self.inputs), generator=self._shuffling[seed])
            for seed in dict.fromkeys(seeds)
        }
        return torch.stack([orders[seed] for seed in seeds]).to(self.device)

    def losses(self, index: Tensor) -> Tensor:
        self._before = self._streams.copy()
        tensors = {**self._trained, **self._held, **self._buffers}
        try:
            losses, self._buffers = self._computed(tensors, index, self._streams)
        except BaseException:
            self._streams = self._before  # it may be tried again without the run whose fault it was
            raise
        return losses

    def losses_again(self, index: Tensor) -> Tensor:
        tensors = {**self._trained, **self._held, **self._buffers}
        try:
            return self._computed(tensors, index, self._before.copy())[0]
        except Exception:
            lost = torch.tensor(self.lost())
            if not lost.any():
                raise
            # Some losses raise where others give NaN.
            losses = torch.full((len(lost),), torch.nan, device=self.device)
            others = [place for place, gone in enumerate(lost) if not gone]
            if others:
                own = {name: tensor[others] for name, tensor in tensors.items()}
                found, _ = self._computed(own, index[others], self._before.only(others))
                losses = losses.to(found.dtype)
                losses[others] = found
            return losses

    def _computed(self, tensors: Tensors, index: Tensor, streams: Streams) -> tuple[Tensor, Tensors]:
        """The losses, and the buffers as they are then; those given are left alone."""
        own = {name: tensor.clone() if name in self._buffers else tensor for name, tensor in tensors.items()}
        outputs = self._lowering.train(own, self._gathered(index), streams)
        targets = self.targets.index_select(0, index.flatten()).unflatten(0, index.shape)
        losses = loss_of_each(self.task.loss, outputs, targets, streams, all_count=self._all_count)
        return losses, {name: own[name] for name in self._buffers}

    def _gathered(self, index: Tensor) -> Tensor:
        """Each run's inputs of its batch, ``[K, B, ...]``."""
        if not self._lowering.patterns_first:
            return self.inputs.index_select(0, index.flatten()).unflatten(0, index.shape)
        by_pattern = self.inputs.index_select(0, index.T.flatten())
        return by_pattern.unflatten(0, index.T.shape).transpose(0, 1)

    def outputs(self, inputs: Tensor) -> Sequence[Any]:
        return self._lowering.evaluate(
            {**self._trained, **self._held, **self._buffers}, inputs, self._streams
        )

    def numbers_of(self, place: int) -> AbstractContextManager[None]:
        return self._streams.of(place)

    def evaluate(self) -> tuple[list[float], Sequence[float | None]]:
        before = self._streams.copy()
        try:
            return super().evaluate()
        except BaseException:
            self._streams = before  # it may be tried again without the run whose fault it was
            raise

    def moment(self) -> tuple[list[Tensor], Tensors, Streams]:
        """Weights, buffers and random streams as they are."""
        return [p.detach().clone() for p in self.parameters], self._buffers, self._streams.copy()

    def go_back(self, moment: tuple[list[Tensor], Tensors, Streams]) -> None:
        """Put back what :meth:`moment` gave."""
        weights, self._buffers, streams = moment
        self._streams = streams.copy()
        with torch.no_grad():
            for p, weight in zip(self.parameters, weights, strict=True):
                p.copy_(weight)

    def rates(self) -> Sequence[Rates]:
        return self._optimizer.rates_by_model()

    def lost(self) -> Sequence[bool]:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        finite = [torch.isfinite(t).flatten(1).all(1) for t in (*self.parameters, *gradients)]
        return torch.stack(finite).all(0).logical_not().tolist()

    def keep(self, places: Sequence[int]) -> None:
        rows = torch.tensor(places, device=self.device)
        saved, schedule = self.optimizer.state_dict(), self.schedule

        def cut(name: str, tensor: Tensor, like: Tensor) -> Tensor:
            own = tensor.detach()[rows]
            return self._lowering.arranged(name, own) if tensor.shape == like.shape else own

        state = {
            number: {
                key: cut(name, value, p) if isinstance(value, Tensor) else value
                for key, value in saved["state"].get(number, {}).items()
            }
            for number, (name, p) in enumerate(self._trained.items())
        }
        self._trained = {name: nn.Parameter(cut(name, p, p)) for name, p in self._trained.items()}
        self._held = {name: cut(name, tensor, tensor) for name, tensor in self._held.items()}
        self._buffers = {name: tensor[rows] for name, tensor in self._buffers.items()}
        self._streams = self._streams.only(places)
        self._build()
        (fresh,) = self.optimizer.state_dict()["param_groups"]
        group = {**fresh, "lr": saved["param_groups"][0]["lr"]}
        self.optimizer.load_state_dict(
            {"state": {n: own for n, own in state.items() if own}, "param_groups": [group]}
        )
        if self.schedule is not None and schedule is not None:
            # No gradient, so nothing moves; but a scheduler complains of an optimizer that has never made a step.
            self.optimizer.step(loss=torch.zeros(len(places)))
            self.schedule.load_state_dict(schedule.state_dict())


# ----------------------------------------------------------------------------------------------------------- the trial

Results = dict[str, list[Tensor | None]]
"""What is compared: losses, gradients, outputs and buffers."""

_verdicts: dict[int, tuple[weakref.ref[Task], dict[Any, str | None]]] = {}
"""By the task's id: what came out of its trials."""
_AT_ONCE = 1_000_000
"""Numbers that are compared at once."""


def _tried(task: Task, spec: RunSpec, device: torch.device, lowering: str) -> str | None:
    """:func:`_trial`, once for each task, batch size and device."""
    known, verdicts = _verdicts.get(id(task), (None, {}))
    if known is None or known() is not task:
        verdicts = {}
        number = id(task)
        _verdicts[number] = (weakref.ref(task, lambda _: _verdicts.pop(number, None)), verdicts)
    key = (spec.batch_size, device, lowering)
    if key not in verdicts:
        with own_random_state(device):
            verdicts[key] = _trial(task, spec, device, LOWERINGS[lowering])
    return verdicts[key]


def _trial(task: Task, spec: RunSpec, device: torch.device, lowering: type[Lowering]) -> str | None:
    """Why two such runs are not the same together as each by itself; ``None``: they are.

    It is made in float64, where rounding hides nothing, and then in the task's own precision. What insists on its own
    precision is judged in that.
    """
    exact = False
    if task.train[0].dtype != torch.float64:
        try:
            if (reason := _compared(_in_double(task, spec.batch_size), spec, device, lowering)) is not None:
                return reason
            exact = True
        except Exception:  # perhaps only in float64
            pass
    try:
        return _compared(task, spec, device, lowering, rough=exact)
    except Exception as error:
        return _reason(error)


def _in_double(task: Task, batch_size: int) -> Task:
    """The task in float64, with the first patterns only: enough for the trial."""

    def cut(data: tuple[Tensor, Tensor], patterns: int) -> tuple[Tensor, Tensor]:
        inputs, targets = (t[:patterns].double() if t.is_floating_point() else t[:patterns] for t in data)
        return inputs, targets

    loss: Any = task.loss
    return replace(
        task,
        model=lambda: task.model().double(),
        train=cut(task.train, 2 * batch_size),
        validation=cut(task.validation, batch_size),
        loss=deepcopy(loss).double() if isinstance(loss, nn.Module) else loss,
    )


def _compared(
    task: Task, spec: RunSpec, device: torch.device, lowering: type[Lowering], *, rough: bool = False
) -> str | None:
    """Why the two runs are not the same, where nothing fails; ``rough``: as for :func:`_agree`."""
    pair = [replace(spec, seed=seed) for seed in range(2)]
    try:
        alone = [_first_results(Single(task, own, device)) for own in pair]
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UnsuitedError(f"it fails by itself ({explain(error)})") from error
    stack = Stack(task, pair, device, lowering)
    model, others_numbers = deepcopy(stack.model), _numbers_of_others()
    together = _first_results(stack)
    if _numbers_of_others() != others_numbers:
        return "it draws random numbers from Python or NumPy, which a stack would draw once for all its runs"
    if (what := difference(model, stack.model)) is not None:
        return f"{what} changes from batch to batch"
    rounding = _rounding(t for own in alone for tensors in own.values() for t in tensors)
    if (what := _told_apart(together, alone, rounding, rough=rough)) is not None:
        return f"it gives other {what} for several runs at once than for each by itself"
    del model, alone, together  # what comes next takes as much memory again
    return _trial_of_divergence(stack, rounding)


def _told_apart(together: Results, alone: Sequence[Results], rounding: float, *, rough: bool) -> str | None:
    """By which of the results the stack's runs differ from those by themselves; ``None``: by none."""
    for run, own in enumerate(alone):
        for what, expected in own.items():
            found = [t if t is None else t[run] for t in together[what]]
            if not _agree(found, expected, rounding, rough=rough):
                return what
    return None


def lacks_memory(error: Exception) -> bool:
    """Whether it is for want of memory."""
    words = ("allocate memory", "out of memory")  # torch has no type of its own for the processor's
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error) for w in words)


def _reason(error: Exception) -> str:
    """Why it failed, in words."""
    text = str(error)
    if isinstance(error, UnsuitedError):
        return text
    if lacks_memory(error):
        return "there is not the memory for two runs at once"
    if "random operation" in text:
        return "it draws random numbers in another way than by dropout, rand, randn, randint and their like"
    if "data-dependent" in text or ".item()" in text:
        return "what its code does depends on a tensor's value"
    return f"its model or loss cannot be computed for several runs at once ({explain(error)})"


def _trial_of_divergence(stack: Stack, rounding: float) -> str | None:
    """Whether each of two runs gets the same gradients next to one whose weights are no numbers any more."""
    batch, start = slice(0, stack.batch_size), stack.moment()
    expected = _gradients(stack, batch)[1]
    for lost in range(2):
        stack.go_back(start)
        with torch.no_grad():
            for p in stack.parameters:
                p[lost] = torch.nan
        try:
            found = _gradients(stack, batch)[1]
        except Exception as error:  # as some losses do, and then the run is taken out of the stack at once
            if lacks_memory(error):
                raise
            continue
        ours, theirs = ([t if t is None else t[1 - lost] for t in side] for side in (found, expected))
        if not _agree(ours, theirs, rounding):
            return "a run whose weights are no numbers any more would spoil the others"
    return None


def _gradients(course: Single | Stack, batch: slice) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of a batch and the gradients."""
    for p in course.parameters:
        p.grad = None
    losses = course.losses(course.order[..., batch])
    losses.sum().backward()
    grads = [p.grad for p in course.parameters]
    return losses.detach(), [g.to_dense() if g is not None and g.is_sparse else g for g in grads]


def _first_results(course: Single | Stack) -> Results:
    """What comes of two batches at the initial weights and of the first validation data, without an update."""
    results: Results = {"losses": [], "gradients": []}
    for batch in itertools.islice(course.batches(), 2):
        losses, gradients = _gradients(course, batch)
        results["losses"].append(losses)
        results["gradients"] += gradients
    with torch.no_grad():
        inputs = course.validation[0][: course.batch_size].clone()
        of_runs = [tree.tree_leaves(outputs) for outputs in course.outputs(inputs)]
    if isinstance(course, Single):
        results["outputs"] = of_runs[0]
    else:
        results["outputs"] = [torch.stack(leaves) for leaves in zip(*of_runs, strict=True)]
    results["buffers"] = [buffer.detach() for buffer in course.buffers]
    return results


def _rounding(tensors: Iterable[Tensor | None]) -> float:
    """The relative spacing of the coarsest numbers among them."""
    return max((torch.finfo(t.dtype).eps for t in tensors if t is not None and _is_inexact(t)), default=0.0)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _agree(
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    rounding: float,
    *,
    rough: bool = False,
) -> bool:
    """Whether they are the same to rounding, each tensor by itself and all together; whole numbers are to be equal.

    Errors of two ways of adding up, in multiples of the numbers' spacing (``rounding``): up to 60 of the size of all
    together (eight layers with BatchNorm), and 1 of that for a tensor that should be zero, such as the gradient of a
    bias before BatchNorm. So 100 and 10 are allowed, in float64 much more: 1e-6 and 1e-12 are less than any mistake that
    matters. ``rough``: to half the digits and all together, where float64 has been compared and a few signs of
    activations near zero may be others.
    """
    if [t is None for t in found] != [t is None for t in expected]:
        return False
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    distances = []
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            return False
        if not _is_inexact(theirs):
            if not torch.equal(ours, theirs):
                return False
            continue
        if (distance := _distance(ours, theirs)) is None:
            return False
        distances.append(distance)
    tolerance, share = max(1e-6, 100 * rounding), max(1e-12, 10 * rounding)
    if rough:
        tolerance = share = 10 * rounding**0.5
    error, size = (math.hypot(*(pair[side] for pair in distances)) for side in (0, 1))
    each = all(own <= tolerance * length + share * size for own, length in distances)
    return each and error <= tolerance * size


def _distance(ours: Tensor, theirs: Tensor) -> tuple[float, float] | None:
    """How far apart they are, and how large the second is; ``None``: not the same numbers of both are finite.

    Piece by piece: a copy of all in float64 may be more than there is memory for.
    """
    kind = torch.promote_types(theirs.dtype, torch.float64)
    sums = [0.0, 0.0]
    ours, theirs = torch.atleast_1d(ours.detach()), torch.atleast_1d(theirs.detach())
    rows = max(1, _AT_ONCE * len(theirs) // max(1, theirs.numel()))
    for a, b in zip(ours.split(rows), theirs.split(rows), strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return None
        a, b = a[finite].to(kind), b[finite].to(kind)
        for place, v in enumerate((a - b, b)):
            sums[place] = math.hypot(sums[place], float(torch.linalg.vector_norm(v)))
    return sums[0], sums[1]


def _numbers_of_others() -> tuple[Any, bytes]:
    """Where the random streams are that are not torch's."""
    numpys: Any = np.random.get_state()
    return random.getstate(), numpys[1].tobytes()
