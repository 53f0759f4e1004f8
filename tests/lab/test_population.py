"""A stack of runs is those runs by themselves: every optimizer, every task, both ways of computing it, to rounding.

The comparisons are in float64, where rounding has no time to grow into something else in a few steps; the same in float32
is checked as far as float32 goes.
"""

import json
import math
import pickle
import random
import time
import weakref
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from surefoot.lab import catalogue, population
from surefoot.lab.alike import difference
from surefoot.lab.catalogue import CATALOGUE, Entry
from surefoot.lab.errors import UserError
from surefoot.lab.plan import parse_optimizers
from surefoot.lab.population import (
    LOWERINGS,
    Stack,
    kind_of,
    refusal,
    stack_step_seconds,
    train_stack,
)
from surefoot.lab.runs import RunSpec
from surefoot.lab.schedules import SCHEDULES
from surefoot.lab.tasks import Task, images, load
from surefoot.lab.train import train
from surefoot.optim import core

FEATURES, CLASSES = 5, 3
OURS = {name: entry for name, entry in CATALOGUE.items() if isinstance(entry, Entry)}
CURVES = (
    "train_loss",
    "validation_loss",
    "validation_metric",
    "rate_mean",
    "rate_std",
    "rate_min",
    "rate_max",
)


def usable(task, spec):
    """The lowerings that can be used."""
    return [name for name in LOWERINGS if refusal(task, spec, lowering=name) is None]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layers():
    return nn.Sequential(
        # No bias before BatchNorm: its gradient would be nothing but rounding, and rules that go by signs would see it.
        nn.Linear(FEATURES, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.25),
        nn.Linear(8, CLASSES),
    )


def make_task(model=layers, patterns=22, validation=40, **changes):
    """A small classification with a metric, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(patterns + validation, FEATURES, generator=generator, dtype=torch.float64)
    targets = (inputs @ torch.randn(FEATURES, CLASSES, generator=generator).double()).argmax(dim=1)
    task = Task(
        name="small",
        model=lambda: model().double(),
        train=(inputs[:patterns], targets[:patterns]),
        validation=(inputs[patterns:], targets[patterns:]),
        loss=nn.functional.cross_entropy,
        metric=images.accuracy,
        block=10,
    )
    return replace(task, **changes)


def made_images(model, shape, loss=nn.functional.nll_loss):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(20, *shape, generator=generator),
        torch.randint(10, (20,), generator=generator),
    )
    return Task(
        "made", model, (inputs[:12], targets[:12]), (inputs[12:], targets[12:]), loss, images.accuracy
    )


def in_double(task, patterns, validation):
    """The same task in float64, with that many patterns."""

    def cut(pair, count):
        return tuple(t[:count].double() if t.is_floating_point() else t[:count] for t in pair)

    return replace(
        task,
        model=lambda: task.model().double(),
        train=cut(task.train, patterns),
        validation=cut(task.validation, validation),
    )


def in_precision(dtype, model=layers):
    """The small task in another precision."""
    task = make_task()
    return replace(
        task,
        model=lambda: model().to(dtype),
        train=(task.train[0].to(dtype), task.train[1]),
        validation=(task.validation[0].to(dtype), task.validation[1]),
    )


TASKS = {
    "digits": lambda: load("digits"),
    "digits-mlp": lambda: load("digits-mlp"),
    "regression": lambda: load("regression"),
    "mnist": lambda: made_images(images.paper_cnn, (1, 28, 28)),
    "mnist-sigmoid": lambda: made_images(images.sigmoid_network, (1, 28, 28)),
    "cifar10": lambda: made_images(images.lossgrad_cnn, (3, 32, 32), nn.functional.cross_entropy),
}


def make_spec(optimizer="sgd", rate=0.05, seed=0, batch_size=6, epochs=2, task="small"):
    (request,) = parse_optimizers(optimizer)
    settings = catalogue.resolve(request)
    return RunSpec(task, "v", request.optimizer, settings, rate, batch_size, epochs, seed)


def states():
    """Where the global random streams are."""
    numpys: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), numpys[1].tolist(), random.getstate()


def varied(value, own):
    """Another value of a setting, if it may be a number for each model."""
    if isinstance(value, tuple):
        return tuple(map(varied, value, own))
    if own is not True or value is None:
        return value
    if math.isinf(value):
        return 1.9 if value > 0 else -0.5
    return 0.01 if value == 0 else 0.9 * value if value <= 1 else 1 + 0.9 * (value - 1)


def make_specs(optimizer, **changes):
    """Three runs that differ in seed, rate and every number that the optimizer takes for each model."""
    entry = OURS[optimizer]
    defaults, own = entry.settings, entry.per_model
    other = {name: varied(value, own[name]) for name, value in defaults.items()}
    mixed = {name: (other if i % 2 else defaults)[name] for i, name in enumerate(defaults)}
    base = replace(make_spec(optimizer), **changes)
    return [
        replace(base, settings=settings, rate=rate, seed=seed)
        for settings, rate, seed in ((defaults, 0.02, 0), (other, 0.02, 1), (mixed, 0.005, 0))
    ]


def assert_same(ours, theirs, tolerance):
    """The same run to a relative tolerance; a spread of rates relative to the rates."""
    assert (ours.spec, ours.status, ours.steps) == (theirs.spec, theirs.status, theirs.steps)
    assert list(ours.patterns) == list(theirs.patterns)
    for name in CURVES:
        curve = getattr(theirs, name)
        near = max(theirs.rate_mean, default=0.0) * tolerance if name == "rate_std" else 1e-14
        assert getattr(ours, name) == pytest.approx(curve, rel=tolerance, abs=near), name


def of_one_kind(specs):
    kinds = {}
    for spec in specs:
        kinds.setdefault(kind_of(spec), []).append(spec)
    return list(kinds.values())


def assert_stack_is_separate(task, specs, lowering, tolerance=1e-10):
    assert len(set(map(kind_of, specs))) == 1
    together = train_stack(task, specs, lowering=lowering)
    for ours, spec in zip(together, specs, strict=True):
        assert_same(ours, train(task, spec), tolerance)
    return together


def precision(optimizer):
    """PAL divides by differences of losses: of an error it makes ten times as much with every step."""
    return 1e-6 if optimizer == "pal" else 1e-10


class TestIsSeparateRuns:
    """To 1e-10, in float64 (PAL: 1e-6)."""

    @pytest.mark.parametrize("lowering", LOWERINGS)
    @pytest.mark.parametrize("optimizer", OURS)
    def test_every_optimizer(self, optimizer, lowering):
        # With dropout and BatchNorm in the model, a short last batch, and every number of each model's own.
        assert_stack_is_separate(make_task(), make_specs(optimizer), lowering, precision(optimizer))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TASKS)
    @pytest.mark.parametrize("optimizer", OURS)
    def test_every_optimizer_on_every_task(self, name, optimizer):
        task = in_double(TASKS[name](), 8, 6)
        specs = make_specs(optimizer, batch_size=3, epochs=1)
        assert_stack_is_separate(task, specs, "grouped", precision(optimizer))

    @pytest.mark.parametrize("lowering", LOWERINGS)
    @pytest.mark.parametrize("name", TASKS)
    def test_every_task(self, name, lowering):
        task = in_double(TASKS[name](), 8, 6)
        for optimizer in ("adam-upd[window=2]", "lossgrad"):
            specs = [make_spec(optimizer, rate, seed, 3, 1) for seed in (0, 1) for rate in (0.05, 0.01)]
            assert_stack_is_separate(task, specs, lowering)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_every_schedule(self, schedule):
        for optimizer in ("adam", "srprop", "lossgrad"):
            specs = [make_spec(f"{optimizer}[schedule={schedule}]", 0.01, seed) for seed in range(2)]
            assert_stack_is_separate(make_task(), specs, "grouped")

    @pytest.mark.parametrize("average", ["mean", "exponential"])
    def test_averaged_weights_are_evaluated(self, average):
        specs = [make_spec(f"lossgrad[average={average}]", 0.1, seed) for seed in range(2)]
        assert_stack_is_separate(make_task(), specs, "grouped")

    @pytest.mark.parametrize(
        "optimizer",
        [
            "hyperreg-rkl1[scope=tensor]",
            "hyperreg-rkl1[scope=global]",
            "core[score_history=2,frozen=0.3]",
            "dropout-rprop[dropout=0.4]",
            "lossgrad[probe=raw,retract=false]",
            "lossgrad[probe_every=2]",
            "lossgrad[max_norm=0.1]",
        ],
    )
    def test_what_is_by_tensor_or_by_model(self, optimizer):
        specs = [make_spec(optimizer, rate, seed) for seed in (0, 1) for rate in (0.05, 0.01)]
        assert_stack_is_separate(make_task(), specs, "grouped")

    @pytest.mark.parametrize("runs", [1, 7])
    def test_of_any_size(self, runs):
        specs = [make_spec("adam", 0.01, seed) for seed in range(runs)]
        results = assert_stack_is_separate(make_task(), specs, "grouped")
        assert {r.environment["engine"] for r in results} == {f"stack of {runs}, grouped"}

    @pytest.mark.parametrize("lowering", LOWERINGS)
    def test_in_single_precision_as_far_as_it_goes(self, lowering):
        # 60 steps for the first point and 120 for the second; it is not chaos yet.
        for name, optimizer in (("digits-mlp", "adam-upd[window=10]"), ("digits", "momentum")):
            specs = [make_spec(optimizer, 1e-3, seed, 24, 2) for seed in range(2)]
            assert_stack_is_separate(load(name), specs, lowering, tolerance=3e-5)

    def test_of_the_first_steps_bit_for_bit(self):
        # Nothing is drawn differently: weights, order of the patterns and dropout are the very same.
        task = make_task(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES)), block=6)
        specs = [make_spec("sgd", 1e-300, seed, epochs=1) for seed in range(3)]
        for lowering in LOWERINGS:
            for ours, spec in zip(train_stack(task, specs, lowering=lowering), specs, strict=True):
                assert ours.train_loss == pytest.approx(train(task, spec).train_loss, rel=4e-16)

    def test_a_run_does_not_depend_on_its_place_or_its_company(self):
        spec = make_spec("adam", 0.01, seed=3)
        others = [make_spec("adam", 0.1, seed) for seed in range(4)]
        for specs in ([spec, *others], [*others[:2], spec, *others[2:]], [others[0], spec]):
            assert_same(train_stack(make_task(), specs)[specs.index(spec)], train(make_task(), spec), 1e-12)

    def test_validation_data_are_cut_into_pieces_and_measured_in_those_of_a_single_run(self):
        def metric(outputs, targets):  # no mean over patterns
            return outputs.std() * len(outputs)

        task = make_task(validation=1100, metric=metric)
        specs = [make_spec("sgd", 0.1, seed) for seed in range(2)]
        assert_stack_is_separate(task, specs, "grouped")
        assert_stack_is_separate(task, specs, "vmap")


class OfItsOwn(nn.Module):
    """Two layers, and what a test puts between them."""

    def __init__(self, between=lambda module, h: h, more=lambda module: None):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        more(self)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self, torch.tanh(self.first(x))))


def with_attribute(make):
    """A model whose attribute ``it`` is made anew for every model, and is multiplied with."""
    return lambda: OfItsOwn(lambda m, h: h * m.it, lambda m: setattr(m, "it", make()))


def running_mean(module, h):
    if module.training:
        module.mean = 0.9 * module.mean + 0.1 * h.detach().mean(0)  # a new tensor, not the old one changed
    return h - module.mean


def tied():
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
    model[2].weight = model[0].weight
    return nn.Sequential(model, nn.Linear(FEATURES, CLASSES))


def counting(module, h):
    module.calls += 1
    return h * min(module.calls, 3)


def frozen_first(module):
    module.first.requires_grad_(False)


def clipped(register):
    """A sequence of layers of which each parameter has a hook that changes nothing here."""

    def model():
        made = layers()
        for p in made.parameters():
            register(p)
        return made

    return model


def limited(p):
    p.grad.clamp_(-9, 9)


def hooked_backward(kind):
    def model():
        made = layers()
        getattr(made[0], f"register_full_backward_{kind}")(lambda *arguments: None)
        return made

    return model


def clipped_signal(module, h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return h


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(self.cells(x.unsqueeze(-1))[0][:, -1])


class TestModelsOfOnesOwn:
    @pytest.mark.parametrize(
        "model",
        [
            OfItsOwn,
            lambda: OfItsOwn(lambda m, h: nn.functional.dropout(h, 0.3, m.training)),
            lambda: OfItsOwn(lambda m, h: h + 0.1 * torch.randn_like(h)),
            lambda: OfItsOwn(lambda m, h: h * torch.rand(8, dtype=torch.float64)),
            lambda: OfItsOwn(lambda m, h: m.norm(h), lambda m: setattr(m, "norm", nn.BatchNorm1d(8))),
            lambda: OfItsOwn(lambda m, h: m.norm(h), lambda m: setattr(m, "norm", nn.LayerNorm(8))),
            lambda: OfItsOwn(running_mean, lambda m: m.register_buffer("mean", torch.zeros(8))),
            with_attribute(lambda: torch.arange(8.0)),
            lambda: OfItsOwn(more=frozen_first),
            lambda: OfItsOwn(more=lambda m: setattr(m, "unused", nn.Linear(2, 2))),
            lambda: OfItsOwn(more=lambda m: m.first.register_forward_hook(lambda module, _, out: 2 * out)),
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES))),
            tied,
        ],
        ids=[
            *("plain", "dropout", "noise", "noise_of_a_shape", "batch_norm", "layer_norm", "buffer"),
            *("constant", "frozen", "unused", "hook", "parametrized", "tied"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_are_trained_as_stacks_too(self, model):
        task = make_task(model)
        for optimizer in ("momentum[weight_decay=0.01]", "lossgrad"):
            specs = [make_spec(optimizer, 0.05, seed) for seed in range(3)]
            assert usable(task, specs[0]) == ["vmap"]
            assert_stack_is_separate(task, specs, None)

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (lambda: OfItsOwn(lambda m, h: 2 * h if h.sum() > 0 else h), "depends on a tensor's value"),
            (lambda: OfItsOwn(lambda m, h: h * h.mean().item()), "depends on a tensor's value"),
            (lambda: OfItsOwn(lambda m, h: h * random.random()), "random numbers from Python or NumPy"),
            (lambda: OfItsOwn(lambda m, h: h * np.random.rand()), "random numbers from Python or NumPy"),
            (
                lambda: OfItsOwn(lambda m, h: nn.functional.alpha_dropout(h, 0.3, m.training)),
                "draws random numbers in another way",
            ),
            (
                lambda: OfItsOwn(counting, lambda m: setattr(m, "calls", 0)),
                "attribute calls of OfItsOwn, which is neither parameter nor buffer, changes from batch to batch",
            ),
            (with_attribute(random.random), "attribute it of OfItsOwn, .* may be another from each seed"),
            (
                with_attribute(lambda: torch.rand(8)),
                "attribute it of OfItsOwn, .* may be another from each seed",
            ),
            (with_attribute(lambda: nn.Linear(1, 1).weight.double()), "attribute it of OfItsOwn"),
            (
                lambda: OfItsOwn(
                    lambda m, h: h + m.it[0],
                    lambda m: setattr(m, "it", [nn.Parameter(torch.zeros(8).double())]),
                ),
                "attribute it of OfItsOwn",
            ),
            (
                lambda: OfItsOwn(
                    lambda m, h: h * torch.rand(8, generator=m.it),
                    lambda m: setattr(m, "it", torch.Generator().manual_seed(0)),
                ),
                "attribute it of OfItsOwn",
            ),
            (
                lambda: nn.Sequential(
                    *(nn.Linear(FEATURES, FEATURES) for _ in range(random.randint(1, 9))),
                    nn.Linear(FEATURES, CLASSES),
                ),
                "the number of its layers may be another from each seed",
            ),
            (
                lambda: nn.Sequential(nn.Linear(FEATURES, w := random.randint(3, 99)), nn.Linear(w, CLASSES)),
                "out_features of Linear 0",
            ),
            (lambda: nn.Sequential(nn.Linear(FEATURES, 1), nn.Linear(2, CLASSES)), "it fails by itself"),
            (
                clipped(lambda p: p.register_hook(lambda gradient: gradient.clamp(-9, 9))),
                "parameter 0.weight has a hook on its gradient",
            ),
            (
                clipped(lambda p: p.register_post_accumulate_grad_hook(limited)),
                "parameter 0.weight has a hook on its gradient",
            ),
            (hooked_backward("hook"), "Linear 0 has a backward hook"),
            (hooked_backward("pre_hook"), "Linear 0 has a backward hook"),
            (lambda: OfItsOwn(clipped_signal), "asks whether a tensor needs a gradient"),
            (lambda: OfItsOwn(lambda m, h: h if h.grad_fn is None else 2 * h), "needs a gradient"),
            (Recurrent, "LSTM cells is one operation to torch"),
        ],
        ids=[
            *(
                "branch",
                "item",
                "python",
                "numpy",
                "alpha_dropout",
                "counter",
                "number",
                "tensor",
                "weight",
                "weights",
            ),
            *("generator", "depth", "width", "wrong", "clipped", "clipped_later", "backward", "backward_pre"),
            *("clipped_signal", "by_graph", "recurrent"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing")
    def test_what_cannot_be_stacked_is_refused_with_the_reason(self, model, reason):
        task, spec = make_task(model), make_spec()
        assert usable(task, spec) == []
        found = refusal(task, spec)
        assert found is not None
        assert "\n" not in found
        with pytest.raises(UserError, match=rf"Task small cannot be trained as a stack: .*({reason})"):
            train_stack(task, [spec, replace(spec, seed=1)])

    @pytest.mark.parametrize("padding", [2, -3])
    def test_a_padding_row_is_not_trained(self, padding):
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.rows, self.last = nn.Embedding(5, 4, padding_idx=padding), nn.Linear(4, CLASSES)

            def forward(self, x):
                return self.last(torch.tanh(self.rows(x)).mean(1))

        task = make_task(Words)
        words = [((inputs + 2).long() % 5, targets) for inputs, targets in (task.train, task.validation)]
        task = replace(task, train=words[0], validation=words[1])
        assert_stack_is_separate(task, [make_spec("adam", 0.05, seed) for seed in range(3)], "vmap")

    def test_models_that_differ_only_for_some_seeds_are_refused_when_they_come(self):
        def more(module):
            module.it = 1.0 if float(torch.rand(())) < 0.9 else 2.0

        torch.manual_seed(0)
        task, specs = (
            make_task(lambda: OfItsOwn(lambda m, h: h * m.it, more)),
            [make_spec(seed=s) for s in range(60)],
        )
        assert refusal(task, specs[0]) is None
        with pytest.raises(UserError, match="attribute it of OfItsOwn"):
            train_stack(task, specs)

    def test_a_loss_of_ones_own_gets_each_run_by_itself(self):
        def loss(outputs, targets):
            wrong = (outputs.softmax(1) - nn.functional.one_hot(targets, CLASSES)).square().sum(1)
            return wrong.mean() + 0.1 * wrong.std() + 0.01 * torch.rand((), dtype=torch.float64)

        specs = [make_spec("adam", 0.01, seed) for seed in range(3)]
        for lowering in LOWERINGS:
            assert_stack_is_separate(make_task(loss=loss), specs, lowering)

    def test_targets_that_a_loss_leaves_out_are_left_out(self):
        task = make_task()
        targets = torch.where(torch.arange(22) % 3 == 0, -100, task.train[1])
        specs = [make_spec("sgd", 0.1, seed) for seed in range(3)]
        assert_stack_is_separate(replace(task, train=(task.train[0], targets)), specs, "grouped")

    def test_a_loss_that_spreads_its_arguments_is_no_other_one_in_a_stack(self):
        # Outputs [B, 1] and targets [B]: torch warns, and makes [B, B] of them.
        task = make_task(lambda: nn.Linear(FEATURES, 1), loss=nn.functional.mse_loss, metric=None)
        task = replace(
            task, train=(task.train[0], task.train[0][:, 0]), validation=(task.train[0], task.train[0][:, 0])
        )
        specs = [make_spec("sgd", 0.1, seed) for seed in range(2)]
        with pytest.warns(UserWarning, match="target size"):
            assert_stack_is_separate(task, specs, "vmap")

    def test_outputs_need_not_be_one_tensor(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(FEATURES, CLASSES)

            def forward(self, x):
                return {"mean": self.linear(x), "size": (x.square().sum(1),)}

        def loss(outputs, targets):
            return nn.functional.cross_entropy(outputs["mean"], targets) + outputs["size"][0].mean()

        task = make_task(Two, loss=loss, metric=None)
        assert_stack_is_separate(task, [make_spec("adam", 0.1, seed) for seed in range(2)], "vmap")


class TestGrouped:
    """The layers that are written for several models side by side."""

    @pytest.mark.parametrize(
        "model",
        [
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Dropout2d(0.3),
                nn.Conv2d(4, 6, 3, groups=2, padding="same"),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(6, CLASSES, bias=False),
            ),
            lambda: nn.Sequential(
                nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 4, (2, 3), dilation=1), nn.Softplus()),
                nn.MaxPool2d(2, stride=1, padding=1),
                nn.Dropout(0.2),
                nn.Flatten(),
                nn.LazyLinear(5),
                nn.BatchNorm1d(5, affine=False),
                nn.Softmax(dim=-1),
                nn.Identity(),
                nn.Linear(5, CLASSES),
                nn.LogSoftmax(dim=1),
            ),
            lambda: nn.Sequential(
                nn.Conv2d(2, 2, 1, groups=2),
                nn.Linear(8, 3),
                nn.Sigmoid(),
                nn.BatchNorm2d(2),
                nn.Flatten(),
                nn.Linear(48, CLASSES),
            ),
            lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, CLASSES)),
            lambda: nn.Sequential(nn.Flatten(), nn.Softmax(dim=1), nn.Linear(128, CLASSES)),
            lambda: nn.Sequential(
                nn.Flatten(),
                nn.Linear(128, 5),
                twice := nn.Sequential(nn.Dropout(0.3), nn.ELU()),
                nn.Linear(5, CLASSES),
                twice,
            ),
        ],
        ids=["strided", "nested", "linear_on_planes", "norm_first", "softmax_first", "one_layer_twice"],
    )
    def test_every_layer(self, model):
        def made():
            made = model().double()
            made(torch.zeros(2, 2, 8, 8, dtype=torch.float64))  # for the lazy one
            return made

        task = make_task(made)
        generator = torch.Generator().manual_seed(1)
        pictures = [torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64) for n in (22, 40)]
        task = replace(task, train=(pictures[0], task.train[1]), validation=(pictures[1], task.validation[1]))
        specs = [make_spec("adam", 0.01, seed) for seed in range(3)]
        assert_stack_is_separate(task, specs, "grouped")
        assert_stack_is_separate(task, specs[:1], "grouped")

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (OfItsOwn, "OfItsOwn is no layer"),
            (lambda: nn.Sequential(nn.PReLU(), nn.Linear(FEATURES, CLASSES)), "PReLU 0 is no layer"),
            (tied, "Linear 0.2 has the weights of another layer"),
            (
                lambda: nn.Sequential(
                    nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, CLASSES)
                ),
                "BatchNorm1d 1 has options",
            ),
            (lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Softmax(dim=0)), "Softmax 1 has options"),
        ],
        ids=["own", "other", "tied", "cumulative", "over_patterns"],
    )
    def test_others_are_left_to_vmap(self, model, reason):
        assert reason in (refusal(make_task(model), make_spec(), lowering="grouped") or "")

    def test_a_hook_is_not_passed_over(self):
        def model():
            made = layers()
            made[0].register_forward_hook(twice)
            return made

        def twice(module, arguments, out):
            return 2 * out

        assert refusal(make_task(model), make_spec(), lowering="grouped") == "Linear 0 has hooks"
        assert usable(make_task(model), make_spec()) == ["vmap"]


def explosive(outputs, targets):
    return outputs.square().mean()


class TestDivergence:
    @pytest.mark.parametrize("lowering", LOWERINGS)
    @pytest.mark.parametrize(
        "optimizer", ["sgd", "adam-upd[window=3]", "lossgrad-momentum", "sgd[schedule=onecycle]", "wngrad"]
    )
    def test_ends_a_run_and_leaves_the_others_alone(self, optimizer, lowering):
        # Rates that end in the first block, later, and never.
        task = make_task(lambda: nn.Linear(FEATURES, CLASSES), loss=explosive, block=6)
        rates = (1e30, 0.05, 1e12, 0.01, 1e300)
        specs = [make_spec(optimizer, rate, seed % 2, epochs=9) for seed, rate in enumerate(rates)]
        results = assert_stack_is_separate(task, specs, lowering, 1e-9)
        if optimizer == "sgd":
            assert [r.status for r in results] == ["diverged", "finished", "diverged", "finished", "diverged"]
            assert 0 < len(results[2].patterns) < len(results[1].patterns)

    def test_of_a_convolution_too(self):
        task = in_double(made_images(images.paper_cnn, (1, 28, 28)), 12, 6)
        task = replace(task, block=4)
        specs = [make_spec("sgd", 1e300 if k == 1 else 0.01, k, 2, 2) for k in range(3)]
        assert [r.status for r in assert_stack_is_separate(task, specs, "grouped")] == [
            *("finished", "diverged", "finished")
        ]

    def test_of_all_ends_the_stack(self):
        specs = [make_spec("sgd", 1e300, seed, epochs=20) for seed in range(3)]
        assert_stack_is_separate(make_task(loss=explosive), specs, "grouped")

    @pytest.mark.parametrize("block", [6, 22])
    @pytest.mark.parametrize("lowering", LOWERINGS)
    @pytest.mark.parametrize("optimizer", ["momentum", "lossgrad[retract=false]", "adam[schedule=cosine]"])
    def test_a_loss_that_raises_on_nan_ends_only_the_run_whose_it_is(self, optimizer, lowering, block):
        def loss(outputs, targets):
            return nn.functional.binary_cross_entropy(outputs.sigmoid(), targets)

        def metric(outputs, targets):
            if not torch.isfinite(outputs).all():
                raise ValueError("a metric of numbers")
            return outputs.mean()

        task = make_task(loss=loss, metric=metric, block=block)
        train_data, validation = (
            (inputs, (inputs[:, :CLASSES] > 0).double()) for inputs, _ in (task.train, task.validation)
        )
        task = replace(task, train=train_data, validation=validation)
        rates = (0.01, 1e307, 0.05)
        specs = [make_spec(optimizer, rate, seed, epochs=3) for seed, rate in enumerate(rates)]
        results = assert_stack_is_separate(task, specs, lowering)
        assert results[0].status == results[2].status == "finished"

    def test_an_error_that_has_nothing_to_do_with_it_is_not_hidden(self):
        def loss(outputs, targets):
            calls.append(len(outputs))
            if len(calls) > 30:
                raise ZeroDivisionError("a mistake")
            return outputs.square().mean()

        calls = []
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            train_stack(make_task(loss=loss), [make_spec(seed=s, epochs=9) for s in range(2)])

    def test_a_single_pattern_left_over_is_explained(self):
        task = make_task(patterns=13)
        with pytest.raises(UserError, match="single pattern that 13 training patterns in batches of 6"):
            train_stack(task, [make_spec(seed=seed) for seed in range(2)])


class TestKinds:
    def test_differ_in_seeds_rates_and_numbers_only(self):
        same = [
            make_spec("adam-upd[window=50]", rate, seed) for rate in (1e-3, 1e-2) for seed in range(2)
        ] + [make_spec(o) for o in ("adam-upd[etas=0.4:1.3]", "adam-upd[weight_decay=0.1,betas=0.8:0.9]")]
        others = [
            make_spec("adam-upd[window=60]"),
            make_spec("adam-upd[amsgrad=true]"),
            make_spec("adam-upd[schedule=cosine]"),
            make_spec("srprop"),
            make_spec("adam-upd", batch_size=7),
            make_spec("adam-upd", epochs=3),
            make_spec("adam-upd", task="other"),
            replace(make_spec("adam-upd"), task_version="w"),
        ]
        mixed = [same[0], *others[:4], *same[1:], *others[4:]]
        assert of_one_kind(mixed) == [same, *([spec] for spec in others)]

    def test_a_number_is_no_none_and_some_numbers_are_of_all_models(self):
        asked = [
            *("hyperreg-rkl1", "hyperreg-rkl1[longest_step=0.5]", "hyperreg-rkl1[scope=tensor]"),
            *("core", "core[betas=0.7:0.8:300:0.99]", "core[betas=0.7:0.8:300:0.9]", "core[frozen=0.1,score_history=5]"),
        ]  # fmt: skip
        groups = of_one_kind([make_spec(optimizer) for optimizer in asked])
        assert [len(group) for group in groups] == [2, 1, 2, 1, 1]

    def test_come_back_from_a_store_as_they_went(self):
        # JSON makes lists of tuples.
        spec = make_spec("adam-upd[etas=0.4:1.3]")
        back = replace(spec, settings=json.loads(json.dumps(spec.settings)))
        assert len(of_one_kind([spec, back, make_spec("adam-upd")])) == 1
        results = train_stack(make_task(), [spec, back, make_spec("adam-upd")])
        assert results[0].train_loss == results[1].train_loss

    def test_every_setting_is_known_to_be_one_or_the_other(self):
        for entry in OURS.values():
            assert entry.settings.keys() <= entry.per_model.keys()
            for setting, default in entry.settings.items():
                own = entry.per_model[setting]
                assert not isinstance(default, tuple) or (isinstance(own, tuple) and len(own) == len(default))

    @pytest.mark.parametrize("optimizer", [name for name in CATALOGUE if name not in OURS])
    def test_other_packages_optimizers_are_refused(self, optimizer):
        spec = RunSpec("small", "v", optimizer, {}, 1.0, 6, 2, 0)
        assert "another package's" in (refusal(make_task(), spec) or "")
        assert usable(make_task(), spec) == []
        assert of_one_kind([spec, make_spec()]) == [[spec], [make_spec()]]
        for runs in ([spec], [spec, replace(spec, seed=1)]):
            with pytest.raises(UserError, match="another package's"):
                train_stack(make_task(), runs)

    def test_runs_of_two_groups_are_no_stack(self):
        with pytest.raises(UserError, match="differ in more than"):
            train_stack(make_task(), [make_spec("sgd"), make_spec("adam")])


class TestRecords:
    def test_the_results_are_in_the_order_of_the_specifications_and_plain(self):
        specs = [make_spec("sgd", 10.0**-k, seed) for k in (3, 1, 2) for seed in (1, 0)]
        results = train_stack(make_task(), specs)
        assert [r.spec for r in results] == specs
        for result in results:
            assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["environment"]["engine"] == (
                "stack of 6, grouped"
            )
            assert b"torch" not in pickle.dumps(replace(result, environment={}))

    def test_the_time_is_shared_out(self):
        specs = [make_spec("sgd", 0.01, seed) for seed in range(4)]
        refusal(make_task(), specs[0])
        task = make_task()
        refusal(task, specs[0])
        began = time.perf_counter()
        results = train_stack(task, specs)
        took = time.perf_counter() - began
        assert 0.5 * took < sum(r.seconds for r in results) <= took
        for result in results:
            assert 0 < result.step_seconds * result.steps < result.seconds

    def test_the_callers_random_state_neither_matters_nor_changes(self):
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            before = states()
            results = train_stack(make_task(), [make_spec(seed=s) for s in range(2)])
            found.append([list(r.train_loss) for r in results])
            stack_step_seconds(make_task(), [make_spec()], moment=0.001)
            assert states() == before
        assert found[0] == found[1]

    def test_the_data_are_left_alone_by_a_model_that_changes_its_input(self):
        task = make_task(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, CLASSES)))
        before = [tensor.clone() for tensor in (*task.train, *task.validation)]
        assert_stack_is_separate(task, [make_spec(seed=s) for s in range(2)], "grouped")
        assert_stack_is_separate(task, [make_spec(seed=s) for s in range(2)], "vmap")
        for tensor, copy in zip((*task.train, *task.validation), before, strict=True):
            assert torch.equal(tensor, copy)

    def test_a_step_that_is_timed_is_near_what_it_takes(self):
        specs = [make_spec("adam", 0.01, seed, epochs=40) for seed in range(4)]
        task = make_task()
        sum_of_shares = sum(r.step_seconds for r in train_stack(task, specs))
        assert sum_of_shares / 4 < stack_step_seconds(task, specs, moment=0.1) < sum_of_shares * 4


class TestTrial:
    def test_is_made_once_for_each_task_and_does_not_keep_the_task(self, monkeypatch):
        tried = []
        real = population._trial
        monkeypatch.setattr(population, "_trial", lambda *a: tried.append(a[3].name) or real(*a))
        task, spec = make_task(), make_spec()
        for seed in range(3):
            assert refusal(task, replace(spec, seed=seed, rate=0.1 * (seed + 1)), lowering="vmap") is None
        assert tried == ["vmap"]
        assert refusal(make_task(), spec, lowering="vmap") is None
        assert tried == ["vmap", "vmap"]
        gone = weakref.ref(task)
        del task
        tried.clear()
        assert gone() is None

    def test_finds_a_lowering_that_computes_something_else(self, monkeypatch):
        class Wrong(LOWERINGS["grouped"]):
            def train(self, tensors, inputs, streams):
                return super().train(tensors, inputs, streams) * 1.01

        monkeypatch.setitem(LOWERINGS, "grouped", Wrong)
        assert refusal(make_task(), make_spec(), lowering="grouped") == (
            "it gives other losses for several runs at once than for each by itself"
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_finds_small_mistakes_in_any_precision(self, monkeypatch, dtype):
        class Wrong(LOWERINGS["grouped"]):
            def train(self, tensors, inputs, streams):
                return super().train(tensors, inputs, streams) * (1 + 1e-5)

        task = in_precision(dtype)
        assert usable(task, make_spec()) == ["grouped", "vmap"]
        monkeypatch.setitem(LOWERINGS, "grouped", Wrong)
        # Of another task, for the verdict on this one is known.
        assert "it gives other" in (refusal(in_precision(dtype), make_spec(), lowering="grouped") or "")

    def test_finds_what_is_wrong_with_one_small_tensor_only(self, monkeypatch):
        class Wrong(LOWERINGS["grouped"]):
            def train(self, tensors, inputs, streams):
                bias = tensors["4.bias"]
                return super().train(
                    {**tensors, "4.bias": bias + 1e-4 * (bias - bias.detach())}, inputs, streams
                )

        def model():
            made = layers()
            made[4].weight.data *= 1e4  # whose gradients are then the others'
            return made

        monkeypatch.setitem(LOWERINGS, "grouped", Wrong)
        assert "other gradients" in (refusal(make_task(model), make_spec(), lowering="grouped") or "")

    def test_what_insists_on_its_own_precision_is_compared_in_that(self, monkeypatch):
        class Insisting(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = layers()

            def forward(self, x):
                return self.layers(x.float())

        class Wrong(LOWERINGS["vmap"]):
            def train(self, tensors, inputs, streams):
                return super().train(tensors, inputs, streams) * (1 + 1e-3)

        assert usable(in_precision(torch.float32, Insisting), make_spec()) == ["vmap"]
        monkeypatch.setitem(LOWERINGS, "vmap", Wrong)
        task = in_precision(torch.float32, Insisting)
        assert "other losses" in (refusal(task, make_spec(), lowering="vmap") or "")

    def test_a_gradient_that_is_rounding_only_is_no_difference(self):
        def model():  # biases before BatchNorm
            between = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(4)]
            return nn.Sequential(nn.Linear(FEATURES, 16), *between, nn.Linear(16, CLASSES))

        for dtype in (torch.float64, torch.float32):
            assert usable(in_precision(dtype, model), make_spec()) == ["grouped", "vmap"]

    @pytest.mark.parametrize("scale", [1e-2, 1e-4])
    def test_a_loss_with_the_weights_of_the_model_made_last_is_refused(self, scale):
        def model():
            made.append(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)))
            return made[-1]

        def loss(outputs, targets):
            size = sum(p.square().sum() for p in made[-1].parameters())
            return nn.functional.cross_entropy(outputs, targets) + scale * size

        made = []
        assert usable(replace(in_precision(torch.float32, model), loss=loss), make_spec()) == []

    def test_it_compares_piece_by_piece(self, monkeypatch):
        monkeypatch.setattr(population, "_AT_ONCE", 10)
        assert usable(make_task(), make_spec()) == ["grouped", "vmap"]
        a = torch.arange(60.0).view(20, 3)
        assert population._distance(a.mT, (a + 1).mT) == pytest.approx((60**0.5, float((a + 1).norm())))
        assert population._distance(a, a / 0) is None

    @pytest.mark.parametrize("calls", [0, 2])  # the batches, and the trial of divergence
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory."),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        ],
    )
    def test_want_of_memory_is_a_reason(self, monkeypatch, error, calls):
        class Large(LOWERINGS["grouped"]):
            made = 0

            def train(self, tensors, inputs, streams):
                self.made += 1
                if self.made > calls:
                    raise error
                return super().train(tensors, inputs, streams)

        monkeypatch.setitem(LOWERINGS, "grouped", Large)
        reason = refusal(make_task(), make_spec(), lowering="grouped")
        assert reason == "there is not the memory for two runs at once"

    def test_finds_a_lowering_in_which_one_model_spoils_another(self, monkeypatch):
        class Leaky(LOWERINGS["grouped"]):
            def train(self, tensors, inputs, streams):
                outputs = super().train(tensors, inputs, streams)
                return outputs + 0 * outputs.sum()

        monkeypatch.setitem(LOWERINGS, "grouped", Leaky)
        assert refusal(make_task(), make_spec(), lowering="grouped") == (
            "a run whose weights are no numbers any more would spoil the others"
        )


def test_a_step_waits_for_nothing(monkeypatch):
    """No operation in a step of a stack has a result that the host needs."""
    monkeypatch.setattr(core, "is_at_hand", lambda value: False)  # as if the CPU were a device
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        met: ClassVar = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.met.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    stack = Stack(
        make_task(layers),
        [make_spec("lossgrad-adam", rate) for rate in (0.1, 0.2)],
        torch.device("cpu"),
        LOWERINGS["grouped"],
    )
    batches = stack.batches()
    for _ in range(
        2
    ):  # the second one, as an exception, checks that a probe that drops out sees the step's own masks
        stack.step(next(batches))
    with Watching():
        stack.step(next(batches))
    assert {"baddbmm", "mul"} <= Watching.met
    assert not Watching.met & {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Settings:
    def __init__(self, number):
        self.number, self.round = number, self  # a circle


def scaled(by):
    return lambda x: x * by


class TestDifference:
    """What tells two models of one make apart."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda module: 1.5,
            lambda module: {"a": [1, (2.0, None)], "b": {3}, "c": "word"},
            lambda module: torch.arange(3),
            lambda module: np.arange(3),
            lambda module: torch.float64,
            lambda module: nn.functional.relu,
            lambda module: lambda x: x + 1,
            lambda module: scaled(2.0),
            lambda module: partial(scaled, by=2.0),
            lambda module: module.forward,
            lambda module: [module, module.first],
            lambda module: Settings(3),
            lambda module: OrderedDict({5: scaled(2.0)}),
        ],
    )
    def test_there_is_none(self, make):
        pair = [OfItsOwn(more=lambda module: vars(module).update(it=make(module))) for _ in range(2)]
        assert difference(*pair) is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda module, k: k,
            lambda module, k: [1, 2, k],
            lambda module, k: {k: 1, "one": 1},
            lambda module, k: ("a", "b") if k else ["a", "b"],
            lambda module, k: torch.tensor(k),
            lambda module, k: torch.zeros(1, dtype=(torch.float32, torch.float64)[k]),
            lambda module, k: torch.zeros(1, requires_grad=True),
            lambda module, k: np.array(k),
            lambda module, k: scaled(k),
            lambda module, k: (scaled, varied)[k],
            lambda module, k: partial(scaled, by=k),
            lambda module, k: OfItsOwn().forward,
            lambda module, k: (module.first, module.last)[k],
            lambda module, k: [nn.Linear(1, 1)],
            lambda module, k: Settings(k),
            lambda module, k: object(),
            lambda module, k: random.Random(0),
            lambda module, k: np.random.default_rng(0),
        ],
    )
    def test_there_may_be_one(self, make):
        pair = [OfItsOwn(more=lambda module, k=k: vars(module).update(it=make(module, k))) for k in range(2)]
        found = difference(*pair)
        assert found is not None
        assert found.startswith("attribute it of OfItsOwn")

    def test_of_the_layers_and_their_shapes(self):
        for one, other, what in (
            (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()), "the kind of its layers"),
            (nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()), "the number of its layers"),
            (
                nn.ReLU(inplace=True),
                nn.ReLU(),
                "attribute inplace of ReLU, which is neither parameter nor buffer,",
            ),
            (
                nn.ParameterList([torch.zeros(2)]),
                nn.ParameterList([torch.zeros(3)]),
                "the shape of its parameters",
            ),
        ):
            assert difference(one, other) == what
