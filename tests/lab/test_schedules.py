"""A schedule multiplies an optimizer's lr by its curve, step by step, and wastes no step at a rate of 0."""

import math
from itertools import pairwise

import pytest
import torch

from surefoot import SRprop
from surefoot.lab.schedules import SCHEDULES, scheduler

STEPS = 60


def linear(t, steps):
    return 1 - t / steps


def cosine(t, steps):
    return (1 + math.cos(math.pi * t / steps)) / 2


def onecycle(t, steps):
    """From 1/25 to 1 and to 1/250,000, along half cosines."""
    peak, end = 0.3 * steps - 1, steps - 1
    low, high, share = (1 / 25, 1, t / peak) if t <= peak else (1, 4e-6, (t - peak) / (end - peak))
    return high + (low - high) * (1 + math.cos(math.pi * share)) / 2


def step(t, steps):
    return 1 if t < 2 * steps / 3 else 0.1


def trapezoid(t, steps):
    """Known at its corners, straight in between."""
    corners = [(-1, 0), (steps / 3 - 1, 1), (steps / 2, 1), (steps, 0)]
    (a, low), (b, high) = next((p, q) for p, q in pairwise(corners) if p[0] <= t <= q[0])
    return low + (high - low) * (t - a) / (b - a)


CURVES = {
    "linear": linear,
    "cosine": cosine,
    "onecycle": onecycle,
    "step": step,
    "trapezoid": trapezoid,
}


def rates_of_steps(name, steps, *lrs):
    """The lr of each group at each step, moved as a run moves it."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups)
    schedule = scheduler(name, steps, optimizer)
    rates = []
    for t in range(steps):
        if t:
            schedule.step()
        optimizer.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def test_every_schedule_is_tested():
    assert set(SCHEDULES) == {"none", *CURVES}


@pytest.mark.parametrize("name", CURVES)
class TestEvery:
    def test_follows_its_curve_in_every_group(self, name):
        expected = [CURVES[name](t, STEPS) for t in range(STEPS)]
        for t, rates in enumerate(rates_of_steps(name, STEPS, 0.5, 2.0)):
            assert rates == pytest.approx([0.5 * expected[t], 2 * expected[t]], rel=1e-6), t

    @pytest.mark.parametrize("steps", [*range(1, 14), 997])
    def test_no_step_is_wasted_and_none_exceeds_the_rate(self, name, steps):
        rates = [rate for (rate,) in rates_of_steps(name, steps, 1.0)]
        assert len(rates) == steps
        assert all(0 < rate <= 1 for rate in rates)
        if steps > 2:
            assert max(rates) > 0.6
            assert rates[-1] < max(rates)

    def test_multiplies_the_rates_that_an_optimizer_finds(self, name):
        """lr is a multiplier there: half of it moves a weight half as far."""
        weight = torch.zeros(3, requires_grad=True, dtype=torch.float64)
        optimizer = SRprop([weight], initial_rate=0.01)
        schedule = scheduler(name, 9, optimizer)
        for t in range(9):
            if t:
                schedule.step()
            before = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            lr = optimizer.param_groups[0]["lr"]
            moved = (before - weight.detach()).mean().item()
            assert moved == pytest.approx(0.01 * lr, rel=1e-6, abs=0)
            assert optimizer.rates().mean == pytest.approx(0.01 * lr, rel=1e-6, abs=0)


def test_one_drop_by_ten_after_two_thirds():
    """LOSSGRAD's paper: after epoch 20 of 30, to the step."""
    rates = [rate for (rate,) in rates_of_steps("step", 30 * 7, 1.0)]
    assert rates[: 20 * 7] == [1.0] * (20 * 7)
    assert rates[20 * 7 :] == pytest.approx([0.1] * (10 * 7))


def test_no_schedule_is_no_scheduler():
    """Nothing is wrapped around the optimizer's step, nothing multiplies its lr."""
    assert scheduler("none", STEPS, torch.optim.SGD([torch.zeros(1)], lr=0.1)) is None


def test_momentum_is_left_alone():
    weight = torch.zeros(1, requires_grad=True)
    for optimizer in (
        torch.optim.SGD([weight], lr=0.1, momentum=0.7),
        torch.optim.Adam([weight], betas=(0.8, 0.9)),
    ):
        before = {k: v for k, v in optimizer.param_groups[0].items() if k in ("momentum", "betas")}
        schedule = scheduler("onecycle", 10, optimizer)
        for _ in range(9):
            optimizer.step()
            schedule.step()
            assert {k: optimizer.param_groups[0][k] for k in before} == before
