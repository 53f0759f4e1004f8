"""The optimizer's own manners: what it refuses, what it reports, and sums over the parameters."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surefoot
from surefoot import AdamUpd, CoRe, DropoutRprop, SelfTuning, SGDUpd, SRprop
from surefoot.optim import directions, rules
from surefoot.optim.space import Space


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.ones(shape, requires_grad=True) for shape in shapes or [(3, 2)]]


def step(optimizer: SelfTuning, gradient: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, gradient)
    optimizer.step()


def test_the_limit_of_the_norm_is_no_rounded_one():
    """A plain number limits float64 gradients to its own digits, and a stack's models as it would each by itself."""
    for limit, models in ((0.3, None), (torch.tensor([0.3, math.inf], dtype=torch.float64), 2)):
        p = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        step(SelfTuning([p], directions.SGD(), rules.Constant(1.0), max_norm=limit, models=models), 7.0)
        norm = 7 * math.sqrt(6 if models is None else 3)
        assert p[0].tolist() == pytest.approx([-7 * 0.3 / (norm + 1e-6)] * 3, rel=1e-15)
        assert p[1].tolist() == pytest.approx(p[0].tolist() if models is None else [-7.0] * 3, rel=1e-15)


# ------------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    (lambda p: SRprop(p, initial_rate=0.0), "initial_rate must be above 0, not 0.0."),
    (lambda p: SRprop(p, initial_rate=math.nan), "initial_rate must be above 0, not nan."),
    (lambda p: SRprop(p, window=0), "window must be a whole number of steps, at least 1, not 0."),
    (lambda p: SRprop(p, window=2.5), "window must be a whole number of steps, at least 1, not 2.5."),
    (lambda p: SRprop(p, etas=(1.2, 0.5)), r"etas must be a pair with 0 < etas\[0\] <= 1 <= etas\[1\]"),
    (lambda p: SRprop(p, etas=0.5), r"etas must be a pair"),
    (lambda p: SRprop(p, step_sizes=(1.0, 0.1)), r"step_sizes must be a pair with"),
    (lambda p: SRprop(p, undo="maybe"), "undo must be one of exact, none, subtract, not 'maybe'."),
    (lambda p: SRprop(p, weight_decay=-1), "weight_decay must be at least 0, not -1."),
    (lambda p: SRprop(p, lr=-1.0), "lr must be a finite number of at least 0, not -1.0."),
    (lambda p: SRprop(p, lr="big"), "lr must be a finite number of at least 0, not 'big'."),
    (lambda p: SGDUpd(p, nesterov=True), "nesterov needs a momentum above 0."),
    (lambda p: SGDUpd(p, momentum=1.0), r"momentum must be in \[0, 1\), not 1.0."),
    (lambda p: AdamUpd(p, betas=(0.9, 1.0)), r"betas must be a pair with both in \[0, 1\)"),
    (lambda p: AdamUpd(p, eps=-1e-8), "eps must be at least 0"),
    (lambda p: CoRe(p, betas=(0.9, 0.9, 0.0, 0.9)), r"betas\[2\] \(c\) must be above 0, not 0.0."),
    (lambda p: CoRe(p, frozen=0.1), "frozen needs a score_history above 0"),
    (lambda p: CoRe(p, frozen=2.0, score_history=3), r"frozen must be in \[0, 1\], not 2.0."),
    (lambda p: DropoutRprop(p, dropout=1.0), r"dropout must be in \[0, 1\), not 1.0."),
    (lambda p: DropoutRprop(p, seed=-1), "seed must be a whole number, at least 0, not -1."),
    (lambda p: SRprop(p, window=math.inf), "window must be a whole number of steps, at least 1, not inf."),
    (lambda p: SRprop(p, lr=math.inf), "lr must be a finite number"),
    (lambda p: SRprop(p, maximize="no"), "maximize must be True or False, not 'no'."),
    (lambda p: AdamUpd(p, amsgrad="no"), "amsgrad must be True or False, not 'no'."),
    (lambda p: SGDUpd(p, nesterov="no"), "nesterov must be True or False, not 'no'."),
    (lambda p: SRprop(p, lr=torch.ones(3)), r"lr as a tensor must be 0-d, not of shape \(3,\)."),
    (
        lambda p: SRprop([torch.ones(2, 3)], initial_rate=torch.ones(3), models=2),
        r"initial_rate as a tensor must be 0-d or of shape \(2,\), not of shape \(3,\).",
    ),
    (
        lambda p: DropoutRprop([torch.ones(2, 3)], dropout=torch.ones(2), models=2),
        r"dropout must be in \[0, 1\)",
    ),
    (
        lambda p: SelfTuning(p, directions.SGD(), rules.CoReRates(score_history=3)),
        "CoReRates with these options needs a direction that keeps exp_avg.",
    ),
    (lambda p: SRprop(p, models=0), "models must be None or a whole number of at least 1, not 0."),
    (lambda p: SRprop(p, models=2), r"leading axis of that length, not shape \(3, 2\)."),
    (
        lambda p: SRprop([p[0].to(torch.complex64).detach().requires_grad_()]),
        "complex parameters are not supported",
    ),
    (lambda p: SRprop([{"params": p, "windw": 3}]), "'windw' of a parameter group: did you mean 'window'?"),
    (lambda p: SRprop([{"params": p, "zzz": 3}]), "'zzz' of a parameter group: it is none of"),
    (lambda p: SRprop([{"params": p, "window": -3}]), "window must be a whole number of steps"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_bad_options_are_refused_in_a_sentence(make, sentence):
    """Naming the option and its range, at once."""
    with pytest.raises(ValueError, match=sentence):
        make(weights())


@pytest.mark.parametrize("window", [0, math.inf, "many"])
def test_a_refused_group_is_not_kept(window):
    optimizer = SRprop(weights())
    with pytest.raises(ValueError, match="window must be"):
        optimizer.add_param_group({"params": weights(), "window": window})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "parts",
    [
        (rules.Constant(), directions.SGD()),
        (directions.SGD, rules.Constant()),
        ("adam", rules.Constant()),
        (directions.SGD(), 0.1),
    ],
)
def test_what_is_no_direction_or_rule_is_refused(parts):
    with pytest.raises(TypeError, match=r"must be one of surefoot.optim\.(directions|rules)"):
        SelfTuning(weights(), *parts)


def test_a_pair_may_be_a_list():
    """As JSON gives it back; in a stack it is still one number for each model."""
    betas = [torch.tensor([0.9, 0.1]), 0.999]
    results = []
    for pair in (betas, tuple(betas)):
        p = torch.ones(2, 2, requires_grad=True)
        optimizer = SelfTuning(
            [{"params": [p], "betas": pair}], directions.Adam(), rules.Constant(0.1), models=2
        )
        for gradient in (1.0, -0.3):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert torch.equal(results[0][:, 0], results[0][:, 1])
    assert results[0][0, 0] != results[0][1, 0]


def test_an_lr_meant_for_torch_is_warned_about():
    """``lr=1e-3`` is what users of torch type; here it would be a thousandth of the rule's own rates."""
    with pytest.warns(UserWarning, match="it is not the initial rate"):
        AdamUpd(weights(), lr=1e-3)


def test_options_of_schedulers_and_names_of_groups_are_let_through():
    """Others write into groups too."""
    groups = [{"params": weights(), "name": "head", "initial_lr": 1.0}]
    assert SRprop(groups).param_groups[0]["name"] == "head"


def test_direction_and_rule_may_not_share_an_option():
    class Twin(rules.Constant):
        def options(self):
            return {"rate": 1.0, "weight_decay": 0.0}

    with pytest.raises(ValueError, match="two parts of this optimizer have an option named 'weight_decay'"):
        SelfTuning(weights(), directions.SGD(), Twin())


def test_a_state_of_another_optimizer_is_refused_and_nothing_is_lost():
    ours, other = SRprop(weights(), window=2), AdamUpd(weights())
    step(ours), step(other)
    before = ours.state_dict()
    with pytest.raises(
        ValueError, match="is that of a Adam x Window optimizer, and this one is Sign x Window"
    ):
        ours.load_state_dict(other.state_dict())
    unlabelled = other.state_dict()
    del unlabelled["param_groups"][0]["cell"]
    with pytest.raises(ValueError, match="reads the option 'amsgrad' of the loaded state's group"):
        ours.load_state_dict(unlabelled)
    assert ours.state_dict()["state"][0]["rate"].equal(before["state"][0]["rate"])
    with pytest.raises(ValueError, match=r"rate of parameter 0 has shape \(3, 2\), the parameter \(4,\)"):
        SRprop(weights((4,)), window=2).load_state_dict(before)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SRprop([{"params": weights()}, {"params": weights()}]).load_state_dict(before)


def test_loading_fills_options_that_an_older_checkpoint_lacks():
    """A checkpoint from before an option existed gets its default."""
    old = SRprop(weights(), window=7)
    step(old)
    saved = old.state_dict()
    del saved["param_groups"][0]["undo"]
    new = SRprop(weights())
    new.load_state_dict(saved)
    assert new.param_groups[0]["undo"] == "exact"
    assert new.param_groups[0]["window"] == 7


def test_state_follows_the_ids_of_the_checkpoint():
    """As torch pairs it: groups in another order, and names for ids, as distributed checkpoints have them."""
    first, second = weights((3,), (3,))
    old = AdamUpd([{"params": [first]}, {"params": [second]}], window=2)
    for _ in range(5):
        first.grad, second.grad = torch.full((3,), 0.1), torch.full((3,), -2.0)
        old.step()
    saved = old.state_dict()
    saved["param_groups"].reverse()
    swapped = AdamUpd([{"params": weights((3,))}, {"params": weights((3,))}], window=2)
    swapped.load_state_dict(saved)
    states = [swapped.state[group["params"][0]] for group in swapped.param_groups]
    assert torch.equal(states[0]["exp_avg"], old.state[second]["exp_avg"])
    assert torch.equal(states[1]["exp_avg"], old.state[first]["exp_avg"])

    named = {
        "state": {"b": saved["state"][1]},
        "param_groups": [
            {**group, "params": [name]} for group, name in zip(saved["param_groups"], "ba", strict=True)
        ],
    }
    swapped.load_state_dict(named)
    assert torch.equal(
        swapped.state[swapped.param_groups[0]["params"][0]]["exp_avg"], old.state[second]["exp_avg"]
    )


def test_a_state_of_torchs_own_is_refused_before_anything_is_changed():
    p = weights()[0]
    theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    theirs.step()
    ours = SRprop([p])
    step(ours)
    before = ours.state[p]["rate"].clone()
    with pytest.raises(ValueError, match="of the loaded state's group"):
        ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[p]["rate"], before)
    assert ours.param_groups[0]["lr"] == 1.0


def test_options_of_a_checkpoint_are_checked_too():
    optimizer = SRprop(weights())
    step(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["window"] = 0
    with pytest.raises(ValueError, match="window must be"):
        optimizer.load_state_dict(saved)


def test_lr_zero_holds_an_open_window():
    """A window that was turning back when lr became 0 is not undone: nothing moves."""
    p = torch.zeros(1, requires_grad=True)
    for lr in (0.0, torch.tensor(0.0)):
        optimizer = SRprop([p], initial_rate=0.1, window=4)
        for gradient in [1.0] * 4 + [-1.0] * 2:
            step(optimizer, gradient)
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = lr
        for gradient in [-1.0] * 2:
            step(optimizer, gradient)
        assert torch.equal(p, before)


def test_a_window_that_is_changed_counts_from_the_last_one():
    """Two steps of 2, then windows of 6: the second window turned back, so its rate halves and it is undone."""
    p = torch.zeros(1, requires_grad=True)
    optimizer = SRprop([p], initial_rate=0.1, window=2)
    for _ in range(2):
        step(optimizer, 1.0)
    optimizer.param_groups[0]["window"] = 6
    for _ in range(5):
        step(optimizer, -1.0)
        assert optimizer.rates().mean == pytest.approx(0.1)
    step(optimizer, -1.0)
    assert optimizer.rates().mean == pytest.approx(0.05)
    assert p.item() == pytest.approx(-0.2)


def test_the_undo_of_16_bit_weights_is_exact():
    """Weight and compensation together stand where the window began; float32 does the same."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.ones(1, dtype=dtype, requires_grad=True)
        optimizer = SRprop([p], initial_rate=1e-4, window=5)
        for gradient in [1.0] * 5 + [-1.0] * 5 + [1.0] * 5 + [-1.0] * 5:
            step(optimizer, gradient)
        ends.append(p.detach().float() + optimizer.state[p].get("compensation", 0.0))
    assert ends[0].item() == pytest.approx(1 - 5e-4 - 5 * 0.5e-4, rel=1e-6)
    assert torch.equal(*ends)


def test_the_smallest_steps_add_up_in_bf16():
    """4,000 steps of a millionth: what 16 bits beside the weight could not hold."""
    p = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SelfTuning([p], directions.Sign(), rules.Constant(1e-6))
    for _ in range(4000):
        step(optimizer)
    assert 1 - (p.detach().float() + optimizer.state[p]["compensation"]).item() == pytest.approx(
        4e-3, rel=0.05
    )


def test_a_model_that_becomes_a_16_bit_one_goes_on():
    model = torch.nn.Linear(3, 2)
    optimizer = SRprop(model.parameters(), window=2)
    for _ in range(3):
        step(optimizer)
    model.bfloat16()
    for _ in range(3):
        step(optimizer)
    again = SRprop(
        torch.nn.Linear(3, 2).parameters(), window=2
    )  # and a checkpoint of it loads into a float32 one
    again.load_state_dict(optimizer.state_dict())
    step(again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_keeps_its_options_in_full_precision(dtype):
    """Rates for each model are not rounded to the weights' 16 bits."""
    p = torch.ones(2, 4, dtype=dtype, requires_grad=True)
    rates, lrs = torch.tensor([1e-3, 3e-3]), torch.tensor([1.0, 0.7])
    optimizer = SGDUpd([p], initial_rate=rates, lr=lrs, models=2)
    step(optimizer)
    assert torch.equal(optimizer.state[p]["rate"][:, 0], rates)
    assert optimizer.rates(model=1).mean == pytest.approx(2.1e-3, rel=1e-6)


def test_hooks_around_loading_see_whole_states():
    optimizer, seen = SRprop(weights()), []
    step(optimizer)
    other = SRprop(weights())
    other.register_load_state_dict_pre_hook(lambda o, s: seen.append(len(s["state"])))
    other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [1, 1]


# ------------------------------------------------------------------------------------------------------ the rates


def test_rates_before_the_first_step_are_the_initial_ones():
    optimizer = AdamUpd([{"params": weights(), "lr": 0.5}, {"params": weights(), "initial_rate": 0.1}])
    rates = optimizer.rates()
    assert (rates.min, rates.max) == pytest.approx((0.5e-3, 0.1))
    assert rates.mean == pytest.approx((0.5e-3 + 0.1) / 2)


def test_rates_include_lr_and_count_every_weight_once():
    """4 weights at 2e-2 x 0.5 and 2 at 1e-1: mean, unbiased s.d. and histogram worked by hand."""
    optimizer = SRprop(
        [
            {"params": weights((4,)), "lr": 0.5, "initial_rate": 2e-2},
            {"params": weights((2,)), "initial_rate": 0.1},
        ]
    )
    step(optimizer)
    rates = optimizer.rates(bins=2)
    mean = (4 * 0.01 + 2 * 0.1) / 6
    assert rates.mean == pytest.approx(mean)
    assert rates.std == pytest.approx(math.sqrt((4 * (0.01 - mean) ** 2 + 2 * (0.1 - mean) ** 2) / 5))
    assert rates.histogram == (4, 2)
    assert rates.edges == pytest.approx((0.01, 10**-1.5, 0.1))


def test_rates_of_one_value_are_one_bin():
    rates = SelfTuning(weights(), directions.SGD(), rules.Constant(0.25)).rates()
    assert (rates.mean, rates.std, rates.histogram, rates.edges) == (0.25, 0.0, (6,), (0.25, 0.25))


def test_a_frozen_parameter_has_no_say_in_the_rates():
    moving, frozen = weights((2,), (100,))
    frozen.requires_grad_(False)
    optimizer = SRprop([moving, frozen], initial_rate=0.1, window=1, etas=(0.5, 1.5), track_rates=True)
    for _ in range(3):
        moving.grad = torch.ones_like(moving)
        optimizer.step()
    assert optimizer.rates().mean == pytest.approx(0.1 * 1.5**2)
    assert optimizer.lr_mean == pytest.approx([0.1, 0.1, 0.15, 0.225])
    assert not optimizer.state.get(frozen)


def test_the_history_follows_the_parameter_with_most_steps():
    """A parameter that missed a gradient has windows of its own, but no entries of its own."""
    first, late = weights((2,), (2,))
    optimizer = SRprop([first, late], window=4, track_rates=True)
    for t in range(40):
        first.grad = torch.ones(2)
        late.grad = None if t == 1 else torch.ones(2)
        optimizer.step()
    assert optimizer.lr_counter == 11


def test_a_constant_rate_is_tracked_with_its_schedule():
    optimizer = SelfTuning(weights(), directions.SGD(), rules.Constant(0.1), track_rates=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        step(optimizer)
        scheduler.step()
    assert optimizer.lr_mean == pytest.approx([0.1, 0.1, 0.05, 0.025])


def test_rates_of_nothing_and_of_zero():
    """No weight: no rates. lr = 0: rates of 0, in no bin."""
    empty = torch.zeros(0, requires_grad=True)
    assert SRprop([empty]).rates().histogram == ()
    rates = SRprop(
        [{"params": weights((4,)), "lr": 0.0}, {"params": weights((2,)), "initial_rate": 0.1}]
    ).rates()
    assert (rates.min, rates.histogram) == (0.0, (2,))
    assert rates.edges == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="bins must be"):
        SRprop(weights()).rates(bins=0)
    with pytest.raises(ValueError, match="model is for a stack"):
        SRprop(weights()).rates(model=1)
    with pytest.raises(ValueError, match="rates_by_model is for a stack"):
        SRprop(weights()).rates_by_model()
    assert math.isnan(SRprop([torch.zeros(2, 0, requires_grad=True)], models=2).rates_by_model()[1].max)


def test_untracked_rates_say_how_to_track_them():
    with pytest.raises(AttributeError, match="track_rates=True"):
        _ = SRprop(weights()).lr_mean


def test_group_lr_is_the_multiplier():
    """What a logger of ``group["lr"]`` logs: the number that schedulers move, times which every rate is taken."""
    optimizer = SRprop(weights(), lr=0.5, initial_rate=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    step(optimizer)
    assert optimizer.param_groups[0]["params"][0].detach().flatten()[0] == pytest.approx(1 - 0.5 * 0.1)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.05])
    assert optimizer.rates().mean == pytest.approx(0.05 * 0.1)


# ------------------------------------------------------------------------------------------------------ the space


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_sums_and_dots_are_those_of_one_long_vector(lists):
    tensors = [torch.tensor(values, dtype=torch.float64) for values in lists]
    together = torch.cat(tensors)
    space = Space()
    assert space.sum(tensors).item() == pytest.approx(together.sum().item(), abs=1e-9)
    assert space.dot(tensors, tensors).item() == pytest.approx(together.dot(together).item(), rel=1e-12)
    mean, std = space.mean_std(tensors)
    assert mean.item() == pytest.approx(together.mean().item(), abs=1e-9)
    if len(together) > 1:
        assert std.item() == pytest.approx(together.std().item(), rel=1e-6, abs=1e-6)


def test_sums_of_a_stack_are_each_models_own():
    tensors = [torch.randn(3, 4, 2), torch.randn(3, 5), torch.randn(3)]
    stack, one = Space(3), Space()
    for k in range(3):
        own = [t[k] for t in tensors]
        assert stack.sum(tensors)[k] == one.sum(own)
        assert stack.dot(tensors, tensors)[k] == one.dot(own, own)
        for ours, theirs in zip(stack.mean_std(tensors), one.mean_std(own), strict=True):
            assert ours[k] == pytest.approx(theirs.item(), rel=1e-12)


def test_sums_are_made_in_float64():
    """A million ones and a tiny one, which float32 would lose."""
    tensors = [torch.ones(10**6), torch.full((1,), 1e-4)]
    assert Space().sum(tensors).item() == pytest.approx(10**6 + 1e-4, abs=1e-9)


def test_no_tensors_sum_to_zero():
    assert Space().sum([]).item() == 0
    assert Space(2).sum([]).tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------ the package


def test_importing_surefoot_does_not_wait_for_torch():
    code = "import sys, surefoot; assert 'torch' not in sys.modules; surefoot.SRprop; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    assert all(getattr(surefoot, name) is not None for name in surefoot.__all__)
    assert surefoot.optim.directions.Adam() == directions.Adam()
    assert dir(surefoot) == sorted(surefoot.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = surefoot.nothing


def test_the_optimizers_need_torch_alone():
    """``pip install surefoot`` without the laboratory's packages must do to train."""
    code = (
        "import sys\n"
        "for name in ('numpy', 'scipy', 'sklearn', 'plotly', 'rich', 'typer', 'sqlalchemy', 'pooch', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "import torch, surefoot\n"
        "p = torch.ones(2, requires_grad=True)\n"
        "optimizer = surefoot.AdamUpd([p], window=1, track_rates=True)\n"
        "for _ in range(3):\n"
        "    p.grad = torch.ones(2)\n"
        "    optimizer.step()\n"
        "optimizer.rates(), optimizer.lr_mean, optimizer.load_state_dict(optimizer.state_dict())\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
