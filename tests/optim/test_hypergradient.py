"""Hypergradient descent against an oracle in loops, as the derivative that it is, and inside its limits."""

from __future__ import annotations

import math

import pytest
import torch
from perceptron import Perceptron, Update, dot

from surefoot import HypergradientDescent, SelfTuning
from surefoot.optim import directions, rules

STEPS = 300


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize(
    ("direction", "rate", "beta", "decay"),
    [
        ("sgd", 0.02, 1e-2, 0.0),
        ("sgd", 0.02, 1e-2, 0.05),
        ("momentum", 0.01, 1e-3, 0.0),
        ("nesterov", 0.01, 1e-3, 0.05),
        ("adam", 0.01, 1e-4, 0.0),
        ("sign", 0.003, 1e-4, 0.0),
    ],
)
def test_it_is_the_formula(direction, rate, beta, decay, form):
    """The rate first, by this gradient and the last update; then the step, with the new rate."""
    problem = Perceptron(STEPS)
    params = problem.parameters()
    update, last = Update(direction, len(problem.start)), None
    rose, fell = 0, 0

    def oracle(t, w):
        nonlocal rate, last, rose, fell
        _, g = problem.loss_and_gradient(w, t)
        g = [gi + decay * wi for gi, wi in zip(g, w, strict=True)]
        if last is not None:
            product = dot(g, last)
            rose, fell = rose + (product > 0), fell + (product < 0)
            if form == "additive":
                rate += beta * product
            else:
                rate *= 1 + beta * product / (math.sqrt(dot(g, g)) * math.sqrt(dot(last, last)))
        last = update(g)
        return [wi - rate * ui for wi, ui in zip(w, last, strict=True)], rate

    optimizer = HypergradientDescent(
        params, direction=direction, initial_rate=rate, hyper_rate=beta, form=form, weight_decay=decay
    )
    problem.follow(optimizer, params, oracle, STEPS)
    assert min(rose, fell) > 20


@pytest.mark.parametrize("direction", ["sgd", "momentum", "nesterov", "adam", "sign"])
@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_without_a_hyper_rate_the_rate_is_constant(direction, form):
    """Bit for bit the optimizer that it is made of."""
    ends = []
    for rule in (rules.Hypergradient(0.01, 0.0, form), rules.Constant(0.01)):
        problem = Perceptron(30)
        params = problem.parameters()
        *_, (weights, _) = problem.train(
            SelfTuning(params, directions.by_name(direction), rule), params, steps=30
        )
        ends.append(torch.from_numpy(weights))
    assert torch.equal(*ends)


@pytest.mark.parametrize("direction", ["sgd", "nesterov", "adam"])
def test_it_is_the_derivative_by_the_rate(direction):
    """d f_1(w - r u) / dr by finite differences, at the first step's rate: what the second step moves the rate against."""
    losses = []
    for step in (-1e-6, 0.0, 1e-6):
        problem = Perceptron(2)
        params = problem.parameters()
        optimizer = HypergradientDescent(
            params, direction=direction, initial_rate=0.05 + step, hyper_rate=1e-2
        )
        training = problem.train(optimizer, params, 2)
        next(training)
        losses.append(problem.torch_loss(params, 1).item())
        _, rate = next(training)
        if step == 0.0:
            moved = rate - 0.05
    derivative = (losses[2] - losses[0]) / 2e-6
    assert moved == pytest.approx(-1e-2 * derivative, rel=1e-5)


def drive(optimizer, gradients):
    rates = []
    for gradient in gradients:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, gradient)
        optimizer.step()
        rates.append(optimizer.rates().max)
    return rates


def test_the_rate_never_falls_below_0_and_comes_back():
    """Gradients that oppose each other: the published rule would go up the hill from the third step on."""
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = HypergradientDescent([p], initial_rate=0.1, hyper_rate=0.02)
    falling = drive(optimizer, [1.0, -1.0, 1.0, -1.0, 1.0])
    assert falling == pytest.approx([0.1, 0.04, 1e-12, 1e-12, 1e-12])
    assert drive(optimizer, [1.0, 1.0])[-1] == pytest.approx(1e-12 + 2 * 0.06)


def test_the_multiplicative_one_changes_by_at_most_its_hyper_rate():
    """cos = 1 and -1: it stays above 0 by itself, and a gradient of 0 leaves it."""
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = HypergradientDescent([p], initial_rate=0.1, hyper_rate=0.5, form="multiplicative")
    rates = drive(optimizer, [1.0, 5.0, -1.0, 0.0, 1.0])
    assert rates == pytest.approx([0.1, 0.15, 0.075, 0.075, 0.075])


def test_the_multiplicative_one_does_not_depend_on_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1000.0):
        problem = Perceptron(40)
        params = problem.parameters()
        optimizer = HypergradientDescent(
            params, initial_rate=0.05 / scale, hyper_rate=0.1, form="multiplicative"
        )
        *_, (weights, _) = problem.train(optimizer, params, 40, scale)
        ends.append(torch.from_numpy(weights))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_one_overflow_does_not_spoil_the_rate():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = HypergradientDescent([p], initial_rate=0.1, hyper_rate=0.02)
    assert drive(optimizer, [1.0, math.inf]) == [0.1, 0.1]


def test_the_rate_is_one_for_all_and_does_not_depend_on_how_weights_are_grouped():
    """In the released Adam code every tensor sees the rate that the tensors before it have left."""
    ends = []
    for sizes in ((6,), (2, 4), (1, 2, 3)):
        draw = torch.Generator().manual_seed(0)
        params = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in sizes]
        optimizer = HypergradientDescent(params, direction="adam", initial_rate=0.01, hyper_rate=1e-3)
        for _ in range(30):
            noise = torch.randn(6, generator=draw, dtype=torch.float64).split(sizes)
            for p, n in zip(params, noise, strict=True):
                p.grad = p.detach() + n
            optimizer.step()
        ends.append(torch.cat(params).detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-12, atol=1e-12)


def test_groups_count_by_their_share_of_the_step():
    """lr (2, 1): the second moved half as far, so its agreement counts half; the largest lr itself does not count."""
    a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = HypergradientDescent(
        [{"params": [a], "lr": 2.0}, {"params": [b]}], initial_rate=0.1, hyper_rate=0.01
    )
    assert drive(optimizer, [1.0, 1.0]) == pytest.approx([2 * 0.1, 2 * (0.1 + 0.01 * 1.5)])


def test_the_defaults_are_the_authors():
    def rule(**options):
        return HypergradientDescent([torch.ones(1)], **options).rule

    assert rule() == rules.Hypergradient(1e-3, 1e-6)
    assert rule(direction="adam") == rules.Hypergradient(1e-3, 1e-8)
    assert rule(direction="adam", form="multiplicative").hyper_rate == 0.02
    assert rule(hyper_rate=0.5).hyper_rate == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initial_rate": 0.0}, "initial_rate must be above 0 and finite"),
        ({"hyper_rate": -1e-3}, "hyper_rate must be at least 0 and finite"),
        (
            {"hyper_rate": 1.0, "form": "multiplicative"},
            r"hyper_rate must be in \[0, 1\) for the multiplicative",
        ),
        ({"form": "relative"}, "form must be one of additive, multiplicative"),
        ({"step_sizes": (0.0, 1.0)}, r"step_sizes must be a pair with 0 < step_sizes\[0\]"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, said):
    with pytest.raises(ValueError, match=said):
        HypergradientDescent([torch.ones(2, requires_grad=True)], **options)
