"""Every direction with a constant rate is torch's own optimizer: same numbers, same options, same schedulers.

What this protects: a comparison in the laboratory is between rules, so the baselines must be the ones that everybody
knows; and ``lr`` stays a plain multiplier, so whatever works on ``group["lr"]`` works here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from driving import assert_close, assert_same, parameters, problems, put_gradients, values
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import ABSOLUTE, RELATIVE, advance

from surefoot import SelfTuning
from surefoot.optim import directions, rules

STEPS = 60
RATE = 0.05


@dataclass(frozen=True)
class Twin:
    """A torch optimizer and the direction that is the same thing, with the options of a second parameter group.

    ``torch_only`` are the options that here are another direction.
    """

    name: str
    reference: type[torch.optim.Optimizer]
    direction: Any
    options: dict[str, Any] = field(default_factory=dict)
    torch_only: dict[str, Any] = field(default_factory=dict)
    other_group: dict[str, Any] = field(default_factory=dict)
    maximize: bool = False

    def torch_optimizer(self, params, lr):
        return self.reference(params, lr=lr, **self.options, **self.torch_only, maximize=self.maximize)

    def ours(self, params, rate, lr):
        return SelfTuning(
            params, self.direction(**self._ours()), rules.Constant(rate), lr=lr, maximize=self.maximize
        )

    def _ours(self):
        spelled = dict(self.options)
        if self.reference is torch.optim.AdamW:
            spelled["decoupled_weight_decay"] = True
        return spelled


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
D = directions
TWINS = [
    Twin("sgd", SGD, D.SGD),
    Twin("sgd-decay", SGD, D.SGD, {"weight_decay": 0.1}, other_group={"weight_decay": 0.3}),
    Twin("sgd-maximize", SGD, D.SGD, {"weight_decay": 0.1}, maximize=True),
    Twin("momentum", SGD, D.Momentum, {"momentum": 0.9}, other_group={"momentum": 0.5}),
    Twin(
        "momentum-dampening-decay",
        SGD,
        D.Momentum,
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
        other_group={"momentum": 0.6, "dampening": 0.1, "weight_decay": 0.0},
    ),
    Twin("momentum-maximize", SGD, D.Momentum, {"momentum": 0.9, "weight_decay": 0.05}, maximize=True),
    Twin("nesterov", SGD, D.Nesterov, {"momentum": 0.9}, {"nesterov": True}, {"momentum": 0.4}),
    Twin("nesterov-decay", SGD, D.Nesterov, {"momentum": 0.7, "weight_decay": 0.2}, {"nesterov": True}),
    Twin("nesterov-maximize", SGD, D.Nesterov, {"momentum": 0.7}, {"nesterov": True}, maximize=True),
    Twin("adam", Adam, D.Adam, other_group={"betas": (0.5, 0.9)}),
    Twin("adam-betas-eps", Adam, D.Adam, {"betas": (0.8, 0.95), "eps": 1e-3}, other_group={"eps": 1e-2}),
    Twin("adam-decay", Adam, D.Adam, {"weight_decay": 0.1}, other_group={"weight_decay": 0.0}),
    Twin("adam-amsgrad", Adam, D.Adam, {"amsgrad": True, "betas": (0.9, 0.9), "weight_decay": 0.05}),
    Twin("adam-maximize", Adam, D.Adam, {"weight_decay": 0.1}, maximize=True),
    Twin("adamw", AdamW, D.Adam, {"weight_decay": 0.1}, other_group={"weight_decay": 0.4}),
    Twin("adamw-amsgrad-maximize", AdamW, D.Adam, {"weight_decay": 0.1, "amsgrad": True}, maximize=True),
]
by_twin = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)


def run_both(reference, ours, theirs, mine, tasks, steps=STEPS, after_step=None, context=""):
    """Step both optimizers over the same problems and compare all weights after every step."""
    for t in range(1, steps + 1):
        put_gradients(theirs, tasks, t)
        put_gradients(mine, tasks, t)
        reference.step()
        ours.step()
        if after_step is not None:
            after_step(t)
        assert_close(mine, theirs, context=f"{context} step {t}")


@by_twin
@pytest.mark.parametrize(
    ("rate", "lr"), [(RATE, 1.0), (1.0, RATE), (RATE / 4, 4.0)], ids=["rate", "lr", "both"]
)
def test_constant_rate_is_torch(twin, rate, lr):
    tasks = problems(STEPS, dead=False)
    theirs, mine = parameters(tasks), parameters(tasks)
    start = values(mine)
    run_both(twin.torch_optimizer(theirs, rate * lr), twin.ours(mine, rate, lr), theirs, mine, tasks)
    assert all((p - s).abs().min() > 0 for p, s in zip(mine, start, strict=True))


@by_twin
def test_dead_weights_agree_too(twin):
    tasks = problems(STEPS, dead=True, seed=3)
    theirs, mine = parameters(tasks), parameters(tasks)
    run_both(twin.torch_optimizer(theirs, RATE), twin.ours(mine, RATE, 1.0), theirs, mine, tasks)


@by_twin
def test_parameter_groups_keep_their_own_settings(twin):
    """Each group is its own optimizer: rate, lr and every option of the direction."""
    tasks = problems(STEPS, seed=1)
    theirs, mine = parameters(tasks), parameters(tasks)
    reference = twin.torch_optimizer(
        [{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.02 * 0.5, **twin.other_group}], RATE
    )
    ours = twin.ours(
        [{"params": mine[:3]}, {"params": mine[3:], "lr": 0.5, "rate": 0.02, **twin.other_group}], RATE, 1
    )
    run_both(reference, ours, theirs, mine, tasks)


@by_twin
def test_a_group_added_later_starts_its_own_count(twin):
    tasks = problems(STEPS, seed=2)
    theirs, mine = parameters(tasks), parameters(tasks)
    reference, ours = twin.torch_optimizer(theirs[:2], RATE), twin.ours(mine[:2], RATE, 1.0)

    def add(t):
        if t == 20:
            reference.add_param_group({"params": theirs[2:], "lr": 0.01})
            ours.add_param_group({"params": mine[2:], "lr": 0.01 / RATE})

    run_both(reference, ours, theirs, mine, tasks, after_step=add)


@by_twin
def test_late_and_missing_gradients_and_a_frozen_parameter(twin):
    """A parameter counts its own steps from its first gradient on; one that never gets a gradient never moves."""
    tasks = problems(STEPS, seed=4)
    theirs, mine = parameters(tasks), parameters(tasks)
    theirs[1].requires_grad_(False)
    mine[1].requires_grad_(False)
    frozen = mine[1].detach().clone()
    reference, ours = twin.torch_optimizer(theirs, RATE), twin.ours(mine, RATE, 1.0)
    for t in range(1, STEPS + 1):
        for params in (theirs, mine):
            put_gradients(params, tasks, t)
            if t <= 10:
                params[3].grad = None
            if t % 3 == 0:
                params[4].grad = None
        before = mine[3].detach().clone()
        reference.step()
        ours.step()
        assert_close(mine, theirs, context=f"step {t}")
        assert (t > 10) != torch.equal(before, mine[3])
    assert torch.equal(frozen, mine[1])


def test_maximize_can_differ_between_groups():
    tasks = problems(STEPS, seed=5)
    theirs, mine = parameters(tasks), parameters(tasks)
    reference = SGD([{"params": theirs[:3], "maximize": True}, {"params": theirs[3:]}], lr=1e-3)
    ours = SelfTuning(
        [{"params": mine[:3], "maximize": True}, {"params": mine[3:]}], D.SGD(), rules.Constant(1e-3)
    )
    run_both(reference, ours, theirs, mine, tasks)


def test_an_empty_tensor_is_no_trouble():
    empty, other = torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(2))
    for direction in (D.SGD(), D.Momentum(), D.Nesterov(), D.Adam(amsgrad=True), D.Sign()):
        opt = SelfTuning([empty, other], direction, rules.Constant(0.1))
        empty.grad, other.grad = torch.zeros(0, 3), torch.ones(2)
        before = other.detach().clone()
        opt.step()
        assert bool((other < before).all())


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_gradient_whose_square_overflows_does_what_torch_does(amsgrad):
    """v <- b2 v + (1 - b2) g^2 stays infinite after one such gradient: that weight stalls, and never becomes NaN."""
    theirs, mine = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    reference = Adam([theirs], lr=0.1, amsgrad=amsgrad)
    ours = SelfTuning([mine], D.Adam(amsgrad=amsgrad), rules.Constant(0.1))
    for g in ([1.0, 1e20, 1.0], [1.0, 1.0, 1.0], [-1.0, 2.0, 1e20], [1.0, 1.0, 1.0]):
        theirs.grad, mine.grad = torch.tensor(g), torch.tensor(g)
        reference.step()
        ours.step()
    assert theirs.isfinite().all()
    assert_close([mine], [theirs], tolerance=1e-6)


# -- decay that torch has no name for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "twin"),
    [
        (D.SGD(weight_decay=0.1, decoupled_weight_decay=True), Twin("", SGD, None)),
        (
            D.Momentum(momentum=0.8, weight_decay=0.1, decoupled_weight_decay=True),
            Twin("", SGD, None, {"momentum": 0.8}),
        ),
        (
            D.Nesterov(momentum=0.8, weight_decay=0.1, decoupled_weight_decay=True),
            Twin("", SGD, None, {"momentum": 0.8, "nesterov": True}),
        ),
    ],
    ids=["sgd", "momentum", "nesterov"],
)
def test_decoupled_decay_is_a_shrinking_beside_torchs_step(direction, twin):
    """w <- (1 - lr lambda) w - lr u with u free of the decay, as AdamW does it."""
    tasks = problems(STEPS, seed=6)
    theirs, mine = parameters(tasks), parameters(tasks)
    reference = twin.torch_optimizer(theirs, RATE)
    ours = SelfTuning(mine, direction, rules.Constant(RATE))
    for t in range(1, STEPS + 1):
        put_gradients(theirs, tasks, t)
        put_gradients(mine, tasks, t)
        with torch.no_grad():
            for p in theirs:
                p.mul_(1 - RATE * 0.1)
        reference.step()
        ours.step()
        assert_close(mine, theirs, context=f"step {t}")


@pytest.mark.parametrize("decoupled", [False, True])
def test_sign_direction_by_hand(decoupled):
    """Coupled decay votes in the sign (sign(g + lambda w)); decoupled decay is added to it."""
    p = torch.nn.Parameter(torch.tensor([2.0, -2.0, 4.0, 0.0, 1.0], dtype=torch.float64))
    p.grad = torch.tensor([-0.5, 0.0, 1.0, 0.0, -0.25], dtype=torch.float64)
    SelfTuning([p], D.Sign(weight_decay=0.5, decoupled_weight_decay=decoupled), rules.Constant(0.25)).step()
    expected = [2.0, -1.75, 3.25, 0.0, 1.125] if decoupled else [1.75, -1.75, 3.75, 0.0, 0.75]
    assert p.tolist() == expected


def test_the_momentum_can_be_given_by_position():
    """Momentum(0.9), as the design writes it, and not a decay of 0.9."""
    assert D.Momentum(0.9) == D.Momentum(momentum=0.9, weight_decay=0.0)
    assert D.Nesterov(0.9) == D.Nesterov(momentum=0.9, weight_decay=0.0)


# -- schedulers --------------------------------------------------------------------------------------------------------


SCHEDULED = [
    t for t in TWINS if t.name in ("sgd", "momentum", "nesterov-decay", "adam", "adam-amsgrad", "adamw")
]
by_scheduled_twin = pytest.mark.parametrize("twin", SCHEDULED, ids=lambda twin: twin.name)


def run_scheduled(twin, make, rate, lr):
    tasks = problems(STEPS, seed=7)
    theirs, mine = parameters(tasks), parameters(tasks)
    reference, ours = twin.torch_optimizer(theirs, rate * lr), twin.ours(mine, rate, lr)
    their_scheduler, my_scheduler = make(reference), make(ours)
    lrs = set()

    def schedule(t):
        advance(their_scheduler, t)
        advance(my_scheduler, t)
        assert rate * ours.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
        lrs.add(ours.param_groups[0]["lr"])

    run_both(reference, ours, theirs, mine, tasks, after_step=schedule)
    assert len(lrs) > 1, "the scheduler changed nothing, so nothing was tested"
    return reference, ours


@by_scheduled_twin
@pytest.mark.parametrize("name", RELATIVE)
def test_schedulers_multiply(twin, name):
    run_scheduled(twin, RELATIVE[name], RATE, 1.0)


@by_scheduled_twin
@pytest.mark.parametrize("name", [*RELATIVE, *ABSOLUTE])
def test_schedulers_mean_the_same_with_a_unit_rate(twin, name):
    run_scheduled(twin, {**RELATIVE, **ABSOLUTE}[name], 1.0, RATE)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("twin", [t for t in SCHEDULED if t.name != "sgd"], ids=lambda twin: twin.name)
def test_cycled_momentum_is_really_cycled(twin, name):
    """The agreement above would also hold if both sides ignored the momentum that the scheduler writes."""
    tasks = problems(STEPS, seed=7)
    plain, cycled = parameters(tasks), parameters(tasks)
    with_cycle, without = twin.ours(cycled, 1.0, RATE), twin.ours(plain, 1.0, RATE)
    schedulers = ABSOLUTE[name](with_cycle), ABSOLUTE[name](without)
    key = "betas" if "betas" in with_cycle.defaults else "momentum"
    seen = set()
    for t in range(1, STEPS + 1):
        without.param_groups[0][key] = without.defaults[key]
        seen.add(with_cycle.param_groups[0][key])
        put_gradients(cycled, tasks, t)
        put_gradients(plain, tasks, t)
        with_cycle.step()
        without.step()
        for scheduler in schedulers:
            scheduler.step()
    assert len(seen) > 5
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(cycled, plain, strict=True))


# -- properties --------------------------------------------------------------------------------------------------------

DIRECTIONS = [
    D.SGD(weight_decay=0.1),
    D.Momentum(momentum=0.9, dampening=0.2),
    D.Nesterov(momentum=0.8),
    D.Adam(amsgrad=True),
    D.Adam(weight_decay=0.1, decoupled_weight_decay=True),
    D.Sign(),
]
finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    direction=st.sampled_from(DIRECTIONS),
    gradients=st.lists(st.tuples(finite, finite), min_size=1, max_size=12),
)
def test_lr_zero_moves_nothing(direction, gradients):
    p = torch.nn.Parameter(torch.tensor([0.3, -7.0], dtype=torch.float64))
    before = p.detach().clone()
    opt = SelfTuning([p], direction, rules.Constant(0.5), lr=0.0)
    for g in gradients:
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
    assert torch.equal(p, before)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    direction=st.sampled_from(DIRECTIONS),
    gradients=st.lists(st.tuples(finite, finite), min_size=1, max_size=12),
)
def test_maximizing_f_is_minimizing_minus_f(direction, gradients):
    up, down = (torch.nn.Parameter(torch.tensor([0.3, -7.0], dtype=torch.float64)) for _ in range(2))
    rising = SelfTuning([up], direction, rules.Constant(0.1), maximize=True)
    falling = SelfTuning([down], direction, rules.Constant(0.1))
    for g in gradients:
        up.grad = torch.tensor(g, dtype=torch.float64)
        down.grad = -up.grad
        rising.step()
        falling.step()
    assert_same([up], [down])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    direction=st.sampled_from(DIRECTIONS),
    lr=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    gradients=st.lists(st.tuples(finite, finite), min_size=1, max_size=12),
)
def test_lr_and_rate_are_interchangeable(direction, lr, gradients):
    """Only their product counts: exact here because the lr are powers of two."""
    a, b = (torch.nn.Parameter(torch.tensor([0.3, -7.0], dtype=torch.float64)) for _ in range(2))
    first = SelfTuning([a], direction, rules.Constant(0.25), lr=lr)
    second = SelfTuning([b], direction, rules.Constant(0.25 * lr), lr=1.0)
    for g in gradients:
        a.grad = torch.tensor(g, dtype=torch.float64)
        b.grad = a.grad.clone()
        first.step()
        second.step()
    assert_same([a], [b])
