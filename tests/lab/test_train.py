"""One run does what it says: every number of it is checked against a loop written by hand, or against an identity."""

import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from surefoot import SelfTuning
from surefoot.lab.catalogue import resolve
from surefoot.lab.errors import UserError
from surefoot.lab.plan import parse_optimizers
from surefoot.lab.runs import RunSpec
from surefoot.lab.schedules import SCHEDULES
from surefoot.lab.streams import stream_seed
from surefoot.lab.tasks import Task
from surefoot.lab.train import timed, train

PATTERNS, FEATURES, CLASSES = 37, 5, 3


def make_task(**changes):
    """A small classification that has a metric, dropout in its model and more validation data than go in one piece."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(PATTERNS + 1100, FEATURES, generator=generator)
    targets = (inputs @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(dim=1)
    task = Task(
        name="small",
        model=lambda: nn.Sequential(
            nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, CLASSES)
        ),
        train=(inputs[:PATTERNS], targets[:PATTERNS]),
        validation=(inputs[PATTERNS:], targets[PATTERNS:]),
        loss=nn.functional.cross_entropy,
        metric=lambda outputs, targets: (outputs.argmax(dim=1) == targets).double().mean(),
    )
    return replace(task, **changes)


def make_spec(optimizer="sgd", rate=0.1, batch_size=6, epochs=3, seed=0):
    (request,) = parse_optimizers(optimizer)
    return RunSpec("small", "v", request.optimizer, resolve(request), rate, batch_size, epochs, seed)


def numbers(result):
    """What must be the same when a run is repeated."""
    return {
        name: value
        for name, value in result.to_dict().items()
        if name not in ("spec", "seconds", "step_seconds", "environment")
    }


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestByHand:
    def test_is_a_plain_torch_loop_bit_for_bit(self):
        task, spec = make_task(), make_spec(rate=0.3, batch_size=6, epochs=3, seed=4)
        torch.manual_seed(stream_seed(4, "weights"))
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        order = torch.Generator().manual_seed(stream_seed(4, "order"))
        torch.manual_seed(stream_seed(4, "training"))
        train_loss, validation_loss, accuracy = [], [], []
        for _ in range(3):
            model.train()
            total = 0.0
            for index in torch.randperm(PATTERNS, generator=order).split(6):
                loss = nn.functional.cross_entropy(model(task.train[0][index]), task.train[1][index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(index)
            model.eval()
            with torch.no_grad():
                outputs, targets = model(task.validation[0]), task.validation[1]
                validation_loss.append(nn.functional.cross_entropy(outputs.double(), targets).item())
                accuracy.append((outputs.argmax(dim=1) == targets).double().mean().item())
            train_loss.append(total / PATTERNS)

        result = train(task, spec)
        # Float64 sums of the very same float32 losses: a single other bit in a weight would show.
        assert result.train_loss == pytest.approx(train_loss, rel=1e-14)
        assert result.validation_loss == pytest.approx(validation_loss, rel=1e-6)
        assert result.validation_metric == pytest.approx(accuracy, rel=1e-14)
        assert result.patterns == [PATTERNS, 2 * PATTERNS, 3 * PATTERNS]
        assert (result.status, result.steps) == ("finished", 3 * math.ceil(PATTERNS / 6))
        for curve in (result.rate_mean, result.rate_min, result.rate_max):
            assert curve == pytest.approx([0.3] * 3, rel=1e-7)
        assert result.rate_std == pytest.approx([0] * 3, abs=1e-9)
        assert result.spec is spec

    def test_batch_norm_evaluates_with_its_running_statistics(self):
        def model():
            return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

        task, spec = make_task(model=model), make_spec(epochs=1, batch_size=10)
        torch.manual_seed(stream_seed(0, "weights"))
        by_hand = model()
        optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
        order = torch.Generator().manual_seed(stream_seed(0, "order"))
        for index in torch.randperm(PATTERNS, generator=order).split(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(task.train[0][index]), task.train[1][index]).backward()
            optimizer.step()
        by_hand.eval()
        loss = nn.functional.cross_entropy(by_hand(task.validation[0]), task.validation[1]).item()
        assert train(task, spec).validation_loss == pytest.approx([loss], rel=1e-6)

    def test_a_frozen_parameter_stays_and_has_no_rate(self):
        def model():
            made = nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES))
            made[0].requires_grad_(False)
            made.register_forward_pre_hook(lambda module, _: first.append(module[0].weight.detach().clone()))
            return made

        first = []
        result = train(make_task(model=model), make_spec("srprop[window=2]"))
        assert result.status == "finished"
        assert all(torch.equal(weight, first[0]) for weight in first)


class TestSeeds:
    def test_the_same_seed_is_the_same_run(self):
        for optimizer in ("adam", "srprop[window=4]", "dropout-rprop[dropout=0.3]"):
            task, spec = make_task(), make_spec(optimizer, rate=0.01)
            assert numbers(train(task, spec)) == numbers(train(task, spec))

    def test_another_seed_has_other_weights_another_order_and_another_dropout(self):
        weights, orders, masks = [], [], []
        for seed in range(3):
            weights.append(first_weights(seed))
            orders.append(tuple(order_of_patterns(seed=seed)))
            masks.append(first_mask(seed))
        for drawn in (weights, orders, masks):
            assert len(set(drawn)) == 3

    def test_optimizers_with_one_seed_are_a_pair(self):
        assert (
            len({first_weights(1, o) for o in ("sgd", "adam", "srprop", "dropout-rprop[dropout=0.5]")}) == 1
        )
        assert (
            len(
                {
                    tuple(order_of_patterns(o))
                    for o in ("sgd", "adam", "adam-upd", "dropout-rprop[dropout=0.5]")
                }
            )
            == 1
        )
        assert len({first_mask(1, o) for o in ("sgd", "adam", "srprop")}) == 1

    def test_every_epoch_is_another_permutation(self):
        order = order_of_patterns(epochs=4)
        epochs = [tuple(order[start : start + PATTERNS]) for start in range(0, 4 * PATTERNS, PATTERNS)]
        assert all(sorted(epoch) == list(range(PATTERNS)) for epoch in epochs)
        assert len(set(epochs)) == 4

    def test_no_epoch_of_one_seed_is_an_epoch_of_another(self):
        first, second = order_of_patterns(seed=0, epochs=6), order_of_patterns(seed=1, epochs=6)
        epochs = {
            tuple(order[i : i + PATTERNS])
            for order in (first, second)
            for i in range(0, 6 * PATTERNS, PATTERNS)
        }
        assert len(epochs) == 12

    def test_the_callers_random_state_neither_matters_nor_changes(self):
        results = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(numbers(train(make_task(), make_spec())))
            timed(make_task(), make_spec(), moment=0.001)
            assert torch.equal(torch.get_rng_state(), before)
        assert results[0] == results[1]

    def test_a_failing_run_gives_the_random_state_back_too(self):
        np.random.seed(1)
        random.seed(1)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with pytest.raises(ZeroDivisionError):
            train(make_task(loss=lambda o, t: 1 / 0), make_spec())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]

    @pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
    def test_rule_pythons_and_numpys_random_numbers_too(self, draw):
        drawn = []

        def model():
            drawn.append(("weights", draw()))
            made = nn.Linear(FEATURES, CLASSES)
            made.register_forward_pre_hook(lambda *_: drawn.append(("training", draw())))
            return made

        met = {}
        for optimizer, seed in (("sgd", 0), ("adam", 0), ("sgd", 1)):
            drawn.clear()
            train(make_task(model=model), make_spec(optimizer, rate=0.01, epochs=1, seed=seed))
            met[optimizer, seed] = list(drawn)
            draw()  # what goes on between runs does not matter
        assert met["sgd", 0] == met["adam", 0]
        assert not set(met["sgd", 0]) & set(met["sgd", 1])
        assert met["sgd", 0][0][1] != met["sgd", 0][1][1]  # two streams


class TestData:
    def test_are_left_alone_by_a_model_that_changes_its_input(self):
        class InPlace(nn.Linear):
            def forward(self, x):
                return super().forward(x.mul_(2))

        task = make_task(model=lambda: InPlace(FEATURES, CLASSES))
        before = [tensor.clone() for tensor in (*task.train, *task.validation)]
        first = numbers(train(task, make_spec()))
        for tensor, copy in zip((*task.train, *task.validation), before, strict=True):
            assert torch.equal(tensor, copy)
        assert numbers(train(task, make_spec())) == first


def first_weights(seed, optimizer="sgd"):
    """The weights that the first batch met."""
    met = []

    class Watched(nn.Linear):
        def forward(self, x):
            met.append(self.weight.detach().clone())
            return super().forward(x)

    train(
        make_task(model=lambda: Watched(FEATURES, CLASSES)),
        make_spec(optimizer, rate=0.01, epochs=1, seed=seed),
    )
    return tuple(met[0].flatten().tolist())


def first_mask(seed, optimizer="sgd"):
    """What dropout did in the first batch."""
    met = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            mask = nn.functional.dropout(torch.ones(20), 0.5, self.training)
            met.append(tuple(mask.tolist()))
            return self.linear(x)

    train(make_task(model=Watched), make_spec(optimizer, rate=0.01, epochs=1, seed=seed))
    return met[0]


def counting_task(block, patterns=PATTERNS):
    """Its loss is the mean of the batch's pattern numbers, whatever the weights are."""
    count = torch.arange(float(patterns)).view(-1, 1)
    return Task(
        name="counting",
        model=lambda: nn.Linear(1, 1),
        train=(count, count),
        validation=(count, count),
        loss=lambda outputs, targets: (0 * outputs).sum() + targets.mean(),
        block=block,
    )


def order_of_patterns(optimizer="sgd", seed=0, epochs=1):
    """The numbers of the patterns in the order in which they were seen."""
    result = train(
        counting_task(block=1), make_spec(optimizer, rate=0.01, batch_size=1, epochs=epochs, seed=seed)
    )
    return [int(number) for number in result.train_loss]


class TestBlocks:
    @settings(max_examples=60, deadline=None, database=None)
    @given(
        patterns=st.integers(1, 25),
        batch_size=st.integers(1, 30),
        block=st.none() | st.integers(1, 70),
        epochs=st.integers(1, 3),
    )
    @example(patterns=11, batch_size=10, block=5, epochs=2)  # a block with two batches after one with none
    def test_a_batch_belongs_to_the_block_in_which_it_ends(self, patterns, batch_size, block, epochs):
        result = train(
            counting_task(block, patterns), make_spec(rate=1.0, batch_size=batch_size, epochs=epochs)
        )
        block = block or patterns
        ends = [
            epoch * patterns + min(start + batch_size, patterns)
            for epoch in range(epochs)
            for start in range(0, patterns, batch_size)
        ]
        last_in_block = {math.ceil(end / block): end for end in ends}
        assert result.patterns == list(last_in_block.values())
        assert result.steps == len(ends)
        # The blocks' means, weighted by their patterns, add up to every pattern's number once an epoch.
        spans = [end - start for start, end in pairwise([0, *result.patterns])]
        total = sum(loss * span for loss, span in zip(result.train_loss, spans, strict=True))
        assert total == pytest.approx(epochs * patterns * (patterns - 1) / 2, rel=1e-5)
        # Validation loss is the mean over all patterns, in one piece or in several.
        assert result.validation_loss == pytest.approx([(patterns - 1) / 2] * len(spans), rel=1e-6)

    def test_without_a_block_there_is_a_point_each_epoch(self):
        assert train(make_task(), make_spec(epochs=4)).patterns == [PATTERNS * k for k in range(1, 5)]

    def test_losses_are_taken_before_the_update_and_in_training_mode(self):
        modes = []

        class Watched(nn.Linear):
            def forward(self, x):
                modes.append((self.training, torch.is_grad_enabled()))
                return super().forward(x)

        task = make_task(model=lambda: Watched(FEATURES, CLASSES), block=12)
        result = train(task, make_spec(batch_size=6, epochs=1))
        chunks = math.ceil(1100 / 500)
        pieces = [[(True, True)] * 2 + [(False, False)] * chunks] * 3 + [
            [(True, True)] + [(False, False)] * chunks
        ]
        assert modes == [mode for piece in pieces for mode in piece]
        torch.manual_seed(stream_seed(0, "weights"))
        model = nn.Linear(FEATURES, CLASSES)
        index = torch.randperm(PATTERNS, generator=torch.Generator().manual_seed(stream_seed(0, "order")))[:6]
        initial = nn.functional.cross_entropy(model(task.train[0][index]), task.train[1][index])
        first = train(replace(task, block=6), make_spec(batch_size=6, epochs=1)).train_loss[0]
        assert first == pytest.approx(initial.item(), rel=1e-14)
        assert result.train_loss[0] != first

    def test_a_task_without_a_metric_has_no_such_curve(self):
        result = train(make_task(metric=None), make_spec())
        assert list(result.validation_metric) == []
        assert len(result.validation_loss) == 3

    def test_the_rates_of_a_window_rule_are_followed(self):
        result = train(make_task(), make_spec("srprop[window=3]", rate=0.01, epochs=6))
        assert result.rate_std[0] > 0
        assert result.rate_min[-1] < 0.01 < result.rate_max[-1]
        for low, mean, high in zip(result.rate_min, result.rate_mean, result.rate_max, strict=True):
            assert low <= mean <= high


class TestSchedule:
    def test_is_torchs_scheduler_moved_once_a_step(self):
        task, spec = make_task(), make_spec("sgd[schedule=cosine]", rate=0.3, batch_size=6, epochs=3)
        torch.manual_seed(stream_seed(0, "weights"))
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * math.ceil(PATTERNS / 6))
        order = torch.Generator().manual_seed(stream_seed(0, "order"))
        torch.manual_seed(stream_seed(0, "training"))
        train_loss, rates = [], []
        for _ in range(3):
            total = 0.0
            for index in torch.randperm(PATTERNS, generator=order).split(6):
                loss = nn.functional.cross_entropy(model(task.train[0][index]), task.train[1][index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                used = optimizer.param_groups[0]["lr"]
                schedule.step()
                total += loss.item() * len(index)
            train_loss.append(total / PATTERNS)
            rates.append(used)

        result = train(task, spec)
        # Not to the bit: lr is a multiplier here, and the product rounds once more.
        assert result.train_loss == pytest.approx(train_loss, rel=1e-6)
        for curve in (result.rate_mean, result.rate_min, result.rate_max):
            assert curve == pytest.approx(rates, rel=1e-5, abs=0)
        assert 0 < result.rate_mean[-1] < 0.01 * result.rate_mean[0]

    @pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "none"])
    def test_shows_in_the_rates_of_a_rule_too(self, name):
        plain = train(make_task(), make_spec("srprop[window=1000]", rate=0.01, epochs=6))
        result = train(make_task(), make_spec(f"srprop[window=1000,schedule={name}]", rate=0.01, epochs=6))
        assert plain.rate_mean == pytest.approx([0.01] * 6)
        assert result.rate_mean[-1] < 0.6 * max(result.rate_mean) <= 0.6 * 0.01 * (1 + 1e-6)
        assert result.train_loss != plain.train_loss

    def test_none_is_the_run_without_one(self):
        plain, none = make_spec("adam", rate=0.01), make_spec("adam[schedule=none]", rate=0.01)
        assert plain.key == none.key
        assert numbers(train(make_task(), plain)) == numbers(train(make_task(), none))

    def test_is_timed_as_it_runs(self):
        spec = make_spec("sgd[schedule=onecycle]", epochs=1, batch_size=30)  # as many steps as it is made for
        assert timed(make_task(), spec).seconds > 0


def test_validation_is_at_the_averaged_weights_and_training_is_not():
    plain = train(make_task(), make_spec("lossgrad", rate=0.3))
    averaged = train(make_task(), make_spec("lossgrad[average=mean]", rate=0.3))
    assert averaged.train_loss == plain.train_loss
    assert averaged.rate_mean == plain.rate_mean
    assert averaged.validation_loss != plain.validation_loss


class TestDivergence:
    def test_ends_the_run_with_finite_curves(self):
        task = make_task(model=lambda: nn.Linear(FEATURES, CLASSES), loss=lambda o, t: (o**2).mean(), block=6)
        result = train(task, make_spec(rate=2.0, epochs=50))
        assert result.status == "diverged"
        assert 0 < len(result.patterns) < result.steps < 50 * math.ceil(PATTERNS / 6)
        curves = {name: value for name, value in result.to_dict().items() if isinstance(value, list)}
        assert {len(curve) for curve in curves.values()} == {len(result.patterns)}
        assert all(math.isfinite(number) for curve in curves.values() for number in curve)

    def test_in_the_first_block_leaves_empty_curves(self):
        result = train(make_task(loss=lambda o, t: o.mean() * math.inf), make_spec())
        assert (result.status, list(result.patterns), list(result.train_loss)) == ("diverged", [], [])
        json.dumps(result.to_dict(), allow_nan=False)

    def test_counts_also_where_only_the_validation_loss_sees_it(self):
        def loss(outputs, targets):
            return outputs.mean() * (math.nan if len(outputs) > 6 else 1)

        result = train(make_task(loss=loss), make_spec())
        assert (result.status, list(result.patterns)) == ("diverged", [])

    @pytest.mark.parametrize("where", ["training", "validation"])
    def test_a_loss_that_raises_on_nan_is_divergence_too(self, where):
        def loss(outputs, targets):
            if not torch.isfinite(outputs).all():
                raise ValueError("all elements of input should be between 0 and 1")
            return outputs.mean() * 1e38

        # The first step ends at infinity; what comes next is either the second batch or the end of the block.
        block = PATTERNS if where == "training" else 6
        result = train(make_task(loss=loss, block=block), make_spec(rate=1e30))
        assert (result.status, list(result.patterns)) == ("diverged", [])

    def test_an_optimizer_that_fails_at_a_gradient_that_is_no_number_has_diverged(self, monkeypatch):
        def step(self, **_):
            assert all(torch.isfinite(p.grad).all() for p in self.param_groups[0]["params"])

        monkeypatch.setattr(SelfTuning, "step", step)
        task = make_task(loss=lambda o, t: o.mean() * math.nan)
        result = train(task, make_spec())
        assert (result.status, result.steps, list(result.patterns)) == ("diverged", 0, [])
        assert timed(task, make_spec()).seconds >= 0

    def test_an_error_that_has_nothing_to_do_with_it_is_not_hidden(self):
        def loss(outputs, targets):
            raise ValueError("a mistake")

        with pytest.raises(ValueError, match="a mistake"):
            train(make_task(loss=loss), make_spec())

    def test_a_metric_that_is_no_number_is_divergence_too(self):
        def metric(outputs, targets):
            metric.pieces += 1
            return outputs.mean() * (
                math.nan if metric.pieces > 3 else 1
            )  # in the second point of the curves

        metric.pieces = 0
        result = train(make_task(metric=metric), make_spec())
        assert (result.status, list(result.patterns)) == ("diverged", [PATTERNS])
        assert len(result.validation_metric) == len(result.validation_loss) == 1
        json.dumps(result.to_dict(), allow_nan=False)

    def test_an_estimate_of_it_comes_to_an_end(self):
        def loss(outputs, targets):
            if not torch.isfinite(outputs).all():
                raise ValueError("all elements of input should be between 0 and 1")
            return outputs.mean() * 1e38

        assert timed(make_task(loss=loss), make_spec(rate=1e30)).seconds > 0


class TestBatchNorm:
    MODEL = staticmethod(
        lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    )

    def test_a_single_pattern_left_over_is_explained(self):
        with pytest.raises(
            UserError, match=r"single pattern that 37 .* batches of 6 .* another batch size\.$"
        ) as error:
            train(make_task(model=self.MODEL), make_spec(batch_size=6))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError) as estimating:
            timed(make_task(model=self.MODEL), make_spec(batch_size=6))
        assert str(estimating.value) == str(error.value)

    def test_nothing_is_left_over_silently(self):
        seen = []

        class Watched(nn.Linear):
            def forward(self, x):
                seen.append(len(x))
                return super().forward(x)

        train(make_task(model=lambda: Watched(FEATURES, CLASSES)), make_spec(batch_size=6, epochs=1))
        assert seen[:7] == [6] * 6 + [1]


def test_gradients_that_an_optimizer_does_not_take_are_said_in_its_words():
    task = Task(
        name="sparse",
        model=lambda: nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2)),
        train=(torch.arange(10).view(10, 1), torch.arange(10) % 2),
        validation=(torch.arange(10).view(10, 1), torch.arange(10) % 2),
        loss=nn.functional.cross_entropy,
    )
    for attempt in (train, timed):
        with pytest.raises(UserError, match=r"^Optimizer adam: .*sparse.*[^.]\.$") as error:
            attempt(task, make_spec("adam"))
        assert "\n" not in str(error.value)


class TestTime:
    def test_a_steps_time_leaves_validation_out(self):
        class Slow(nn.Linear):
            def forward(self, x):
                time.sleep(0.001 if self.training else 0.1)
                return super().forward(x)

        task = make_task(model=lambda: Slow(FEATURES, CLASSES))
        result = train(task, make_spec(epochs=1))
        assert 0.001 < result.step_seconds < 3 * 0.1 / result.steps
        assert result.seconds > 3 * 0.1 + result.steps * result.step_seconds

    def test_an_estimate_is_near_the_truth(self):
        class Slow(nn.Linear):
            def forward(self, x):
                time.sleep(0.004 if self.training else 0.01)
                return super().forward(x)

        task, spec = make_task(model=lambda: Slow(FEATURES, CLASSES), block=20), make_spec(epochs=4)
        result = train(task, spec)
        assert result.seconds / 3 < timed(task, spec, moment=0.05).seconds < result.seconds * 3

    def test_an_estimate_of_less_than_a_moment_needs_no_more_than_the_run(self):
        taken = []

        class Watched(nn.Linear):
            def forward(self, x):
                taken.append(self.training)
                return super().forward(x)

        spec = make_spec(epochs=1, batch_size=30)  # two steps
        assert timed(make_task(model=lambda: Watched(FEATURES, CLASSES)), spec).seconds > 0
        assert sum(taken) == 2


class TestEnvironment:
    def test_says_what_ran_and_not_where(self):
        environment = train(make_task(), make_spec()).environment
        assert isinstance(environment, Mapping)
        assert set(environment) == {
            *("surefoot", "torch", "python", "platform", "processor", "device", "threads", "started"),
            "engine",
        }
        assert environment["device"] == "cpu"
        assert environment["engine"] == "separate"
        assert environment["threads"] == 1
        # Plain types: a driver that unpickles or parses them needs no torch.
        assert {type(value) for value in environment.values()} == {str, int}
        assert "/" not in json.dumps({k: v for k, v in environment.items() if k != "processor"})

    @pytest.mark.parametrize("device", ["warp", "cuda:99"])
    def test_a_device_that_is_not_there_is_named(self, device):
        with pytest.raises(UserError, match=f"Device '{device}' cannot be used here") as error:
            train(make_task(), make_spec(), device=device)
        assert "\n" not in str(error.value)


def test_streams_of_neighbouring_seeds_and_purposes_differ():
    seeds = {
        stream_seed(seed, purpose) for seed in range(1000) for purpose in ("weights", "order", "training")
    }
    assert len(seeds) == 3000
    assert len({seed % 2**32 for seed in seeds}) == 3000  # torch's generator looks at 32 bits
