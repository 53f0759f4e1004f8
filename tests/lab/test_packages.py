"""Other packages' optimizers are their own, step by step; what is added is what the laboratory asks of an optimizer.

A test of a package that is not installed is skipped.
"""

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch import nn

from surefoot.lab import tasks
from surefoot.lab.catalogue import build, resolve
from surefoot.lab.errors import UserError
from surefoot.lab.packages import RIVALS
from surefoot.lab.plan import parse_optimizers
from surefoot.lab.runs import RunSpec
from surefoot.lab.tasks import Task
from surefoot.lab.train import timed, train

STEPS = 25


def of(module, distribution):
    """The package, or the test is skipped."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    return importlib.import_module(module)


@pytest.fixture(params=RIVALS)
def name(request):
    """Every optimizer whose package is here."""
    rival = RIVALS[request.param]
    of(rival.path.partition(".")[0], rival.distribution)
    return request.param


def resolved(text):
    (request,) = parse_optimizers(text)
    return request.optimizer, resolve(request, (0.5, 1.0))


def made(text, params, rate=1.0):
    optimizer, settings = resolved(text)
    return build(params, optimizer, settings, rate)


class Problem:
    """A small network on fixed data in float64, whose gradients do not vanish."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.inputs = torch.randn(20, 4).double()
        self.targets = torch.randn(20, 2).double()

    def loss(self, t):
        return ((self.model(self.inputs[t % 10 :]) - self.targets[t % 10 :]) ** 2).mean()

    def gradients(self, optimizer, t):
        optimizer.zero_grad()
        loss = self.loss(t)
        loss.backward()
        return loss

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def train(self, optimizer, steps=STEPS, after=lambda: None):
        """Steps as the laboratory makes them."""
        for t in range(steps):
            loss = self.gradients(optimizer, t)
            optimizer.step(loss=loss, evaluate=lambda t=t: self.loss(t))
            after()


def by_hand(module, distribution, optimizer, rate, with_loss=False, **options):
    """The weights after the same steps by the package alone, as its documentation has it."""
    problem = Problem()
    optimizer = getattr(of(module, distribution), optimizer)(problem.model.parameters(), lr=rate, **options)
    if module == "schedulefree":
        optimizer.train()
    for t in range(STEPS):
        loss = problem.gradients(optimizer, t)
        optimizer.step(loss=loss) if with_loss else optimizer.step()
    return problem.weights()


class TestThePackagesOwn:
    @pytest.mark.parametrize(
        ("text", "rate", "reference"),
        [
            ("prodigy", 1.0, lambda: by_hand("prodigyopt", "prodigyopt", "Prodigy", 1.0)),
            ("prodigy[d0=1e-4,weight_decay=0.1,betas=0.8:0.99]", 0.5, lambda: by_hand("prodigyopt", "prodigyopt", "Prodigy", 0.5, d0=1e-4, weight_decay=0.1, betas=(0.8, 0.99))),
            ("schedulefree-adamw[warmup_steps=9]", 0.01, lambda: by_hand("schedulefree", "schedulefree", "AdamWScheduleFree", 0.01, warmup_steps=9)),
            ("schedulefree-sgd[momentum=0.8]", 0.3, lambda: by_hand("schedulefree", "schedulefree", "SGDScheduleFree", 0.3, momentum=0.8)),
            ("dadapt-adam[decouple=true,weight_decay=0.1]", 1.0, lambda: by_hand("dadaptation", "dadaptation", "DAdaptAdam", 1.0, decouple=True, weight_decay=0.1)),
            ("dadapt-sgd[momentum=0.9,growth_rate=1.5]", 1.0, lambda: by_hand("dadaptation", "dadaptation", "DAdaptSGD", 1.0, momentum=0.9, growth_rate=1.5)),
            ("dog[reps_rel=1e-3]", 1.0, lambda: by_hand("dog", "dog-optimizer", "DoG", 1.0, reps_rel=1e-3)),
            ("ldog[reps_rel=1e-3,weight_decay=0.1]", 1.0, lambda: by_hand("dog", "dog-optimizer", "LDoG", 1.0, reps_rel=1e-3, weight_decay=0.1)),
            ("momo[lb=0.1,beta=0.5]", 1.0, lambda: by_hand("momo", "momo-opt", "Momo", 1.0, True, lb=0.1, beta=0.5)),
            ("momo-adam[use_fstar=true]", 0.1, lambda: by_hand("momo", "momo-opt", "MomoAdam", 0.1, True, use_fstar=True)),
        ],
    )  # fmt: skip
    def test_to_the_bit(self, text, rate, reference):
        expected = reference()
        problem = Problem()
        before = problem.weights()
        problem.train(made(text, problem.model.parameters(), rate))
        assert torch.equal(problem.weights(), expected)
        assert not torch.equal(problem.weights(), before)

    def test_every_setting_reaches_it(self, name):
        settings = RIVALS[name].settings
        assert settings.keys() & {"weight_decay"}
        assert not settings.keys() & {"lr", "foreach", "fsdp_in_use", "params"}
        plain = known_by(RIVALS[name].make([torch.zeros(3)], settings, 0.5))
        for setting, default in settings.items():
            other = RIVALS[name].make([torch.zeros(3)], {**settings, setting: another(default)}, 0.5)
            assert known_by(other) != plain, setting

    def test_its_lr_is_the_rate(self, name):
        for rate in (1e-3, 2.0):
            (group,) = made(name, [torch.zeros(3)], rate).param_groups
            assert group["lr"] == rate

    def test_what_it_does_not_take_is_one_sentence(self):
        of("momo", "momo-opt")
        for text, said in (
            ("momo[beta=2]", r"^Optimizer momo\[beta=2\]: Invalid beta parameter: 2.0\.$"),
            ("momo[beta=x]", r"^momo\[beta\] takes a number, such as 0.9, not x\.$"),
            ("momo[bta=1]", r"^Optimizer momo has no setting 'bta'; did you mean beta\.$"),
            ("momo[package=x]", r"^Optimizer momo has no setting 'package'"),
        ):
            with pytest.raises(UserError, match=said):
                resolved(text)

    @pytest.mark.parametrize(
        ("text", "value"),
        [("prodigy[weight_decay=0.5]", 0.5), ("schedulefree-adamw[warmup_steps=5]", 5), ("momo[lb=1]", 1.0)],
    )
    def test_a_number_is_one_though_its_default_is_written_as_0(self, text, value):
        rival = RIVALS[text.partition("[")[0]]
        of(rival.path.partition(".")[0], rival.distribution)
        setting = text.partition("[")[2].partition("=")[0]
        found = resolved(text)[1][setting]
        assert (found, type(found)) == (value, type(value))

    def test_nothing_is_printed_or_logged_on_being_made(self, name, capfd, caplog):
        settings = {**RIVALS[name].settings, "weight_decay": 0.1}
        settings |= (
            {"decouple": True} if "decouple" in settings else {}
        )  # Prodigy and D-Adaptation would print it
        RIVALS[name].make([torch.zeros(3)], settings, 0.3)  # DoG would warn of any lr but 1
        assert capfd.readouterr() == ("", "")
        assert not caplog.records


def known_by(optimizer):
    """Everything plain that an optimizer holds."""
    (group,) = optimizer.param_groups
    kept = {**{k: v for k, v in group.items() if k != "params"}, **vars(optimizer)}
    return {k: v for k, v in kept.items() if isinstance(v, bool | int | float | str | tuple)}


def another(default):
    if isinstance(default, bool):
        return not default
    if isinstance(default, tuple):
        return (default[0] / 2, *default[1:])
    return 7.0 if math.isinf(default) else default + 1 if type(default) is int else default / 2 + 0.01


class TestRates:
    """Where a package tells how far it went, the rate times the gradient is how far its weights went."""

    @pytest.mark.parametrize("text", ["dog[reps_rel=1e-3]", "ldog[reps_rel=1e-3]"])
    def test_dog_of_the_last_step(self, text):
        of("dog", "dog-optimizer")
        problem = Problem()
        optimizer = made(text, problem.model.parameters(), 0.5)
        assert math.isnan(optimizer.rates().mean)  # it needs a gradient
        problem.train(optimizer, 4)
        before = [p.detach().clone() for p in problem.model.parameters()]
        problem.train(optimizer, 1)
        etas = [
            ((old - p.detach()).norm() / p.grad.norm()).item()
            for old, p in zip(before, problem.model.parameters(), strict=True)
        ]
        rates = optimizer.rates()
        assert (rates.min, rates.max) == pytest.approx((min(etas), max(etas)), rel=1e-9)
        assert (rates.max > 1.01 * rates.min) == text.startswith("l")
        counts = [p.numel() for p in problem.model.parameters()]
        mean = sum(eta * n for eta, n in zip(etas, counts, strict=True)) / sum(counts)
        variance = sum(n * (eta - mean) ** 2 for eta, n in zip(etas, counts, strict=True)) / (sum(counts) - 1)
        assert rates.mean == pytest.approx(mean, rel=1e-9)
        assert rates.std == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-12)

    def test_dadaptation_of_sgd_for_the_next_step(self):
        of("dadaptation", "dadaptation")
        problem = Problem()
        optimizer = made("dadapt-sgd", problem.model.parameters(), 0.5)
        assert math.isnan(optimizer.rates().mean)
        problem.train(optimizer, 6)
        rates, before = optimizer.rates(), problem.weights()
        problem.train(optimizer, 1)
        gradient = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        moved = ((before - problem.weights()).norm() / gradient.norm()).item()
        assert rates.mean == rates.min == rates.max == pytest.approx(moved, rel=1e-6)
        assert rates.mean > 1e-6

    @pytest.mark.parametrize("text", ["prodigy", "dadapt-adam"])
    def test_a_distance_times_lr(self, text):
        rival = RIVALS[text]
        of(rival.path.partition(".")[0], rival.distribution)
        problem = Problem()
        optimizer = made(text, problem.model.parameters(), 0.5)
        assert optimizer.rates().mean == pytest.approx(0.5e-6)  # d0 = 1e-6
        problem.train(optimizer)
        rates = optimizer.rates()
        assert rates.mean == rates.max == pytest.approx(0.5 * optimizer.param_groups[0]["d"])
        assert rates.mean > 1e-5

    @pytest.mark.parametrize("text", ["schedulefree-adamw", "schedulefree-sgd"])
    def test_schedule_free_with_its_warm_up(self, text):
        of("schedulefree", "schedulefree")
        problem = Problem()
        optimizer = made(f"{text}[warmup_steps=10]", problem.model.parameters(), 0.5)
        assert optimizer.rates().mean == 0.5
        problem.train(optimizer, 3)
        assert optimizer.rates().mean == pytest.approx(0.3 * 0.5)

    @pytest.mark.parametrize("text", ["momo", "momo-adam"])
    def test_momos_cap(self, text):
        of("momo", "momo-opt")
        problem = Problem()
        optimizer = made(text, problem.model.parameters(), 0.5)
        problem.train(optimizer, 3)
        assert (optimizer.rates().mean, optimizer.rates().std) == (0.5, 0)


class TestEvaluation:
    def test_leaves_no_trace_in_the_training(self, name):
        plain, watched = Problem(), Problem()
        plain.train(made(name, plain.model.parameters(), 0.5))
        optimizer = made(name, watched.model.parameters(), 0.5)

        def evaluate():
            before = watched.weights()
            with optimizer.averaged():
                watched.loss(0)
            assert torch.equal(watched.weights(), before)

        watched.train(optimizer, after=evaluate)
        assert torch.equal(plain.weights(), watched.weights())

    def test_an_error_inside_leaves_the_weights_as_they_were(self, name):
        problem = Problem()
        optimizer = made(name, problem.model.parameters(), 0.5)
        problem.train(optimizer)
        before = problem.weights()
        with pytest.raises(ZeroDivisionError), optimizer.averaged():
            raise ZeroDivisionError
        assert torch.equal(problem.weights(), before)
        problem.train(optimizer, 1)

    @pytest.mark.parametrize("text", ["dog", "ldog"])
    def test_dogs_is_at_its_packages_average_of_the_model(self, text):
        package = of("dog", "dog-optimizer")
        problem, reference = Problem(), Problem()
        ours = made(f"{text}[reps_rel=1e-2]", problem.model.parameters(), 0.5)
        theirs = (package.LDoG if text == "ldog" else package.DoG)(
            reference.model.parameters(), lr=0.5, reps_rel=1e-2
        )
        averager = package.PolynomialDecayAverager(reference.model)
        for t in range(STEPS):
            ours.step(loss=problem.gradients(ours, t))
            reference.gradients(theirs, t)
            theirs.step()
            averager.step()
        reference.model = averager.averaged_model
        iterate = problem.weights()
        with ours.averaged():
            assert torch.equal(problem.weights(), reference.weights())
            assert not torch.equal(problem.weights(), iterate)

    @pytest.mark.parametrize("text", ["schedulefree-adamw", "schedulefree-sgd"])
    def test_schedule_free_is_at_its_mean(self, text):
        """x, of which the weights in training are y = (1 - beta) z + beta x."""
        of("schedulefree", "schedulefree")
        problem = Problem()
        optimizer = made(text, problem.model.parameters(), 0.1)
        problem.train(optimizer)
        y = problem.weights()
        z = torch.cat([optimizer.state[p]["z"].flatten() for p in problem.model.parameters()])
        with optimizer.averaged():
            torch.testing.assert_close(0.1 * z + 0.9 * problem.weights(), y, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(problem.weights(), y, rtol=1e-6)

    @pytest.mark.parametrize("text", ["prodigy", "momo", "dadapt-adam"])
    def test_the_others_are_at_their_weights(self, text):
        rival = RIVALS[text]
        of(rival.path.partition(".")[0], rival.distribution)
        problem = Problem()
        optimizer = made(text, problem.model.parameters(), 0.5)
        problem.train(optimizer)
        before = problem.weights()
        with optimizer.averaged():
            assert torch.equal(problem.weights(), before)


def classification(patterns=40, **changes):
    """Three separable classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * patterns, 5, generator=generator)
    targets = (inputs @ torch.randn(5, 3, generator=generator)).argmax(dim=1)
    task = Task(
        name="small",
        model=lambda: nn.Linear(5, 3),
        train=(inputs[:patterns], targets[:patterns]),
        validation=(inputs[patterns:], targets[patterns:]),
        loss=nn.functional.cross_entropy,
    )
    return replace(task, **changes)


def spec_of(text, rate=1.0, epochs=2, batch_size=8):
    optimizer, settings = resolved(text)
    return RunSpec("small", "v", optimizer, settings, rate, batch_size, epochs, 0)


class TwoHeads(nn.Module):
    """One head is not used at first, the other never, and one part of the model is frozen."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.late, self.frozen = (nn.Linear(5, 3) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.first = {k: v.clone() for k, v in self.state_dict().items()}
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return self.used(x) + self.frozen(x) + (self.late(x) if self.calls > 5 else 0)


class TestRuns:
    def test_weights_without_a_gradient_stay(self, name):
        made_here = []

        def model():
            made_here.append(TwoHeads())
            return made_here[-1]

        result = train(classification(model=model), spec_of(name))
        assert (result.status, result.steps) == ("finished", 10)
        (trained,) = made_here
        moved = {k for k, v in trained.state_dict().items() if not torch.equal(v, trained.first[k])}
        assert moved == {"used.weight", "used.bias", "late.weight", "late.bias"}

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_no_number_ends_the_run_as_diverged(self, name, value):
        task = classification(loss=lambda outputs, targets: outputs.mean() * value)
        result = train(task, spec_of(name))
        assert (result.status, list(result.patterns)) == ("diverged", [])
        assert timed(task, spec_of(name), moment=0.01).seconds >= 0

    def test_a_first_gradient_of_zero_is_no_end(self, name):
        task = classification(model=lambda: nn.Sequential(nn.Linear(5, 3), nn.Threshold(1e9, 0.0)))
        result = train(task, spec_of(name))
        assert result.status == "finished"
        assert result.validation_loss == pytest.approx([math.log(3)] * 2)

    def test_is_the_same_run_again(self, name):
        task, spec = classification(), spec_of(name)
        first, second = train(task, spec), train(task, spec)
        assert first.train_loss == second.train_loss
        assert first.validation_loss == second.validation_loss
        assert first.rate_mean == second.rate_mean

    @pytest.mark.parametrize("schedule", ["linear", "onecycle", "trapezoid"])
    def test_a_schedule_moves_it(self, name, schedule):
        plain = train(classification(), spec_of(name, rate=0.5, epochs=4))
        scheduled = train(classification(), spec_of(f"{name}[schedule={schedule}]", rate=0.5, epochs=4))
        assert scheduled.status == "finished"
        assert scheduled.train_loss != plain.train_loss
        assert 0 < scheduled.rate_mean[-1] < plain.rate_mean[-1]

    def test_learns_the_digits(self, name):
        """From ln 10 = 2.3 to below 0.5, at its own rate; SGD with D-Adaptation needs its rate lowered."""
        rate = {"schedulefree-adamw": 0.01, "momo-adam": 0.01, "dadapt-sgd": 0.1}.get(name, 1.0)
        result = train(tasks.load("digits-mlp"), spec_of(name, rate, epochs=12, batch_size=32))
        assert result.status == "finished"
        assert result.final_validation_loss < 0.5


class TestWhatARunIsKnownBy:
    def test_the_packages_version_is_part_of_it(self, name, monkeypatch):
        _, settings = resolved(name)
        distribution = RIVALS[name].distribution
        assert settings["package"] == f"{distribution} {metadata.version(distribution)}"
        spec = RunSpec("small", "v", name, settings, 1.0, 8, 2, 0)
        monkeypatch.setattr("surefoot.lab.packages.metadata.version", lambda _: "99.0")
        newer = replace(spec, settings=resolved(name)[1])
        assert newer.settings["package"] == f"{distribution} 99.0"
        assert newer.key != spec.key

    def test_a_run_of_another_version_is_refused(self, name, monkeypatch):
        spec = spec_of(name)
        here = spec.settings["package"]
        monkeypatch.setattr("surefoot.lab.packages.metadata.version", lambda _: "99.0")
        said = f"^Optimizer {name} is {RIVALS[name].distribution} 99.0 here; the run is of {here}.$"
        with pytest.raises(UserError, match=said):
            train(classification(), spec)


class TestMissing:
    @pytest.fixture(autouse=True)
    def _none_is_installed(self, monkeypatch):
        def version(distribution):
            raise metadata.PackageNotFoundError(distribution)

        monkeypatch.setattr("surefoot.lab.packages.metadata.version", version)

    @pytest.mark.parametrize("text", RIVALS)
    def test_one_sentence_says_what_to_install(self, text):
        with pytest.raises(UserError) as error:
            resolved(text)
        sentence = str(error.value)
        assert sentence.endswith(f"is not installed; install it by: pip install {RIVALS[text].distribution}")
        assert "\n" not in sentence

    def test_what_is_surefoots_own_works(self):
        assert resolved("adam")[0] == "adam"
        with pytest.raises(UserError, match="did you mean prodigy"):
            resolved("prodgy")


@pytest.mark.slow
def test_no_package_is_imported_before_it_is_named():
    modules = sorted({rival.path.partition(".")[0] for rival in RIVALS.values()})
    code = f"import sys, surefoot.lab.train; print([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
