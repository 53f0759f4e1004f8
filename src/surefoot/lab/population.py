"""Many runs at once: K of them, which differ in seed, rate and other numbers, trained as one stack.

Every parameter is ``[K, ...]`` and every loss ``[K]``. Each run has its own initial weights, order of data, random
numbers (dropout), hyper-parameters and buffers, all as :func:`surefoot.lab.train.train` would make them, and is what it
would be by itself, to rounding: sums are added up in another order, and float32 training amplifies that.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Sequence
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


def stack_of(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """The runs in groups of which each may be one stack, in the order of their first runs.

    A group has one task, optimizer, batch size and number of epochs, and its settings differ only in numbers that the
    optimizer takes for each model. A run of another package's optimizer is a group by itself.
    """
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        stackable = catalogue.stack_key(spec.optimizer, spec.settings) is not None
        groups.setdefault(kind_of(spec) if stackable else spec.key, []).append(spec)
    return list(groups.values())


def kind_of(spec: RunSpec) -> str:
    """The same for runs that take the same time, as far as that can be told, and for those that may be one stack."""
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
    """Train the runs of one group of :func:`stack_of` side by side; the results in their order.

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
    if len(stack_of(specs)) != 1:
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

_verdicts: dict[int, tuple[weakref.ref[Task], dict[Any, str | None]]] = {}
"""By the task's id: what came out of its trials."""


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
    """Why two such runs are not the same together as each by itself; ``None``: they are."""
    pair = [replace(spec, seed=seed) for seed in range(2)]
    try:
        alone = [_first_results(Single(task, own, device)) for own in pair]
    except Exception as error:
        return f"it fails by itself ({explain(error)})"
    try:
        stack = Stack(task, pair, device, lowering)
        model, others_numbers = deepcopy(stack.model), _numbers_of_others()
        together = _first_results(stack)
    except UnsuitedError as error:
        return str(error)
    except Exception as error:
        return _reason(error)
    if _numbers_of_others() != others_numbers:
        return "it draws random numbers from Python or NumPy, which a stack would draw once for all its runs"
    if (what := difference(model, stack.model)) is not None:
        return f"{what} changes from batch to batch"
    for run, own in enumerate(alone):
        for what, expected in own.items():
            found = [t if t is None else t[run] for t in together[what]]
            if not _agree(found, expected):
                return f"it gives other {what} for several runs at once than for each by itself"
    return _trial_of_divergence(stack)


def _reason(error: Exception) -> str:
    """What torch's ``vmap`` could not do, in words."""
    text = str(error)
    if "random operation" in text:
        return "it draws random numbers in another way than by dropout, rand, randn, randint and their like"
    if "data-dependent" in text or ".item()" in text:
        return "what its code does depends on a tensor's value"
    return f"its model or loss cannot be computed for several runs at once ({explain(error)})"


def _trial_of_divergence(stack: Stack) -> str | None:
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
        except Exception:  # as some losses do, and then the run is taken out of the stack at once
            continue
        pairs = [[t if t is None else t[1 - lost] for t in side] for side in (found, expected)]
        if not _agree(*pairs):
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


def _first_results(course: Single | Stack) -> dict[str, list[Tensor | None]]:
    """What comes of two batches at the initial weights and of the first validation data, without an update."""
    results: dict[str, list[Tensor | None]] = {"losses": [], "gradients": []}
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


def _agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether they are the same to rounding, all taken together."""
    if [t is None for t in found] != [t is None for t in expected]:
        return False
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if not pairs:
        return True
    ours, theirs = (
        torch.cat([t.detach().flatten().double() for t in side]) for side in zip(*pairs, strict=True)
    )
    finite = torch.isfinite(theirs)
    if not torch.equal(torch.isfinite(ours), finite):
        return False
    rounding = max((torch.finfo(t.dtype).eps for _, t in pairs if t.is_floating_point()), default=0.0)
    error, size = (float(torch.linalg.vector_norm(v[finite])) for v in (ours - theirs, theirs))
    return error <= 10 * rounding**0.5 * size


def _numbers_of_others() -> tuple[Any, bytes]:
    """Where the random streams are that are not torch's."""
    numpys: Any = np.random.get_state()
    return random.getstate(), numpys[1].tobytes()
