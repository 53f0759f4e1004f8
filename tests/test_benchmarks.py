"""The benchmarks whose pages make claims: runs are kept, the published rule is the published one, words follow numbers."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from surefoot.lab.tasks.images import sigmoid_network

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import hyperreg_rates as hyperreg
import insensitivity
import lossgrad_threshold as threshold
from _shared import Ledger, batches, fresh_model, run_missing, task_of

JOB = {"task": "digits", "rate": 0.1}


class TestLedger:
    def test_what_was_kept_is_there_again_and_nothing_else(self, tmp_path):
        Ledger(tmp_path / "new" / "runs").add(JOB, {"loss": math.inf})
        ledger = Ledger(tmp_path / "new" / "runs")
        assert ledger.get(dict(reversed(JOB.items()))) == {"loss": math.inf}
        assert ledger.get({**JOB, "rate": 0.2}) is None

    def test_a_line_that_was_being_written_is_dropped(self, tmp_path):
        path = tmp_path / "runs"
        ledger = Ledger(path)
        ledger.add(JOB, {"loss": 1.0})
        whole = path.read_bytes()
        ledger.add({**JOB, "rate": 0.2}, {"loss": 2.0})
        path.write_bytes(path.read_bytes()[:-9])
        assert Ledger(path).get({**JOB, "rate": 0.2}) is None
        assert path.read_bytes() == whole

    def test_only_what_is_missing_is_run(self, tmp_path):
        ledger = Ledger(tmp_path / "runs")
        ledger.add(JOB, {"loss": 1.0})
        run_missing([JOB], lambda **_: pytest.fail("it is there"), ledger, workers=1)


def test_batches_go_through_every_epoch_in_another_order():
    numbers = torch.arange(10)
    found = [inputs.tolist() for inputs, _ in batches((numbers, numbers), 4, seed=0, number=6)]
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2]
    first, second = ([number for batch in epoch for number in batch] for epoch in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert found != [inputs.tolist() for inputs, _ in batches((numbers, numbers), 4, seed=1, number=6)]


class TestPublished:
    """Against the parabola f = a x^2 / 2: the step size goes up exactly below 1 / a, and the weight moves by h a x."""

    @pytest.mark.parametrize(("h", "rises"), [(0.49, True), (0.51, False), (1.5, False)])
    def test_one_step(self, h, rises):
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(model.weight, 3.0)
        rule = insensitivity.Published(model, h, c=1.05)
        assert rule.step(lambda: model.weight.square().sum()) == 9.0  # a = 2
        assert rule.step_size() == pytest.approx(h * 1.05 if rises else h / 1.05)
        assert model.weight.item() == pytest.approx(3 - h * 6)

    def test_a_loss_that_is_no_number_raises_the_step_size(self):
        model = nn.Linear(1, 1)
        rule = insensitivity.Published(model, 0.1, c=1.05)
        rule.step(lambda: model.weight.sum() * math.nan)
        assert rule.step_size() == pytest.approx(0.105)

    def test_a_change_too_small_to_show_lowers_it(self):
        model = nn.Linear(1, 1, bias=False)
        rule = insensitivity.Published(model, 1e-12, c=1.05)
        rule.step(lambda: 1 + model.weight.square().sum())
        assert rule.step_size() == pytest.approx(1e-12 / 1.05)

    def test_is_what_surefoot_says_it_is_where_nothing_is_extreme(self):
        task = task_of("digits", None)
        model, own = fresh_model(task, 0), fresh_model(task, 0)
        published = insensitivity.Published(model, 1e-2, c=1.05)
        surefoot = insensitivity.Surefoot(own, 1e-2, ramp=1, retract=False)
        for inputs, targets in batches(task.train, 24, seed=0, number=40):
            before = published.step_size(), published.step(lambda x=inputs, y=targets: task.loss(model(x), y))
            found = surefoot.step_size(), surefoot.step(lambda x=inputs, y=targets: task.loss(own(x), y))
            assert found == pytest.approx(before, rel=1e-3)


def digits_run(rule, initial_rate, count=40):
    return insensitivity.run("digits", rule, insensitivity.settings(rule), initial_rate, 0, count, data=None)


@pytest.mark.parametrize("rule", insensitivity.RULES)
def test_a_run_tells_every_batch_and_how_it_ended(rule):
    found = digits_run(rule, 0.1)
    assert len(found["step_size"]) == len(found["loss"]) == 40
    assert found["step_size"][0] == 0.1
    assert len(set(found["loss"])) == 40
    assert 0 < found["validation_accuracy"] < 1
    assert not found["lost"]


def test_a_run_that_explodes_ends_there():
    found = digits_run(insensitivity.PUBLISHED, 1e30)
    assert found["lost"]
    assert len(found["loss"]) < 40


def test_a_run_is_known_by_every_option_of_its_rule():
    given = insensitivity.settings(insensitivity.DEFAULT)
    assert given["up"] == 1.05
    assert {"down", "threshold", "ramp", "retract", "lower_bound"} <= given.keys()
    assert "initial_rate" not in given  # it is a key of its own


def made_run(first, last, sizes, lost=False):
    losses = [first] * 400 + [last] * 400
    return {
        "lost": lost,
        "step_size": sizes,
        "loss": losses,
        "validation_loss": last,
        "validation_accuracy": 0.5,
    }


LEARNT = made_run(2.3, 1.0, [0.1] * 800)
COLLAPSED = made_run(2.3, 2.3, [1e-7] * 400 + [1e-12] * 400)
STUCK = made_run(2.3, 2.31, [5.0] * 800)
LOST = made_run(2.3, math.nan, [1.0] * 3, lost=True)


class TestInsensitivityPage:
    @pytest.mark.parametrize(
        ("runs", "outcome"),
        [
            ((LEARNT, LEARNT), "learnt"),
            ((LEARNT, STUCK), "mixed"),
            ((STUCK, STUCK), "stuck"),
            ((COLLAPSED, COLLAPSED), "collapsed"),
            ((LEARNT, LOST), "not finite"),
        ],
    )
    def test_outcomes(self, runs, outcome):
        assert insensitivity.Point(1e-7, runs).outcome == outcome

    def test_says_what_the_numbers_say(self):
        rates = insensitivity.RATES
        published = [COLLAPSED, COLLAPSED, *[LEARNT] * 6, STUCK, LOST]
        lines = {
            insensitivity.PUBLISHED: published,
            insensitivity.DEFAULT: [LEARNT] * 9 + [STUCK],
        }
        results = {
            ("cifar10", rule): [
                insensitivity.Point(r, (run, run)) for r, run in zip(rates, runs, strict=True)
            ]
            for rule, runs in lines.items()
        }
        text = insensitivity.page(results, ["cifar10"], seeds=2, count=800, stem="x")
        assert (
            "**published rule** (2 seeds) learnt from 6 of 10 initial rates (1e-6, 1e-5, 1e-4, 1e-3, 0.01 and 0.1)"
            in text
        )
        assert "a tenth of its start): 1e-8 and 1e-7." in text
        assert "at least one seed): 10." in text
        assert "**LossGrad()** (2 seeds) learnt from 9 of 10 initial rates (1e-8, " in text
        assert "Of the 6 initial rates in both, 6 end alike (learnt in every seed, or not)." in text
        assert "1.14 to 1.72 times" in text  # 0.1 / 0.088 and 0.1 / 0.058
        assert "| 10 | – | not finite | not finite | 5 | 2.310 ± 0 (stuck) | 2.310 ± 0 |" in text
        figures = (
            insensitivity.steps_figure(results, ["cifar10"]),
            insensitivity.loss_figure(results, ["cifar10"]),
        )
        for figure in figures:
            json.loads(figure.to_json())


class TestHyperregPage:
    def test_says_what_the_numbers_say(self):
        def record(name, initial):
            final = 2.0 / (1 + initial) if initial <= 1 else 100 * initial
            if initial == 1e4 and name.startswith("RKL3"):
                final = math.inf
            if name == hyperreg.DEFAULT:
                final = 0.5
            final *= 1.02 if (name, initial) == ("H2", 1.0) else 1
            return {"first": 2.4, "final": final, "largest": max(2.4, final), "validation_loss": final}

        results = {
            name: {r: hyperreg.Point(r, (record(name, r),)) for r in hyperreg.RATES}
            for name in hyperreg.METHODS
        }
        assert len(results) == 14
        text = hyperreg.page(results, 10_000, 40, 1, "x")
        assert "0 % at 1e-4" in text
        assert "2 % at 1 (H2). Within 1 %: 1e-4, 1e-3, 0.01, 0.1" in text
        assert "GD 1 at 1; the 12 rules 1 to 1.02 at 1" in text
        assert "above that with GD at 10, 100, 1e3 and 1e4" in text
        assert "final loss 0.5 from rates of 1 and more" in text
        assert "above its first loss nowhere" in text
        assert text.count("not finite |") == 2
        json.loads(hyperreg.figure(results).to_json())

    def test_a_run_trains_and_one_that_explodes_is_told(self, monkeypatch):
        draw = torch.Generator().manual_seed(0)
        images, labels = torch.rand(60, 784, generator=draw), torch.randint(10, (60,), generator=draw)
        task = hyperreg.task_of("digits", None)
        made = replace(
            task,
            model=sigmoid_network,
            train=(images, labels),
            validation=(images, labels),
            loss=nn.functional.nll_loss,
        )
        monkeypatch.setattr(hyperreg, "task_of", lambda *_: made)
        fine = hyperreg.run("RKL1", 0.1, seed=0, patterns=60, epochs=20, data=None)
        assert fine["final"] < fine["first"]
        assert fine["largest"] >= fine["first"]
        lost = hyperreg.run(hyperreg.GD, 1e38, seed=0, patterns=60, epochs=20, data=None)
        assert (lost["final"], lost["largest"]) == (math.inf, math.inf)


class TestThreshold:
    """The rule by which LOSSGRAD's default was chosen, on made runs."""

    @staticmethod
    def results(losses):
        """Runs of every candidate on every task, alike but for the candidate's own losses (first loss 1)."""
        return {
            (task, candidate): [{"first": 1.0, "last": x, "validation": x} for x in losses[candidate]]
            for task in threshold.SIZES
            for candidate in threshold.CANDIDATES
        }

    def test_fewest_dead_first_then_the_lowest_loss(self):
        fast, few_dead, slow, *others = threshold.CANDIDATES
        losses = {
            fast: [0.1] * 20 + [1.0] * 10,
            few_dead: [0.2] * 29 + [math.inf],
            slow: [0.3] * 30,
            **dict.fromkeys(others, [0.1] * 10 + [1.0] * 20),
        }
        made = self.results(losses)
        for runs in (
            made.values()
        ):  # an infinite loss has no geometric mean: a network that is lost counts as a dead one
            runs[-1]["last"] = min(runs[-1]["last"], 1.0)
        deaths, ratios, running = threshold.judged(made)
        tasks = len(threshold.SIZES)
        assert deaths[fast] == 10 * tasks
        assert deaths[few_dead] == tasks
        assert deaths[slow] == 0
        assert threshold.told_apart(tasks, 0, 30 * tasks) > 0.05  # 5 of 150
        assert running == [few_dead, slow]
        assert ratios[few_dead] < ratios[slow]
        assert f"**{threshold.named(*few_dead)}**" in threshold.page(made, seeds=5)

    def test_a_network_that_has_learnt_is_not_dead_and_one_without_numbers_is(self):
        assert not threshold.dead({"first": 2.0, "last": 1.0})
        assert threshold.dead({"first": 2.0, "last": 2.0})
        assert threshold.dead({"first": 2.0, "last": math.nan})

    def test_a_run(self, monkeypatch):
        monkeypatch.setattr(threshold, "BATCHES", 120)
        record = threshold.run("cancer-deep", {"threshold": 0.4, "down": 1.1}, 1e-4, 0, None)
        assert 0 < record["last"] < record["first"]
