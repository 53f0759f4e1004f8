"""Averages of the iterates: what they are, that they change no step, and how they are looked at."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from surefoot import LossGrad, SelfTuning
from surefoot.optim import averaging, directions, rules

STEPS = 40


def train(average, *, dtype=torch.float64, rate=0.1, **options):
    """A noisy quadratic; returns the optimizer, its parameter and every iterate."""
    p = torch.ones(5, dtype=dtype, requires_grad=True)
    optimizer = SelfTuning([p], directions.Momentum(0.5), rules.Constant(rate), average=average, **options)
    noise = torch.randn(STEPS, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    iterates = []
    for t in range(STEPS):
        p.grad = (p.detach() + noise[t]).to(dtype)
        optimizer.step()
        iterates.append(p.detach().double().numpy().copy())
    return optimizer, p, np.array(iterates)


def weights_of(average):
    """How much each iterate counts, from the definition of each mean."""
    t = np.arange(1, STEPS + 1, dtype=float)
    if isinstance(average, averaging.Exponential):
        weights = average.decay ** (STEPS - t)
        return weights / weights.sum()
    weights = np.empty(STEPS)
    for i in range(STEPS):  # what is left of iterate i after the later ones have come in
        c = (1 + average.gamma) / (t + average.gamma)
        weights[i] = c[i] * np.prod(1 - c[i + 1 :])
    return weights


@pytest.mark.parametrize(
    "average",
    [averaging.Mean(), averaging.Mean(8.0), averaging.Exponential(0.9), averaging.Exponential(0.0)],
    ids=repr,
)
def test_the_average_is_the_weighted_mean_of_all_iterates(average):
    optimizer, p, iterates = train(average)
    last = p.detach().clone()
    weights = weights_of(average)
    assert weights.sum() == pytest.approx(1.0), "the initial weights have no part"
    with optimizer.averaged():
        np.testing.assert_allclose(p.detach().numpy(), weights @ iterates, rtol=0, atol=1e-12)
    assert torch.equal(p, last)


def test_a_plain_mean_counts_all_alike():
    assert weights_of(averaging.Mean()) == pytest.approx(np.full(STEPS, 1 / STEPS))


def test_an_average_changes_no_step():
    plain, averaged = train(None), train(averaging.Mean())
    np.testing.assert_array_equal(plain[2], averaged[2])


def test_the_average_of_16_bit_weights_is_of_their_full_values():
    """Steps too small for bfloat16 are in the average: it follows the float32 run's, rounded once when it's looked at."""
    short = train(averaging.Mean(), dtype=torch.bfloat16, rate=1e-4)
    full = train(averaging.Mean(), rate=1e-4)
    state = short[0].state[short[1]]["average"]
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), full[0].state[full[1]]["average"], rtol=0, atol=1e-5)
    with short[0].averaged():
        assert torch.equal(short[1], state.to(torch.bfloat16))


def test_each_model_of_a_stack_may_forget_at_its_own_pace():
    decays = torch.tensor([0.0, 0.9], dtype=torch.float64)
    p = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = SelfTuning(
        [p],
        directions.SGD(),
        rules.Constant(1.0),
        average=averaging.Exponential(decays),
        models=2,
    )
    for _ in range(3):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    with optimizer.averaged():
        assert p[0].tolist() == [3.0] * 3
        assert p[1, 0].item() == pytest.approx((0.81 * 1 + 0.9 * 2 + 3) / 2.71)


def test_a_step_inside_is_refused_and_the_weights_come_back():
    optimizer, p, iterates = train(averaging.Mean())
    with pytest.raises(RuntimeError, match="inside averaged"), optimizer.averaged(), optimizer.averaged():
        optimizer.step()
    np.testing.assert_array_equal(p.detach().numpy(), iterates[-1])
    optimizer.step()


def test_without_an_average_nothing_is_swapped():
    optimizer, p, _ = train(None)
    before = p.detach().clone()
    with optimizer.averaged():
        assert torch.equal(p, before)


def test_copies_and_checkpoints_keep_the_average():
    optimizer, p, _ = train(averaging.Mean(2.0))
    clone = copy.deepcopy(optimizer)
    (q,) = clone.param_groups[0]["params"]
    other = SelfTuning([p], directions.Momentum(0.5), rules.Constant(0.1), average=averaging.Mean(2.0))
    other.load_state_dict(optimizer.state_dict())
    with optimizer.averaged():
        expected = p.detach().clone()
    with clone.averaged():
        assert torch.equal(q, expected)
    with other.averaged():
        assert torch.equal(p, expected)
    plain = SelfTuning([p], directions.Momentum(0.5), rules.Constant(0.1))
    with pytest.raises(ValueError, match="Momentum x Constant x Mean"):
        plain.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: averaging.Mean(-1.0), "gamma must be at least 0"),
        (lambda: averaging.Exponential(1.0), r"decay must be in \[0, 1\)"),
        (lambda: LossGrad([torch.zeros(1)], average="median"), "average must be one of none, mean, exp"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_average_that_is_none_is_refused():
    with pytest.raises(TypeError, match="average must be None or one of"):
        SelfTuning([nn.Parameter(torch.zeros(1))], directions.SGD(), rules.Constant(), average="mean")  # type: ignore
