"""The search itself: what samplers are told and propose, and which trials go on."""

import itertools
import math
import subprocess
import sys

import pytest

from surefoot.lab import search as module
from surefoot.lab import spaces
from surefoot.lab.runs import Trial
from surefoot.lab.search import SAMPLERS, Known, Outcome, known, promoted, propose, ranked, rungs, told
from surefoot.lab.spaces import Choices, Range

INF = math.inf
SPACE = {
    "rate": Range(1e-5, 10.0, log=True),
    "window": Range(10, 1000, log=True, whole=True),
    "betas": Choices(((0.9, 0.99), (0.8, 0.9))),
    "undo": Choices(("exact", None, True, 1.5)),
}
FINITE = {"window": Range(1, 3, whole=True), "undo": Choices(("a", "b", "c", "d"))}


@pytest.fixture
def outcome(make_run):
    def make(number, losses, granted=None, whole=5, pruned=False, seeds=None):
        seeds = seeds or range(len(losses))
        runs = tuple(make_run(loss, seed=seed) for seed, loss in zip(seeds, losses, strict=True))
        trial = Trial(
            number, {"rate": 0.1 * (number + 1)}, len(losses) if granted is None else granted, pruned
        )
        return Outcome(trial, runs, whole)

    return make


class TestOutcome:
    def test_its_state(self, outcome):
        assert outcome(0, [1.0, 2.0], granted=5).state == "open"
        assert outcome(0, [1.0] * 5).state == "complete"
        assert outcome(0, [1.0], pruned=True).state == "pruned"
        assert [outcome(0, [1.0] * n, granted=2).waits for n in (1, 2)] == [False, True]
        assert not outcome(0, [1.0] * 5).waits
        assert not outcome(0, [1.0] * 2, pruned=True).waits

    def test_its_loss_is_the_mean_over_the_seeds_with_its_spread(self, outcome):
        loss = outcome(0, [1.0, 2.0, 6.0]).loss
        assert (loss.n, loss.mean) == (3, 3.0)
        assert loss.sd == pytest.approx(math.sqrt(7))
        assert outcome(0, [1.0, INF]).loss.mean == INF
        assert outcome(0, [1.0, INF]).diverged == 1

    def test_the_first_seeds_are_the_first_by_number(self, outcome):
        half_done = outcome(0, [1.0, 5.0, 7.0], seeds=[0, 2, 3], granted=5)
        assert half_done.loss_of(2).n == 1  # seed 1 is still missing
        assert half_done.loss_of(3).mean == 3.0

    def test_the_best_come_first_and_the_diverged_last(self, outcome):
        found = ranked(
            [
                outcome(0, [2.0] * 5),
                outcome(1, [1.0], pruned=True),  # better, but by one seed only
                outcome(2, [1.5] * 5),
                outcome(3, [0.1, 0.1, 0.1, INF, INF]),
                outcome(4, [0.1, 0.1, 0.1, 0.1, INF]),
                outcome(5, [0.1], granted=5),
            ]
        )
        assert [o.trial.number for o in found] == [2, 0, 4, 3, 1]


class TestHalving:
    @pytest.mark.parametrize(
        ("seeds", "halving", "expected"),
        [
            (5, None, [5]),
            (5, 3, [1, 2, 5]),
            (9, 3, [1, 3, 9]),
            (2, 2, [1, 2]),
            (10, 4, [1, 3, 10]),
            (3, 9, [1, 3]),
        ],
    )
    def test_rungs(self, seeds, halving, expected):
        assert rungs(seeds, halving) == expected

    def test_the_best_third_goes_on(self, outcome):
        waiting = [outcome(number, [float(number)]) for number in range(7)]
        assert promoted(waiting, 3) == {number: number < 2 for number in range(7)}

    def test_at_least_the_best_goes_on(self, outcome):
        assert promoted([outcome(0, [2.0]), outcome(1, [1.0])], 3) == {0: False, 1: True}
        assert promoted([outcome(0, [2.0])], 3) == {0: True}

    def test_those_before_count_by_the_seeds_of_this_rung(self, outcome):
        before = [
            outcome(0, [1.0, 9.0, 9.0, 9.0, 9.0]),
            outcome(1, [1.1], pruned=True),
            outcome(2, [1.2], granted=5),
        ]
        assert promoted([*before, outcome(3, [1.05])], 3) == {3: False}
        assert promoted([*before, outcome(3, [0.9])], 3) == {3: True}

    def test_a_diverged_one_never_goes_on(self, outcome):
        assert promoted([outcome(0, [INF]), outcome(1, [INF])], 2) == {0: False, 1: False}

    def test_who_is_not_at_a_rung_is_not_decided_on(self, outcome):
        assert (
            promoted([outcome(0, [1.0], granted=2), outcome(1, [1.0] * 5), outcome(2, [1.0], pruned=True)], 2)
            == {}
        )

    def test_equals_go_on_together(self, outcome):
        assert promoted([outcome(number, [1.0]) for number in range(4)], 4) == dict.fromkeys(range(4), True)


class TestTold:
    def test_ordinary_losses_as_they_are(self):
        assert told([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]

    def test_the_diverged_and_the_far_off_at_a_ceiling_above_the_median(self):
        values = told([1.0, 2.0, 3.0, 1e9, INF])  # the median of the finite is 2.5, the best 1
        assert values == [1.0, 2.0, 3.0, 7.0, 7.0]

    def test_where_all_are_equal_the_diverged_are_still_worse(self):
        for losses in ([2.0, 2.0, INF], [0.0, INF], [-3.0, -3.0, INF]):
            values = told(losses)
            assert math.isfinite(values[-1])
            assert values[-1] > values[0]

    def test_where_all_diverged_nothing_is_better(self):
        assert told([INF, INF]) == [0.0, 0.0]

    def test_nothing(self):
        assert told([]) == []

    def test_trials_under_way_are_known_without_a_value(self, outcome):
        trials = known([outcome(0, [1.0] * 5), outcome(1, [7.0], granted=5), outcome(2, [3.0], pruned=True)])
        assert [trial.value for trial in trials] == [1.0, None, 3.0]


def loss_of(setting):
    """Diverges at high rates; best at 1e-2 with a window of 100 and the first of the betas."""
    if setting["rate"] > 1:
        return INF
    return (
        1
        + (math.log10(setting["rate"]) + 2) ** 2
        + math.log10(setting["window"] / 100) ** 2
        + (setting["betas"] == (0.8, 0.9))
    )


def searched(sampler, trials, space=SPACE, at_once=5, diverged=told):
    settings, losses = [], []
    while len(settings) < trials:
        values = diverged(losses)
        found = propose(
            None, sampler, space, [Known(s, v) for s, v in zip(settings, values, strict=True)], at_once
        )
        assert found
        settings += found
        losses += map(loss_of, found)
    return settings, losses


class TestProposing:
    @pytest.mark.parametrize("sampler", ["tpe", "random"])
    def test_proposals_are_in_the_space_as_its_own_values_and_new(self, sampler):
        settings, _ = searched(sampler, 40)
        for setting in settings:
            assert setting.keys() == SPACE.keys()
            assert 1e-5 <= setting["rate"] <= 10
            assert float(f"{setting['rate']:.3e}") == setting["rate"]
            assert isinstance(setting["window"], int)
            assert setting["betas"] in SPACE["betas"].values
            assert any(setting["undo"] is value for value in SPACE["undo"].values)  # True is not 1
        assert len({repr(setting) for setting in settings}) == 40

    @pytest.mark.parametrize("sampler", ["tpe", "random"])
    def test_the_same_trials_give_the_same_proposals(self, sampler):
        assert searched(sampler, 20) == searched(sampler, 20)

    @pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
    def test_a_search_begins_alike_whatever_the_losses_are_going_to_be(self, sampler):
        first = propose(None, sampler, SPACE, [], 5)
        assert propose(None, "random", SPACE, [], 5) == first
        assert len(first) == 5

    def test_trials_under_way_are_kept_away_from(self):
        done, _ = searched("tpe", 20)
        trials = [
            Known(setting, value) for setting, value in zip(done, told([*map(loss_of, done)]), strict=True)
        ]
        (alone,) = propose(None, "tpe", SPACE, trials, 1)
        (beside,) = propose(None, "tpe", SPACE, [*trials, Known(alone, None)], 1)
        assert alone != beside

    def test_tpe_finds_what_chance_does_not(self):
        _, guided = searched("tpe", 60)
        _, chance = searched("random", 60)
        assert sorted(guided[30:])[15] < sorted(chance[30:])[15]
        assert min(guided) < 1.25

    @pytest.mark.slow
    def test_gp_does_too(self):
        _, guided = searched("gp", 25)
        assert min(guided) < 1.1

    def test_tpe_learns_where_runs_diverge(self):
        space = {**SPACE, "rate": Range(1e-2, 1e5, log=True)}  # five of seven decades diverge
        _, losses = searched("tpe", 60, space)
        diverged = sum(map(math.isinf, losses[10:]))
        assert diverged < 50 * 5 / 7 / 2  # less than half of what chance would

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_finite_space_is_tried_to_its_end_each_point_once(self, sampler):
        trials = []
        while found := propose(None, sampler, FINITE, trials, 5):
            trials += [Known(setting, 1.0 + setting["window"]) for setting in found]
        assert len(trials) == spaces.size(FINITE) == 12
        assert {(t.setting["window"], t.setting["undo"]) for t in trials} == {
            (point["window"], point["undo"]) for point in spaces.points(FINITE)
        }

    def test_a_grid_goes_on_where_it_was(self):
        grid = list(spaces.points(FINITE))
        trials = [Known(setting, None) for setting in grid[:5]]
        assert propose(None, "grid", FINITE, trials, 4) == grid[5:9]
        assert propose(None, "grid", FINITE, trials[1:], 2) == [grid[0], grid[5]]  # what someone left out

    def test_a_sampler_that_repeats_itself_does_not_hold_the_search_up(self, monkeypatch):
        stuck = {**FINITE, "rate": Range(1e-5, 1.0, log=True)}
        point = {"window": 1, "undo": "a", "rate": 0.1}
        real = module._sampled

        def repeating(sampler, space, trials):
            return itertools.repeat(point) if sampler == "tpe" else real(sampler, space, trials)

        monkeypatch.setattr(module, "_sampled", repeating)
        found = propose(None, "tpe", stuck, [Known(point, 1.0)], 5)
        assert len({repr(setting) for setting in found}) == 5
        assert point not in found

    def test_nothing_is_said_and_no_torch_is_loaded_but_for_gp(self):
        code = (
            "import sys\n"
            "from surefoot.lab.search import *\n"
            "from surefoot.lab.spaces import Range\n"
            "space = {'rate': Range(1e-5, 1.0, log=True)}\n"
            "trials = [Known({'rate': 0.01 * i}, float(i)) for i in range(1, 15)]\n"
            "for sampler in ('tpe', 'random'): propose(None, sampler, space, trials, 3)\n"
            "assert 'torch' not in sys.modules\n"
        )
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
