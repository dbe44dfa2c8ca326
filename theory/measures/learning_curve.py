r"""How the error of what is learnt falls with the number of samples, over several draws of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
Learner = Callable[[Tensor, Tensor], Function]


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Errors by number of samples and draw.

    Args:
        counts: numbers of samples n, shape (m,).
        errors: root-mean-square test errors, shape (m, draws).
    """

    counts: Tensor
    errors: Tensor

    @property
    def mean(self) -> Tensor:
        """Root of the mean squared error over the draws, shape (m,)."""
        return self.errors.square().mean(1).sqrt()

    @property
    def standard_error(self) -> Tensor:
        """Of `mean`: the squares' standard deviation over √draws, divided by 2·mean; shape (m,).

        nan with one draw.
        """
        squares = self.errors.square()
        return squares.std(1) / (squares.shape[1] ** 0.5 * 2 * self.mean)

    def samples_for(self, error: float) -> float:
        """Samples after which `mean` first falls to `error`, log-linear in between; inf where it never does.

        Example:
            >>> curve = LearningCurve(torch.tensor([10, 100]), torch.tensor([[1.0], [0.01]]))
            >>> round(curve.samples_for(0.1), 1)
            31.6
        """
        n, e = self.counts.double().log(), self.mean.double().log()
        wanted = torch.tensor(error, dtype=torch.float64).log()
        if e[0] <= wanted:
            return float(self.counts[0])
        for i in range(1, len(n)):
            if e[i] <= wanted:
                share = (wanted - e[i - 1]) / (e[i] - e[i - 1])
                return float((n[i - 1] + share * (n[i] - n[i - 1])).exp())
        return float("inf")


def learning_curve(
    learner: Learner,
    target: Function,
    draw: Callable[[int, torch.Generator], Tensor],
    counts: Sequence[int],
    test: Tensor,
    *,
    draws: int = 10,
    seed: int = 0,
) -> LearningCurve:
    r"""Test error of what a learner makes of n samples of a function, for every n and draw.

    Draw d of n samples is the same for every learner and target, so that two curves can be compared in pairs.

    Args:
        learner: `learner(x, y)` gives the function learnt from inputs x (n, …) and values y = target(x).
        target: the function that is learnt, on inputs (n, …).
        draw: `draw(n, generator)` gives n inputs; all randomness from the generator.
        counts: numbers of samples.
        test: inputs at which the error is measured, shape (k, …).
        draws: how often each number is drawn; the learner's own randomness is seeded by the draw too.
        seed: of the first draw, each further one has the next.

    Raises:
        ValueError: no counts or draws; a prediction of another shape than the target's values.

    Example:
        >>> test = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
        >>> curve = learning_curve(
        ...     lambda x, y: LeastSquares(x, y, lambda x: x), lambda x: 3 * x,
        ...     lambda n, g: torch.rand(n, 1, generator=g, dtype=torch.float64), [2, 4], test, draws=3)
        >>> curve.errors.shape, bool((curve.errors < 1e-12).all())
        (torch.Size([2, 3]), True)
    """
    if not len(counts) or draws < 1:
        raise ValueError(f"counts must hold at least one number, and draws be at least 1: got {draws}.")
    wanted = target(test).detach()
    errors = torch.zeros(len(counts), draws, dtype=torch.float64)
    for i, n in enumerate(counts):
        for d in range(draws):
            x = draw(n, torch.Generator().manual_seed(seed + d))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + d)
                learnt = learner(x, target(x))
            with torch.no_grad():
                predicted = learnt(test)
            if predicted.shape != wanted.shape:
                raise ValueError(
                    "what is learnt must have the target's shape: got "
                    f"{tuple(predicted.shape)} for {tuple(wanted.shape)}."
                )
            errors[i, d] = (predicted - wanted).square().mean().sqrt()
    return LearningCurve(torch.tensor(counts), errors)


class PiecewiseLinear(nn.Module):
    r"""Straight lines between samples of a periodic function of one variable.

    On a gap of length h its mean squared error is f''² h⁴/120. With one uniform sample in each of n equal
    cells E h⁵ = 3/n⁵ (in periods), so that the root-mean-square error tends to rms(f'')/(√40 n²).

    Args:
        x: samples' places, shape (n, 1), n ≥ 2.
        y: values, shape (n, 1).
        period: of the function.

    Raises:
        ValueError: other shapes.

    Source:
        de Boor, A Practical Guide to Splines (2001), chapter III.

    Example:
        >>> f = PiecewiseLinear(torch.tensor([[0.25], [0.75]]), torch.tensor([[1.0], [3.0]]))
        >>> f(torch.tensor([[0.5], [1.0], [1.25]])).flatten()
        tensor([2., 2., 1.])
    """

    def __init__(self, x: Tensor, y: Tensor, period: float = 1.0) -> None:
        super().__init__()
        if x.ndim != 2 or x.shape[1] != 1 or len(x) < 2 or y.shape != x.shape:
            raise ValueError(
                f"x and y must both have the shape (n, 1), n ≥ 2: got {tuple(x.shape)}, {tuple(y.shape)}."
            )
        place, order = torch.sort(x.flatten() % period)
        value = y.flatten()[order]
        self.period = period
        self.register_buffer("place", torch.cat((place[-1:] - period, place, place[:1] + period)))
        self.register_buffer("value", torch.cat((value[-1:], value, value[:1])))

    def forward(self, x: Tensor) -> Tensor:
        """The lines at x (k, 1), shape (k, 1)."""
        place, value = self.get_buffer("place"), self.get_buffer("value")
        at = x.flatten() % self.period
        right = torch.searchsorted(place, at.contiguous(), right=True).clamp(1, len(place) - 1)
        left = right - 1
        share = (at - place[left]) / (place[right] - place[left])
        return torch.lerp(value[left], value[right], share).reshape(x.shape)


class LeastSquares(nn.Module):
    r"""Ordinary least squares: y ≈ φ(x) C, of the smallest ‖C‖ where several fit alike.

    It is a linear projection of y on the span of φ: what lies in the span is reproduced whatever the samples
    (at least as many as features), so a known part in the span changes nothing.

    Args:
        x: inputs, shape (n, …).
        y: values, shape (n, k).
        features: φ, from inputs to (n, m).

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> LeastSquares(x, 2 * x, lambda x: x)(torch.tensor([[5.0]]))
        tensor([[10.]])
    """

    def __init__(self, x: Tensor, y: Tensor, features: Function) -> None:
        super().__init__()
        self.features = features
        solution = torch.linalg.lstsq(features(x), y, driver="gelsd" if x.device.type == "cpu" else None)
        self.register_buffer("coefficients", solution.solution)

    def forward(self, x: Tensor) -> Tensor:
        """φ(x) C, shape (n, k)."""
        return self.features(x) @ self.get_buffer("coefficients")
