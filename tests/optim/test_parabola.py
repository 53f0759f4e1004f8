"""PAL and QLAB against oracles in loops; on a parabola they are exact; and what they do where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from perceptron import Perceptron, Update, dot
from torch import nn

from surefoot import PAL, QLAB, SelfTuning
from surefoot.optim import directions, rules
from surefoot.optim.rules.parabola import pal_step, qlab_step

STEPS = 300


def penalised(problem, w, t, decay):
    loss, g = problem.loss_and_gradient(w, t)
    return loss + decay / 2 * dot(w, w), [gi + decay * wi for gi, wi in zip(g, w, strict=True)]


@pytest.mark.parametrize(
    ("momentum", "stretch", "longest_step", "decay"),
    [(0.4, 1 / 0.6, 3.16, 0.0), (0.0, 1.0, 0.3, 0.03), (0.9, 1.3, 1.0, 0.0)],
)
def test_pal_is_the_formula(momentum, stretch, longest_step, decay):
    """The paper's cases, in its own symbols: d = beta d + g, e = d / |d|, b and a of the parabola at mu, s."""
    problem, mu = Perceptron(STEPS), 0.5
    params = problem.parameters()
    update = Update("momentum", len(problem.start), momentum)
    cases = {"parabola": 0, "longest": 0, "straight": 0, "uphill": 0}

    def oracle(t, w):
        loss_0, g = penalised(problem, w, t, decay)
        d = update(g)
        norm = math.sqrt(dot(d, d))
        b = -dot(g, d) / norm
        loss_mu, _ = penalised(problem, [wi - mu * di / norm for wi, di in zip(w, d, strict=True)], t, decay)
        a = (loss_mu - loss_0 - b * mu) / mu**2
        if b >= 0:
            case, s = "uphill", 0.0
        elif a <= 0:
            case, s = "straight", mu
        else:
            case, s = "parabola", -b / (2 * a) * stretch
        if s > longest_step:
            case, s = "longest", longest_step
        cases[case] += 1
        return [wi - s * di / norm for wi, di in zip(w, d, strict=True)], s / norm

    optimizer = PAL(
        params,
        probe_length=mu,
        longest_step=longest_step,
        stretch=stretch,
        momentum=momentum,
        weight_decay=decay,
    )
    problem.follow(optimizer, params, oracle, STEPS)
    assert cases["parabola"] > 0
    assert cases["longest"] + cases["straight"] > 0
    assert (cases["uphill"] > 0) == (momentum > 0)


@pytest.mark.parametrize("direction", ["sgd", "momentum", "nesterov", "adam", "sign"])
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_qlab_is_the_formula(direction, decay):
    """h* = s h^2 / (2 (f1 - f0 + h s)) from 1e-4, at most twice h, probed at the last h."""
    problem, h, growth = Perceptron(STEPS), 1e-4, 2.0
    params = problem.parameters()
    update = Update(direction, len(problem.start))
    cases = {"minimum": 0, "grows": 0, "uphill": 0}

    def oracle(t, w):
        nonlocal h
        f0, g = penalised(problem, w, t, decay)
        u = update(g)
        s = dot(g, u)
        f1, _ = penalised(problem, [wi - h * ui for wi, ui in zip(w, u, strict=True)], t, decay)
        if s <= 0:
            cases["uphill"] += 1
            return w, 0.0
        rise = f1 - f0 + h * s
        best = s * h * h / (2 * rise) if rise > 0 else math.inf
        cases["minimum" if best < growth * h else "grows"] += 1
        h = min(best, growth * h)
        return [wi - h * ui for wi, ui in zip(w, u, strict=True)], h

    problem.follow(QLAB(params, direction=direction, weight_decay=decay), params, oracle, STEPS)
    assert cases["minimum"] > 100
    assert cases["grows"] >= 5
    assert (cases["uphill"] > 0) == (direction in ("momentum", "nesterov", "adam"))


@given(
    st.floats(0.1, 10.0),
    st.floats(0.1, 3.0),
    st.sampled_from(
        [
            lambda p, h: PAL(p, stretch=1.0, momentum=0.0, longest_step=1e3, probe_length=h),
            lambda p, h: QLAB(p, initial_rate=h, growth=1e6),
            lambda p, h: SelfTuning(p, directions.Adam(), rules.PAL(h, 1e3, 1.0)),
        ]
    ),
)
def test_on_a_parabola_the_step_ends_at_the_minimum(curvature, h, make):
    """On a/2 |x - 1|^2 with x along the diagonal every direction leads through the minimum, and one step to it."""
    p = torch.full((3,), 4.0, dtype=torch.float64, requires_grad=True)

    def loss():
        return curvature / 2 * (p - 1).square().sum()

    optimizer = make([p], h)
    value = loss()
    value.backward()
    optimizer.step(loss=value, evaluate=loss)
    torch.testing.assert_close(p.detach(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def numbers(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


class TestPALStep:
    def step(self, f0, f1, slope, mu=0.5, stretch=1.25, longest=2.0):
        return pal_step(*numbers(f0, f1, slope), mu, stretch, longest).item()

    def test_every_case(self):
        assert self.step(1.0, 1.0, 2.0) == pytest.approx(0.25 * 1.25), "symmetric: the middle, stretched"
        assert self.step(1.0, 0.0, 2.0) == 0.5, "straight: mu"
        assert self.step(1.0, -1.0, 2.0) == 0.5, "bends downwards: mu"
        assert self.step(1.0, 0.01, 2.0) == 2.0, "far away: the longest"
        assert self.step(1.0, -1.0, 2.0, mu=3.0, longest=2.0) == 2.0, "mu may be longer than the longest"
        assert self.step(1.0, 5.0, -2.0) == 0.0, "uphill"
        assert self.step(1.0, 1.0, 0.0) == 0.0, "flat"

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_no_number_no_step(self, bad):
        assert self.step(1.0, bad, 2.0) == 0.0
        assert self.step(bad, 1.0, 2.0) == 0.0
        assert self.step(1.0, 1.0, bad) == 0.0


class TestQLABStep:
    def step(self, f0, f1, slope, h=0.5, growth=3.0, step_sizes=(1e-3, 4.0), floor=0.0):
        rate, new = qlab_step(*numbers(f0, f1, slope, h), growth, step_sizes, torch.tensor(floor))
        return rate.item(), new.item()

    def test_every_case(self):
        assert self.step(1.0, 1.0, 2.0) == pytest.approx((0.25, 0.25)), "symmetric: the middle"
        assert self.step(1.0, 0.0, 2.0) == (1.5, 1.5), "straight: growth h"
        assert self.step(1.0, -1.0, 2.0) == (1.5, 1.5), "bends downwards: growth h"
        assert self.step(1.0, 0.0, 2.0, growth=30.0) == (4.0, 4.0), "the largest"
        assert self.step(1.0, 1e9, 2.0) == (1e-3, 1e-3), "the smallest"
        assert self.step(1.0, 5.0, -2.0) == (0.0, 0.5), "uphill: none, and h stays"
        assert self.step(1.0, 1.0, 0.0) == (0.0, 0.5), "flat"

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_no_number_no_step_and_a_nearer_probe(self, bad):
        assert self.step(1.0, bad, 2.0) == (0.0, 0.5 / 3)
        assert self.step(bad, 1.0, 2.0) == (0.0, 0.5 / 3)
        assert self.step(1.0, 1.0, bad) == (0.0, 0.5 / 3)

    def test_what_rounding_hides_makes_h_grow(self):
        """f1 = f0 would be read as twice too far, and h halved for ever."""
        assert self.step(1.0, 1.0, 1e-9, floor=1e-7) == (1.5, 1.5)
        assert self.step(1.0, 1.5, 1e-9, floor=1e-7)[0] < 0.5, "a rise that shows is one"

    def test_it_is_the_minimum_that_lossgrad_compares_with(self):
        """h* = h / (2 rel), rel = 1 - actual / predicted decrease."""
        rel = 1 - (1.0 - 0.7) / (0.5 * 2.0)
        assert self.step(1.0, 0.7, 2.0)[0] == pytest.approx(0.5 / (2 * rel))


def test_h_leaves_the_rounding_floor():
    """In single precision from 1e-12, where no probe shows any difference, to the step that the curvature wants."""
    p = torch.full((4,), 3.0, requires_grad=True)
    optimizer = QLAB([p], initial_rate=1e-12)
    for _ in range(60):
        optimizer.zero_grad()
        loss = 10 + p.square().sum()
        loss.backward()
        optimizer.step(loss=loss, evaluate=lambda: 10 + p.square().sum())
    assert p.abs().max() < 1e-2


class Noisy(nn.Module):
    """Dropout and BatchNorm: everything that a look ahead can spoil."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(nn.functional.dropout(torch.relu(self.norm(self.first(x))), 0.5, self.training))


MAKE = {
    "pal": lambda p, **o: PAL(p, **{"probe_length": 0.1, "longest_step": 10.0, **o}),
    "qlab": lambda p, **o: QLAB(p, **{"initial_rate": 0.1, **o}),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
class TestProbes:
    @pytest.mark.parametrize("way", ["evaluate", "closure"])
    def test_leave_no_trace_but_the_step(self, make, way):
        """The weights are looked at elsewhere, and what moves them is the step alone, from where they were."""
        torch.manual_seed(0)
        model = Noisy()
        params = list(model.parameters())
        optimizer = make(params)
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        seen = []

        def loss():
            value = nn.functional.cross_entropy(model(x), y)
            seen.append(([p.detach().clone() for p in params], value.item()))
            return value

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        for step in range(4):
            seen.clear()
            if way == "closure":
                optimizer.step(closure)
            else:
                value = closure()
                optimizer.step(loss=value, evaluate=loss)
            (here, _), *_, (there, _) = seen  # in the second step also one at the step's own weights
            rate, first = optimizer.rates().max, params[0]
            assert any(not torch.equal(a, b) for a, b in zip(here, there, strict=True))
            u = optimizer.state[first]["momentum_buffer"] if isinstance(optimizer, PAL) else first.grad
            assert rate > 0
            torch.testing.assert_close(first.detach(), here[0] - rate * u)
            assert model.norm.num_batches_tracked == step + 1

    def test_see_the_same_dropout_masks(self, make):
        """With lr = 0 the probe is at the weights themselves, and so is its loss."""
        torch.manual_seed(0)
        model = Noisy()
        optimizer = make(model.parameters(), lr=0.0)
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        for step in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            seen = []

            def again(seen=seen):
                seen.append(nn.functional.cross_entropy(model(x), y))
                return seen[-1]

            optimizer.step(loss=loss, evaluate=again)
            assert seen == [loss] * (2 if step == 1 else 1), "in the second step it is checked"

    def test_a_failing_one_leaves_the_weights(self, make):
        """An error in ``evaluate`` comes through, and the weights are where they were."""
        p = torch.ones(2, requires_grad=True)
        optimizer = make([p])
        p.grad = torch.ones(2)

        def evaluate():
            raise KeyError("gone")

        with pytest.raises(KeyError):
            optimizer.step(loss=1.0, evaluate=evaluate)
        assert torch.equal(p, torch.ones(2))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_of_no_number_make_no_step(self, make, bad):
        """The weights stay where the loss is known, and later batches are not spoilt."""
        p = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = make([p], lr=1.0)
        for found in (bad, bad, None):
            p.grad = 2 * p.detach()
            assert torch.equal(p, torch.ones(2, dtype=torch.float64))
            optimizer.step(
                loss=p.detach().square().sum(), evaluate=lambda f=found: p.square().sum() if f is None else f
            )
        assert abs(p[0]) < 1

    def test_a_schedule_shortens_the_step_and_not_the_probe(self, make):
        """Half the lr: half the way to the minimum, and probed where it was."""
        ends, probes = [], []
        for lr in (1.0, 0.5, torch.tensor(0.5)):
            p = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
            optimizer = make([p])
            optimizer.param_groups[0]["lr"] = lr
            p.grad = 2 * p.detach()

            def evaluate(p=p):
                probes.append(p.detach().clone())
                return p.square().sum()

            optimizer.step(loss=p.detach().square().sum(), evaluate=evaluate)
            ends.append(p.detach())
        for probe, end in zip(probes[1:], ends[1:], strict=True):
            torch.testing.assert_close(probe, probes[0])
            torch.testing.assert_close(3 - end, (3 - ends[0]) / 2)

    def test_groups_shape_the_line(self, make):
        """lr (2, 1, 0): the probe goes half as far in the second, stays in the third, and so does the step, twice as far."""
        params = [torch.full((1,), x, dtype=torch.float64, requires_grad=True) for x in (1.0, 2.0, 3.0)]
        optimizer = make([{"params": [p], "lr": lr} for p, lr in zip(params, (2.0, 1.0, 0.0), strict=True)])
        start = torch.cat(params).detach()
        seen = []

        def loss():
            seen.append(torch.cat(params).detach())
            return torch.cat(params).square().sum()

        for p in params:
            p.grad = 2 * p.detach()
        optimizer.step(loss=loss(), evaluate=loss)
        line = torch.tensor([2.0, 0.5 * 4.0, 0.0], dtype=torch.float64)  # u times lr / 2
        probed, moved = (start - seen[1]) / line, (start - torch.cat(params).detach()) / line
        length = 0.1 / line.norm().item() if isinstance(optimizer, PAL) else 0.1
        torch.testing.assert_close(probed[:2], torch.full((2,), length, dtype=torch.float64))
        assert probed[2].isnan()
        # |x - t d|^2 is least at t = <g, d> / 2 |d|^2; QLAB may only double h, PAL stretches by 1 / 0.6.
        least = (2 * 2.0 + 4.0 * 2.0) / (2 * line.square().sum().item())
        expected = 2 * (least / 0.6 if isinstance(optimizer, PAL) else min(least, 2 * 0.1))
        torch.testing.assert_close(moved[:2], torch.full((2,), expected, dtype=torch.float64))

    def test_no_gradient_no_step(self, make):
        """A norm of 0 is divided by nowhere."""
        p = torch.ones(2, requires_grad=True)
        optimizer = make([p], momentum=0.0) if make is MAKE["pal"] else make([p])
        p.grad = torch.zeros(2)
        optimizer.step(loss=1.0, evaluate=lambda: 1.0)
        assert torch.equal(p, torch.ones(2))
        assert optimizer.rates().max == 0.0

    def test_what_is_missing_is_said_before_anything_moves(self, make):
        p = torch.ones(2, requires_grad=True)
        optimizer = make([p])
        p.grad = torch.ones(2)
        with pytest.raises(ValueError, match="goes by the loss"):
            optimizer.step()
        with pytest.raises(ValueError, match="probes the loss"):
            optimizer.step(loss=1.0)
        assert torch.equal(p, torch.ones(2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: PAL(p, probe_length=0.0), "probe_length must be above 0 and finite"),
        (lambda p: PAL(p, longest_step=-1.0), "longest_step must be above 0 and finite"),
        (lambda p: PAL(p, stretch=math.inf), "stretch must be above 0 and finite"),
        (lambda p: PAL(p, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda p: QLAB(p, initial_rate=0.0), "initial_rate must be above 0 and finite"),
        (lambda p: QLAB(p, growth=1.0), "growth must be above 1 and finite"),
        (lambda p: QLAB(p, step_sizes=(0.0, 1.0)), r"step_sizes must be a pair with 0 < step_sizes\[0\]"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make([torch.ones(2, requires_grad=True)])
