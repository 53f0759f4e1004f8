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
    optimizer = LossGrad([p], weight_decay=weight_decay)
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
    optimizer = LossGrad(model.parameters(), initial_rate=0.05, up=up, down=up, **options)
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
    assert len(probed[3]) == (60 if way == "closure" else 30)
    assert probed[0].norm.num_batches_tracked == 30


def test_a_probe_sees_the_same_dropout_masks():
    """With lr = 0 the weights stand still, so the loss of the probe is that of the step."""
    _, losses, _, evaluated = train("evaluate", up=1.0, lr=0.0)
    assert evaluated == losses


def test_evaluate_and_closure_are_one_rule():
    by_value, by_closure = train("evaluate", up=1.1), train("closure", up=1.1)
    assert by_value[1] == by_closure[1]


def test_probe_every_takes_its_factors_to_the_power():
    """Every fourth step is judged, by factors to the fourth."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = LossGrad([p], initial_rate=1e-3, probe_every=4, up=1.1)
    calls = []

    def evaluate():
        calls.append(1)
        return -float(p.sum())

    for _ in range(8):
        p.grad = torch.full((2,), -1.0)
        optimizer.step(loss=-p.detach().sum(), evaluate=evaluate)
    assert len(calls) == 2
    assert optimizer.rates().mean == pytest.approx(1e-3 * 1.1**8)


def test_a_schedule_shortens_the_step_and_not_the_probe():
    """h does not grow to undo the schedule: a straight loss raises it by the same factor with one as without."""
    ends = []
    for scheduled in (False, True):
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = LossGrad([p], initial_rate=1e-3)
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
    optimizer = LossGrad([{"params": [a]}, {"params": [b], "lr": 3.0}], initial_rate=0.01)
    a.grad, b.grad = torch.full((1,), -1.0), torch.full((1,), -1.0)
    optimizer.step(loss=0.0, evaluate=lambda: -(a + b).item())
    assert b.item() == pytest.approx(3 * a.item())
    assert optimizer.state[a]["slope"].item() == pytest.approx(1 + 3)
    assert optimizer.state[a]["step_size"].item() == pytest.approx(0.0105)


def test_the_copy_of_an_optimizer_probes_too():
    """What is remembered of the random state is no part of a checkpoint, and is there again in a copy."""
    p = torch.ones(2, requires_grad=True)
    optimizer = copy.deepcopy(LossGrad([p]))
    (q,) = optimizer.param_groups[0]["params"]
    q.grad = torch.ones(2)
    optimizer.step(loss=2.0, evaluate=lambda: q.sum())
    assert optimizer.state[q]["step_size"].item() == pytest.approx(1.05e-4)
