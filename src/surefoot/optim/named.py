"""The papers' names: each a direction and a rule, with its formula and its defaults.

Options that all of them share (see :class:`surefoot.optim.SelfTuning`): ``lr`` multiplies every rate and is what
schedulers move; ``maximize``; ``track_rates``; ``models`` for a stack.
"""

from __future__ import annotations

import math

from torch.optim.optimizer import ParamsT

from surefoot.optim import averaging
from surefoot.optim.core import SelfTuning
from surefoot.optim.directions import (
    SGD,
    Adam,
    AnnealedAdam,
    Momentum,
    Nesterov,
    Sign,
    by_name,
)
from surefoot.optim.parts import Direction, Number, is_some, require
from surefoot.optim.rules import parabola, polyak
from surefoot.optim.rules.divergence import Divergence
from surefoot.optim.rules.hypergradient import Hypergradient
from surefoot.optim.rules.lossgrad import LossGrad as LossGradRule
from surefoot.optim.rules.rprop import CoReRates, Rprop
from surefoot.optim.rules.window import Window

Pair = tuple[Number, Number]


class SRprop(SelfTuning):
    r"""S-Rprop (Andersen 2024): Rprop for mini-batches. sign x window.

    Every step :math:`w \leftarrow w - \Delta (\mathrm{sign}(g) + \lambda w)`; at the end of every ``window`` steps each
    weight's own rate :math:`\Delta` is multiplied by :math:`\eta_+` where the window moved it the same way as the
    window before, and where it moved the other way by :math:`\eta_-`, the window then being undone.

    Args:
        params: parameters or groups.
        lr: multiplies every rate.
        initial_rate: :math:`\Delta` of every weight until two windows have passed.
        window: steps between two adaptations: the paper's L / M, which are counted in patterns.
        etas: :math:`(\eta_-, \eta_+)`.
        step_sizes: smallest and largest :math:`\Delta`.
        weight_decay: :math:`\lambda`, decoupled from the sign.
        undo: "exact" puts a weight back where the window began, "subtract" does it with the published code's rounding,
            "none" leaves it.

    ``lr_mean`` of ``track_rates`` is the paper's as long as ``lr`` is 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        initial_rate: Number = 1e-2,
        window: int = 50,
        etas: Pair = (0.5, 1.2),
        step_sizes: Pair = (1e-6, 50.0),
        weight_decay: Number = 0.0,
        undo: str = "exact",
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            Sign(weight_decay=weight_decay),
            Window(initial_rate, etas, step_sizes, window, undo),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class SGDUpd(SelfTuning):
    r"""SGD-Upd (Andersen 2024): SGD with a rate for each weight. sgd, momentum or nesterov x window.

    Every step :math:`w \leftarrow w - \Delta u` with u the gradient, or torch's momentum or Nesterov direction;
    :math:`\Delta` as in :class:`SRprop`. In the published code momentum had no effect; here it has.

    Args:
        params: parameters or groups.
        lr: multiplies every rate.
        initial_rate, window, etas, step_sizes, undo: as for :class:`SRprop`.
        momentum: 0 for none.
        nesterov: Nesterov's form; needs a momentum.
        weight_decay: coupled (L2): g + weight_decay w.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        initial_rate: Number = 1e-2,
        window: int = 50,
        etas: Pair = (0.5, 1.2),
        step_sizes: Pair = (1e-6, 50.0),
        momentum: Number = 0.0,
        nesterov: bool = False,
        weight_decay: Number = 0.0,
        undo: str = "exact",
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        require("nesterov", nesterov, "True or False", lambda v: isinstance(v, bool))
        direction: Direction
        if nesterov:
            if not is_some(momentum):
                raise ValueError("nesterov needs a momentum above 0.")
            direction = Nesterov(momentum, weight_decay=weight_decay)
        elif is_some(momentum):
            direction = Momentum(momentum, weight_decay=weight_decay)
        else:
            direction = SGD(weight_decay=weight_decay)
        super().__init__(
            params,
            direction,
            Window(initial_rate, etas, step_sizes, window, undo),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class AdamUpd(SelfTuning):
    r"""Adam-Upd (Andersen 2024): Adam with a rate for each weight. adam x window.

    Every step :math:`w \leftarrow w - \Delta\, \hat m / (\sqrt{\hat v} + \epsilon)`, Adam's moments knowing nothing of
    :math:`\Delta` or the undo; :math:`\Delta` as in :class:`SRprop`.

    Args:
        params: parameters or groups.
        lr: multiplies every rate.
        initial_rate, window, etas, step_sizes, undo: as for :class:`SRprop`.
        betas, eps, amsgrad: as for ``torch.optim.Adam``.
        weight_decay: coupled (L2), as for ``torch.optim.Adam``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        initial_rate: Number = 1e-3,
        window: int = 50,
        etas: Pair = (0.5, 1.2),
        step_sizes: Pair = (1e-6, 50.0),
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-8,
        amsgrad: bool = False,
        weight_decay: Number = 0.0,
        undo: str = "exact",
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            Adam(betas, eps, amsgrad, weight_decay=weight_decay),
            Window(initial_rate, etas, step_sizes, window, undo),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class CoRe(SelfTuning):
    r"""CoRe 1.1 (Eckhoff & Reiher): Adam's step with Rprop's rates, adapted at every step.

    The direction is Adam's with a first beta that moves from a to b
    (:class:`~surefoot.optim.directions.AnnealedAdam`); each weight's rate s is multiplied by :math:`\eta_+` or
    :math:`\eta_-` by the sign of the smoothed gradient against the last one, and
    :math:`w \leftarrow w - \lambda |d| w - d` with :math:`d = s\,u` (:class:`~surefoot.optim.rules.CoReRates`).

    Args:
        params: parameters or groups.
        lr: multiplies every rate.
        initial_rate: s at the start.
        etas: :math:`(\eta_-, \eta_+)`.
        step_sizes: smallest and largest s. The authors advise a largest of 1e-3 for mini-batches, 1e-2 in between, 1
            for full batches.
        betas: (a, b, c, :math:`\beta_2`); a negative :math:`\beta_2` makes the direction sign(m).
        eps: as in Adam.
        weight_decay: :math:`\lambda`, relative to each weight's own step.
        score_history, frozen: hold the share ``frozen`` of each tensor with the highest importance scores, averaged
            over ``score_history`` steps; 0 for none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        initial_rate: Number = 1e-3,
        etas: Pair = (0.7375, 1.2),
        step_sizes: Pair = (1e-6, 1e-2),
        betas: tuple[Number, Number, Number, float] = (0.7375, 0.8125, 250.0, 0.99),
        eps: Number = 1e-8,
        weight_decay: Number = 0.1,
        score_history: int = 0,
        frozen: float = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            AnnealedAdam(betas, eps, weight_decay=weight_decay),
            CoReRates(initial_rate, etas, step_sizes, score_history, frozen),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class DropoutRprop(SelfTuning):
    r"""Rprop that knows of dropout (Mosca & Magoulas, arXiv 1509.04612): mask-aware iRprop-. sign x rprop.

    Every step each weight's rate is multiplied by :math:`\eta_+` or :math:`\eta_-` by the sign of the gradient against
    the remembered one; a weight whose sign turned does not move and forgets. A weight that is masked, or whose gradient
    is exactly 0 because its unit was dropped, neither moves nor forgets, so its next comparison is not lost.

    Args:
        params: parameters or groups.
        lr: multiplies every rate.
        initial_rate: rate of every weight at the start.
        etas: :math:`(\eta_-, \eta_+)`, the authors' (0.1, 1.01).
        step_sizes: smallest and largest rate.
        dropout: chance that a weight (never a bias) sits out a step: the authors' dropout, which masks updates. With
            dropout layers in the model leave 0.
        seed: decides the masks, together with the step and the parameter's position; torch's random stream is not
            touched. The models of a stack share their masks.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        initial_rate: Number = 1e-2,
        etas: Pair = (0.1, 1.01),
        step_sizes: Pair = (1e-3, 5.0),
        dropout: float = 0.0,
        seed: int = 0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            Sign(),
            Rprop(initial_rate, etas, step_sizes, dropout, seed),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class HyperReg(SelfTuning):
    r"""Hyper-regularization (arXiv 2104.05447): the rate from a maxmin problem. sgd x divergence.

    Every step :math:`w \leftarrow w - g / \beta`; :math:`\beta` starts at ``1 / initial_rate`` and only grows, by the
    solution of :math:`\max_\beta \min_x\; g (x - w) + \frac12 [\beta (x - w)^2 - \beta_t\, \phi(\beta / \beta_t)]`, one
    problem for each weight. For "rkl" and algorithm 1
    :math:`\beta \leftarrow (\beta + \sqrt{\beta^2 + 4 g^2}) / 2`, at most :math:`2 \beta`. All 15 rules, and what of them is
    sourced and what reconstructed: :mod:`surefoot.optim.rules.divergence`.

    An ``initial_rate`` that is too small is never recovered from. One that is too large does no harm as long as there is
    a ``longest_step``; ``longest_step=None`` is the published rule.

    Args:
        params: parameters or groups.
        lr: multiplies every rate; beta does not see it.
        divergence: "kl", "rkl", "hellinger", "chi2" or "neyman".
        algorithm: 1 exact; 2 approximate; 3 approximate, and a step behind.
        initial_rate: :math:`1 / \beta` at the start. High, since only the rates that are too high are mended.
        scope: a rate for each "weight", for each "tensor", or one, "global".
        growth: largest :math:`\beta_{t+1} / \beta_t`; ``None`` for no limit (algorithm 1, and "chi2").
        radius: the displacement that counts as large: 1 in the paper.
        longest_step: no weight (tensor, ...) moves further in one step, times lr; the remedy for large initial rates.
        warmup_steps, warmup_rate: that many first steps at a fixed rate.
        after_warmup: "hold" goes on from ``initial_rate``, "reset" from ``warmup_rate``.
        weight_decay: coupled (L2): g + weight_decay w, which beta sees too.
        direction: "sgd", "momentum", "nesterov", "adam" or "sign": the rule sees its update in place of g.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        divergence: str = "rkl",
        algorithm: int = 1,
        initial_rate: Number = 1.0,
        scope: str = "weight",
        growth: Number | None = 2.0,
        radius: Number = 1.0,
        longest_step: Number | None = 0.1,
        warmup_steps: int = 0,
        warmup_rate: Number = 1e-2,
        after_warmup: str = "hold",
        weight_decay: Number = 0.0,
        direction: str = "sgd",
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False),
            Divergence(
                divergence,
                algorithm,
                initial_rate,
                scope,
                growth,
                radius,
                longest_step,
                warmup_steps,
                warmup_rate,
                after_warmup,
            ),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class WNGrad(SelfTuning):
    r"""WNGrad (Wu, Ward & Bottou, arXiv 1803.02865): one rate, from the norms of all gradients so far. sgd x divergence.

    :math:`b \leftarrow b + \|g\|^2 / b` and :math:`w \leftarrow w - g / b`, from b = ``1 / initial_rate``. It is
    :class:`HyperReg` with "chi2", algorithm 2, one rate for all weights and no limits, so that is the rule it is made of.

    Args:
        params: parameters or groups.
        lr: multiplies the rate. Other codes have a learning rate within the update of b: theirs of lr from b_0 is this
            one with ``initial_rate`` = lr / b_0.
        initial_rate: 1 / b at the start.
        first: "update" counts the first gradient, so that no step is longer than 1/2 (b >= 2 |g|); "step" is the published
            order, whose first step is plain gradient descent at ``initial_rate``. The later steps are alike.
        weight_decay: coupled (L2): g + weight_decay w.
        direction: as for :class:`HyperReg`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        initial_rate: Number = 1.0,
        first: str = "update",
        weight_decay: Number = 0.0,
        direction: str = "sgd",
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        require("first", first, "update or step", lambda v: v in ("update", "step"))
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False),
            Divergence(
                "chi2",
                2,
                initial_rate,
                scope="global",
                growth=None,
                longest_step=None,
                warmup_steps=int(first == "step"),
                warmup_rate=initial_rate,
            ),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class LossGrad(SelfTuning):
    r"""LOSSGRAD (Wojcik, Maziarka & Tabor 2018): one step size, judged by the loss. any direction x lossgrad.

    After every step :math:`x \leftarrow x - h u` the loss of the same batch is computed again, and

    .. math:: h \leftarrow h / \mathrm{down} \quad\text{if}\quad f_1 > f_0 - (1 - \tau) h \langle g, u \rangle,
              \quad\text{else}\quad h \leftarrow h \cdot \mathrm{up}.

    Every step needs the loss and a function that computes it again, or a closure::

        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step(loss=loss, evaluate=lambda: criterion(model(x), y))

    The probe sees the same dropout masks and leaves BatchNorm's buffers, gradients and random streams as they are. A closure
    is called twice, backward pass and all. Where the loss or the gradient is not finite no step is made.

    The published rule is ``LossGrad(params, down=1.05, threshold=0.5, ramp=1, retract=False)``. It fails from initial rates that are far off; with
    ``ramp`` and ``retract`` those from 1e-8 to 1e8 end much alike.

    Args:
        params: parameters or groups; a group may have an lr of its own, and every other option is one for all.
        lr: multiplies the step. A schedule, or a change by hand, shortens the step that is taken, not the one that is probed.
        direction: "sgd" as published, "momentum", "nesterov", "adam" or "sign".
        initial_rate: h at the start.
        up, down: the factors; 1.05 both in the paper.
        threshold: :math:`\tau` in (0, 1]; the step aims at :math:`2 \tau` times the best one along the line; 0.5 in
            the paper.
        ramp: the factor to begin with; its root takes its place whenever h turns upwards, down to ``up`` and ``down``.
        probe_every: k, a probe at every k-th step, with the factors to the k-th power; with a ramp the first 40 steps are all
            probed.
        step_sizes: smallest and largest h.
        probe: "step" looks along the step itself, "raw" along the direction without its momentum; "next" takes the next
            step's loss, for training on the full batch: then no ``evaluate`` is needed.
        lower_bound: of the loss, 0 for cross-entropy and squares: no step is longer than the parabola that just touches it
            allows, 2 (f0 - lower_bound) / <g, u>.
        retract: take back what was too much of a step after which the loss is higher, and during the ramp all of a step
            that was too long; costs a copy of the weights. ``None``: unless ``probe`` is "next".
        horizon: that many steps, over which the step fades linearly to 0; the probe stays at h.
        max_norm: clips the norm of all gradients first; h is judged by the real slope.
        average: "none", "mean" (of all iterates) or "exponential": what :meth:`averaged` evaluates.
        weight_decay: coupled (L2); the penalty counts as part of the loss.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        direction: str = "sgd",
        initial_rate: Number = 1e-4,
        up: Number = 1.05,
        down: Number = 1.1,
        threshold: Number = 0.4,
        ramp: Number = 10.0,
        probe_every: int = 1,
        step_sizes: tuple[float, float] = (1e-12, 1e6),
        probe: str = "step",
        lower_bound: Number = -math.inf,
        retract: bool | None = None,
        horizon: int | None = None,
        max_norm: Number = math.inf,
        average: str = "none",
        weight_decay: Number = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False),
            LossGradRule(
                initial_rate,
                up,
                down,
                threshold,
                ramp,
                probe_every,
                step_sizes,
                probe,
                lower_bound,
                probe != "next" if retract is None else retract,
                horizon,
            ),
            lr,
            average=averaging.by_name(average),
            max_norm=max_norm,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class L4(SelfTuning):
    r"""L4 (Rolinek & Martius, arXiv 1802.05074): a share of the step to the least loss. any direction x l4.

    With v the direction, m a bias-corrected mean of the gradients and :math:`L_{\min}` the least loss so far, slowly
    forgotten,

    .. math:: w \leftarrow w - \eta v, \qquad
              \eta = \alpha \frac{L - \gamma L_{\min}}{\langle v, m \rangle + 10^{-12}}.

    ``direction="momentum"`` is the published L4Mom, ``"adam"`` (with epsilon 1e-4, as published) L4Adam. Every step needs the
    loss: ``optimizer.step(loss=loss)``, or a closure. The loss has to stay above ``lower_bound`` and to come near what it
    can reach; :math:`\alpha` takes the place of a learning rate, and above 0.15 losses are known to explode.

    Args:
        params: parameters or groups; a group may have an lr of its own, and every other option is one for all.
        lr: multiplies the step.
        direction: "sgd", "momentum", "nesterov", "adam" or "sign".
        fraction: :math:`\alpha`.
        attainable: :math:`\gamma`, the share of :math:`L_{\min}` that is taken to be attainable.
        first_lowest: :math:`\gamma_0`, the first :math:`L_{\min}` as a share of the first loss.
        forget_steps: :math:`\tau`; :math:`L_{\min}` rises by :math:`1 / \tau` at every step.
        smoothing: the coefficient of the mean m.
        lower_bound: what losses are measured from; with ``maximize`` a bound of the negated loss.
        weight_decay: coupled (L2); the penalty counts as part of the loss.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        direction: str = "momentum",
        fraction: Number = 0.15,
        attainable: Number = 0.9,
        first_lowest: Number = 0.75,
        forget_steps: Number = 1000.0,
        smoothing: Number = 0.9,
        lower_bound: Number = 0.0,
        weight_decay: Number = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        published = {"eps": 1e-4} if direction == "adam" else {}
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False, **published),
            polyak.L4(fraction, attainable, first_lowest, forget_steps, smoothing, lower_bound=lower_bound),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class SPS(SelfTuning):
    r"""SPS_max, the stochastic Polyak step (Loizou et al., arXiv 2002.10542). any direction x polyak.

    .. math:: w \leftarrow w - \eta u, \qquad
              \eta = \min\Big\{ \frac{f - f^*}{c\, \langle g, u \rangle},\; \mathrm{bound} \Big\},

    with :math:`\langle g, g \rangle = \|g\|^2` for the published direction, the gradient. Every step needs the loss:
    ``optimizer.step(loss=loss)``, or a closure. Where the loss cannot fall to :math:`f^*` on every batch at once (label
    smoothing, weight decay, noise), the bound decides, and has to be chosen like a learning rate.

    Args:
        params: parameters or groups; a group may have an lr of its own, and every other option is one for all.
        lr: multiplies the step.
        direction: "sgd" as published, "momentum", "nesterov", "adam" or "sign".
        bound: the largest step.
        c: 1/2 jumps to the minimum of a parabola; a larger one is more careful.
        growth: where finite, :math:`\eta` is at most this times the last one instead, the first at most that times
            ``bound``. The authors' code has :math:`2^{1/n}`, n the steps of an epoch.
        lower_bound: :math:`f^*`; with ``maximize`` a bound of the negated loss.
        weight_decay: coupled (L2); the penalty counts as part of the loss.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        direction: str = "sgd",
        bound: Number = 1.0,
        c: Number = 0.5,
        growth: Number = math.inf,
        lower_bound: Number = 0.0,
        weight_decay: Number = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False),
            polyak.Polyak(bound, c, growth, lower_bound=lower_bound),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class PAL(SelfTuning):
    r"""PAL (Mutschler & Zell, arXiv 1903.11991): to the minimum of a parabola. momentum x pal.

    With d the momentum buffer and e = d / |d|, the loss of the same batch is looked at once more at
    :math:`w - \mu e`, and with :math:`b = -\langle g, e \rangle` and :math:`a = (L(\mu) - L_0 - b \mu) / \mu^2`

    .. math:: w \leftarrow w - s e, \qquad
              s = \min\Big\{ \frac{-b}{2a} \alpha,\; s_{\max} \Big\},

    or :math:`s = \mu` where :math:`a \le 0`, and no step uphill, :math:`b \ge 0`. Called as :class:`LossGrad` is:
    ``step(loss=loss, evaluate=...)``, or a closure. Any other direction: ``SelfTuning(params, direction, rules.PAL())``.

    Args:
        params: parameters or groups; a group may have an lr of its own, and every other option is one for all.
        lr: multiplies the step, not the probe.
        probe_length: :math:`\mu`, a length in the space of all weights; 0.1 to 1 is the authors' advice.
        longest_step: :math:`s_{\max}`, likewise a length; 1 to 10.
        stretch: :math:`\alpha`; 1.2 to 1.7.
        momentum: 0 for none; the authors advise 0.4 or none.
        weight_decay: coupled (L2); the penalty counts as part of the loss.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        probe_length: Number = 1.0,
        longest_step: Number = 3.16,
        stretch: Number = 1 / 0.6,
        momentum: Number = 0.4,
        weight_decay: Number = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        direction = (
            Momentum(momentum, weight_decay=weight_decay)
            if is_some(momentum)
            else SGD(weight_decay=weight_decay)
        )
        super().__init__(
            params,
            direction,
            parabola.PAL(probe_length, longest_step, stretch),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class QLAB(SelfTuning):
    r"""QLAB (Fu & Wu, arXiv 2302.00252): to the minimum of a parabola. any direction x qlab.

    The loss of the same batch is looked at once more at :math:`w - h u`, h being the last step's, and with
    :math:`s = \langle g, u \rangle`

    .. math:: w \leftarrow w - h^* u, \qquad h^* = \frac{s h^2}{2 (f_1 - f_0 + h s)},

    which is LOSSGRAD's parabola, jumped to the minimum of before the step. Called as :class:`LossGrad` is:
    ``step(loss=loss, evaluate=...)``, or a closure.

    Args:
        params: parameters or groups; a group may have an lr of its own, and every other option is one for all.
        lr: multiplies the step, not the probe.
        direction: "sgd", "momentum", "nesterov", "adam" or "sign".
        initial_rate: the first probe's h.
        growth: h grows by at most this factor, and by it where the loss does not bend upwards.
        step_sizes: smallest and largest h.
        weight_decay: coupled (L2); the penalty counts as part of the loss.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        direction: str = "sgd",
        initial_rate: Number = 1e-4,
        growth: Number = 2.0,
        step_sizes: Pair = (1e-12, 1e6),
        weight_decay: Number = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False),
            parabola.QLAB(initial_rate, growth, step_sizes),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )


class HypergradientDescent(SelfTuning):
    r"""Hypergradient descent (Baydin et al., arXiv 1703.04782). any direction x hypergradient.

    Gradient descent on the rate: before every step
    :math:`r \leftarrow r + \beta \langle g_t, u_{t-1} \rangle`, with u the last direction that was gone along, or with
    ``form="multiplicative"`` :math:`r \leftarrow r (1 + \beta \cos(g_t, u_{t-1}))`. The published SGD-HD, SGDN-HD and Adam-HD
    are ``direction="sgd"``, ``"nesterov"`` and ``"adam"``. Needs no loss.

    Args:
        params: parameters or groups; a group may have an lr of its own, and every other option is one for all.
        lr: multiplies the step.
        direction: "sgd", "momentum", "nesterov", "adam" or "sign".
        initial_rate: r at the start.
        hyper_rate: :math:`\beta`. ``None``: the authors' 1e-6, or 1e-8 with "adam"; 0.02 for the multiplicative form. The
            additive one depends on the scale of the loss and the number of weights, and does nothing where it is small.
        form: "additive" as published, or "multiplicative".
        step_sizes: smallest and largest r.
        weight_decay: coupled (L2); part of the gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        *,
        direction: str = "sgd",
        initial_rate: Number = 1e-3,
        hyper_rate: Number | None = None,
        form: str = "additive",
        step_sizes: Pair = (1e-12, 1e6),
        weight_decay: Number = 0.0,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        if hyper_rate is None:
            hyper_rate = 0.02 if form == "multiplicative" else 1e-8 if direction == "adam" else 1e-6
        super().__init__(
            params,
            by_name(direction, weight_decay=weight_decay, decoupled_weight_decay=False),
            Hypergradient(initial_rate, hyper_rate, form, step_sizes),
            lr,
            maximize=maximize,
            track_rates=track_rates,
            models=models,
        )
