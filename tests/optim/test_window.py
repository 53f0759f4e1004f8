"""The window rule against the published algorithm: S-Rprop, SGD-Upd, Adam-Upd and the other directions.

What this protects: step sizes are compared with ``==`` because they are products of the etas and one wrong vote in
60 windows changes them; weights to 1e-12. The problems are noisy enough that displacements agree, disagree and vanish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from driving import (
    assert_close,
    assert_same,
    parameters,
    problems,
    put_gradients,
    through_bytes,
    through_memory,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import AdamFast, LAlgorithm, NoisyQuadratic, SGDFast, SignFast, pooled_statistics

from surefoot import AdamUpd, SelfTuning, SGDUpd, SRprop
from surefoot.optim import directions as D
from surefoot.optim import rules

WINDOWS = 60
ETAS, LIMITS = (0.5, 1.2), (1e-4, 0.5)


@dataclass(frozen=True)
class Case:
    """A public optimizer with its options, and the fast update of the reference with the same options."""

    name: str
    optimizer: Any
    fast: Any
    options: dict[str, Any] = field(default_factory=dict)
    fast_options: dict[str, Any] | None = None
    rate: float = 0.05

    def build(self, params, *, window, undo="exact", etas=ETAS, step_sizes=LIMITS, **more):
        return self.optimizer(
            params,
            **{"initial_rate": self.rate, **self.options, **more},
            window=window,
            etas=etas,
            step_sizes=step_sizes,
            undo=undo,
        )

    def oracle(self, start, *, window, undo="exact", etas=ETAS, step_sizes=LIMITS, patterns=1, **more):
        options = self.options if self.fast_options is None else self.fast_options
        return LAlgorithm(
            start,
            self.fast(**options),
            self.rate,
            L=window * patterns,
            M=patterns,
            etas=etas,
            limits=step_sizes,
            undo=undo,
            **more,
        )


def cell(direction):
    """An optimizer by its direction: any other cell of the table with the same arguments as the named ones."""

    def build(params, *, lr=1.0, track_rates=False, maximize=False, **window):
        return SelfTuning(
            params, direction, rules.Window(**window), lr=lr, track_rates=track_rates, maximize=maximize
        )

    return build


NAMED = [
    Case("srprop", SRprop, SignFast),
    Case("srprop-decay", SRprop, SignFast, {"weight_decay": 0.1}),
    Case("sgd-upd", SGDUpd, SGDFast),
    Case("sgd-upd-momentum", SGDUpd, SGDFast, {"momentum": 0.9}, rate=0.01),
    Case("sgd-upd-nesterov", SGDUpd, SGDFast, {"momentum": 0.8, "nesterov": True}, rate=0.02),
    Case("sgd-upd-decay", SGDUpd, SGDFast, {"weight_decay": 0.1}),
    Case("sgd-upd-momentum-decay", SGDUpd, SGDFast, {"momentum": 0.5, "weight_decay": 0.2}),
    Case("adam-upd", AdamUpd, AdamFast),
    Case("adam-upd-decay", AdamUpd, AdamFast, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
    Case("adam-upd-amsgrad", AdamUpd, AdamFast, {"amsgrad": True, "betas": (0.9, 0.9)}),
    Case("adam-upd-amsgrad-decay", AdamUpd, AdamFast, {"amsgrad": True, "weight_decay": 0.05}),
]
CELLS = [
    Case(
        "momentum-dampening",
        cell(D.Momentum(momentum=0.8, dampening=0.5)),
        SGDFast,
        fast_options={"momentum": 0.8, "dampening": 0.5},
    ),
    Case(
        "nesterov-decoupled",
        cell(D.Nesterov(momentum=0.7, weight_decay=0.1, decoupled_weight_decay=True)),
        SGDFast,
        fast_options={"momentum": 0.7, "nesterov": True, "decoupled": 0.1},
        rate=0.02,
    ),
    Case(
        "adamw",
        cell(D.Adam(weight_decay=0.1, decoupled_weight_decay=True)),
        AdamFast,
        fast_options={"decoupled": 0.1},
    ),
]
CASES = NAMED + CELLS
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_named = pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
A_FEW = [c for c in NAMED if c.name in ("srprop", "sgd-upd-momentum", "adam-upd-amsgrad")]
by_a_few = pytest.mark.parametrize("case", A_FEW, ids=lambda case: case.name)
by_undo = pytest.mark.parametrize("undo", ["exact", "none"])


def gradients(oracles, tasks, t):
    """Each oracle's own gradient of step ``t``."""
    return [task.gradient(o.w, t) for o, task in zip(oracles, tasks, strict=True)]


def rates(opt, params):
    return [opt.state[p]["rate"] for p in params]


def assert_agrees(opt, params, oracles, tolerance=1e-12, context=""):
    """Step sizes exactly, weights to the tolerance."""
    assert_same(rates(opt, params), [o.D for o in oracles], f"{context} rate of")
    assert_close(params, [o.w for o in oracles], tolerance, context)


def total_signs(oracles):
    return {sign: sum(o.signs[sign] for o in oracles) for sign in (-1, 0, 1)}


def assert_all_votes_happened(oracles):
    signs = total_signs(oracles)
    assert min(signs.values()) > 0.03 * sum(signs.values()), f"a vote is missing: {signs}"


# -- against the published algorithm -----------------------------------------------------------------------------------


@by_case
@by_undo
@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_windows_follow_the_published_algorithm(case, undo, window):
    steps = WINDOWS * window
    tasks = problems(steps, seed=window)
    params = parameters(tasks)
    oracles = [case.oracle(task.start, window=window, undo=undo, patterns=4) for task in tasks]
    opt = case.build(params, window=window, undo=undo)
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks, t), strict=True):
            oracle.step(g)
        assert_agrees(opt, params, oracles, context=f"step {t}")
    assert_all_votes_happened(oracles)
    assert len({float(x) for o in oracles for x in o.D.ravel()}) > 10, "the step sizes hardly moved"


@by_named
def test_a_window_at_its_default_length(case):
    """window = 50 and the default etas and limits."""
    steps = 50 * 12
    tasks = problems(steps, shapes=[(6, 5)], seed=11)
    params = parameters(tasks)
    defaults = {"window": 50, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}
    (oracle,) = (case.oracle(task.start, **defaults) for task in tasks)
    opt = case.optimizer(params, initial_rate=case.rate, **case.options)
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        oracle.step(tasks[0].gradient(oracle.w, t))
    assert_agrees(opt, params, [oracle])
    assert oracle.signs[1] > 0
    assert oracle.signs[-1] > 0


@pytest.mark.parametrize(
    ("optimizer", "fast", "rate"),
    [(SRprop, SignFast, 1e-2), (SGDUpd, SGDFast, 1e-2), (AdamUpd, AdamFast, 1e-3)],
)
def test_the_documented_default_rate(optimizer, fast, rate):
    tasks = problems(4, shapes=[(6, 5)])
    params = parameters(tasks)
    oracle = LAlgorithm(tasks[0].start, fast(), rate, L=50)
    opt = optimizer(params)
    for t in range(1, 5):
        put_gradients(params, tasks, t)
        opt.step()
        oracle.step(tasks[0].gradient(oracle.w, t))
    assert_agrees(opt, params, [oracle])


@pytest.mark.parametrize("undo", ["exact", "none", "subtract"])
@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_srprop_bit_for_bit(undo, window, dtype):
    """Without decay a sign step leaves nothing to rounding order, so even the published undo's residues must match."""
    steps = WINDOWS * window
    numpy_dtype = np.float32 if dtype == torch.float32 else np.float64
    tasks = problems(steps, seed=20 + window, spread=0.1)  # near zero a difference of weights is seldom exact
    params = parameters(tasks, dtype)
    oracles = [
        LAlgorithm(
            p.detach().numpy(),
            SignFast(),
            0.05,
            window,
            etas=ETAS,
            limits=LIMITS,
            undo=undo,
            dtype=numpy_dtype,
        )
        for p in params
    ]
    opt = SRprop(params, initial_rate=0.05, window=window, etas=ETAS, step_sizes=LIMITS, undo=undo)
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks, t), strict=True):
            oracle.step(g)
        assert_same(rates(opt, params), [o.D for o in oracles], f"step {t} rate of")
        assert_same(params, [o.w for o in oracles], f"step {t}")
    if undo == "subtract" and window > 1:
        assert sum(o.residues for o in oracles) > 0, "no residue: this run could not tell subtract from exact"


def test_subtract_is_the_published_undo_with_its_residue():
    """SGD-Upd with gradients that are powers of two: every product is exact, so the residue must be, too."""
    rng = np.random.default_rng(5)
    steps, window = 240, 2
    start = rng.normal(size=64)
    noise = np.sign(rng.normal(size=(steps, 64))) * 2.0 ** rng.integers(-4, 4, size=(steps, 64))
    p = torch.nn.Parameter(torch.tensor(start))
    opt = SGDUpd([p], initial_rate=0.1, window=window, step_sizes=(1e-3, 3.0), undo="subtract")
    published = LAlgorithm(start, SGDFast(), 0.1, window, limits=(1e-3, 3.0), undo="subtract")
    exact = LAlgorithm(start, SGDFast(), 0.1, window, limits=(1e-3, 3.0), undo="exact")
    residues_voted = False
    for g in noise:
        p.grad = torch.tensor(g)
        opt.step()
        published.step(g)
        exact.step(g)
        residues_voted |= bool((published.D != exact.D).any())
    assert published.residues > 10
    assert residues_voted
    assert torch.equal(opt.state[p]["rate"], torch.tensor(published.D))
    assert torch.equal(p, torch.tensor(published.w))


# -- by hand -----------------------------------------------------------------------------------------------------------


def follow(opt, p, gradients):
    """Weights and rates after each step for a list of gradients."""
    trace = []
    for g in gradients:
        p.grad = torch.full_like(p, g)
        opt.step()
        trace.append((p.item(), opt.state[p]["rate"].item()))
    return trace


HAND = {"initial_rate": 0.25, "window": 2, "etas": (0.5, 1.5), "step_sizes": (2**-10, 16.0)}
HAND_GRADIENTS = [1, 1, 1, 1, -1, -1, -1, -1, -1, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_srprop_by_hand_exact(scale):
    """Agree, agree, reverse and undo, a neutral window, agree, no displacement, neutral, agree: from w = 1."""
    p = torch.nn.Parameter(torch.tensor(1.0))
    trace = follow(SRprop([p], **HAND), p, [scale * g for g in HAND_GRADIENTS])
    assert trace == [
        (0.75, 0.25),
        (0.5, 0.25),  # k = 1: a snapshot only
        (0.25, 0.25),
        (0.0, 0.375),  # k = 2: -1/2 after -1/2 agree
        (0.375, 0.375),
        (0.0, 0.1875),  # k = 3: +3/4 after -1/2 disagree: back to 0
        (0.1875, 0.1875),
        (0.375, 0.1875),  # k = 4: nothing to compare with
        (0.5625, 0.1875),
        (0.5625, 0.28125),  # k = 5: +3/16 after +3/8 agree
        (0.5625, 0.28125),
        (0.5625, 0.28125),  # k = 6: no displacement
        (0.28125, 0.28125),
        (0.0, 0.28125),  # k = 7: nothing to compare with
        (-0.28125, 0.28125),
        (-0.5625, 0.421875),  # k = 8: agree
    ]


def test_srprop_by_hand_without_undo():
    """The reversed window is kept, and it is what the next one is compared with."""
    p = torch.nn.Parameter(torch.tensor(1.0))
    trace = follow(SRprop([p], **HAND, undo="none"), p, HAND_GRADIENTS[:10])
    assert trace[3:] == [
        (0.0, 0.375),
        (0.375, 0.375),
        (0.75, 0.1875),  # +3/4 after -1/2 disagree, and stay
        (0.9375, 0.1875),
        (1.125, 0.28125),  # +3/8 after +3/4 agree
        (1.40625, 0.28125),
        (1.40625, 0.421875),
    ]


def test_window_of_one_by_hand():
    """Every step ends a window; SGD-Upd moves by rate times gradient."""
    p = torch.nn.Parameter(torch.tensor(0.0))
    opt = SGDUpd([p], initial_rate=0.5, window=1, etas=(0.5, 2.0), step_sizes=(0.125, 1.0))
    assert follow(opt, p, [2, 1, 4, -1, -1, 2, 2, 0, 2]) == [
        (-1.0, 0.5),  # k = 1
        (-1.5, 1.0),  # agree
        (-5.5, 1.0),  # agree, at the upper limit
        (-5.5, 0.5),  # +1 disagrees: undone
        (-5.0, 0.5),  # neutral
        (-5.0, 0.25),  # -1 disagrees with +1/2: undone
        (-5.5, 0.25),  # neutral
        (-5.5, 0.25),  # no displacement
        (-6.0, 0.25),  # neutral: what was before the pause is forgotten
    ]


def test_momentum_and_nesterov_of_sgd_upd_by_hand():
    """The published SGD-Upd kept a buffer and never used it (Q3); here it moves the weights."""
    for nesterov, expected in ((False, [-1.0, -2.5, -4.25]), (True, [-1.5, -3.25, -5.125])):
        p = torch.nn.Parameter(torch.tensor(0.0))
        opt = SGDUpd([p], initial_rate=1.0, window=10, momentum=0.5, nesterov=nesterov)
        assert [w for w, _ in follow(opt, p, [1, 1, 1])] == expected


def test_srprop_decay_is_scaled_by_the_weights_own_rate():
    """w <- w - rate (sign(g) + lambda w): with a zero gradient only the decay is left."""
    p = torch.nn.Parameter(torch.tensor([4.0, -4.0, 4.0]))
    opt = SRprop([p], initial_rate=0.5, weight_decay=0.25)
    p.grad = torch.tensor([0.0, 0.0, -3.0])
    opt.step()
    assert p.tolist() == [3.5, -3.5, 4.0]


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initial_rate", "pulled_in"), [(1.0, 0.125), (2**-10, 2**-6)])
@pytest.mark.parametrize("gradient", [1.0, 0.0])
def test_a_rate_outside_the_limits_is_pulled_in_at_the_second_window_end(initial_rate, pulled_in, gradient):
    """The clip acts on every weight, also where nothing voted, but not before two windows can be compared."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = SRprop([p], initial_rate=initial_rate, window=3, step_sizes=(2**-6, 0.125))
    for t in range(1, 8):
        p.grad = torch.tensor([gradient, 0.0])
        before = p.detach().clone()
        opt.step()
        rate = initial_rate if t < 6 else pulled_in
        assert opt.state[p]["rate"].tolist() == [rate, rate]
        moved = initial_rate if t <= 6 else pulled_in
        assert (before - p).tolist() == [moved * gradient, 0.0]


@by_named
def test_nothing_but_the_direction_before_the_second_window_end(case):
    """Until then the method is its direction with a constant rate, whatever the undo."""
    tasks = problems(17, seed=12)
    constant = {
        "srprop": lambda params: SelfTuning(params, D.Sign(), rules.Constant(case.rate)),
        "sgd-upd": lambda params: torch.optim.SGD(params, case.rate),
        "sgd-upd-nesterov": lambda params: torch.optim.SGD(params, case.rate, **case.options),
        "sgd-upd-momentum": lambda params: torch.optim.SGD(params, case.rate, **case.options),
        "sgd-upd-decay": lambda params: torch.optim.SGD(params, case.rate, **case.options),
        "sgd-upd-momentum-decay": lambda params: torch.optim.SGD(params, case.rate, **case.options),
        "srprop-decay": lambda params: SelfTuning(
            params, D.Sign(weight_decay=0.1, decoupled_weight_decay=True), rules.Constant(case.rate)
        ),
    }.get(case.name, lambda params: torch.optim.Adam(params, case.rate, **case.options))
    ours, theirs = parameters(tasks), parameters(tasks)
    first, second = case.build(ours, window=9), constant(theirs)
    for t in range(1, 18):
        put_gradients(ours, tasks, t)
        put_gradients(theirs, tasks, t)
        first.step()
        second.step()
        assert_close(ours, theirs, context=f"step {t}")


@pytest.mark.parametrize(
    "direction",
    [
        D.SGD(weight_decay=0.1),
        D.Momentum(momentum=0.9),
        D.Nesterov(momentum=0.8),
        D.Adam(amsgrad=True),
        D.Adam(weight_decay=0.1, decoupled_weight_decay=True),
        D.Sign(),
        D.Sign(weight_decay=0.2, decoupled_weight_decay=True),
    ],
    ids=repr,
)
def test_eta_one_without_undo_is_the_direction_alone(direction):
    steps = 80
    tasks = problems(steps, seed=13)
    windowed, constant = parameters(tasks), parameters(tasks)
    rule = rules.Window(initial_rate=0.03, window=4, etas=(1.0, 1.0), step_sizes=(1e-6, 50.0), undo="none")
    first, second = (
        SelfTuning(windowed, direction, rule),
        SelfTuning(constant, direction, rules.Constant(0.03)),
    )
    for t in range(1, steps + 1):
        put_gradients(windowed, tasks, t)
        put_gradients(constant, tasks, t)
        first.step()
        second.step()
        assert_close(windowed, constant, context=f"step {t}")
        assert all(bool((rate == 0.03).all()) for rate in rates(first, windowed))


@by_a_few
def test_parameter_groups_have_their_own_windows(case):
    """The published code shares one clock and loses all groups but the last."""
    steps = 90
    tasks = problems(steps, seed=14)
    params = parameters(tasks)
    first = {"window": 3, "undo": "exact", "etas": (0.5, 1.2), "step_sizes": (1e-4, 0.5)}
    second = {"window": 5, "undo": "none", "etas": (0.7, 1.1), "step_sizes": (1e-3, 0.08)}
    opt = case.build(
        [{"params": params[:3]}, {"params": params[3:], "initial_rate": 0.02, **second}], **first
    )
    oracles = [case.oracle(task.start, **(first if i < 3 else second)) for i, task in enumerate(tasks)]
    for oracle in oracles[3:]:
        oracle.lr = 0.02
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks, t), strict=True):
            oracle.step(g)
        assert_agrees(opt, params, oracles, context=f"step {t}")


@by_a_few
def test_late_and_missing_gradients_and_a_frozen_parameter(case):
    """A parameter's windows are counted in its own steps: one that comes late is not compared too early, and one that
    is left out for a step is not compared sooner."""
    steps, window = 90, 4
    tasks = problems(steps, seed=15)
    params = parameters(tasks)
    params[1].requires_grad_(False)
    opt = case.build(params, window=window)
    oracles = [case.oracle(task.start, window=window) for task in tasks]
    for t in range(1, steps + 1):
        absent = {1} | ({3} if t <= 6 else set()) | ({4} if t % 3 == 0 else set())
        put_gradients(params, tasks, t)
        for i in absent:
            params[i].grad = None
        opt.step()
        for i, (oracle, g) in enumerate(zip(oracles, gradients(oracles, tasks, t), strict=True)):
            if i not in absent:
                oracle.step(g)
        assert_close(params, [o.w for o in oracles], context=f"step {t}")
        begun = [i for i, o in enumerate(oracles) if o.D is not None]
        assert_same(
            [opt.state[params[i]]["rate"] for i in begun], [oracles[i].D for i in begun], f"step {t} rate of"
        )
    assert torch.equal(params[1].detach(), torch.tensor(tasks[1].start))
    assert "rate" not in opt.state.get(params[1], {})


@by_a_few
def test_a_parameter_group_added_later_starts_its_own_windows(case):
    steps, window, late = 60, 3, 10
    tasks = problems(steps, seed=16)
    params = parameters(tasks)
    opt = case.build(params[:3], window=window)
    oracles = [case.oracle(task.start, window=window) for task in tasks]
    for t in range(1, steps + 1):
        if t == late:
            opt.add_param_group({"params": params[3:]})
        put_gradients(params, tasks, t)
        opt.step()
        for i, (oracle, g) in enumerate(zip(oracles, gradients(oracles, tasks, t), strict=True)):
            if i < 3 or t >= late:
                oracle.step(g)
    assert_agrees(opt, params, oracles)


# -- lr is a multiplier ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "srprop"], ids=lambda case: case.name)
def test_a_scheduler_multiplies_within_the_window(case):
    """lr scales the move and nothing else: step sizes follow from the displacements that were really made."""
    steps, window = 180, 5
    tasks = problems(steps, seed=17)
    params = parameters(tasks)
    opt = case.build(params, window=window, lr=0.7)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 + 0.5 * math.sin(0.7 * t))
    oracles = [case.oracle(task.start, window=window) for task in tasks]
    for t in range(1, steps + 1):
        multiplier = opt.param_groups[0]["lr"]
        put_gradients(params, tasks, t)
        opt.step()
        schedule.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks, t), strict=True):
            oracle.step(g, multiplier)
        assert_agrees(opt, params, oracles, context=f"step {t}")
    assert_all_votes_happened(oracles)


def test_srprop_under_a_scheduler():
    """As above, with a schedule that lets no window of signs cancel to rounding noise, which may vote either way."""
    steps, window = 180, 5
    tasks = problems(steps, seed=18)
    params = parameters(tasks)
    opt = SRprop(params, initial_rate=0.05, window=window, step_sizes=LIMITS, lr=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)
    oracles = [LAlgorithm(task.start, SignFast(), 0.05, window, limits=LIMITS) for task in tasks]
    for t in range(1, steps + 1):
        multiplier = opt.param_groups[0]["lr"]
        put_gradients(params, tasks, t)
        opt.step()
        schedule.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks, t), strict=True):
            oracle.step(g, multiplier)
        assert_agrees(opt, params, oracles, context=f"step {t}")
    assert_all_votes_happened(oracles)


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMED = [
    *A_FEW,
    Case("srprop-decay", SRprop, SignFast, {"weight_decay": 0.1}),
    Case("adamw", cell(D.Adam(weight_decay=0.1, decoupled_weight_decay=True)), AdamFast),
]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
@pytest.mark.parametrize("undo", ["exact", "none", "subtract"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("through", [through_memory, through_bytes])
def test_resume_at_any_step_of_a_window_bit_for_bit(case, undo, dtype, through):
    window, steps = 4, 24
    tasks = problems(steps, seed=19)

    def run(params, opt, first):
        for t in range(first, steps + 1):
            put_gradients(params, tasks, t)
            opt.step()

    whole = parameters(tasks, dtype)
    whole_opt = case.build(whole, window=window, undo=undo)
    run(whole, whole_opt, 1)
    for cut in range(3 * window + 2):
        before = parameters(tasks, dtype)
        opt = case.build(before, window=window, undo=undo)
        for t in range(1, cut + 1):
            put_gradients(before, tasks, t)
            opt.step()
        saved, weights = through(opt.state_dict()), values(before)
        # The old optimizer goes on: what was saved must not follow it.
        for t in range(cut + 1, min(cut + 3, steps) + 1):
            put_gradients(before, tasks, t)
            opt.step()
        after = [torch.nn.Parameter(w.clone()) for w in weights]
        resumed = case.build(after, window=window, undo=undo)
        resumed.load_state_dict(saved)
        run(after, resumed, cut + 1)
        assert_same(after, whole, f"cut at {cut}:")
        for p, q in zip(after, whole, strict=True):
            mine, theirs = resumed.state[p], whole_opt.state[q]
            assert mine.keys() == theirs.keys()
            for key, item in theirs.items():
                if torch.is_tensor(item):
                    assert mine[key].dtype == item.dtype, key
                    assert torch.equal(mine[key], item), (cut, key)
                else:
                    assert mine[key] == item, (cut, key)


@by_a_few
def test_two_optimizers_with_one_state_dict_go_separate_ways(case):
    """A state dict holds the live tensors: loading it must copy them, or both would step the same rates."""
    tasks = problems(30, seed=27)
    first, second = parameters(tasks), parameters(tasks)
    opt, other = case.build(first, window=4), case.build(second, window=4)
    for t in range(1, 11):
        put_gradients(first, tasks, t)
        opt.step()
    other.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    for params, o in ((first, opt), (second, other)):
        for t in range(11, 31):
            put_gradients(params, tasks, t)
            o.step()
    assert_same(second, first)


def test_loading_into_an_optimizer_with_other_settings_restores_the_saved_ones():
    """Groups are part of the state: the resumed run is the saved run, whatever the new constructor was told."""
    tasks = problems(30, seed=21)
    first, second = parameters(tasks), parameters(tasks)
    opt = AdamUpd(first, initial_rate=0.05, window=4, step_sizes=LIMITS, betas=(0.8, 0.9))
    for t in range(1, 11):
        put_gradients(first, tasks, t)
        opt.step()
    other = AdamUpd(second, initial_rate=0.3, window=9, etas=(0.9, 1.1), undo="none", lr=2.0)
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    other.load_state_dict(through_bytes(opt.state_dict()))
    for t in range(11, 31):
        for params, o in ((first, opt), (second, other)):
            put_gradients(params, tasks, t)
            o.step()
    assert_same(second, first)


# -- what is kept and what is shown ------------------------------------------------------------------------------------


@by_named
def test_tracked_rates_follow_the_published_statistics(case):
    """Mean and unbiased standard deviation over all weights of all tensors; n + 1 entries after n windows."""
    window, windows = 3, 20
    steps = window * windows
    tasks = problems(steps, seed=22)
    params = parameters(tasks)
    opt = case.build(params, window=window, track_rates=True)
    oracles = [case.oracle(task.start, window=window) for task in tasks]
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks, t), strict=True):
            oracle.step(g)
        assert opt.lr_counter == t // window + 1 == oracles[0].lr_counter
        assert len(opt.lr_mean) == len(opt.lr_std) == t // window + 1
    means, stds = pooled_statistics(oracles)
    assert list(opt.lr_mean) == pytest.approx(means, rel=1e-12)
    assert list(opt.lr_std) == pytest.approx(stds, rel=1e-9, abs=1e-12)
    assert opt.lr_mean[:2] == pytest.approx([case.rate] * 2, rel=1e-12)
    assert opt.lr_std[:2] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert opt.lr_std[2] > 0
    assert all(type(x) is float for x in (*opt.lr_mean, *opt.lr_std))


def test_tracked_rates_are_kept_through_a_checkpoint():
    """A resumed run shows the whole history, as the run that was not interrupted does."""
    tasks = problems(24, seed=23)
    histories = []
    for cut in (None, 10):
        params = parameters(tasks)
        opt = SRprop(params, initial_rate=0.05, window=3, step_sizes=LIMITS, track_rates=True)
        for t in range(1, 25):
            put_gradients(params, tasks, t)
            opt.step()
            if t == cut:
                saved = through_bytes(opt.state_dict())
                params = [torch.nn.Parameter(w) for w in values(params)]
                opt = SRprop(params, initial_rate=0.05, window=3, step_sizes=LIMITS, track_rates=True)
                opt.load_state_dict(saved)
        histories.append((list(opt.lr_mean), list(opt.lr_std), opt.lr_counter))
    assert histories[0] == histories[1]
    assert len(histories[0][0]) == 9


def test_tracked_rates_leave_a_frozen_first_parameter_out():
    """A parameter that never moves has no step size; the history must not depend on it, through a checkpoint either."""
    steps, window = 24, 3
    tasks = problems(steps, seed=26)
    oracles = [LAlgorithm(task.start, SignFast(), 0.05, window, limits=LIMITS) for task in tasks[1:]]

    def build(params):
        params[0].requires_grad_(False)
        return SRprop(params, initial_rate=0.05, window=window, step_sizes=LIMITS, track_rates=True)

    params = parameters(tasks)
    opt = build(params)
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        for oracle, g in zip(oracles, gradients(oracles, tasks[1:], t), strict=True):
            oracle.step(g)
        if t == 10:
            saved = through_bytes(opt.state_dict())
            params = [torch.nn.Parameter(w) for w in values(params)]
            opt = build(params)
            opt.load_state_dict(saved)
    means, stds = pooled_statistics(oracles)
    assert opt.lr_mean == pytest.approx(means, rel=1e-12)
    assert opt.lr_std == pytest.approx(stds, rel=1e-9, abs=1e-12)


def test_tracking_changes_no_number():
    tasks = problems(30, seed=24)
    plain, tracked = parameters(tasks), parameters(tasks)
    for params, track in ((plain, False), (tracked, True)):
        opt = AdamUpd(params, initial_rate=0.05, window=3, track_rates=track)
        for t in range(1, 31):
            put_gradients(params, tasks, t)
            opt.step()
    assert_same(tracked, plain)


@by_a_few
@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_rates_are_the_effective_ones_now(case, lr):
    """lr times the step sizes over all weights, groups with their own lr."""
    steps, window = 40, 4
    tasks = problems(steps, seed=25)
    params = parameters(tasks)
    opt = case.build([{"params": params[:2]}, {"params": params[2:], "lr": 2 * lr}], window=window, lr=lr)
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
    factors = [lr] * 2 + [2 * lr] * (len(params) - 2)
    everything = torch.cat([f * rate.flatten() for f, rate in zip(factors, rates(opt, params), strict=True)])
    seen = opt.rates()
    assert seen.mean == pytest.approx(everything.mean().item(), rel=1e-9)
    assert seen.std == pytest.approx(everything.std(unbiased=True).item(), rel=1e-9)
    assert seen.min == pytest.approx(everything.min().item(), rel=1e-12)
    assert seen.max == pytest.approx(everything.max().item(), rel=1e-12)
    assert sum(seen.histogram) == everything.numel()
    assert len(seen.edges) == len(seen.histogram) + 1
    edges = [float(edge) for edge in seen.edges]
    assert edges == sorted(edges)
    assert edges[0] <= seen.min * (1 + 1e-6)
    assert edges[-1] >= seen.max * (1 - 1e-6)


@pytest.mark.parametrize(
    ("build", "own_bytes"),
    [
        (lambda p: SRprop(p), 0),
        (lambda p: SRprop(p, weight_decay=0.1, track_rates=True), 0),
        (lambda p: SGDUpd(p), 0),
        (lambda p: SGDUpd(p, momentum=0.9), 4),
        (lambda p: SGDUpd(p, momentum=0.9, nesterov=True), 4),
        (lambda p: AdamUpd(p), 8),
        (lambda p: AdamUpd(p, amsgrad=True), 12),
    ],
    ids=["srprop", "srprop-tracked", "sgd-upd", "momentum", "nesterov", "adam-upd", "amsgrad"],
)
@pytest.mark.parametrize("undo", ["exact", "none", "subtract"])
def test_state_is_nine_bytes_a_weight_besides_the_directions_own(build, own_bytes, undo):
    """A rate, a snapshot and one sign; also after loading."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(100, 100))
    opt = build([{"params": [p], "window": 2, "undo": undo}])
    for _ in range(5):
        p.grad = torch.randn(100, 100)
        opt.step()
    for _ in range(2):
        used = sum(x.untyped_storage().nbytes() for x in opt.state[p].values() if torch.is_tensor(x))
        assert (
            used <= (9 + own_bytes) * p.numel() + 1024
        )  # a few scalars, and the history where it is tracked
        saved = through_bytes(opt.state_dict())
        opt = build([p])
        opt.load_state_dict(saved)
        assert opt.state[p]["sign"].dtype == torch.int8


# -- properties --------------------------------------------------------------------------------------------------------

finite = st.floats(-100, 100, allow_nan=False, width=32)
streams = st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=40)
BUILDERS = {
    "srprop": lambda p, **k: SRprop(p, **k),
    "srprop-decay": lambda p, **k: SRprop(p, weight_decay=0.1, **k),
    "sgd-upd": lambda p, **k: SGDUpd(p, momentum=0.5, nesterov=True, weight_decay=0.1, **k),
    "adam-upd": lambda p, **k: AdamUpd(p, amsgrad=True, **k),
}
builders = st.sampled_from(sorted(BUILDERS))
undos = st.sampled_from(["exact", "none", "subtract"])


def three_weights():
    return torch.nn.Parameter(torch.tensor([0.5, -3.0, 0.0], dtype=torch.float64))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=builders,
    undo=undos,
    window=st.integers(1, 5),
    initial=st.sampled_from([1e-6, 1e-2, 0.3, 40.0]),
    low=st.sampled_from([1e-4, 1e-2]),
    high=st.sampled_from([0.05, 1.0]),
    stream=streams,
)
def test_rates_stay_within_the_step_sizes_after_two_windows(name, undo, window, initial, low, high, stream):
    p = three_weights()
    opt = BUILDERS[name]([p], initial_rate=initial, window=window, step_sizes=(low, high), undo=undo)
    for t, g in enumerate(stream, start=1):
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
        rate = opt.state[p]["rate"]
        if t < 2 * window:
            assert bool((rate == initial).all())
        else:
            assert bool(((rate >= low) & (rate <= high)).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=builders, undo=undos, window=st.integers(1, 5), stream=streams)
def test_lr_zero_moves_nothing(name, undo, window, stream):
    """And what did not move did not vote: the step sizes stay as well."""
    p = three_weights()
    before = p.detach().clone()
    opt = BUILDERS[name]([p], initial_rate=0.125, window=window, undo=undo, lr=0.0)
    for g in stream:
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
    assert torch.equal(p, before)
    assert opt.state[p]["rate"].tolist() == [0.125] * 3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=builders, undo=undos, window=st.integers(1, 5), stream=streams)
def test_maximizing_f_is_minimizing_minus_f(name, undo, window, stream):
    up, down = three_weights(), three_weights()
    rising = BUILDERS[name]([up], initial_rate=0.1, window=window, undo=undo, maximize=True)
    falling = BUILDERS[name]([down], initial_rate=0.1, window=window, undo=undo)
    for g in stream:
        up.grad = torch.tensor(g, dtype=torch.float64)
        down.grad = -up.grad
        rising.step()
        falling.step()
    assert_same([up], [down])
    assert_same([rising.state[up]["rate"]], [falling.state[down]["rate"]])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=builders, undo=undos, window=st.integers(1, 5), stream=streams)
def test_a_weight_does_not_care_which_tensor_it_is_in(name, undo, window, stream):
    """Every weight has its own rate, snapshot and vote: three tensors of one weight are one tensor of three."""
    together = three_weights()
    apart = [torch.nn.Parameter(x.clone()) for x in three_weights().detach()]
    settings = {"initial_rate": 0.1, "window": window, "undo": undo}
    first, second = BUILDERS[name]([together], **settings), BUILDERS[name](apart, **settings)
    for g in stream:
        together.grad = torch.tensor(g, dtype=torch.float64)
        for p, x in zip(apart, g, strict=True):
            p.grad = torch.tensor(x, dtype=torch.float64)
        first.step()
        second.step()
    assert_same([together], [torch.stack([p.detach() for p in apart])])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(undo=st.sampled_from(["exact", "none"]), window=st.integers(1, 4), stream=streams)
def test_any_gradients_give_the_published_votes(undo, window, stream):
    """S-Rprop on gradients that hypothesis chooses, zeros and repeats included: bit for bit the slow reference."""
    p = three_weights()
    opt = SRprop([p], initial_rate=0.125, window=window, step_sizes=LIMITS, undo=undo)
    oracle = LAlgorithm(p.detach().numpy(), SignFast(), 0.125, window, limits=LIMITS, undo=undo)
    for g in stream:
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
        oracle.step(np.array(g))
    assert_same([p], [oracle.w])
    assert_same([opt.state[p]["rate"]], [oracle.D])


def test_the_reference_itself_by_hand():
    """The oracle is code, too: the hand-worked windows hold for it, and patterns only scale its clock."""
    for patterns in (1, 25):
        oracle = LAlgorithm(
            1.0, SignFast(), 0.25, L=2 * patterns, M=patterns, etas=(0.5, 1.5), limits=(2**-10, 16.0)
        )
        trace = []
        for g in HAND_GRADIENTS:
            oracle.step(np.array(float(g)))
            trace.append((float(oracle.w), float(oracle.D)))
        assert [trace[i] for i in (3, 5, 7, 9, 11, 15)] == [
            (0.0, 0.375),
            (0.0, 0.1875),
            (0.375, 0.1875),
            (0.5625, 0.28125),
            (0.5625, 0.28125),
            (-0.5625, 0.421875),
        ]
        assert oracle.lr_counter == 9
        assert oracle.signs == {-1: 1, 0: 3, 1: 3}


def test_the_noisy_problem_is_what_it_says():
    task = NoisyQuadratic((14,), 9, seed=1)
    assert np.count_nonzero(task.gradient(task.start, 1) == 0) == 2
    assert np.count_nonzero(task.gradient(task.start, 5) == 0) > 2
