"""Slow references for the optimizers: float64 NumPy, written line by line from the published algorithms.

Nothing here is clever, and nothing here is shared with the library. The windows keep both snapshots and the clock in
patterns, as the published code does, where the library keeps one snapshot and a sign; weights are looped over where the
algorithm has an "if". A test that agrees with these files agrees with the papers.
"""

from __future__ import annotations

import math

import numpy as np


class NoisyQuadratic:
    """A gradient that both sides of a comparison can ask for: g(w, t) = h * (w - optimum) + noise[t].

    Every fourth weight has a zero gradient in a third of the run, and every seventh starts at zero and never has one: so
    windows without any displacement happen, as they do to the weights of a dead unit, with weight decay, too.
    """

    def __init__(self, shape, steps, *, seed=0, noise=1.0, spread=1.0, dead=True):
        rng = np.random.default_rng(seed)
        self.shape, self.steps = tuple(shape), steps
        self.start = np.asarray(rng.normal(size=shape) * spread)
        self.optimum = rng.normal(size=shape) * spread
        self.curvature = rng.uniform(0.2, 1.0, size=shape)
        self.noise = rng.normal(size=(steps, *self.shape)) * noise
        self.alive = np.ones((steps, *self.shape))
        if dead:
            flat = self.alive.reshape(steps, -1)
            flat[steps // 3 : 2 * steps // 3, 3::4] = 0.0
            flat[:, 6::7] = 0.0
            self.start.reshape(-1)[6::7] = 0.0

    def gradient(self, w, t):
        """The gradient at the weights ``w`` of step ``t`` = 1, 2, ..., steps."""
        return self.alive[t - 1] * (self.curvature * (w - self.optimum) + self.noise[t - 1])


# -- the L-algorithms: fast updates ------------------------------------------------------------------------------------


class SignFast:
    """S-Rprop: w <- w - D (sign(g) + lambda w)."""

    def __init__(self, weight_decay=0.0):
        self.weight_decay = weight_decay

    def __call__(self, w, g, D):
        if self.weight_decay == 0:
            return w - D * np.sign(g)
        return w - D * (np.sign(g) + self.weight_decay * w)


class SGDFast:
    """SGD-Upd: w <- w - D g with coupled L2 and, where asked for, a buffer b <- mu b + g that is really used."""

    def __init__(self, momentum=0.0, nesterov=False, dampening=0.0, weight_decay=0.0, decoupled=0.0):
        self.momentum, self.nesterov, self.dampening = momentum, nesterov, dampening
        self.weight_decay, self.decoupled = weight_decay, decoupled
        self.buffer = None

    def __call__(self, w, g, D):
        g = g + self.weight_decay * w
        u = g
        if self.momentum:
            if self.buffer is None:
                self.buffer = g
            else:
                self.buffer = self.momentum * self.buffer + (1 - self.dampening) * g
            u = g + self.momentum * self.buffer if self.nesterov else self.buffer
        return w - D * (u + self.decoupled * w)


class AdamFast:
    """Adam-Upd, spec section 1.2. ``decoupled`` is AdamW's decay, scaled by the weight's own step size."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, decoupled=0.0):
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        self.weight_decay, self.decoupled = weight_decay, decoupled
        self.t = 0
        self.m = self.v = self.vmax = 0.0

    def __call__(self, w, g, D):
        b1, b2 = self.betas
        self.t += 1
        g = g + self.weight_decay * w
        self.m = self.m + (1 - b1) * (g - self.m)
        self.v = b2 * self.v + (1 - b2) * g**2
        self.vmax = np.maximum(self.vmax, self.v)
        v = self.vmax if self.amsgrad else self.v
        step = (D / (1 - b1**self.t)) * self.m / (np.sqrt(v) / math.sqrt(1 - b2**self.t) + self.eps)
        return w - step - D * self.decoupled * w


# -- the L-algorithms: the slow clock ----------------------------------------------------------------------------------


class LAlgorithm:
    """Spec section 1.1 for one tensor, with its names: c, k, s1, s2, A, B, sigma; L and M in patterns.

    ``signs`` counts what was voted (sigma = -1, 0, +1), ``residues`` the undone weights that did not come back exactly,
    and ``recorded`` keeps every weight's step size whenever the published code records its statistics.
    """

    def __init__(
        self, w, fast, lr, L, M=1, etas=(0.5, 1.2), limits=(1e-6, 50.0), undo="exact", dtype=np.float64
    ):
        self.w = np.array(w, dtype=dtype)
        self.fast, self.lr, self.L, self.M = fast, lr, L, M
        self.etas, self.limits, self.undo = etas, limits, undo
        self.c = self.lr_counter = 0
        self.recorded = []
        self.signs = {-1: 0, 0: 0, 1: 0}
        self.residues = 0
        self.D = self.s1 = self.s2 = None

    def step(self, g, multiplier=1.0):
        """One call with the gradient ``g`` of an M-batch; ``multiplier`` is the library's lr at the write-back."""
        g = np.asarray(g, dtype=self.w.dtype)
        if self.D is None:
            self.D = np.full_like(self.w, self.lr)
            self.s1 = self.w.copy()
            self._record()
            self.lr_counter = 1
        D = self.D if multiplier == 1 else multiplier * self.D
        self.w = np.asarray(self.fast(self.w, g, D)).copy()
        self.c = self.c + self.M
        if self.c % self.L == 0:
            k = self.c // self.L
            if k == 1:
                self.s2 = self.w.copy()
                self._record()
            else:
                self._compare()
                self._record()
                self.s1 = self.s2
                self.s2 = self.w.copy()
            self.lr_counter = self.lr_counter + 1

    def _compare(self):
        eta_minus, eta_plus = map(self.w.dtype.type, self.etas)
        lowest, highest = map(self.w.dtype.type, self.limits)
        for i in np.ndindex(self.w.shape):
            A = self.s2[i] - self.s1[i]
            B = self.w[i] - self.s2[i]
            sigma = int(np.sign(A * B))
            self.signs[sigma] += 1
            if sigma > 0:
                D = self.D[i] * eta_plus
            elif sigma < 0:
                D = self.D[i] * eta_minus
            else:
                D = self.D[i]
            self.D[i] = min(max(D, lowest), highest)
            if sigma < 0 and self.undo == "exact":
                self.w[i] = self.s2[i]
            elif sigma < 0 and self.undo == "subtract":
                self.w[i] = self.w[i] - (self.w[i] - self.s2[i])
                self.residues += self.w[i] != self.s2[i]

    def _record(self):
        self.recorded.append(self.D.copy())


def pooled_statistics(oracles):
    """(means, unbiased standard deviations) over all weights of all tensors, an entry a recording."""
    rows = [
        np.concatenate([r.ravel() for r in rows]) for rows in zip(*(o.recorded for o in oracles), strict=True)
    ]
    means = [math.fsum(row) / len(row) for row in rows]
    stds = [
        math.sqrt(math.fsum((x - mean) ** 2 for x in row) / (len(row) - 1))
        for row, mean in zip(rows, means, strict=True)
    ]
    return means, stds


# -- relatives ---------------------------------------------------------------------------------------------------------


class CoReOracle:
    """CoRe 1.1.0 (spec section 4.1) for one tensor, weight by weight. ``frozen_votes`` counts P = 0."""

    def __init__(
        self,
        w,
        lr=1e-3,
        etas=(0.7375, 1.2),
        limits=(1e-6, 1e-2),
        betas=(0.7375, 0.8125, 250.0, 0.99),
        eps=1e-8,
        weight_decay=0.1,
        score_history=0,
        frozen=0.0,
    ):
        self.w = np.array(w, dtype=np.float64)
        self.g = np.zeros_like(self.w)
        self.h = np.zeros_like(self.w)
        self.s = np.full_like(self.w, lr)
        self.S = np.zeros_like(self.w)
        self.t = 0
        self.etas, self.limits, self.betas, self.eps = etas, limits, betas, eps
        self.weight_decay, self.T = weight_decay, score_history
        self.n_f = int(frozen * self.w.size)
        self.frozen_votes = 0
        self.signs = {-1: 0, 0: 0, 1: 0}

    def step(self, G, multiplier=1.0):
        G = np.asarray(G)
        self.t += 1
        a, b, c, b2 = self.betas
        b1t = b + (a - b) * math.exp(-(((self.t - 1) / c) ** 2))
        threshold = None
        if self.T > 0 and self.t > self.T and self.n_f > 0:
            threshold = 0.999999 * sorted(self.S.ravel(), reverse=True)[self.n_f - 1]
        for i in np.ndindex(self.w.shape):
            if b2 >= 0:
                self.h[i] = b2 * self.h[i] + (1 - b2) * G[i] ** 2
            g_new = b1t * self.g[i] + (1 - b1t) * G[i]
            P = 1.0
            if threshold is not None and self.S[i] >= threshold:
                P = 0.0
                self.frozen_votes += 1
            if self.T > 0 and self.t > self.T:
                self.S[i] = (1 - 1 / self.T) * self.S[i]
            vote = int(np.sign(g_new * self.g[i] * P))
            self.signs[vote] += 1
            factor = {1: self.etas[1], -1: self.etas[0], 0: 1.0}[vote]
            self.s[i] = min(max(self.s[i] * factor, self.limits[0]), self.limits[1])
            if b2 >= 0:
                u = (g_new / (1 - b1t**self.t)) / (math.sqrt(self.h[i] / (1 - b2**self.t)) + self.eps)
            else:
                u = np.sign(g_new)
            d = multiplier * u * self.s[i] * P
            if self.T > 0:
                self.S[i] = self.S[i] + g_new * d / self.T
            self.w[i] = self.w[i] - self.weight_decay * abs(d) * self.w[i] - d
            self.g[i] = g_new


class MaskedRprop:
    """Mosca and Magoulas's modified iRprop- (spec section 4.2) for one tensor; the mask of the update is an argument."""

    def __init__(self, w, lr=1e-2, etas=(0.1, 1.01), limits=(1e-3, 5.0)):
        self.w = np.array(w, dtype=np.float64)
        self.p = np.ones_like(self.w)
        self.D = np.full_like(self.w, lr)
        self.etas, self.limits = etas, limits
        self.signs = {-1: 0, 0: 0, 1: 0}

    def step(self, g, mask=None, multiplier=1.0):
        g = np.asarray(g)
        mask = np.ones_like(self.w) if mask is None else mask
        for i in np.ndindex(self.w.shape):
            self.signs[int(np.sign(self.p[i] * g[i]))] += 1
            self.w[i], self.p[i], self.D[i] = masked_rprop_update(
                self.w[i], self.p[i], self.D[i], g[i], mask[i], self.etas, self.limits, multiplier
            )


def masked_rprop_update(w, p, D, g, mask, etas, limits, multiplier=1.0):
    """One weight, one step: the new (w, p, D)."""
    change = p * g
    if change > 0:
        D = D * etas[1]
    elif change < 0:
        D = D * etas[0]
    D = min(max(D, limits[0]), limits[1])
    if mask * g == 0:
        return w, p, D
    if change < 0:
        return w, 0.0, D
    return w - multiplier * D * np.sign(g), g, D
