"""ODEs with exact solutions, shared by the tests."""

import math

import torch


def riccati(t, y):
    """y' = −2ty², y(0) = 1: nonlinear and non-autonomous, so it sees every order condition."""
    return -2 * t * y * y


def riccati_exact(t, y0=1.0, t0=0.0):
    return 1 / (1 / y0 + t * t - t0 * t0)


def pair(t, y):
    """A nonlinear, non-autonomous pair without symmetry; exact: y = (e^{sin t}, 1 / (1 + t))."""
    a, b = y[..., 0], y[..., 1]
    return torch.stack([a * torch.cos(torch.as_tensor(t)) + 0 * b, -(b**2) + 0 * a], -1)


def pair_exact(t):
    return torch.tensor([math.exp(math.sin(t)), 1 / (1 + t)], dtype=torch.float64)


def van_der_pol(t, y, mu=2.0):
    x, v = y[..., 0], y[..., 1]
    return torch.stack([v, mu * (1 - x * x) * v - x], -1)
