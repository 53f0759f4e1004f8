"""LOSSGRAD against a NumPy oracle, its safe answers, and probes that leave no trace."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surefoot import LossGrad, SelfTuning
from surefoot.optim import directions, rules
from surefoot.optim.rules.lossgrad import rises

STEPS = 1000
PUBLISHED = {"down": 1.05, "threshold": 0.5, "ramp": 1.0, "retract": False}


def softmax_loss(w, x, y):
    """Cross-entropy of a linear model and its gradient, in NumPy."""
    scores = x @ w
    scores = scores - scores.max(axis=1, keepdims=True)
    p = np.exp(scores)
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = -np.log(p[rows, y]).mean()
    p[rows, y] -= 1
    return loss, x.T @ p / len(y)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_thousand_steps_are_the_papers(weight_decay):
    """The published rule (c = 1.05, half the predicted decrease, from 1e-4): every decision, and every weight.

    A convex problem, so that rounding is not amplified; with L2 the penalty is part of what is predicted and measured.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(STEPS, 10, 6)), rng.integers(3, size=(STEPS, 10))
    w, h = np.zeros((6, 3)), 1e-4
    p = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    optimizer = LossGrad([p], weight_decay=weight_decay, **PUBLISHED)
    ups = 0
    for t in range(STEPS):
        inputs, targets = torch.tensor(x[t]), torch.tensor(y[t])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ p, targets)
        loss.backward()
        optimizer.step(loss=loss, evaluate=lambda i=inputs, t=targets: nn.functional.cross_entropy(i @ p, t))

        f0, g = softmax_loss(w, x[t], y[t])
        f0, g = f0 + weight_decay / 2 * (w**2).sum(), g + weight_decay * w
        w = w - h * g
        f1 = softmax_loss(w, x[t], y[t])[0] + weight_decay / 2 * (w**2).sum()
        rel = (f1 - (f0 - h * (g**2).sum())) / (h * (g**2).sum() + 1e-25)
        ups += rel <= 0.5
        h = h / 1.05 if rel > 0.5 else h * 1.05
        assert optimizer.rates().mean == pytest.approx(h, rel=1e-9), f"decision {t}"
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=0, atol=1e-9)
    assert 100 < ups < STEPS - 100, "both decisions were made"


def decide(f0, f1, h=1.0, slope=1.0, threshold=0.5, floor=0.0):
    numbers = (torch.tensor(v, dtype=torch.float64) for v in (f0, f1, h, slope))
    return bool(rises(*numbers, threshold, torch.tensor(floor, dtype=torch.float64)))


@pytest.mark.parametrize("f1", [math.nan, math.inf])
def test_a_loss_that_is_no_number_lowers_the_step(f1):
    assert not decide(1.0, f1)
    assert not decide(f1, 1.0) or math.isinf(f1)
    assert not decide(1.0, f1, floor=10.0)


def test_uphill_lowers_the_step():
    """Slope below 0: a convex loss rises along the step however short it is."""
    assert not decide(1.0, 1.1, slope=-0.1)


def test_what_rounding_hides_raises_the_step():
    """The released code falls for ever there."""
    assert decide(1.0, 1.0, h=1e-9, floor=1e-7)
    assert not decide(1.0, 1.0, h=1e-9)
    assert not decide(1.0, 50.0, h=1e-9, floor=1e-7), "nothing was predicted, but the rise is plain to see"


@given(st.floats(0.05, 5.0), st.floats(0.1, 1.0), st.floats(0.1, 10.0))
def test_on_a_parabola_the_rule_aims_at_twice_the_threshold(h, threshold, curvature):
    """f(x - h g) = f0 - h s + h^2 a / 2 with its minimum at h* = s / a: up iff h <= 2 threshold h*."""
    slope = 2.0
    target = 2 * threshold * slope / curvature
    if abs(h - target) > 1e-6 * target:
        assert decide(0.0, -h * slope + h * h * curvature / 2, h, slope, threshold) == (h < target)


class Noisy(nn.Module):
    """Dropout and BatchNorm: everything that a second look can spoil."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(nn.functional.dropout(torch.relu(self.norm(self.first(x))), 0.5, self.training))


def train(way, *, up, steps=30, **options):
    """Thirty steps; ``way`` is how the optimizer is told of the loss. Returns model, losses, and a draw at the end."""
    torch.manual_seed(0)
    model = Noisy()
    data = torch.randn(steps, 16, 6), torch.randint(3, (steps, 16))
    optimizer = LossGrad(
        model.parameters(), **{**PUBLISHED, "initial_rate": 0.05, "up": up, "down": up, **options}
    )
    losses, evaluated = [], []
    for x, y in zip(*data, strict=True):

        def forward(x=x, y=y):
            return nn.functional.cross_entropy(model(x), y)

        def closure():
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            evaluated.append(loss.item())
            return loss

        if way == "closure":
            losses.append(optimizer.step(closure).item())
        else:
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            gradients = [p.grad for p in model.parameters()]
            values = [g.clone() for g in gradients]

            def again():
                evaluated.append(forward().item())
                return evaluated[-1]

            optimizer.step(loss=loss, evaluate=again)
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
            assert all(torch.equal(g, v) for g, v in zip(gradients, values, strict=True))
            losses.append(loss.item())
    return model, losses, torch.rand(3), evaluated


def plain():
    """The same steps without any probe."""
    return train("evaluate", up=1.0, probe_every=10**9)


@pytest.mark.parametrize("way", ["evaluate", "closure"])
def test_a_probe_leaves_no_trace(way):
    """Probes at every step whose decisions are ignored (factors 1): bit for bit the run without them."""
    probed, unprobed = train(way, up=1.0), plain()
    for name, value in unprobed[0].state_dict().items():
        assert torch.equal(probed[0].state_dict()[name], value), name
    assert probed[1] == unprobed[1]
    assert torch.equal(probed[2], unprobed[2])
    assert len(probed[3]) == (60 if way == "closure" else 31), "one to see whether it is the step's loss"
    assert probed[0].norm.num_batches_tracked == 30


def test_a_probe_sees_the_same_dropout_masks():
    """With lr = 0 the weights stand still, so the loss of the probe is that of the step."""
    _, losses, _, evaluated = train("evaluate", up=1.0, lr=0.0)
    assert evaluated == [losses[0], losses[1], *losses[1:]]


def test_evaluate_and_closure_are_one_rule():
    by_value, by_closure = train("evaluate", up=1.1), train("closure", up=1.1)
    assert by_value[1] == by_closure[1]


def test_probe_every_takes_its_factors_to_the_power():
    """Every fourth step is judged, by factors to the fourth."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = LossGrad([p], initial_rate=1e-3, probe_every=4, up=1.1, **PUBLISHED)
    calls = []

    def evaluate():
        calls.append(1)
        return -float(p.sum())

    for _ in range(8):
        p.grad = torch.full((2,), -1.0)
        optimizer.step(loss=-p.detach().sum(), evaluate=evaluate)
    assert len(calls) == 2
    assert optimizer.rates().mean == pytest.approx(1e-3 * 1.1**8)


@pytest.mark.parametrize("start", [1e-4, 100.0])
def test_with_a_ramp_the_first_forty_steps_are_probed_whatever_probe_every_is(start):
    """By the factors themselves: seven unjudged steps at an h that a ramp is still looking for would end a training."""
    runs = []
    for every in (1, 8):
        p = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
        optimizer = LossGrad([p], initial_rate=start, probe_every=every)
        calls, ends = [], []
        for step in range(72):
            p.grad = 2 * p.detach()

            def evaluate(step=step, p=p, calls=calls):
                calls.append(step + 1)
                return p.square().sum()

            optimizer.step(loss=p.detach().square().sum(), evaluate=evaluate)
            ends.append(p.item())
        runs.append((calls, ends))
    assert runs[1][0] == [*range(1, 41), 48, 56, 64, 72]
    assert runs[1][1][:40] == runs[0][1][:40]


def test_a_schedule_shortens_the_step_and_not_the_probe():
    """h does not grow to undo the schedule: a straight loss raises it by the same factor with one as without."""
    ends = []
    for scheduled in (False, True):
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = LossGrad([p], initial_rate=1e-3, **PUBLISHED)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10) if scheduled else None
        seen = []
        for _ in range(10):
            p.grad = torch.full_like(p, -1.0)
            start = p.item()

            def evaluate(p=p, seen=seen):
                seen.append(p.item())
                return -p.sum()

            optimizer.step(loss=-p.detach().sum(), evaluate=evaluate)
            if scheduler:
                assert seen[-1] - start == pytest.approx(1e-3 * 1.05 ** (len(seen) - 1))
                scheduler.step()
        ends.append((p.item(), optimizer.state[p]["step_size"].item()))
    assert ends[0][1] == pytest.approx(ends[1][1])
    assert ends[1][0] < 0.7 * ends[0][0]


SCHEDULES = {
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.05, 0.5, 4, cycle_momentum=False),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    "by hand": lambda o: None,
}


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_whatever_moves_lr_what_is_probed_is_the_lr_that_the_group_was_given(schedule, lr):
    """And is so from a checkpoint on, into an optimizer that was given another."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = LossGrad([p], lr=copy.deepcopy(lr), initial_rate=1e-3, **PUBLISHED)
    scheduler = schedule(optimizer)
    taken = set()
    for step in range(12):
        if step == 6:
            saved = optimizer.state_dict()
            optimizer = LossGrad([p], lr=0.125, initial_rate=1e-3, **PUBLISHED)
            optimizer.load_state_dict(saved)
            if scheduler:
                scheduler.optimizer = optimizer
            else:
                optimizer.param_groups[0]["lr"] = 0.05
        start, seen = p.item(), []

        def evaluate(seen=seen):
            seen.append(p.item())
            return -p.sum()

        p.grad = torch.full_like(p, -1.0)
        optimizer.step(loss=-p.detach().sum(), evaluate=evaluate)
        h = 1e-3 * 1.05**step
        assert seen[0] - start == pytest.approx(0.5 * h)
        assert optimizer.state[p]["step_size"].item() == pytest.approx(1.05 * h)
        taken.add(round((p.item() - start) / h, 9))
        if scheduler:
            scheduler.step(
                *([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
            )
    assert len(taken) > 1, "the steps that were taken are the schedule's"


def test_a_checkpoint_from_before_lr_was_remembered_is_taken_at_this_optimizers():
    optimizer, p = scalar(1.0, lr=0.5)
    one_step(optimizer, p, lambda x: x * x, lambda x: 2 * x)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["given_lr"]
    optimizer, p = scalar(1.0, lr=0.25)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["given_lr"] == 0.25
    one_step(optimizer, p, lambda x: x * x, lambda x: 2 * x)


@pytest.mark.parametrize("direction", ["sgd", "momentum", "nesterov", "adam", "sign"])
@pytest.mark.parametrize("probe", ["step", "raw"])
def test_every_direction_finds_its_step_from_far_too_small_a_one(direction, probe):
    """From h = 1e-8 a full-batch fit falls by half, which at that rate would take for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True))
    optimizer = LossGrad(
        model.parameters(), initial_rate=1e-8, direction=direction, probe=probe, up=1.1, down=1.3
    )
    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step(loss=loss, evaluate=lambda: nn.functional.mse_loss(model(x), y))
        losses.append(loss.item())
    assert min(losses) < losses[0] / 2
    assert optimizer.rates().mean > 1e-4


@pytest.mark.parametrize(
    "direction",
    [
        directions.SGD(),
        directions.Momentum(0.9),
        directions.Nesterov(0.9),
        directions.Adam(amsgrad=True),
        directions.AnnealedAdam(),
        directions.AnnealedAdam(betas=(0.7, 0.8, 9.0, -1.0)),
    ],
    ids=repr,
)
def test_raw_is_the_direction_without_its_past(direction):
    """At the first step there is no past: raw is the update, but for the part of it that Nesterov adds in advance."""
    looked_at = []

    class Spy(rules.Constant):
        def choose(self, slot):
            looked_at.append(
                (slot.update.clone(), slot.direction.raw(slot), slot.direction.gain(slot.options))
            )
            return super().choose(slot)

    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = SelfTuning([p], direction, Spy(0.0))
    p.grad = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    for _ in range(400):  # under a constant gradient the update grows to its gain times raw
        optimizer.step()
    first, last = looked_at[0], looked_at[-1]
    ahead = 1.9 if isinstance(direction, directions.Nesterov) else 1.0
    torch.testing.assert_close(first[0], ahead * first[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(last[0], last[2] * last[1], rtol=1e-6, atol=0)


def test_what_is_missing_is_said_before_anything_moves():
    p = torch.ones(2, requires_grad=True)
    optimizer = LossGrad([p])
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="goes by the loss"):
        optimizer.step()
    with pytest.raises(ValueError, match="probes the loss"):
        optimizer.step(loss=1.0)
    with pytest.raises(ValueError, match="not both"):
        optimizer.step(lambda: 1.0, loss=1.0)
    with pytest.raises(ValueError, match=r"loss must have shape \(\), not \(3,\)"):
        optimizer.step(loss=torch.ones(3), evaluate=lambda: 1.0)
    with pytest.raises(ValueError, match="threshold is one for all groups"):
        LossGrad([{"params": [p]}, {"params": [torch.ones(1)], "threshold": 0.1}])
    assert torch.equal(p, torch.ones(2))
    assert not optimizer.state.get(p)


def test_groups_move_by_their_multiple_of_one_step():
    """lr 1 and 3: the second moves three times as far, the prediction counts both, and the decision is one."""
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = LossGrad([{"params": [a]}, {"params": [b], "lr": 3.0}], initial_rate=0.01, **PUBLISHED)
    a.grad, b.grad = torch.full((1,), -1.0), torch.full((1,), -1.0)
    optimizer.step(loss=0.0, evaluate=lambda: -(a + b).item())
    assert b.item() == pytest.approx(3 * a.item())
    assert optimizer.state[a]["slope"].item() == pytest.approx(1 + 3)
    assert optimizer.state[a]["step_size"].item() == pytest.approx(0.0105)


def test_the_copy_of_an_optimizer_probes_too():
    """What is remembered of the random state is no part of a checkpoint, and is there again in a copy."""
    p = torch.ones(2, requires_grad=True)
    optimizer = copy.deepcopy(LossGrad([p], **PUBLISHED))
    (q,) = optimizer.param_groups[0]["params"]
    q.grad = torch.ones(2)
    optimizer.step(loss=2.0, evaluate=lambda: q.sum())
    assert optimizer.state[q]["step_size"].item() == pytest.approx(1.05e-4)


def has_found(optimizer, p, h):
    """As if the ramp were over: from then on retraction is by the parabola."""
    one_step(optimizer, p, lambda x: 0.0, lambda x: 0.0)
    for name, value in (("factor", 1.0), ("step_size", h)):
        optimizer.state[p][name].fill_(value)


def one_step(optimizer, p, loss_of, slope_of, **options):
    """One step on a one-dimensional loss."""
    p.grad = torch.full_like(p, slope_of(p.detach().sum().item()))
    optimizer.step(
        loss=loss_of(p.detach().sum().item()), evaluate=lambda: loss_of(p.detach().sum().item()), **options
    )


def scalar(start, **options):
    p = torch.full((1,), start, dtype=torch.float64, requires_grad=True)
    return LossGrad([p], **{**PUBLISHED, **options}), p


# ------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_clipped_gradients_are_judged_by_the_real_slope(weight_decay):
    """The step is along torch's clipped gradient, p.grad stays, and <g, u> is of the loss as it is."""
    p = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    optimizer = LossGrad([p], initial_rate=0.1, max_norm=0.3, weight_decay=weight_decay, **PUBLISHED)
    q = p.detach().clone().requires_grad_()
    g = torch.tensor([6.0, 8.0], dtype=torch.float64)
    p.grad, q.grad = g.clone(), g.clone()
    torch.nn.utils.clip_grad_norm_([q], 0.3)
    plain = torch.optim.SGD([q], 0.1, weight_decay=weight_decay)
    direction = q.grad + weight_decay * q.detach()
    slope = (g + weight_decay * q.detach()) @ direction
    optimizer.step(loss=0.0, evaluate=lambda: 0.0)
    plain.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    assert torch.equal(p.grad, g)
    assert optimizer.state[p]["slope"].item() == pytest.approx(slope.item())


def test_a_clipped_step_finds_the_minimum_along_its_line():
    """On 50 x^2 from x = 1 the gradient 100 is clipped to 1: the best step is 1, a hundred times the unclipped one's.

    Judged by the clipped slope (1 in place of 100) the rule would go on until f1 > f0, to a step of 2.
    """
    optimizer, p = scalar(1.0, initial_rate=0.01, max_norm=1.0, up=1.05, down=1.05)
    for _ in range(300):
        p.data.fill_(1.0)
        one_step(optimizer, p, lambda x: 50 * x * x, lambda x: 100 * x)
    assert optimizer.rates().mean == pytest.approx(1.0, rel=0.06)


# ---------------------------------------------------------------------------------------------------- spikes


def wall(x):
    """Nearly straight until a wall: the batches of a training that goes well, until one doesn't."""
    return 10 - 0.01 * x if x < 100 else 9 + 50 * (x - 100) ** 2


def wall_slope(x):
    return -0.01 if x < 100 else 100 * (x - 100)


def climb(**options):
    """Two thousand steps from 0; the largest loss seen, and the last."""
    optimizer, p = scalar(0.0, initial_rate=1.0, **options)
    seen = []
    for _ in range(2000):
        one_step(optimizer, p, wall, wall_slope)
        seen.append(wall(p.item()))
    return max(seen), seen[-1]


def test_each_remedy_lowers_the_spike_of_the_published_rule():
    """On a straight loss h grows without limit and then hits the wall. Largest loss after any step, from 10 at the start."""
    published, _ = climb()
    assert published > 1e6
    assert climb(retract=True)[0] <= 10, "no step that raises the loss is kept"
    assert climb(lower_bound=0.0)[0] < published / 1e6
    assert climb(down=1.5)[0] < published / 4


def test_a_larger_down_recovers_from_a_spike_sooner():
    """sqrt(1 + x^2) with a step 10,000 times too long: thrown from side to side until h has come down."""

    def recovery(down):
        optimizer, p = scalar(0.5, initial_rate=1e4, down=down)
        one_step(optimizer, p, lambda x: math.hypot(1, x), lambda x: x / math.hypot(1, x))
        for t in range(1000):
            one_step(optimizer, p, lambda x: math.hypot(1, x), lambda x: x / math.hypot(1, x))
            if math.hypot(1, p.item()) < 2:
                return t
        return math.inf

    assert recovery(1.5) < recovery(1.15) / 2 < math.inf
    assert recovery(1.05) == math.inf, "equal factors: what one side lowers the other raises"


def test_the_cap_is_where_the_lowest_possible_parabola_has_its_minimum():
    """1/2 L x^2 with its own bound 0: the capped step is the minimum itself, and h is neither used nor raised."""
    optimizer, p = scalar(3.0, initial_rate=1e3, lower_bound=0.0)
    one_step(optimizer, p, lambda x: 2 * x * x, lambda x: 4 * x)
    assert p.item() == pytest.approx(0.0, abs=1e-12)
    assert optimizer.state[p]["step_size"].item() == 1e3


def test_a_bound_above_the_loss_stops_and_breaks_nothing():
    optimizer, p = scalar(1.0, initial_rate=0.1, lower_bound=5.0)
    one_step(optimizer, p, lambda x: x * x, lambda x: 2 * x)
    assert p.item() == 1.0
    assert optimizer.rates().mean == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_retracted_step_ends_at_the_parabolas_minimum(dtype):
    """x^2 / 2 from 1 with h = 5: thrown to -4, it comes back to 0, in whatever the weight is kept."""
    p = torch.ones(1, dtype=dtype, requires_grad=True)
    optimizer = LossGrad([p], down=1.05, retract=True)
    has_found(optimizer, p, 5.0)
    p.grad = torch.ones_like(p)
    optimizer.step(loss=0.5, evaluate=lambda: p.double().square().sum() / 2)
    assert p.item() == pytest.approx(0.0, abs=1e-6)
    assert optimizer.rates().mean == pytest.approx(5 / 1.05)


@pytest.mark.parametrize("probe", ["step", "raw"])
def test_a_first_step_that_is_too_long_is_undone(probe):
    """x^2 / 2 from 1 with h = 1.9: the loss is lower after it, but not by enough, and the ramp is not over."""
    optimizer, p = scalar(1.0, initial_rate=1.9, retract=True, ramp=10.0, probe=probe)
    one_step(optimizer, p, lambda x: x * x / 2, lambda x: x)
    assert p.item() == 1.0
    optimizer, p = scalar(1.0, retract=True, probe=probe)
    has_found(optimizer, p, 1.9)
    one_step(optimizer, p, lambda x: x * x / 2, lambda x: x)
    assert p.item() == pytest.approx(-0.9)
    has_found(optimizer, p, 5.0)
    p.data.fill_(1.0)
    one_step(optimizer, p, lambda x: x * x / 2, lambda x: x)
    assert p.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("f1", [math.inf, math.nan])
@pytest.mark.parametrize("found", [True, False])
def test_a_step_to_no_number_is_undone(f1, found):
    p = torch.zeros(2, requires_grad=True)
    optimizer = LossGrad([p], retract=True, step_sizes=(1e-12, 1e38))
    has_found(optimizer, p, 1e38)
    optimizer.state[p]["factor"].fill_(1.0 if found else 10.0)
    p.data.copy_(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([1e3, 0.3])  # to -infinity
    optimizer.step(loss=1.0, evaluate=lambda: f1)
    assert p.tolist() == [1.0, -2.0]


def test_a_step_that_helps_is_kept_whole():
    bound, free = scalar(1.0, initial_rate=0.1, retract=True), scalar(1.0, initial_rate=0.1)
    for optimizer, p in (bound, free):
        for _ in range(20):
            one_step(optimizer, p, lambda x: x * x, lambda x: 2 * x)
    assert torch.equal(bound[1], free[1])


def test_a_shortened_step_is_cut_only_as_far_as_it_is_too_long():
    """Probed at h = 5 (too far: 1 would do) but scheduled down to 0.4: nothing of it is taken back."""
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = LossGrad([p], retract=True)
    has_found(optimizer, p, 5.0)
    optimizer.param_groups[0].update(initial_lr=1.0, lr=0.08)
    one_step(optimizer, p, lambda x: x * x / 2, lambda x: x)
    assert p.item() == pytest.approx(0.6)
    optimizer.param_groups[0]["lr"] = 0.9  # 5 / 1.05 x 0.9 would be 4.3: it's cut to 1
    one_step(optimizer, p, lambda x: x * x / 2, lambda x: x)
    assert p.item() == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------------------------------- horizon and ramp


def test_a_horizon_fades_the_step_and_not_the_probe():
    """It is LinearLR from 1 to 0 from outside, to the last bit of what both round alike; then it stands still."""
    ends = []
    for outside in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        optimizer = LossGrad(model.parameters(), initial_rate=0.01, horizon=None if outside else 20)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20) if outside else None
        x = torch.randn(30, 8, 3, dtype=torch.float64)
        for t in range(25):

            def loss_of(model=model, inputs=x[t]):
                return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step(loss=loss, evaluate=loss_of)
            if scheduler:
                scheduler.step()
            if t == 20:
                frozen = model.weight.detach().clone()
        assert torch.equal(model.weight, frozen)
        ends.append(model.weight.detach().clone())
        rate = optimizer.rates().mean
        assert rate == 0.0
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("start", [1e-8, 1e4])
def test_a_ramp_leaves_a_bad_start_behind(start):
    """x^2 with its best step 1/2, from eight decades below and four above: found in 25 steps, then the small factors."""
    optimizer, p = scalar(1.0, initial_rate=start, ramp=10.0)
    factors = []
    for _ in range(60):
        p.data.fill_(1.0)
        before = optimizer.rates().mean
        one_step(optimizer, p, lambda x: x * x, lambda x: 2 * x)
        factors.append(max(optimizer.rates().mean / before, before / optimizer.rates().mean))
        if len(factors) > 25:
            assert optimizer.rates().mean == pytest.approx(0.5, rel=0.3), "and never far from it again"
    assert factors[:4] == pytest.approx([10] * 4)
    assert factors[-1] == pytest.approx(1.05)
    assert optimizer.rates().mean == pytest.approx(0.5, rel=0.06)


# ------------------------------------------------------------------------------------------- cheaper probes


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", [None, 40])
def test_the_next_steps_loss_is_the_probe_where_the_batch_is_the_whole(weight_decay, schedule):
    """On the full batch "next" makes every decision that a probe makes, without one.

    Under a schedule it sees a shorter step than the probe would: on a parabola, as here, the decisions are the same too.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=draw, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True))
    ends = []
    for probe in ("step", "next"):
        model = nn.Linear(4, 1).double()
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = LossGrad(
            model.parameters(),
            initial_rate=1e-3,
            probe=probe,
            up=1.2,
            down=1.3,
            ramp=1.0,
            retract=False,
            weight_decay=weight_decay,
            horizon=schedule,
            direction="momentum",
        )
        rates = []
        for _ in range(39):

            def loss_of(model=model):
                return nn.functional.mse_loss(model(x), y)

            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step(loss=loss, evaluate=loss_of if probe == "step" else None)
            rates.append(optimizer.state[model.weight]["step_size"].item())
        ends.append(rates)
    assert ends[1][1:] == pytest.approx(ends[0][:-1]), "the same decisions, each known at the next step"
    assert len(set(ends[0])) > 10


@pytest.mark.parametrize("name", ["ramp", "initial_rate"])
def test_infinity_is_no_factor_and_no_start(name):
    with pytest.raises(ValueError, match=f"{name} must be .* and finite, not inf"):
        LossGrad([torch.zeros(1)], **{name: math.inf})


def test_next_with_decoupled_decay_is_refused():
    with pytest.raises(ValueError, match="cannot tell decoupled weight decay"):
        SelfTuning(
            [torch.zeros(1)],
            directions.Adam(weight_decay=0.1, decoupled_weight_decay=True),
            rules.LossGrad(probe="next"),
        )
    with pytest.raises(ValueError, match="probe_every must be 1 with probe='next'"):
        LossGrad([torch.zeros(1)], probe="next", probe_every=2)
    with pytest.raises(ValueError, match="probe must be 'step' or 'raw' to retract"):
        LossGrad([torch.zeros(1)], probe="next", retract=True)


def test_a_part_of_the_batch_is_judged_by_its_own_loss():
    """Half the batch is compared with its own loss before, not with the whole's, which may be far from it."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=draw), torch.randn(8, generator=draw)
    model = nn.Linear(3, 1)

    def losses():
        return (model(x).squeeze(1) - y).square()

    looked = []

    class Listening(rules.LossGrad):
        def judge(self, slots, shared, options, before, after, eps):
            looked.append((before.item(), after.item()))
            super().judge(slots, shared, options, before, after, eps)

    optimizer = SelfTuning(model.parameters(), directions.SGD(), Listening(1e-3))
    each = losses()
    each.mean().backward()
    optimizer.step(loss=each.mean(), probe_loss=each[:4].mean(), evaluate=lambda: losses()[:4].mean())
    (before, after), now = looked[0], losses()
    assert before == pytest.approx(each[:4].mean().item())
    assert after == pytest.approx(now[:4].mean().item())
    assert optimizer.state[model.weight]["step_size"].item() == pytest.approx(1.05e-3)


@pytest.mark.parametrize(
    ("layer", "message"), [(nn.BatchNorm1d(4), "BatchNorm"), (nn.Dropout(0.5), "random numbers")]
)
def test_a_part_is_refused_where_it_is_another_alone(layer, message):
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    optimizer = LossGrad(model.parameters())
    x = torch.randn(8, 3)
    optimizer.zero_grad()
    each = model(x).square()
    each.mean().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step(
            loss=each.mean(), probe_loss=each[:4].mean(), evaluate=lambda: model(x[:4]).square().mean()
        )
    model.eval()  # where both are the same for a part as for the whole
    optimizer.zero_grad()
    each = model(x).square()
    each.mean().backward()
    optimizer.step(
        loss=each.mean(), probe_loss=each[:4].mean(), evaluate=lambda: model(x[:4]).square().mean()
    )
