"""Batches whose loss or gradient is no number: rules that go by the loss make no step, and training goes on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from surefoot import SelfTuning
from surefoot.optim import averaging, core, directions, rules

RULES = {
    "lossgrad": rules.LossGrad(ramp=10.0, retract=True),
    "lossgrad-published": rules.LossGrad(0.05),
    "lossgrad-raw": rules.LossGrad(0.01, probe="raw", ramp=10.0, probe_every=2),
    "lossgrad-next": rules.LossGrad(0.01, probe="next"),
    "lossgrad-bound": rules.LossGrad(0.05, lower_bound=0.0, horizon=1000),
    "l4": rules.L4(),
    "sps": rules.Polyak(0.05),
    "sps-smooth": rules.Polyak(0.05, growth=1.1),
    "pal": rules.PAL(0.1, 1.0, 1.0),
    "qlab": rules.QLAB(0.05),
}
DIRECTIONS = {
    "sgd": directions.SGD(),
    "momentum": directions.Momentum(0.5, weight_decay=1e-3),
    "nesterov": directions.Nesterov(0.5),
    "adam": directions.Adam(amsgrad=True),
}
every = [
    pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS),
    pytest.mark.parametrize("rule", RULES.values(), ids=RULES),
]


def each(test):
    for mark in every:
        test = mark(test)
    return test


def all_finite(optimizer, but=()):
    """Of every state value; a limit or a minimum that is not known yet is infinite."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name not in ("limit", "lowest", *but):
                assert value.isfinite().all(), name
            elif isinstance(value, Tensor):
                assert not value.isnan().any(), name


def test_on_a_device_nobody_looks_and_the_numbers_are_the_same(monkeypatch):
    """The host looks at its own tensors only; where it may not, what is finite is masked, bit for bit alike."""
    found = []
    for at_hand in (True, False):
        monkeypatch.setattr(core, "is_at_hand", lambda value, at_hand=at_hand: at_hand)
        torch.manual_seed(0)
        p = torch.randn(3, 5, requires_grad=True)
        optimizer = SelfTuning([p], directions.Adam(), rules.LossGrad(0.05, ramp=10.0), models=3)
        for step in range(12):

            def loss(p=p, step=step):
                losses = (p - step / 10).square().sum(1)
                return losses * torch.tensor([1.0, math.nan if step == 5 else 1.0, 1.0])

            optimizer.zero_grad()
            losses = loss()
            losses.sum().backward()
            optimizer.step(loss=losses.detach(), evaluate=loss)
        found.append(p.detach().clone())
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@each
@pytest.mark.parametrize(("bad", "number"), [(0, math.nan), (7, math.inf)])
def test_a_batch_that_is_no_number_is_left_out(rule, direction, bad, number):
    """Through a real backward pass: no step at that batch, all state finite, and the loss goes on falling."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(32, 4)
    y = torch.sin(x.sum(1, keepdim=True))
    optimizer = SelfTuning(model.parameters(), direction, rule, average=averaging.Mean(), max_norm=100.0)
    losses = []
    for step in range(40):
        inputs = x * number if step == bad else x
        before = [p.detach().clone() for p in model.parameters()]

        def loss_of(inputs=inputs):
            return nn.functional.mse_loss(model(inputs), y)

        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step(loss=loss, evaluate=loss_of)
        losses.append(loss.item())
        still = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        if step == bad:
            assert still
        all_finite(optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
    assert min(losses[bad + 1 :]) < 0.9 * losses[1], "and training goes on"


@each
def test_a_gradient_that_is_no_number_makes_no_step_whatever_the_loss(rule, direction):
    """sqrt |x| at 0: a finite loss with one gradient of NaN; the next batch is without it."""
    p = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = SelfTuning([p], direction, rule)

    def root():
        return p.abs().sqrt().sum()

    def square():
        return (p - 3).square().sum()

    for loss_of in (square, square, root, square):
        with torch.no_grad():
            p[0] = 0.0
        before = p.detach().clone()
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step(loss=loss, evaluate=loss_of)
        if loss_of is root:
            assert p.grad.isnan().any(), "what is given is left as it is"
            assert torch.equal(p, before)
        assert p.isfinite().all()
        all_finite(optimizer)


@each
def test_in_a_stack_only_the_model_that_it_happens_to_stands_still(rule, direction):
    """The other one's run is bit for bit what it is without."""
    ends = []
    for bad in (False, True):
        p = torch.full((2, 3), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer = SelfTuning([p], direction, rule, models=2)
        for step in range(6):
            scale = torch.tensor([1.0, math.nan if bad and step == 2 else 1.0], dtype=torch.float64)

            def loss_of(p=p, scale=scale):
                return p.square().sum(1) * scale

            optimizer.zero_grad()
            loss = loss_of()
            loss.sum().backward()
            before = p.detach().clone()
            optimizer.step(loss=loss.detach(), evaluate=loss_of)
            if bad and step == 2:
                assert torch.equal(p[1], before[1])
            assert p.isfinite().all()
            all_finite(optimizer)
        ends.append(p[0].detach().clone())
    assert torch.equal(*ends)


def test_h_is_judged_by_no_such_batch():
    """Neither h nor the ramp's factor knows of it."""
    p = torch.ones(2, requires_grad=True)
    optimizer = SelfTuning([p], directions.SGD(), rules.LossGrad(ramp=10.0, retract=True))
    for loss in (1.0, math.nan, math.inf):
        p.grad = torch.ones(2)
        optimizer.step(loss=loss, evaluate=lambda: 0.5)
        assert optimizer.state[p]["step_size"].item() == pytest.approx(1e-3)
        assert optimizer.state[p]["factor"].item() == 10.0
