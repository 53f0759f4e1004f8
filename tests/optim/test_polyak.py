"""L4 and the Polyak step against oracles in loops, their identities, and what they do with losses that they are not for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from perceptron import Perceptron, Update, dot

from surefoot import L4, SPS, SelfTuning
from surefoot.optim import directions, rules
from surefoot.optim.rules.polyak import l4_step

STEPS = 300
DIRECTIONS = ["sgd", "momentum", "nesterov", "adam", "sign"]


def with_penalty(loss, g, w, decay):
    """The loss and its gradient with w/2 |x|^2 added to it."""
    return loss + decay / 2 * dot(w, w), [gi + decay * wi for gi, wi in zip(g, w, strict=True)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("bound", "c", "growth", "lower_bound", "decay"),
    [(0.3, 0.5, math.inf, 0.0, 0.0), (0.02, 1.0, 1.05, -0.05, 0.03)],
    ids=["bound", "smoothed"],
)
def test_sps_is_the_formula(direction, bound, c, growth, lower_bound, decay):
    """eta = min{(f - f*) / (c <g, u>), bound}, bound being growth times the last step where it is smoothed."""
    problem = Perceptron(STEPS)
    params = problem.parameters()
    update = Update(direction, len(problem.start))
    branches = {"bound": 0, "quotient": 0, "uphill": 0}
    last = bound

    def oracle(t, w):
        nonlocal last
        f, g = with_penalty(*problem.loss_and_gradient(w, t), w, decay)
        u = update(g)
        limit = bound if math.isinf(growth) else growth * last
        slope = dot(g, u)
        if slope <= 0:
            branch, rate = "uphill", 0.0
        else:
            quotient = (f - lower_bound) / (c * slope)
            branch, rate = min(("quotient", quotient), ("bound", limit), key=lambda pair: pair[1])
            last = rate
        branches[branch] += 1
        return [wi - rate * ui for wi, ui in zip(w, u, strict=True)], rate

    optimizer = SPS(
        params,
        direction=direction,
        bound=bound,
        c=c,
        growth=growth,
        lower_bound=lower_bound,
        weight_decay=decay,
    )
    problem.follow(optimizer, params, oracle, STEPS)
    assert branches["bound"] > 0
    assert branches["quotient"] > 0
    assert (branches["uphill"] > 0) == (direction in ("momentum", "nesterov", "adam"))


@pytest.mark.parametrize(
    ("direction", "fraction", "smoothing", "decay"),
    [
        ("sgd", 0.05, 0.9, 0.0),
        ("sgd", 0.15, 0.0, 0.02),
        ("momentum", 0.15, 0.9, 0.0),
        ("momentum", 0.1, 0.9, 0.02),
        ("adam", 0.1, 0.9, 0.0),
        ("nesterov", 0.1, 0.5, 0.01),
    ],
)
def test_l4_is_the_formula(direction, fraction, smoothing, decay):
    """As published, with the averages bias-corrected: v for momentum is that average, where the library has a buffer."""
    problem, tau = Perceptron(STEPS), 100.0
    params = problem.parameters()
    size = len(problem.start)
    update, mean = Update(direction, size, eps=1e-4), [0.0] * size
    lowest, falls, uphill = 0.0, 0, 0

    def oracle(t, w):
        nonlocal lowest, falls, uphill
        loss, g = with_penalty(*problem.loss_and_gradient(w, t), w, decay)
        for i, gi in enumerate(g):
            mean[i] = smoothing * mean[i] + (1 - smoothing) * gi
        m = [mi / (1 - smoothing ** (t + 1)) for mi in mean]
        u = update(g)
        v = m if direction == "momentum" else u
        falls += t > 0 and loss < lowest
        lowest = 0.75 * loss if t == 0 else min(lowest, loss)
        slope = dot(v, m)
        uphill += slope <= 0
        eta = fraction * (loss - 0.9 * lowest) / (slope + 1e-12) if slope > 0 else 0.0
        lowest *= 1 + 1 / tau
        moved = [wi - eta * vi for wi, vi in zip(w, v, strict=True)]
        # The buffer is the average times (1 - beta^t) / (1 - beta), so its rate is eta divided by that.
        return moved, eta * (1 - smoothing) / (1 - smoothing ** (t + 1)) if direction == "momentum" else eta

    optimizer = L4(
        params,
        direction=direction,
        fraction=fraction,
        smoothing=smoothing,
        forget_steps=tau,
        weight_decay=decay,
    )
    problem.follow(optimizer, params, oracle, STEPS)
    assert falls > 3, "the minimum was lowered"
    assert (uphill > 0) == (direction == "nesterov" or (direction == "sgd" and smoothing > 0))


@given(st.floats(0.01, 100.0), st.floats(-5.0, 5.0).filter(lambda x: abs(x) > 1e-3), st.floats(-3.0, 3.0))
def test_on_a_parabola_half_jumps_to_the_minimum(curvature, x, least):
    """f = least + L/2 |x|^2 with c = 1/2 and f* = least: one step, whatever L is."""
    p = torch.tensor([x, -2 * x], dtype=torch.float64, requires_grad=True)
    optimizer = SPS([p], bound=math.inf, lower_bound=least)
    loss = least + curvature / 2 * p.square().sum()
    loss.backward()
    optimizer.step(loss=loss)
    torch.testing.assert_close(p.detach(), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6 * abs(x))


def end(make, steps=20, scale=1.0):
    problem = Perceptron(steps)
    params = problem.parameters()
    *_, (weights, _) = problem.train(make(params), params, steps, scale)
    return torch.from_numpy(weights)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SPS(p, bound=math.inf, c=5.0),
        lambda p: SPS(p, bound=math.inf, c=5.0, direction="nesterov"),
        lambda p: L4(p),
        lambda p: L4(p, direction="sgd", smoothing=0.0),
    ],
)
def test_the_scale_of_the_loss_does_not_matter(make):
    """1000 f is minimised by the steps of f: what is divided and what it is divided by grow alike."""
    torch.testing.assert_close(end(make, scale=1000.0), end(make), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", [rules.Polyak(math.inf, c=5.0), rules.L4(smoothing=0.0)], ids=["sps", "l4"])
def test_the_scale_of_the_update_does_not_matter(rule):
    """Nor does clipping: the slope is the loss's own along the clipped update."""
    plain = end(lambda p: SelfTuning(p, directions.SGD(), rule))
    clipped = end(lambda p: SelfTuning(p, directions.SGD(), rule, max_norm=1e-3))
    torch.testing.assert_close(clipped, plain, rtol=1e-9, atol=1e-9)


def one_step(optimizer, loss, *gradients):
    for p, gradient in zip((p for g in optimizer.param_groups for p in g["params"]), gradients, strict=True):
        p.grad = torch.full_like(p, gradient)
    optimizer.step(loss=loss)


MAKE = {"sps": lambda p, **o: SPS(p, bound=10.0, **o), "l4": lambda p, **o: L4(p, **o)}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
class TestLosses:
    def test_a_negative_one_makes_no_step(self, make):
        """Published L4 goes uphill there."""
        p = torch.ones(2, requires_grad=True)
        optimizer = make([p])
        for loss in (-1.0, -2.0, -0.5):
            one_step(optimizer, loss, 1.0)
        assert torch.equal(p, torch.ones(2))

    def test_a_lower_bound_is_what_it_is_measured_from(self, make):
        ends = []
        for shift in (0.0, -7.0):
            p = torch.ones(2, dtype=torch.float64, requires_grad=True)
            optimizer = make([p], lower_bound=shift)
            for loss, gradient in ((3.0, 1.0), (2.0, 0.5), (2.5, -1.0)):
                one_step(optimizer, loss + shift, gradient)
            ends.append(p.detach())
        torch.testing.assert_close(*ends)
        assert not torch.equal(ends[0], torch.ones(2, dtype=torch.float64))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_no_number_is_forgotten(self, make, bad):
        """At the first step, and later: no step is made, and the next ones know nothing of it."""
        ends = []
        for losses in ((3.0, 2.0, 2.5), (bad, 3.0, bad, 2.0, 2.5)):
            p = torch.ones(2, dtype=torch.float64, requires_grad=True)
            optimizer = make([p])
            for loss in losses:
                before = p.detach().clone()
                one_step(optimizer, loss, 1.0)
                assert torch.equal(p, before) == (not math.isfinite(loss))
            ends.append(p.detach())
        torch.testing.assert_close(*ends)

    def test_none_is_refused(self, make):
        p = torch.ones(2, requires_grad=True)
        optimizer = make([p])
        p.grad = torch.ones(2)
        with pytest.raises(ValueError, match="goes by the loss"):
            optimizer.step()


def test_a_batch_without_loss_does_not_stop_the_smoothed_step():
    """Its step of 0 is no bound for later ones: in the released code there would be none."""
    p = torch.ones(1, requires_grad=True)
    optimizer = SPS([p], bound=0.1, growth=1.1)
    for loss in (1.0, 0.0, 0.0, 1.0):
        one_step(optimizer, loss, 1.0)
    assert optimizer.rates().max == pytest.approx(0.1 * 1.1 * 1.1)


def test_l4s_minimum():
    """First a share of the loss; then the minimum, which rises by 1 / tau after each step."""

    def f64(x):
        return torch.tensor(x, dtype=torch.float64)

    def step(loss, lowest):
        rate, lowest = l4_step(f64(loss), f64(lowest), f64(2.0), 0.5, 0.9, 0.75, 10.0)
        return rate.item(), lowest.item()

    assert step(8.0, math.inf) == pytest.approx((0.5 * (8 - 0.9 * 6) / 2, 6.6))
    assert step(7.0, 6.6) == pytest.approx((0.5 * (7 - 0.9 * 6.6) / 2, 7.26))
    assert step(4.0, 7.26) == pytest.approx((0.5 * (4 - 0.9 * 4) / 2, 4.4))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
class TestGroups:
    def test_their_ratio_shapes_the_line_and_the_largest_lr_scales_it(self, make):
        """lr (1, 1/2): the line goes half as far in the second; lr (2, 1): the same line, twice as far along it."""
        moved = []
        for lrs in ((1.0, 0.5), (2.0, 1.0), (torch.tensor(2.0), 1.0)):
            a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
            optimizer = make([{"params": [a], "lr": lrs[0]}, {"params": [b], "lr": lrs[1]}])
            one_step(optimizer, 0.1, 2.0, 3.0)
            moved.append(torch.cat([1 - a.detach(), 1 - b.detach()]))
        whole = 0.1 / (2 * 2 + 0.5 * 3 * 3) * (2.0 if make is MAKE["sps"] else 0.15 * (1 - 0.9 * 0.75))
        torch.testing.assert_close(moved[0], whole * torch.tensor([2.0, 1.5], dtype=torch.float64))
        torch.testing.assert_close(moved[1], 2 * moved[0])
        torch.testing.assert_close(moved[2], 2 * moved[0])

    def test_a_frozen_one_is_as_if_it_were_not_there(self, make):
        a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        alone = torch.ones(1, dtype=torch.float64, requires_grad=True)
        one_step(make([{"params": [a]}, {"params": [b], "lr": 0.0}]), 0.1, 2.0, 3.0)
        one_step(make([alone]), 0.1, 2.0)
        assert torch.equal(a, alone)
        assert b.item() == 1.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: SPS(p, bound=0.0), "bound must be above 0"),
        (lambda p: SPS(p, c=-1.0), "c must be above 0"),
        (lambda p: SPS(p, growth=0.5), "growth must be at least 1"),
        (lambda p: SPS(p, lower_bound=-math.inf), "lower_bound must be a finite number"),
        (lambda p: SPS(p, direction="up"), "direction must be one of sgd"),
        (lambda p: L4(p, fraction=0.0), "fraction must be above 0 and finite"),
        (lambda p: L4(p, attainable=1.5), r"attainable must be in \[0, 1\]"),
        (lambda p: L4(p, first_lowest=-0.1), r"first_lowest must be in \[0, 1\]"),
        (lambda p: L4(p, forget_steps=0.0), "forget_steps must be above 0"),
        (lambda p: L4(p, smoothing=1.0), r"smoothing must be in \[0, 1\)"),
        (
            lambda p: L4([{"params": p}, {"params": [torch.ones(1)], "fraction": 0.3}]),
            "fraction is one for all groups",
        ),
    ],
)
def test_bad_options_are_refused_in_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make([torch.ones(2, requires_grad=True)])
