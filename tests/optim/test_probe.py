"""Probes of the loss: what they may not do to a training, and what is said when they cannot be right."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from surefoot import PAL, QLAB, LossGrad, SelfTuning
from surefoot.optim import averaging, directions, rules

cross_entropy = nn.functional.cross_entropy
MAKE = {
    "lossgrad": lambda p, **o: LossGrad(p, **o),
    "lossgrad-published": lambda p, **o: LossGrad(p, ramp=1.0, retract=False, **o),
    "pal": lambda p, **o: PAL(p, probe_length=0.1, **o),
    "qlab": lambda p, **o: QLAB(p, **o),
}
makers = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def network(dropout=0.0, norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def batch(step=0):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=draw), torch.randint(3, (16,), generator=draw)


def train(optimizer, loss_of, steps=3):
    """So many steps; ``loss_of(x, y)``. Returns the losses."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(*batch(step))
        loss.backward()
        optimizer.step(loss=loss, evaluate=lambda step=step: loss_of(*batch(step)))
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------ compiled models


@makers
@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("way", ["model", "function", "in place"])
def test_a_compiled_model_trains_as_the_plain_one_and_is_compiled_once_for_each_way_of_use(make, way):
    """The probe's hooks are no part of the graph: two graphs, with gradients and without, at the first step and no more."""
    graphs, ends = [], []

    def backend(module, inputs):
        graphs.append(module)
        return module

    for compiled in (False, True):
        torch.compiler.reset()
        model = network(norm=True)
        forward = model
        if compiled and way == "in place":
            model.compile(backend=backend)
        elif compiled:
            forward = torch.compile(model if way == "model" else lambda x, m=model: m(x), backend=backend)
        optimizer = make(model.parameters())
        train(optimizer, lambda x, y, f=forward: cross_entropy(f(x), y), 2)
        first = len(graphs)
        train(optimizer, lambda x, y, f=forward: cross_entropy(f(x), y), 4)
        assert len(graphs) == first
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert (way != "in place") <= len(graphs) <= 2, "torch compiles no Sequential in place"
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, msg=name)


# ------------------------------------------------------------------------------------------------ what was rounded


class Widened(nn.Module):
    """A layer of float32 and one of bfloat16, either first; the loss is in float32."""

    def __init__(self, dtypes):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6).to(dtype) for dtype in dtypes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x.float()


@pytest.mark.parametrize("kind", ["autocast", "first short", "last short", "frozen short"])
@pytest.mark.parametrize(
    "make", [lambda p: LossGrad(p, initial_rate=1e-7), lambda p: QLAB(p, initial_rate=1e-7)]
)
def test_h_leaves_what_bfloat16_hides_whoever_rounds(make, kind):
    """From 1e-7 no change of the loss shows in 16 bits: h rises at every one of the first steps."""
    short, full = torch.bfloat16, torch.float32
    model = Widened({"autocast": (full, full), "first short": (short, full)}.get(kind, (full, short)))
    parameters = model.layers[0].parameters() if kind == "frozen short" else model.parameters()
    optimizer = make(parameters)

    def loss_of(x, y):
        with torch.autocast("cpu", dtype=short, enabled=kind == "autocast"):
            return cross_entropy(model(x), y)

    steps = 4 if isinstance(optimizer, LossGrad) else 8
    train(optimizer, loss_of, steps)
    factor = 10 if isinstance(optimizer, LossGrad) else 2
    assert optimizer.rates().max == pytest.approx(1e-7 * factor**steps)


# ------------------------------------------------------------------------------------------------ random numbers


@makers
@pytest.mark.parametrize("zero_first", [True, False])
def test_a_closure_that_draws_its_batch_is_called_again_with_the_same(make, zero_first):
    """Wherever its own zero_grad is."""
    model, drawn = network(), []
    optimizer = make(model.parameters())
    x, y = batch()

    def closure():
        rows = torch.randint(16, (4,))
        drawn.append(rows)
        if zero_first:
            optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(3):
        drawn.clear()
        optimizer.step(closure)
        first, second = drawn
        assert torch.equal(first, second)


def in_order(optimizer, model, order, steps=5):
    """A training with dropout; returns how often the loss was evaluated."""
    calls = []
    for step in range(steps):
        x, y = batch(step)
        if order == "noise, zero_grad last":
            x = x + 0.1 * torch.randn_like(x)

        def loss_of(x=x, y=y):
            return cross_entropy(model(x), y)

        def again(loss_of=loss_of):
            calls.append(1)
            return loss_of()

        if order == "zero_grad first":
            optimizer.zero_grad()
        loss = loss_of()
        if order == "zero_grad after the forward pass":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss, evaluate=again)
        if order == "noise, zero_grad last":
            optimizer.zero_grad()
    return len(calls)


@makers
@pytest.mark.parametrize("order", ["zero_grad after the forward pass", "noise, zero_grad last"])
def test_other_dropout_masks_than_the_steps_are_warned_about_once(make, order):
    """Without a word h would fall and fall: the masks move the loss more than the step."""
    model = network(dropout=0.5)
    with pytest.warns(UserWarning, match="evaluate does not reproduce the loss") as record:
        assert in_order(make(model.parameters()), model, order) == 6
    (warning,) = record
    assert warning.filename == __file__, "it points at the call of step"


@makers
def test_the_right_order_is_checked_in_silence(make):
    model = network(dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_order(make(model.parameters()), model, "zero_grad first") == 6, "one more than steps"


@makers
def test_without_random_numbers_there_is_one_evaluation_a_step(make):
    model = network()
    assert in_order(make(model.parameters()), model, "zero_grad after the forward pass") == 5


# ------------------------------------------------------------------------------------------------ failing probes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [1.0, 0.5], ids=["at the step", "ahead of it"])
def test_an_interrupted_probe_takes_the_step_back(dtype, lr):
    """Ctrl-C in ``evaluate`` leaves no step that was not judged, and the average counts the weights as they are."""
    p = torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = LossGrad([p], initial_rate=0.1, average="mean")
    optimizer.param_groups[0]["lr"] = lr

    def interrupted():
        raise KeyboardInterrupt

    p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss=1.0, evaluate=interrupted)
    assert p.tolist() == [1.0] * 3
    with optimizer.averaged():
        assert p.tolist() == [1.0] * 3
    optimizer.step(loss=1.0, evaluate=lambda: 0.7)
    moved = p.detach().float().clone()
    assert (moved < 1).all()
    with optimizer.averaged():
        torch.testing.assert_close(p.float(), (1 + moved) / 2, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "rule", [rules.LossGrad(0.1), rules.QLAB(0.1)], ids=["without a copy", "looks first"]
)
def test_the_average_is_one_of_weights_after_an_interruption(rule):
    p = torch.ones(3, requires_grad=True)
    optimizer = SelfTuning([p], directions.SGD(), rule, average=averaging.Mean())
    p.grad = torch.ones(3)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss=1.0, evaluate=lambda: 1 / 0)
    now = p.detach().clone()
    with optimizer.averaged():
        assert torch.equal(p, now)


@makers
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (None, r"what evaluate returns must be a number or a tensor of shape \(\), not None"),
        ("a", r"what evaluate returns must be a number or a tensor of shape \(\), not 'a'"),
        (torch.ones(1), r"what evaluate returns must have shape \(\), not \(1,\)"),
    ],
)
def test_what_evaluate_may_not_return_is_said_by_its_name(make, wrong, said):
    p = torch.ones(3, requires_grad=True)
    optimizer = make([p])
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=said):
        optimizer.step(loss=1.0, evaluate=lambda: wrong)
    if make is not MAKE["lossgrad-published"]:
        assert torch.equal(p, torch.ones(3))


def test_a_loss_without_its_name_and_a_closure_without_a_loss_are_refused():
    p = torch.ones(3, requires_grad=True)
    optimizer = LossGrad([p])
    p.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"closure must be a function.*step\(loss=loss\)"):
        optimizer.step(torch.tensor(1.0))  # type: ignore
    with pytest.raises(ValueError, match="what the closure returns must be a number"):
        optimizer.step(lambda: None)  # type: ignore
    with pytest.raises(ValueError, match="loss must be a number"):
        optimizer.step(loss="a", evaluate=lambda: 1.0)  # type: ignore
    assert torch.equal(p, torch.ones(3))


# ------------------------------------------------------------------------------------------------ traces


@makers
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("zeroes", [True, False])
def test_a_closures_probe_leaves_the_gradients_of_other_optimizers(make, to_none, zeroes):
    """One optimizer for the body, another for the head: the head's gradient is that of the step's own pass."""
    model = network()
    x, y = batch()
    body, head = make(model[0].parameters()), torch.optim.SGD(model[3].parameters(), 0.1)
    cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model[3].parameters()]
    if not to_none:
        for p in model[3].parameters():
            p.grad.zero_()
    else:
        head.zero_grad()

    def closure():
        body.zero_grad()
        if zeroes:
            head.zero_grad(to_none)
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    body.step(closure)
    for p, gradient in zip(model[3].parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


class Masked(nn.Module):
    """Buffers that can't be written into, that forward replaces, and that it changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(1, 1).expand(1, 3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return self.norm(self.linear(x)) * self.mask


@makers
def test_buffers_are_what_the_step_made_of_them(make):
    """Expanded ones stay, one that forward replaces counts the steps alone."""
    model = Masked()
    mask = model.mask
    train(make(model.parameters()), lambda x, y: cross_entropy(model(x), y), 3)
    assert model.mask is mask
    assert model.count == 3
    assert model.norm.num_batches_tracked == 3


@makers
@pytest.mark.filterwarnings("ignore")  # of tracing
def test_the_buffers_of_a_scripted_model_are_put_back_too(make):
    model = torch.jit.trace(network(norm=True), batch()[0], check_trace=False)
    counted = dict(model.named_buffers())["1.num_batches_tracked"]
    before = counted.item()
    train(make(model.parameters()), lambda x, y: cross_entropy(model(x), y), 3)
    assert counted == before + 3


@makers
def test_buffers_lent_by_functional_call_go_with_it(make):
    """The model keeps its own, however often it is called in a probe."""
    model = network(norm=True)
    own = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in own.items()}

    def loss_of(x, y):
        lent = {name: buffer.clone() for name, buffer in own.items()}
        tensors = {**dict(model.named_parameters()), **lent}
        halves = (functional_call(model, tensors, (half,)) for half in x.split(8))
        return cross_entropy(torch.cat(list(halves)), y)

    train(make(model.parameters()), loss_of, 2)
    for name, buffer in model.named_buffers():
        assert buffer is own[name]
        assert torch.equal(buffer, before[name])


def test_a_copy_made_of_averages_is_refused():
    """It would train on from them."""
    p = torch.ones(3, requires_grad=True)
    optimizer = LossGrad([p], average="mean")
    p.grad = torch.ones(3)
    optimizer.step(loss=1.0, evaluate=lambda: 0.5)
    with optimizer.averaged():
        for make_copy in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=r"inside averaged\(\)"):
                make_copy(optimizer)
    copy.deepcopy(optimizer)
