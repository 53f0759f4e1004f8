"""CoRe and dropout-aware Rprop against slow references written from their authors' rules.

What this protects: the details that decide numbers and that no loss curve shows: the annealed beta and its power, the
plasticity taken from the old score, a sign that starts at +1, memory kept where the mask hides a weight.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from driving import assert_close, assert_same, parameters, problems, put_gradients, through_bytes, values
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CoReOracle, MaskedRprop, NoisyQuadratic, masked_rprop_update

from surefoot import CoRe, DropoutRprop

STEPS = 300


def run_against(opt, params, oracles, tasks, steps=STEPS, multiplier=1.0, rate_of=None):
    """Step optimizer and references side by side: step sizes exactly, weights to 1e-12, after every step."""
    for t in range(1, steps + 1):
        put_gradients(params, tasks, t)
        opt.step()
        for oracle, task in zip(oracles, tasks, strict=True):
            oracle.step(task.gradient(oracle.w, t), multiplier=multiplier)
        assert_close(params, [o.w for o in oracles], context=f"step {t}")
        assert_same(
            [opt.state[p]["rate"] for p in params], [rate_of(o) for o in oracles], f"step {t} rate of"
        )


def votes(oracles):
    return {sign: sum(o.signs[sign] for o in oracles) for sign in (-1, 0, 1)}


# -- CoRe --------------------------------------------------------------------------------------------------------------

CORE = {
    "defaults": {},
    "no-decay": {"weight_decay": 0.0},
    "quick-anneal": {"betas": (0.5, 0.9, 20.0, 0.95), "eps": 1e-4, "weight_decay": 0.01},
    "sign": {"betas": (0.7375, 0.8125, 250.0, -1.0)},
    "scores-without-frozen": {"score_history": 25},
    "frozen": {"score_history": 25, "frozen": 0.3, "weight_decay": 0.02},
    "frozen-sign": {"score_history": 10, "frozen": 0.2, "betas": (0.6, 0.8, 50.0, -1.0)},
    "all-frozen": {"score_history": 40, "frozen": 1.0},
    "wide": {"etas": (0.5, 1.2), "step_sizes": (1e-8, 1.0), "initial_rate": 0.02},
    "rate-outside-limits": {"initial_rate": 0.5, "step_sizes": (1e-5, 1e-2)},
}
by_core = pytest.mark.parametrize("options", CORE.values(), ids=CORE)


def core_oracle(start, options):
    spelled = dict(options)
    if "initial_rate" in spelled:
        spelled["lr"] = spelled.pop("initial_rate")
    if "step_sizes" in spelled:
        spelled["limits"] = spelled.pop("step_sizes")
    return CoReOracle(start, **spelled)


def core_rate(oracle):
    return oracle.s


@by_core
def test_core_follows_its_authors(options):
    tasks = problems(STEPS, seed=31)
    params = parameters(tasks)
    oracles = [core_oracle(task.start, options) for task in tasks]
    run_against(CoRe(params, **options), params, oracles, tasks, rate_of=core_rate)
    assert min(votes(oracles).values()) > 0
    assert (sum(o.frozen_votes for o in oracles) > 100) == (options.get("frozen", 0) > 0)


@pytest.mark.parametrize("name", ["defaults", "sign", "frozen"])
def test_core_lr_multiplies_the_step_and_its_decay(name):
    tasks = problems(STEPS, seed=32)
    params = parameters(tasks)
    oracles = [core_oracle(task.start, CORE[name]) for task in tasks]
    run_against(CoRe(params, lr=0.5, **CORE[name]), params, oracles, tasks, multiplier=0.5, rate_of=core_rate)


def test_core_parameter_groups():
    tasks = problems(STEPS, seed=33)
    params = parameters(tasks)
    other = {
        "initial_rate": 5e-3,
        "weight_decay": 0.0,
        "etas": (0.6, 1.1),
        "score_history": 10,
        "frozen": 0.5,
    }
    opt = CoRe([{"params": params[:3]}, {"params": params[3:], **other}])
    oracles = [core_oracle(task.start, {} if i < 3 else other) for i, task in enumerate(tasks)]
    run_against(opt, params, oracles, tasks, rate_of=core_rate)


def test_core_first_steps_by_hand():
    """Step 1 votes nothing and both moments are unbiased, so the move is the rate times the gradient's sign."""
    p = torch.nn.Parameter(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    opt = CoRe([p], initial_rate=0.01, step_sizes=(1e-6, 1.0), weight_decay=0.0, eps=0.0)
    p.grad = torch.tensor([3.0, -2.0, 1e-4], dtype=torch.float64)
    opt.step()
    torch.testing.assert_close(
        p.detach(), torch.tensor([0.99, -0.99, 1.99], dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert opt.state[p]["rate"].tolist() == [0.01] * 3
    # The averaged gradient keeps its sign for the first two and turns for the third.
    p.grad = torch.tensor([3.0, -2.0, -1.0], dtype=torch.float64)
    opt.step()
    assert opt.state[p]["rate"].tolist() == [0.01 * 1.2, 0.01 * 1.2, 0.01 * 0.7375]


def test_core_decay_is_in_proportion_to_the_move():
    """w <- w - lambda |d| w - d: a weight without a gradient does not decay."""
    p = torch.nn.Parameter(torch.tensor([10.0, 10.0], dtype=torch.float64))
    p.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
    CoRe([p], initial_rate=0.01, weight_decay=0.1, betas=(0.5, 0.5, 10.0, -1.0)).step()
    torch.testing.assert_close(
        p.detach(), torch.tensor([10 - 0.1 * 0.01 * 10 - 0.01, 10.0], dtype=torch.float64)
    )


def test_core_freezes_what_scored_highest():
    """Once the scores have a history the best quarter stands still, and the others go on."""
    p = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    opt = CoRe([p], score_history=5, frozen=0.25, weight_decay=0.0)
    slopes = torch.tensor([1.0, 8.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    for t in range(1, 7):
        before = p.detach().clone()
        p.grad = slopes.clone()
        opt.step()
        moved = (p != before).tolist()
        assert moved == ([True] * 8 if t <= 5 else [i not in (1, 4) for i in range(8)])


@pytest.mark.parametrize(
    "options", [CORE["defaults"], CORE["frozen"], CORE["sign"]], ids=["defaults", "frozen", "sign"]
)
def test_core_resumes_bit_for_bit(options):
    check_resume(lambda params: CoRe(params, **options))


def test_core_late_and_missing_gradients_and_a_frozen_parameter():
    check_absences(
        lambda params: CoRe(params, score_history=10, frozen=0.2),
        lambda start: CoReOracle(start, score_history=10, frozen=0.2),
        core_rate,
    )


# -- dropout-aware Rprop -----------------------------------------------------------------------------------------------

RPROP = {
    "defaults": {},
    "classic": {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
    "tight": {"etas": (0.5, 1.2), "step_sizes": (1e-3, 0.05), "initial_rate": 0.2},
}
by_rprop = pytest.mark.parametrize("options", RPROP.values(), ids=RPROP)


def rprop_oracle(start, options):
    spelled = dict(options)
    if "initial_rate" in spelled:
        spelled["lr"] = spelled.pop("initial_rate")
    if "step_sizes" in spelled:
        spelled["limits"] = spelled.pop("step_sizes")
    return MaskedRprop(start, **spelled)


def rprop_rate(oracle):
    return oracle.D


@by_rprop
def test_dropout_rprop_without_dropout_is_irprop_minus(options):
    """Zero gradients included: they leave the memory alone, where plain Rprop would forget."""
    tasks = problems(STEPS, seed=41)
    params = parameters(tasks)
    oracles = [rprop_oracle(task.start, options) for task in tasks]
    run_against(DropoutRprop(params, **options), params, oracles, tasks, rate_of=rprop_rate)
    assert min(votes(oracles).values()) > 100


def test_dropout_rprop_lr_multiplies_the_move_only():
    tasks = problems(STEPS, seed=42)
    params = parameters(tasks)
    oracles = [rprop_oracle(task.start, RPROP["classic"]) for task in tasks]
    opt = DropoutRprop(params, lr=0.25, **RPROP["classic"])
    run_against(opt, params, oracles, tasks, multiplier=0.25, rate_of=rprop_rate)


def test_dropout_rprop_parameter_groups():
    tasks = problems(STEPS, seed=43)
    params = parameters(tasks)
    other = {"etas": (0.5, 1.2), "step_sizes": (1e-5, 1.0), "initial_rate": 0.1}
    opt = DropoutRprop([{"params": params[:3]}, {"params": params[3:], **other}])
    oracles = [rprop_oracle(task.start, {} if i < 3 else other) for i, task in enumerate(tasks)]
    run_against(opt, params, oracles, tasks, rate_of=rprop_rate)


def test_dropout_rprop_by_hand():
    """The memory starts at +1: a first negative gradient is a reversal. Zero gradients keep what is remembered."""
    p = torch.nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))
    opt = DropoutRprop([p], initial_rate=0.5, etas=(0.5, 2.0), step_sizes=(0.125, 4.0))
    trace = []
    for g in [(3, -3), (2, -1), (0, 0), (0, -1), (5, 4), (-1, 4), (-1, 0), (-1, 4)]:
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
        trace.append((*p.tolist(), *opt.state[p]["rate"].tolist()))
    assert trace == [
        (-1.0, 0.0, 1.0, 0.25),  # agree with +1 | reversal of +1: no move
        (-3.0, 0.25, 2.0, 0.25),  # agree | nothing to compare with: move
        (-3.0, 0.25, 2.0, 0.25),  # zero: stand still and remember
        (-3.0, 0.75, 2.0, 0.5),  # zero again | agrees with what was before the zero
        (-7.0, 0.75, 4.0, 0.25),  # agrees with what was before two zeros | reversal
        (-7.0, 0.5, 2.0, 0.25),  # reversal | move, nothing to compare with
        (-5.0, 0.5, 2.0, 0.25),  # move, nothing to compare with | zero
        (-1.0, 0.0, 4.0, 0.5),  # agree | agrees with what was before the zero
    ]


def test_dropout_rprop_late_and_missing_gradients_and_a_frozen_parameter():
    check_absences(
        lambda params: DropoutRprop(params, etas=(0.5, 1.2)),
        lambda start: MaskedRprop(start, etas=(0.5, 1.2)),
        rprop_rate,
    )


class MaskWitness:
    """Follows one tensor under a mask that nobody shows, from the outside.

    For every weight it keeps all the memories p that some history of masks could have left, and drops those that the
    observed weight and step size rule out. Where both masks look the same (a reversal stands still either way) both
    memories are kept until a later step tells them apart. None left: no mask explains what the optimizer did.
    """

    def __init__(self, start, lr, etas, limits):
        self.w = np.array(start, dtype=np.float64)
        self.memories = {i: {(1.0, lr)} for i in np.ndindex(self.w.shape)}
        self.etas, self.limits = etas, limits
        self.shown = {0: 0, 1: 0}
        self.hidden_adapted = 0
        self.masks = []

    def see(self, g, w, D, masks=(0, 1)):
        """One step was taken with gradient ``g`` and left weights ``w`` and step sizes ``D``."""
        this_step = np.full(self.w.shape, np.nan)
        for i, memories in self.memories.items():
            possible = {}
            for p, old in memories:
                for mask in masks:
                    w_new, p_new, D_new = masked_rprop_update(
                        self.w[i], p, old, g[i], mask, self.etas, self.limits
                    )
                    if D_new == D[i] and math.isclose(w_new, w[i], rel_tol=1e-12, abs_tol=1e-12):
                        possible.setdefault((p_new, D_new), set()).add((mask, D_new != old))
            assert possible, (
                f"no mask in {masks} explains weight {i}: {memories}, gradient {g[i]}, moved to {w[i]}"
            )
            explanations = set().union(*possible.values())
            if len({mask for mask, _ in explanations}) == 1 and g[i] != 0:
                mask = next(iter(explanations))[0]
                this_step[i] = mask
                self.shown[mask] += 1
                self.hidden_adapted += mask == 0 and all(changed for _, changed in explanations)
            self.memories[i] = set(possible)
        self.w = np.array(w)
        self.masks.append(this_step)


@pytest.mark.parametrize("dropout", [0.2, 0.5, 0.8])
def test_some_mask_explains_every_step(dropout):
    """With dropout each update is the modified rule under a mask: hidden weights stand still, keep their memory and go
    on adapting their step size; biases are never hidden; the mask hides the share it was asked to."""
    etas, limits = (0.5, 1.2), (1e-9, 50.0)
    torch.manual_seed(0)
    tasks = problems(STEPS, shapes=[(8, 6), (3, 2, 2, 2), (9,), ()], seed=44)
    params = parameters(tasks)
    opt = DropoutRprop(params, initial_rate=0.01, etas=etas, step_sizes=limits, dropout=dropout)
    witnesses = [MaskWitness(task.start, 0.01, etas, limits) for task in tasks]
    for t in range(1, STEPS + 1):
        put_gradients(params, tasks, t)
        gradients = [p.grad.numpy().copy() for p in params]
        opt.step()
        for p, g, witness in zip(params, gradients, witnesses, strict=True):
            masks = (0, 1) if p.ndim >= 2 else (1,)
            witness.see(g, p.detach().numpy(), opt.state[p]["rate"].numpy(), masks)
    for witness in witnesses[:2]:
        draws = sum(witness.shown.values())
        assert draws > 1000
        spread = 5 * math.sqrt(dropout * (1 - dropout) / draws)
        assert witness.shown[0] / draws == pytest.approx(dropout, abs=spread)
        assert witness.hidden_adapted > 10, "no hidden weight adapted its step size"


def hidden(params, gradient=1.0, **options):
    """Which weights stood still in each of 40 steps, for gradients that never turn."""
    opt = DropoutRprop(params, **options)
    seen = []
    for _ in range(40):
        before = values(params)
        for p in params:
            p.grad = torch.full_like(p, gradient)
        opt.step()
        seen.append([(p == b).clone() for p, b in zip(params, before, strict=True)])
    return seen


def fresh(*shapes):
    return [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]


def test_masks_are_independent_over_steps_tensors_and_weights():
    torch.manual_seed(0)
    seen = hidden(fresh((20, 20), (20, 20)), dropout=0.5)
    first = torch.stack([s[0] for s in seen]).double()
    second = torch.stack([s[1] for s in seen]).double()
    for a, b in (
        (first, second),
        (first[1:], first[:-1]),
        (first[:, 1:], first[:, :-1]),
        (first[..., 1:], first[..., :-1]),
    ):
        correlation = ((a - 0.5) * (b - 0.5)).mean() * 4
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_the_seed_decides_the_masks():
    runs = [hidden(fresh((6, 6), (4, 5)), dropout=0.5, seed=seed) for seed in (1, 1, 2)]

    def flat(run):
        return torch.cat([mask.flatten() for step in run for mask in step])

    assert torch.equal(flat(runs[0]), flat(runs[1]))
    assert not torch.equal(flat(runs[0]), flat(runs[2]))


def test_masks_leave_torchs_random_stream_alone():
    """A model's own dropout must not change because the optimizer draws masks."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    hidden(fresh((6, 6)), dropout=0.5)
    assert torch.equal(torch.rand(3), expected)


def test_without_dropout_nothing_is_hidden():
    assert not any(mask.any() for step in hidden(fresh((6, 6), (5,)), dropout=0.0) for mask in step)


def test_dropout_rprop_resumes_bit_for_bit():
    check_resume(lambda params: DropoutRprop(params, etas=(0.5, 1.2)))


def test_dropout_rprop_resumes_its_masks_bit_for_bit():
    """The masks of the resumed run are those that the uninterrupted one would have drawn."""
    check_resume(lambda params: DropoutRprop(params, etas=(0.5, 1.2), dropout=0.4, seed=5))


# -- both --------------------------------------------------------------------------------------------------------------


def check_resume(build, steps=24):
    tasks = problems(steps, seed=51)
    whole = parameters(tasks)
    opt = build(whole)
    for t in range(1, steps + 1):
        put_gradients(whole, tasks, t)
        opt.step()
    for cut in range(14):
        before = parameters(tasks)
        opt = build(before)
        for t in range(1, cut + 1):
            put_gradients(before, tasks, t)
            opt.step()
        after = [torch.nn.Parameter(w) for w in values(before)]
        resumed = build(after)
        resumed.load_state_dict(through_bytes(opt.state_dict()))
        for t in range(cut + 1, steps + 1):
            put_gradients(after, tasks, t)
            resumed.step()
        assert_same(after, whole, f"cut at {cut}:")


def check_absences(build, oracle_of, rate_of, steps=100):
    """Late and missing gradients skip the parameter's own count; a frozen parameter stays."""
    tasks = problems(steps, seed=52)
    params = parameters(tasks)
    params[2].requires_grad_(False)
    start = params[2].detach().clone()
    opt = build(params)
    oracles = [oracle_of(task.start) for task in tasks]
    for t in range(1, steps + 1):
        absent = {2} | ({3} if t <= 15 else set()) | ({4} if t % 4 == 0 else set())
        put_gradients(params, tasks, t)
        for i in absent:
            params[i].grad = None
        opt.step()
        for i, (oracle, task) in enumerate(zip(oracles, tasks, strict=True)):
            if i not in absent:
                oracle.step(task.gradient(oracle.w, t))
        assert_close(params, [o.w for o in oracles], context=f"step {t}")
    here = [i for i in range(len(params)) if i != 2]
    assert_same([opt.state[params[i]]["rate"] for i in here], [rate_of(oracles[i]) for i in here], "rate of")
    assert torch.equal(params[2].detach(), start)


finite = st.floats(-100, 100, allow_nan=False, width=32)
streams = st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=30)
BUILDERS = {
    "core": lambda p, **k: CoRe(p, score_history=3, frozen=0.5, **k),
    "core-sign": lambda p, **k: CoRe(p, betas=(0.7, 0.8, 10.0, -1.0), **k),
    "dropout-rprop": lambda p, **k: DropoutRprop(p, dropout=0.3, **k),
}
builders = st.sampled_from(sorted(BUILDERS))


def four_weights():
    return torch.nn.Parameter(torch.tensor([[0.5, -3.0], [0.0, 2.0]], dtype=torch.float64))


def feed(opt, p, stream, sign=1.0):
    """Give the optimizer the gradients of ``stream`` one after the other, masks drawn from the same random stream."""
    torch.manual_seed(0)
    for g in stream:
        p.grad = sign * torch.tensor(g, dtype=torch.float64).reshape(2, 2)
        opt.step()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=builders, initial=st.sampled_from([1e-6, 1e-2, 40.0]), stream=streams)
def test_rates_stay_within_the_step_sizes(name, initial, stream):
    """Both clip in every step, the first included."""
    p = four_weights()
    opt = BUILDERS[name]([p], initial_rate=initial, step_sizes=(1e-4, 0.5))
    for g in stream:
        feed(opt, p, [g])
        assert bool(((opt.state[p]["rate"] >= 1e-4) & (opt.state[p]["rate"] <= 0.5)).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=builders, stream=streams)
def test_lr_zero_moves_nothing(name, stream):
    p = four_weights()
    before = p.detach().clone()
    feed(BUILDERS[name]([p], lr=0.0), p, stream)
    assert torch.equal(p, before)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=builders, stream=streams)
def test_maximizing_f_is_minimizing_minus_f(name, stream):
    up, down = four_weights(), four_weights()
    feed(BUILDERS[name]([up], maximize=True), up, stream)
    feed(BUILDERS[name]([down]), down, stream, sign=-1.0)
    assert_same([up], [down])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    stream=streams,
    options=st.sampled_from([{}, {"score_history": 3, "frozen": 0.5}, {"betas": (0.7, 0.8, 10.0, -1.0)}]),
)
def test_core_on_any_gradients(stream, options):
    """Ties among the scores, zeros and repeats included. Frozen weights are the delicate part: old scores decide."""
    p = four_weights()
    opt, oracle = CoRe([p], **options), CoReOracle(p.detach().numpy(), **options)
    for g in stream:
        feed(opt, p, [g])
        oracle.step(np.reshape(g, (2, 2)))
    assert_close([p], [oracle.w])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(stream=streams)
def test_dropout_rprop_on_any_gradients(stream):
    p = four_weights()
    opt, oracle = DropoutRprop([p], etas=(0.5, 1.2)), MaskedRprop(p.detach().numpy(), etas=(0.5, 1.2))
    for g in stream:
        feed(opt, p, [g])
        oracle.step(np.reshape(g, (2, 2)))
    assert_same([p], [oracle.w])
    assert_same([opt.state[p]["rate"]], [oracle.D])


def test_the_references_by_hand():
    """The mask argument of the reference: hidden weights stand still, remember and adapt."""
    oracle = MaskedRprop([0.0], lr=0.5, etas=(0.5, 2.0), limits=(0.125, 4.0))
    trace = []
    for g, mask in [(3, 1), (2, 0), (-1, 0), (2, 1), (-2, 1), (-2, 0), (-2, 1)]:
        oracle.step(np.array([float(g)]), mask=np.array([mask]))
        trace.append((oracle.w[0], oracle.p[0], oracle.D[0]))
    assert trace == [
        (-1.0, 3.0, 1.0),
        (-1.0, 3.0, 2.0),
        (-1.0, 3.0, 1.0),
        (-3.0, 2.0, 2.0),
        (-3.0, 0.0, 1.0),
        (-3.0, 0.0, 1.0),
        (-2.0, -2.0, 1.0),
    ]
    task = NoisyQuadratic((3,), 1)
    core = CoReOracle(task.start, lr=0.01, weight_decay=0.0, eps=0.0)
    core.step(np.array([2.0, -5.0, 0.5]))
    assert core.w == pytest.approx(task.start - 0.01 * np.array([1, -1, 1]), rel=1e-14)
