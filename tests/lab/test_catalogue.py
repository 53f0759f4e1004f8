"""Every optimizer of the command line is the one of its name, with all its settings, at the rate that was asked for."""

import json
import math

import pytest
import torch
from torch import nn

from surefoot import (
    L4,
    PAL,
    QLAB,
    SPS,
    AdamUpd,
    CoRe,
    DropoutRprop,
    HypergradientDescent,
    HyperReg,
    LossGrad,
    SelfTuning,
    SGDUpd,
    SRprop,
    WNGrad,
)
from surefoot.lab.catalogue import CATALOGUE, build, resolve, schedule_of
from surefoot.lab.errors import UserError
from surefoot.lab.packages import RIVALS
from surefoot.lab.plan import parse_optimizers
from surefoot.lab.schedules import SCHEDULES
from surefoot.optim import directions, rules

RATES = (1e-5, 1e-2, 10.0)
OWN = [name for name in CATALOGUE if name not in RIVALS]
"""surefoot's; what is of other packages is looked at in test_packages.py."""

FIND_THEIR_RATE = {"l4", "l4-momentum", "l4-adam", "pal"}
"""What is varied for these is no rate: the first step finds it."""

NEED_ANOTHER = {"nesterov", "frozen", "after_warmup"}
"""Settings that are refused without another one: a momentum, a history of scores, a warm-up."""

WORDS = {
    "undo": "none",
    "scope": "tensor",
    "after_warmup": "reset",
    "direction": "momentum",
    "first": "step",
    "probe": "raw",
    "average": "mean",
    "form": "multiplicative",
}
"""Another value of every setting that is a word."""


def settings_of(text):
    (request,) = parse_optimizers(text)
    return resolve(request, RATES)


def weights_after(make, steps=25):
    """A small network's weights after some steps of the optimizer that ``make(parameters)`` gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    inputs = torch.randn(20, 4).double()
    optimizer = make(list(model.parameters()))
    for step in range(steps):

        def loss(batch=inputs[step % 10 :]):
            return (model(batch) ** 2).mean()

        optimizer.zero_grad()
        value = loss()
        value.backward()
        known = {"loss": value, "evaluate": loss} if isinstance(optimizer, SelfTuning) else {}
        optimizer.step(**known)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_name(text, rate=0.01):
    (request,) = parse_optimizers(text)
    return lambda params: build(params, request.optimizer, resolve(request), rate)


class TestBaselines:
    @pytest.mark.parametrize(
        ("text", "reference"),
        [
            ("sgd", lambda p: torch.optim.SGD(p, lr=0.01)),
            ("sgd[weight_decay=0.1]", lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1)),
            ("momentum", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
            ("momentum[momentum=0.5,dampening=0.1]", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, dampening=0.1)),
            ("nesterov", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
            ("adam", lambda p: torch.optim.Adam(p, lr=0.01)),
            ("adam[betas=0.8:0.9,amsgrad=true]", lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), amsgrad=True)),
            ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01)),
            ("adamw[weight_decay=0.3]", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3)),
        ],
    )  # fmt: skip
    def test_are_torchs(self, text, reference):
        torch.testing.assert_close(weights_after(by_name(text)), weights_after(reference), rtol=0, atol=1e-12)


class TestMethods:
    @pytest.mark.parametrize(
        ("text", "reference"),
        [
            ("srprop[window=4]", lambda p: SRprop(p, initial_rate=0.01, window=4)),
            ("sgd-upd[window=4]", lambda p: SGDUpd(p, initial_rate=0.01, window=4)),
            ("sgd-upd[window=4,momentum=0.5,nesterov=true]", lambda p: SGDUpd(p, initial_rate=0.01, window=4, momentum=0.5, nesterov=True)),
            ("adam-upd[window=4,etas=0.7:1.1]", lambda p: AdamUpd(p, initial_rate=0.01, window=4, etas=(0.7, 1.1))),
            ("core", lambda p: CoRe(p, initial_rate=0.01)),
            ("dropout-rprop", lambda p: DropoutRprop(p, initial_rate=0.01)),
            ("hyperreg-rkl1", lambda p: HyperReg(p, initial_rate=0.01)),
            ("hyperreg-h2[scope=tensor,direction=adam]", lambda p: HyperReg(p, divergence="hellinger", algorithm=2, initial_rate=0.01, scope="tensor", direction="adam")),
            ("hyperreg-x3[growth=inf,longest_step=inf]", lambda p: HyperReg(p, divergence="chi2", algorithm=3, initial_rate=0.01, growth=None, longest_step=None)),
            ("lossgrad", lambda p: LossGrad(p, initial_rate=0.01)),
            ("lossgrad-adam[probe=raw,probe_every=8]", lambda p: LossGrad(p, direction="adam", probe="raw", probe_every=8, initial_rate=0.01)),
            ("lossgrad[probe=next]", lambda p: LossGrad(p, probe="next", initial_rate=0.01)),
            ("wngrad[first=step]", lambda p: WNGrad(p, initial_rate=0.01, first="step")),
            ("l4-adam[attainable=0.5]", lambda p: L4(p, direction="adam", fraction=0.01, attainable=0.5)),
            ("sps[growth=1.001]", lambda p: SPS(p, bound=0.01, growth=1.001)),
            ("pal[momentum=0]", lambda p: PAL(p, probe_length=0.01, momentum=0.0)),
            ("qlab-momentum", lambda p: QLAB(p, direction="momentum", initial_rate=0.01)),
            ("hypergradient-adam", lambda p: HypergradientDescent(p, direction="adam", initial_rate=0.01)),
            ("hypergradient[form=multiplicative,hyper_rate=0.02]", lambda p: HypergradientDescent(p, initial_rate=0.01, form="multiplicative")),
            ("momentum-window[window=4]", lambda p: SelfTuning(p, directions.Momentum(), rules.Window(0.01, window=4))),
            ("nesterov-window[window=4]", lambda p: SelfTuning(p, directions.Nesterov(), rules.Window(0.01, window=4))),
        ],
    )  # fmt: skip
    def test_are_surefoots(self, text, reference):
        assert torch.equal(weights_after(by_name(text)), weights_after(reference))

    def test_every_direction_times_the_window_has_a_name(self):
        combinations = {
            (type(o.direction), type(o.rule)) for name in OWN for o in [by_name(name)([torch.zeros(2)])]
        }
        for direction in ("SGD", "Momentum", "Nesterov", "Adam", "Sign"):
            assert (getattr(directions, direction), rules.Window) in combinations


@pytest.mark.parametrize("name", OWN)
class TestEvery:
    def test_starts_at_the_rate_asked_for(self, name):
        for rate in RATES:
            optimizer = build([torch.zeros(3, requires_grad=True)], name, settings_of(name), rate)
            rates = optimizer.rates()
            expected = 0.0 if name in FIND_THEIR_RATE else rate
            assert (rates.min, rates.max) == pytest.approx((expected, expected), rel=1e-6)

    def test_is_the_same_after_json(self, name):
        settings = settings_of(name)
        restored = json.loads(json.dumps(settings))
        built = [build([torch.zeros(3)], name, s, 0.01).param_groups[0] for s in (settings, restored)]
        for group in built:
            del group["params"]
        assert built[0] == built[1]

    def test_every_setting_reaches_it(self, name):
        """No setting is shown that does nothing: another value is another optimizer, or is refused by it."""
        settings = CATALOGUE[name].settings
        plain = by_name(name)([torch.zeros(3)])
        for setting, default in settings.items():
            changed = {**settings, setting: WORDS[setting] if isinstance(default, str) else another(default)}
            if setting in NEED_ANOTHER:
                with pytest.raises(ValueError, match=setting):
                    build([torch.zeros(3)], name, changed, 0.01)
            else:
                other = build([torch.zeros(3)], name, changed, 0.01)
                assert known_by(other) != known_by(plain), setting

    def test_has_a_summary_of_one_line(self, name):
        assert CATALOGUE[name].summary
        assert "\n" not in CATALOGUE[name].summary


def known_by(optimizer):
    return optimizer.direction, optimizer.rule, optimizer.average, optimizer.defaults


def another(default):
    """A value of the same type."""
    if default is None:  # a count
        return 7
    if isinstance(default, bool):
        return not default
    if not isinstance(default, tuple) and math.isinf(default):
        return 1.0
    if isinstance(default, tuple):
        return (*default[:-1], default[-1] * 1.25) if default[-1] > 1 else (default[0] / 2, *default[1:])
    if isinstance(default, int) or default >= 1:  # a factor of at least 1 stays one
        return default + 1
    return default / 2 + 0.01


class TestResolve:
    def test_equal_settings_are_equal_however_written(self):
        assert settings_of("srprop") == settings_of("srprop[window=50,undo=exact]")
        assert settings_of("srprop[etas=1:2]") == settings_of("srprop[etas=1.0:2.0]")
        assert settings_of("adam-upd[window=600]") == settings_of("adam-upd[window=6e2]")
        for text in ("srprop[etas=1:2]", "adam-upd[window=6e2]", "sgd[weight_decay=1]"):
            for value, default in zip(
                settings_of(text).values(), settings_of(text.split("[")[0]).values(), strict=True
            ):
                assert type(value) is type(default)
        assert {type(eta) for eta in settings_of("srprop[etas=1:2]")["etas"]} == {float}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("adm", "There is no optimizer 'adm'; did you mean adam"),
            ("ad-upd", "did you mean adam-upd"),
            ("zzz", "there are sgd, momentum, nesterov, adam, adamw, srprop"),
            ("srprop[windw=3]", "Optimizer srprop has no setting 'windw'; did you mean window"),
            ("srprop[lr=3]", "no setting 'lr'"),
            ("srprop[initial_rate=3]", "no setting 'initial_rate'"),
            ("srprop[maximize=true]", "no setting 'maximize'"),
            ("adamw[decoupled_weight_decay=false]", "no setting 'decoupled_weight_decay'"),
            ("sgd[zzz=3]", "there are weight_decay, decoupled_weight_decay, schedule"),
            ("adam[schedule=cosin]", r"^adam\[schedule\] is one of none, linear, cosine, .*, not cosin\.$"),
            ("adam[schedule=3]", r"^adam\[schedule\] takes a word, such as none, not 3\.$"),
            ("srprop[window=2.5]", r"srprop\[window\] takes a whole number, such as 50, not 2.5"),
            ("srprop[window=inf]", "takes a whole number"),
            ("srprop[window=true]", "takes a whole number, such as 50, not true"),
            ("srprop[window=1:2]", "takes a whole number, such as 50, not 1:2"),
            ("adam[eps=small]", "takes a number, such as 1e-08, not small"),
            ("adam[eps=none]", "takes a number, such as 1e-08, not none"),
            ("adam[amsgrad=1]", "takes true or false, such as false, not 1"),
            ("srprop[undo=3]", "takes a word, such as exact, not 3"),
            ("srprop[etas=0.5]", "takes 2 values, such as 0.5:1.2, not 0.5"),
            ("srprop[etas=0.5:1:2]", "takes 2 values"),
            ("srprop[etas=0.5:up]", "takes a number, such as 1.2, not up"),
            ("core[betas=0.5:0.5]", "takes 4 values"),
            ("srprop[undo=half]", r"Optimizer srprop\[undo=half\]: undo must be one of"),
            ("srprop[window=0]", "window must be"),
            ("adam[betas=0.9:1.5]", "betas"),
            ("sgd-upd[nesterov=true]", "nesterov needs a momentum"),
            ("lossgrad[probe=next,retract=true]", "probe must be 'step' or 'raw' to retract"),
            ("momentum[weight_decay=-1]", "weight_decay must be at least 0"),
        ],
    )
    def test_what_an_optimizer_does_not_take_is_one_sentence(self, text, said):
        with pytest.raises(UserError, match=said) as error:
            settings_of(text)
        assert str(error.value).endswith(".")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", OWN)
    def test_rates_beyond_single_precision_are_refused(self, name):
        (request,) = parse_optimizers(name)
        for rate in (1e39, 1e-50):
            with pytest.raises(UserError, match=f"Optimizer {name}: ") as error:
                resolve(request, (1e-3, rate))
            assert str(error.value).endswith(".")
            assert "\n" not in str(error.value)

    def test_the_rates_that_can_be_used_are_named(self):
        (request,) = parse_optimizers("sgd[rate=1e-50]")
        with pytest.raises(UserError, match=r"rate 1e-50 cannot be used; .* from 1.2e-38 to 3.4e\+38\.$"):
            resolve(request)

    @pytest.mark.parametrize("text", ["sgd[weight_decay=1e39]", "srprop[step_sizes=0.1:1e39]"])
    def test_so_are_such_settings(self, text):
        (request,) = parse_optimizers(text)
        with pytest.raises(
            UserError, match=r"\] takes numbers of single precision, up to 3.4e\+38, not 1e\+39\.$"
        ):
            resolve(request, (1e-3,))

    def test_every_rate_is_tried(self):
        (request,) = parse_optimizers("srprop")
        with pytest.raises(UserError, match="initial_rate must be above 0"):
            resolve(request, (1e-3, 0.0))


class TestSchedule:
    @pytest.mark.parametrize("name", OWN)
    def test_is_a_setting_of_every_optimizer(self, name):
        for schedule in SCHEDULES:
            settings = settings_of(f"{name}[schedule={schedule}]")
            assert schedule_of(settings) == schedule
            assert isinstance(build([torch.zeros(3)], name, settings, 0.01), SelfTuning)

    def test_none_leaves_a_run_known_as_it_was(self):
        """Runs that were stored before there were schedules are found again."""
        assert settings_of("adam[schedule=none]") == settings_of("adam")
        assert "schedule" not in settings_of("adam")
        assert schedule_of(settings_of("adam")) == "none"
        assert settings_of("adam[schedule=linear]") == {**settings_of("adam"), "schedule": "linear"}


def test_none_can_be_a_word():
    assert settings_of("srprop[undo=none]")["undo"] == "none"
    assert settings_of("lossgrad[average=none]")["average"] == "none"
