"""The promises of every public optimizer: a table of optimizers x checks, a record each (``records.py``)."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulers
import torch
from records import RECORDS, Record
from schedulers import ABSOLUTE, RELATIVE, advance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import surefoot
from surefoot import SelfTuning
from surefoot.optim import core

pytestmark = pytest.mark.filterwarnings("ignore:lr=.* multiplies the rates")

FROZEN = Path(__file__).with_name("state.json")
STEPS = 14


def promise(check: Callable[..., None]) -> Callable[..., None]:
    """Run a check over every record, leaving out those that say why it does not apply."""
    name = check.__name__.removeprefix("test_")
    cases = [
        pytest.param(r, id=r.name, marks=pytest.mark.skip(reason=r.skips[name]) if name in r.skips else ())
        for r in RECORDS
    ]
    return pytest.mark.parametrize("record", cases)(check)


class Problem:
    """A small regression with a tanh layer; each step has a batch of its own, so gradients are noisy."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(STEPS * 4, 16, 5, generator=draw, dtype=torch.float64).to(dtype)
        self.targets = torch.sin(self.inputs.sum(-1, keepdim=True))
        shapes = [(5, 7), (7,), (7, 1), (1,)]
        self.params = [
            torch.randn(s, generator=draw, dtype=torch.float64).mul(0.5).to(dtype).requires_grad_()
            for s in shapes
        ]

    def loss(self, step: int) -> Tensor:
        a, b, c, d = self.params
        hidden = torch.tanh(self.inputs[step] @ a + b)
        return (hidden @ c + d - self.targets[step]).square().mean()

    def backward(self, step: int) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self.loss(step)
        loss.backward()
        return loss

    def run(self, optimizer: SelfTuning, steps: range) -> None:
        for step in steps:
            self.backward(step)
            self.move(optimizer, step)

    def move(self, optimizer: SelfTuning, step: int) -> None:
        """One step of an optimizer, whatever it needs to know of the loss."""
        loss = self.loss(step).detach()
        optimizer.step(loss=loss, evaluate=lambda: self.loss(step))

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def flat_state(optimizer: SelfTuning) -> list[Any]:
    """Every state value, in the order of the parameters."""
    return [(i, n, v) for i, s in optimizer.state_dict()["state"].items() for n, v in sorted(s.items())]


def same_state(a: SelfTuning, b: SelfTuning) -> bool:
    return same_values(flat_state(a), flat_state(b))


def same_values(xs: list[Any], ys: list[Any]) -> bool:
    pairs = zip(xs, ys, strict=True)
    return all(
        x[:2] == y[:2] and (torch.equal(x[2], y[2]) if isinstance(x[2], Tensor) else x[2] == y[2])
        for x, y in pairs
    )


def test_every_public_optimizer_has_a_record():
    """So that no optimizer is published without its promises."""
    public = [getattr(surefoot, name) for name in surefoot.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert classes == {type(r.make(Problem().params)) for r in RECORDS}
    checks = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert all(r.skips.keys() <= checks for r in RECORDS), "a skip must name a check"


@promise
def test_trains(record: Record):
    """The loss of one batch falls to less than a third in 200 steps, in float32."""
    problem = Problem(torch.float32)
    optimizer = record.make(problem.params)
    before = problem.loss(0).item()
    for _ in range(200):
        problem.run(optimizer, range(1))
    assert problem.loss(0).item() < before / 3


@pytest.mark.parametrize("at", [0, 1, 3, 4, 5, 8, 11])
@promise
def test_resumes(record: Record, at: int):
    """A checkpoint taken at any step of a window, through the bytes of a file, goes on bit for bit."""
    problem = Problem(torch.float32)
    optimizer = record.make(problem.params, track_rates=True)
    problem.run(optimizer, range(at))
    file = io.BytesIO()
    torch.save({"weights": problem.weights(), "optimizer": optimizer.state_dict()}, file)
    problem.run(optimizer, range(at, STEPS))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Problem(torch.float32)
    resumed = record.make(again.params, track_rates=True)
    for p, value in zip(again.params, saved["weights"], strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    again.run(resumed, range(at, STEPS))
    assert same(problem.weights(), again.weights())
    assert same_state(optimizer, resumed)
    assert resumed.lr_mean == optimizer.lr_mean


@promise
def test_load_does_not_alias(record: Record):
    """What was loaded from, a dictionary still held by someone, stays as it was."""
    problem = Problem()
    optimizer = record.make(problem.params)
    problem.run(optimizer, range(5))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other = Problem()
    loaded = record.make(other.params)
    loaded.load_state_dict(saved)
    other.run(loaded, range(5, STEPS))
    for index, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(saved["state"][index][name]), torch.as_tensor(value))


@promise
def test_deepcopy_and_pickle(record: Record):
    """A copy, made either way, is a whole optimizer: it steps exactly as the original does."""
    problem = Problem()
    optimizer = record.make(problem.params, track_rates=True)
    problem.run(optimizer, range(6))
    before = problem.weights()
    copies = [copy.deepcopy((problem, optimizer)), pickle.loads(pickle.dumps((problem, optimizer)))]
    for twin, twin_optimizer in copies:
        twin.run(twin_optimizer, range(6, STEPS))
    assert same(problem.weights(), before), "the copies moved, the original did not"
    problem.run(optimizer, range(6, STEPS))
    for twin, twin_optimizer in copies:
        assert same(twin.weights(), problem.weights())
        assert same_state(twin_optimizer, optimizer)
        assert twin_optimizer.lr_mean == optimizer.lr_mean


@promise
def test_late_gradient(record: Record):
    """A parameter with no gradient is not moved and has no state; once it has one, it starts afresh."""
    problem = Problem()
    optimizer = record.make(problem.params)
    late, before = problem.params[2], problem.params[2].detach().clone()
    for step in range(7):
        problem.backward(step)
        late.grad = None
        problem.move(optimizer, step)
    assert torch.equal(late, before)
    assert not optimizer.state.get(late)

    alone = late.detach().clone().requires_grad_()
    fresh = record.make([alone])
    for step in range(7, STEPS):
        problem.backward(step)
        alone.grad = late.grad.clone()
        problem.move(optimizer, step)
        problem.move(fresh, step)
    assert torch.equal(late, alone)


@promise
def test_add_param_group(record: Record):
    """A group added later is trained like one given at the start that had no gradient yet."""
    results = []
    for later in (False, True):
        problem = Problem()
        given = problem.params[:2] if later else problem.params
        optimizer = record.make(given)
        for step in range(STEPS):
            if step == 5 and later:
                optimizer.add_param_group({"params": problem.params[2:]})
            problem.backward(step)
            if step < 5:
                for p in problem.params[2:]:
                    p.grad = None
            problem.move(optimizer, step)
        results.append(problem.weights())
    assert same(*results)


@promise
def test_empty_first_group(record: Record):
    """A first group without a parameter changes nothing."""
    problem, twin = Problem(), Problem()
    optimizer = record.make([{"params": []}, {"params": problem.params}], track_rates=True)
    problem.run(optimizer, range(5))
    record_of_all = record.make(twin.params, track_rates=True)
    twin.run(record_of_all, range(5))
    assert same(problem.weights(), twin.weights())
    assert optimizer.lr_mean == record_of_all.lr_mean
    loaded = record.make([{"params": []}, {"params": twin.params}], track_rates=True)
    loaded.load_state_dict(optimizer.state_dict())
    assert same_state(optimizer, loaded)


@promise
def test_per_group_lr(record: Record):
    """Two groups with their own lr are two optimizers."""
    problem, twin = Problem(), Problem()
    both = record.make([{"params": problem.params[:2], "lr": 0.5}, {"params": problem.params[2:]}])
    first, second = record.make(twin.params[:2], lr=0.5), record.make(twin.params[2:])
    for step in range(STEPS):
        problem.backward(step)
        twin.backward(step)
        for optimizer in (both, first, second):
            problem.move(optimizer, step)
    assert same(problem.weights(), twin.weights())


def test_every_scheduler_of_this_torch_has_a_case():
    """A torch with a new scheduler must not pass unnoticed."""
    assert schedulers.of_this_torch() == {name.split("-")[0] for name in (*RELATIVE, *ABSOLUTE)}


@pytest.mark.parametrize("name", [*RELATIVE, *ABSOLUTE])
@promise
def test_scheduler(record: Record, name: str):
    """What a scheduler writes into the groups is what is used: the same values set by hand give the same run."""
    moved = ("lr", "initial_lr", "max_lr", "momentum", "betas")
    problem = Problem()
    optimizer = record.make(problem.params)
    scheduler = {**RELATIVE, **ABSOLUTE}[name](optimizer)
    logged = []
    for step in range(STEPS):
        logged.append({k: v for k, v in optimizer.param_groups[0].items() if k in moved})
        problem.backward(step)
        problem.move(optimizer, step)
        advance(scheduler, 10 + step)  # by then the loss is stuck
    by_hand = Problem()
    plain = record.make(by_hand.params)
    for step, values in enumerate(logged):
        plain.param_groups[0].update(values)
        by_hand.run(plain, range(step, step + 1))
    assert len({str(values) for values in logged}) > 1, "the scheduler did something"
    assert same(problem.weights(), by_hand.weights())


@promise
def test_lr_zero(record: Record):
    """lr = 0 moves nothing, at a window's end neither; lr multiplies, so a step with 1e-9 moves next to nothing."""
    problem = Problem()
    before = problem.weights()
    problem.run(record.make(problem.params, lr=0.0), range(STEPS))
    assert same(problem.weights(), before)
    problem.run(record.make(problem.params, lr=1e-9), range(STEPS))
    assert all(torch.allclose(p, b, rtol=0, atol=1e-6) for p, b in zip(problem.params, before, strict=True))
    assert not same(problem.weights(), before)


@promise
def test_tensor_lr(record: Record):
    """An lr that is a tensor gives the run of the same number, also when it is changed in place."""
    problem, twin = Problem(), Problem()
    lr = torch.tensor(0.5, dtype=torch.float64)
    tensor, number = record.make(problem.params, lr=lr), record.make(twin.params, lr=0.5)
    problem.run(tensor, range(6))
    lr.fill_(0.25)
    problem.run(tensor, range(6, STEPS))
    twin.run(number, range(6))
    number.param_groups[0]["lr"] = 0.25
    twin.run(number, range(6, STEPS))
    assert all(
        torch.allclose(x, y, rtol=0, atol=1e-12)
        for x, y in zip(problem.weights(), twin.weights(), strict=True)
    )


@promise
def test_grad_scaler(record: Record):
    """A scaled loss gives the unscaled run (powers of two are exact); an overflow leaves weights and state alone."""
    problem, twin = Problem(torch.float32), Problem(torch.float32)
    optimizer, plain = record.make(problem.params), record.make(twin.params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for step in range(STEPS):
        for p in problem.params:
            p.grad = None
        scaler.scale(problem.loss(step)).backward()
        if step == 6:
            weights, state = problem.weights(), copy.deepcopy(flat_state(optimizer))
            problem.params[0].grad[0, 0] = float("inf")
        loss = problem.loss(step).detach()
        scaler.step(optimizer, loss=loss, evaluate=lambda step=step: problem.loss(step))
        scaler.update()
        if step == 6:
            assert same(problem.weights(), weights)
            assert same_values(flat_state(optimizer), state)
    twin.run(plain, range(6))
    twin.run(plain, range(7, STEPS))
    assert all(
        torch.allclose(x, y, rtol=1e-6, atol=1e-7)
        for x, y in zip(problem.weights(), twin.weights(), strict=True)
    )


@promise
def test_keeps_grad(record: Record):
    """Gradients are only read."""
    problem = Problem()
    optimizer = record.make(problem.params)
    for step in range(STEPS):
        problem.backward(step)
        held = [p.grad for p in problem.params]
        before = [g.clone() for g in held]
        problem.move(optimizer, step)
        assert all(
            p.grad is g and torch.equal(g, b) for p, g, b in zip(problem.params, held, before, strict=True)
        )


@promise
def test_maximize(record: Record):
    """Going up on -f is going down on f."""
    problem, twin = Problem(), Problem()
    down, up = record.make(problem.params), record.make(twin.params, maximize=True)
    for step in range(STEPS):
        problem.backward(step)
        twin.backward(step)
        for p in twin.params:
            p.grad.neg_()
        problem.move(down, step)
        up.step(loss=-twin.loss(step).detach(), evaluate=lambda step=step: -twin.loss(step))
    assert same(problem.weights(), twin.weights())


@promise
def test_closure(record: Record):
    """A closure is called once, with gradients enabled, and its loss returned."""
    problem, twin = Problem(), Problem()
    optimizer, plain = record.make(problem.params), record.make(twin.params)
    losses = [optimizer.step(lambda step=step: problem.backward(step)) for step in range(STEPS)]
    twin.run(plain, range(STEPS))
    assert same(problem.weights(), twin.weights())
    assert float(losses[0].detach()) == float(Problem().loss(0).detach())
    assert plain.step(loss=1.5, evaluate=lambda: 1.0) == 1.5


@promise
def test_sparse_is_refused(record: Record):
    """In one sentence, before anything has moved."""
    dense = torch.ones(3, requires_grad=True)
    table = torch.ones(4, 2, requires_grad=True)
    optimizer = record.make([dense, table])
    dense.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step(loss=1.0, evaluate=lambda: 0.5)
    assert torch.equal(dense, torch.ones(3))
    assert not optimizer.state


@promise
def test_small_steps_in_bf16(record: Record):
    """Steps of about 1/5000 of a weight, which bfloat16 would lose one by one, add up as they do in float32."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.full((8, 8), 1.0, dtype=dtype, requires_grad=True)
        optimizer = record.make([p], lr=2e-4 / largest_step(record))
        for _ in range(40):
            p.grad = torch.ones_like(p)
            optimizer.step(loss=p.detach().float().sum(), evaluate=lambda p=p: p.float().sum())
        value = p.detach().float() + optimizer.state[p].get("compensation", torch.zeros(1)).float()
        moved.append(float((1 - value).mean()))
    assert 1e-4 < moved[0] < 0.2
    assert moved[1] == pytest.approx(moved[0], rel=0.02)


def largest_step(record: Record) -> float:
    """How far the first step takes a weight of 1 under a gradient of 1."""
    p = torch.ones(8, 8, dtype=torch.float64, requires_grad=True)
    p.grad = torch.ones_like(p)
    record.make([p]).step(loss=1.0, evaluate=lambda: 0.5)
    return float((1 - p.detach()).abs().max())


@promise
def test_step_hooks(record: Record):
    """torch's hooks around ``step`` are called, in order."""
    problem = Problem()
    optimizer = record.make(problem.params)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    problem.run(optimizer, range(2))
    assert called == ["before", "after"] * 2


@promise
def test_stack(record: Record):
    """A stack of three models, each with options of its own, is three runs: weights, state and tracked rates."""
    lrs = (1.0, 0.5, 0.0)
    problems = [Problem(seed=seed) for seed in range(3)]
    stacked = [
        torch.stack([p.detach() for p in ps]).requires_grad_()
        for ps in zip(*(q.params for q in problems), strict=True)
    ]

    def triple(value: Any) -> Any:
        if isinstance(value[0], tuple):
            return tuple(triple(v) if isinstance(v, tuple) else v for v in value)
        return torch.tensor(value, dtype=torch.float64)

    def nth(value: Any, k: int) -> Any:
        if isinstance(value[0], tuple):
            return tuple(v[k] if isinstance(v, tuple) else v for v in value)
        return value[k]

    options = {name: triple(value) for name, value in record.per_model.items()}
    stack = record.make(stacked, lr=triple(lrs), models=3, track_rates=True, **options)
    separate = [
        record.make(
            q.params, lr=lrs[k], track_rates=True, **{n: nth(v, k) for n, v in record.per_model.items()}
        )
        for k, q in enumerate(problems)
    ]
    for step in range(STEPS):
        for k, problem in enumerate(problems):
            problem.backward(step)
            problem.move(separate[k], step)
        views = [Problem(seed=seed) for seed in range(3)]
        for k, view in enumerate(views):
            view.params = [p[k] for p in stacked]
        for p in stacked:
            p.grad = None
        losses = torch.stack([view.loss(step) for view in views])
        losses.sum().backward()

        def again(views=views, step=step):
            return torch.stack([view.loss(step) for view in views])

        stack.step(loss=losses.detach(), evaluate=again)
    for i, p in enumerate(stacked):
        for k, problem in enumerate(problems):
            assert torch.allclose(p[k], problem.params[i], rtol=0, atol=1e-12)
            for name, value in separate[k].state[problem.params[i]].items():
                if not name.startswith("lr_"):
                    ours = stack.state[p][name]
                    assert (
                        torch.allclose(ours[k], value, atol=1e-12)
                        if isinstance(value, Tensor)
                        else ours == value
                    )
    for k in range(3):
        assert [mean[k] for mean in stack.lr_mean] == pytest.approx(separate[k].lr_mean, rel=1e-12, abs=1e-15)
        assert [std[k] for std in stack.lr_std] == pytest.approx(separate[k].lr_std, rel=1e-9, abs=1e-15)
        assert stack.rates(model=k).mean == pytest.approx(separate[k].rates().mean, rel=1e-12)
        ours, theirs = stack.rates_by_model()[k], separate[k].rates()
        assert (ours.min, ours.max) == pytest.approx((theirs.min, theirs.max), rel=1e-12)
        assert ours.mean == pytest.approx(theirs.mean, rel=1e-12)
        assert ours.std == pytest.approx(theirs.std, rel=1e-9, abs=1e-15)


class NoHostSync(TorchDispatchMode):
    """Refuses every operation whose result the host would wait for."""

    WAITING = frozenset(
        {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2"}
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_watch_for_host_syncs_sees_one():
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        torch.ones(1).sum().item()


@promise
def test_no_host_sync(record: Record, monkeypatch: pytest.MonkeyPatch):
    """A step never waits for the device: not at the first step, not at a window's end, not to track the rates."""
    monkeypatch.setattr(core, "is_at_hand", lambda value: False)  # as if the CPU were a device
    problem = Problem()
    optimizer = record.make(problem.params, track_rates=True)
    for step in range(STEPS):
        problem.backward(step)
        with NoHostSync():
            problem.move(optimizer, step)


@promise
def test_no_values_are_looked_at(record: Record):
    """Steps on the meta device, where tensors have no values to look at: nor are any copied to the host."""
    params = [torch.zeros(s, device="meta", requires_grad=True) for s in ((5, 7), (7,), (1,))]
    optimizer = record.make(params, track_rates=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="meta")
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.zeros_like(p)
        loss = torch.zeros((), device="meta")
        optimizer.step(loss=loss, evaluate=lambda loss=loss: loss)


def declared_state(record: Record) -> dict[str, dict[str, str]]:
    table = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        problem = Problem(dtype)
        optimizer = record.make(problem.params)
        problem.run(optimizer, range(1))
        state = optimizer.state[problem.params[0]]
        table[str(dtype)] = {
            n: str(v.dtype if isinstance(v, Tensor) else type(v).__name__) for n, v in sorted(state.items())
        }
    return table


@promise
def test_state_is_frozen(record: Record):
    """Names and dtypes of the state are a file format: a change breaks old checkpoints and has to be meant.

    ``python tests/optim/test_promises.py`` writes the file anew.
    """
    assert declared_state(record) == json.loads(FROZEN.read_text())[record.name]


@promise
def test_state_survives_loading_in_its_dtype(record: Record):
    """torch would cast it to the parameter's: float32 rates of bfloat16 weights, 8-bit signs of float32 weights."""
    problem = Problem(torch.bfloat16)
    optimizer = record.make(problem.params)
    problem.run(optimizer, range(9))
    other = record.make(Problem(torch.bfloat16).params)
    other.load_state_dict(optimizer.state_dict())
    assert same_state(optimizer, other)
    dtypes = [v.dtype for *_, v in flat_state(optimizer) if isinstance(v, Tensor)]
    assert dtypes == [v.dtype for *_, v in flat_state(other) if isinstance(v, Tensor)]


if __name__ == "__main__":
    FROZEN.write_text(json.dumps({r.name: declared_state(r) for r in RECORDS}, indent=1) + "\n")
