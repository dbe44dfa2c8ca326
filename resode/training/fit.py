"""Fit any module to data that fit in memory: the short way, without run folders or progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from resode.checks import check_whole, checked, one_of

__all__ = ["fit"]

Loss = Callable[[Tensor, Tensor], Tensor]


@checked
def fit(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    steps: int,
    method: str = "adam",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    weight_decay: float = 0.0,
    loss_fn: Loss | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Minimize the mean loss of model(x) against the target, in place.

    The model is fitted in the mode that it is in; training goes on where it is called again.

    Args:
        model: what is fitted; parameters without `requires_grad` stay as they are.
        x: inputs, shape (N, …).
        target: classes, int (N,), or numbers of the output's shape.
        steps: updates; for "lbfgs" iterations, each of at most 25 evaluations.
        method: "adam", "sgd" (momentum 0.9) or "lbfgs" (strong Wolfe conditions, all samples at once).
        learning_rate: None takes 1e-3 for "adam", 0.1 for "sgd" and 1 for "lbfgs".
        batch_size: samples of an update, drawn anew without replacement in every pass; None takes all.
        weight_decay: decoupled for "adam" (AdamW).
        loss_fn: `loss_fn(model(x), target)`, a scalar mean over samples; None takes cross entropy for
            classes and mean squared error for numbers.
        seed: of the batches' order.

    Returns:
        The loss before every update, detached, shape (steps,); that of the batch where there are batches.

    Raises:
        ValueError: an unknown method, steps or batch_size below 1, another number of targets than of samples,
            "lbfgs" with batches or weight decay, or a model without parameters to fit.

    Source:
        Loshchilov & Hutter (2019), arXiv:1711.05101; Nocedal & Wright, Numerical Optimization, 7.2.

    Example:
        >>> model = nn.Linear(1, 1).double()
        >>> x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        >>> losses = fit(model, x, 3 * x - 1, steps=20, method="lbfgs")
        >>> round(model.weight.item(), 4), round(model.bias.item(), 4)
        (3.0, -1.0)
    """
    one_of("method", method, ("adam", "sgd", "lbfgs"))
    check_whole("steps", steps, 1)
    check_whole("batch_size", 1 if batch_size is None else batch_size, 1)
    if len(x) != len(target) or not len(x):
        raise ValueError(f"every sample needs its target: got {len(x)} samples and {len(target)} targets.")
    if method == "lbfgs" and (batch_size is not None or weight_decay):
        raise ValueError("lbfgs takes all samples at once and no weight_decay: leave these out, or use adam.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to fit.")
    measure: Loss = loss_fn or (mse_loss if target.is_floating_point() else cross_entropy)
    batches = _batches(len(x), batch_size, seed, x.device)
    optimizer = _optimizer(parameters, method, learning_rate, weight_decay)
    losses = []
    for _ in range(steps):
        rows = next(batches)
        inputs, wanted = (x, target) if rows is None else (x[rows], target[rows])

        def closure(inputs: Tensor = inputs, wanted: Tensor = wanted) -> Tensor:
            optimizer.zero_grad()
            loss = measure(model(inputs), wanted)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())  # type: ignore[call-overload]
    return torch.stack(losses)


def _optimizer(
    parameters: list[nn.Parameter], method: str, learning_rate: float | None, weight_decay: float
) -> torch.optim.Optimizer:
    rate = {"adam": 1e-3, "sgd": 0.1, "lbfgs": 1.0}[method] if learning_rate is None else learning_rate
    if method == "adam":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, foreach=True)
    if method == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=weight_decay, foreach=True)
    return torch.optim.LBFGS(
        parameters,
        lr=rate,
        max_iter=20,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )


def _batches(count: int, size: int | None, seed: int, device: torch.device) -> Iterator[Tensor | None]:
    """Rows of one update after another; None where all are taken."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None or size >= count:
            yield None
            continue
        order = torch.randperm(count, generator=generator).to(device)
        yield from order[: count - count % size].split(size)
