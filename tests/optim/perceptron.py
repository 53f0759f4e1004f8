"""A tiny perceptron for oracles of rules that go by the loss: in torch, and by hand in NumPy, with a batch a step.

The oracles' weights are one flat list of floats, and their arithmetic is loops over it: nothing is shared with the library.
"""

from __future__ import annotations

import math

import numpy as np
import torch

INPUTS, HIDDEN, BATCH = 3, 4, 8


class Perceptron:
    """y = sum(v tanh(x W)) with squared loss on noisy targets: not convex, and no batch agrees with another."""

    def __init__(self, steps, seed=0, spread=0.5):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(steps, BATCH, INPUTS))
        self.y = np.sin(self.x.sum(axis=2)) + 0.3 * rng.normal(size=(steps, BATCH))
        self.start = (spread * rng.normal(size=INPUTS * HIDDEN + HIDDEN)).tolist()

    def loss(self, w, t):
        """The loss of batch ``t`` at the flat weights ``w``."""
        return self.loss_and_gradient(w, t)[0]

    def loss_and_gradient(self, w, t):
        w = np.asarray(w)
        matrix, v = w[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN), w[INPUTS * HIDDEN :]
        hidden = np.tanh(self.x[t] @ matrix)
        error = hidden @ v - self.y[t]
        back = 2 * error / BATCH
        inner = self.x[t].T @ (np.outer(back, v) * (1 - hidden**2))
        return float((error**2).mean()), np.concatenate([inner.reshape(-1), hidden.T @ back]).tolist()

    def parameters(self, dtype=torch.float64):
        """The torch twin's parameters, W and v, at the start."""
        flat = torch.tensor(self.start, dtype=dtype)
        return [
            flat[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN).clone().requires_grad_(),
            flat[INPUTS * HIDDEN :].clone().requires_grad_(),
        ]

    def torch_loss(self, params, t):
        matrix, v = params
        x, y = torch.tensor(self.x[t], dtype=v.dtype), torch.tensor(self.y[t], dtype=v.dtype)
        return (torch.tanh(x @ matrix) @ v - y).square().mean()

    def train(self, optimizer, params, steps, scale=1.0):
        """Steps of the optimizer under test; yields the flat weights and the rate after each."""
        for t in range(steps):

            def loss(t=t):
                return scale * self.torch_loss(params, t)

            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step(loss=value.detach(), evaluate=loss)
            yield torch.cat([p.detach().reshape(-1) for p in params]).numpy(), optimizer.rates().max

    def follow(self, optimizer, params, oracle, steps, tolerance=1e-9):
        """Train, and compare weights and rate after every step with ``oracle(t, w)``, w the weights before it.

        The oracle keeps everything but the weights itself: it starts each step from the library's, because training
        amplifies rounding.
        """
        w = list(self.start)
        for t, (weights, rate) in enumerate(self.train(optimizer, params, steps)):
            expected, expected_rate = oracle(t, w)
            assert math.isclose(rate, expected_rate, rel_tol=tolerance, abs_tol=1e-12), f"rate of step {t}"
            np.testing.assert_allclose(weights, expected, rtol=tolerance, atol=tolerance, err_msg=f"step {t}")
            w = weights.tolist()


class Update:
    """A direction's update from a flat gradient, in loops: "sgd", "momentum", "nesterov", "adam" or "sign"."""

    def __init__(self, name, size, momentum=0.9, eps=1e-8):
        self.name, self.momentum, self.eps, self.t = name, momentum, eps, 0
        self.first, self.second = [0.0] * size, [0.0] * size

    def __call__(self, g):
        self.t += 1
        u = []
        for i, gi in enumerate(g):
            if self.name == "sgd":
                u.append(gi)
            elif self.name == "sign":
                u.append(math.copysign(1.0, gi) if gi else 0.0)
            elif self.name == "adam":
                self.first[i] = 0.9 * self.first[i] + 0.1 * gi
                self.second[i] = 0.999 * self.second[i] + 0.001 * gi * gi
                mean, square = self.first[i] / (1 - 0.9**self.t), self.second[i] / (1 - 0.999**self.t)
                u.append(mean / (math.sqrt(square) + self.eps))
            else:
                self.first[i] = self.momentum * self.first[i] + gi
                u.append(self.first[i] if self.name == "momentum" else gi + self.momentum * self.first[i])
        return u


def dot(a, b):
    return math.fsum(ai * bi for ai, bi in zip(a, b, strict=True))
