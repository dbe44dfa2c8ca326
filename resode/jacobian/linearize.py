r"""Linearization of a field F at states: the Jacobian J = ∂F/∂x of each sample.

Dimension 0 of a state is the batch, and rows do not interact: J has one (n, n) block a sample. A field that
couples rows (train-mode BatchNorm), is random, or writes into its input has no such Jacobian and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from resode.calls import kind_of, mixed_dtypes
from resode.checks import checked
from resode.whole_blocks import called

Field = Callable[[Tensor], Tensor]

_ENTRIES = 2**21  # entries of a replicated state, so that the graph of F over it stays in memory


@checked
def jacobian(field: Field, x: Tensor) -> Tensor:
    r"""Dense Jacobian J_ij = ∂F(x)_i / ∂x_j of every sample, i and j in the order of `x[0].flatten()`.

    A batch of r copies of x gives r rows of every sample's J in one backward pass.

    Args:
        field: F, any callable that keeps the state's shape, accepts any number of rows and does not let
            them interact; modules in eval mode.
        x: states, shape (batch, *state), floating-point.

    Returns:
        J, shape (batch, n, n) with n entries a state, dtype and device of x; not differentiable itself.

    Raises:
        TypeError, ValueError: as `check_field`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> jacobian(lambda x: x * x.flip(1), x)
        tensor([[[2., 1.],
                 [2., 1.]],
                [[4., 3.],
                 [4., 3.]]])
    """
    check_field(field, x)
    return dense_jacobian(field, x)


def dense_jacobian(field: Field, x: Tensor) -> Tensor:
    """As `jacobian`, of a field that has been checked: J, shape (batch, n, n)."""
    batch, n = len(x), x[0].numel()
    result = torch.zeros(batch, n, n, dtype=x.dtype, device=x.device)
    copies = max(1, min(n, _ENTRIES // (batch * n)))
    for first in range(0, n, copies):
        rows = torch.arange(first, min(first + copies, n), device=x.device)
        direction = torch.zeros(len(rows), batch, n, dtype=x.dtype, device=x.device)
        direction[torch.arange(len(rows), device=x.device), :, rows] = 1
        product = _products(field, x, direction)
        if product is None:
            break
        result[:, rows] = product.transpose(0, 1)
    return result


def _products(field: Field, x: Tensor, direction: Tensor) -> Tensor | None:
    """vᵀJ for direction v (copies, batch, n), same shape; None where F does not depend on x."""
    with torch.inference_mode(False), torch.enable_grad():
        copies = x.detach().clone().repeat(len(direction), *(1,) * (x.ndim - 1)).requires_grad_()
        y = field(copies)
        if not y.requires_grad:
            return None
        (product,) = torch.autograd.grad(
            y, copies, direction.reshape(copies.shape).to(y.dtype), allow_unused=True
        )
    return None if product is None else product.reshape(direction.shape)


def check_field(field: Field, x: Tensor) -> Tensor:
    """Check that F has a Jacobian at each sample of x, and return F(x).

    Raises:
        TypeError: the field is not callable, or x is not a floating-point tensor.
        ValueError: x has no batch dimension, no entries, or infinite ones; train-mode BatchNorm or dropout;
            F changes the shape, is not floating-point, writes into its input, is random, lets rows interact,
            returns infinite numbers, or is detached from x. The message says which, and what to do.

    Warns:
        UserWarning: F returns its own input plus a term with weights, as a whole residual block does.

    Example:
        >>> check_field(torch.nn.ReLU(inplace=True), torch.ones(1, 2))
        Traceback (most recent call last):
        ValueError: a field must not change its input: F writes into x, as ReLU(inplace=True) does when it
        comes first. Use inplace=False there.
    """
    if not callable(field):
        raise TypeError(f"a field is a callable F(x), got {type(field).__name__}.")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {kind_of(x)}.")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"x must have shape (batch, *state) with at least one entry, got {tuple(x.shape)}. "
            "Add the batch dimension to a single state with x[None]."
        )
    if not torch.isfinite(x).all():
        raise ValueError(
            f"x must be finite; {int((~torch.isfinite(x)).sum())} of {x.numel()} entries are not."
        )
    for name, module in _modules(field):
        _check_module(name, module)
    with torch.inference_mode(False), torch.no_grad():
        state = x.detach().clone()
        version = state._version
        try:
            y = called(field, state)
        except RuntimeError as error:
            if mixed := mixed_dtypes(error, field, x):
                raise mixed from error
            raise
        if state._version != version:
            raise ValueError(
                "a field must not change its input: F writes into x, as ReLU(inplace=True) does when it "
                "comes first. Use inplace=False there."
            )
        if not isinstance(y, Tensor) or y.shape != x.shape:
            came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"a field must keep the state's shape: got x {tuple(x.shape)}, F(x) {came}. "
                "Change width or resolution between groups of blocks (resode.shortcuts), not inside F."
            )
        if not y.is_floating_point():
            raise ValueError(
                f"a field must return floating-point numbers, as x is ({x.dtype}): got {y.dtype}. "
                "View complex numbers as pairs of real ones (torch.view_as_real)."
            )
        if not torch.isfinite(y).all():
            raise ValueError("F(x) must be finite where it is linearized; it holds inf or nan.")
        if _differ(field(state), y):
            raise ValueError(
                "a field must give the same F(x) each time it is called: this one is random. "
                "Call .eval() on it, or hold its noise fixed."
            )
        _check_rows(field, state)
    _check_attached(field, state)
    return y


def _modules(field: Field) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a field: itself, or the one whose method it is."""
    owner = field if isinstance(field, nn.Module) else getattr(field, "__self__", None)
    if isinstance(owner, nn.Module):
        yield from owner.named_modules()


def _check_module(name: str, module: nn.Module) -> None:
    where = f"{type(module).__name__}{f' ({name})' if name else ''}"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training or module.running_mean is None:
            raise ValueError(
                f"linearization needs samples that do not interact: {where} normalizes by the batch's own "
                "statistics. Call .eval() on the field, and let the norm track running statistics."
            )
    elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        raise ValueError(
            f"linearization needs a field that is not random: {where} drops at random. Call .eval()."
        )


def _differ(y: Tensor, other: Tensor) -> bool:
    """Beyond what the order of summation, which may change with threads, explains."""
    tolerance = torch.finfo(y.dtype).eps ** 0.5
    return bool(((y - other).abs() > tolerance * (other.abs() + other.abs().mean())).any())


def _moved(x: Tensor) -> Tensor:
    """Other states of the same kind, no symmetry of F likely between them and x."""
    return 0.6180 - 1.3717 * x


def _check_rows(field: Field, x: Tensor) -> None:
    """F's first row must not move when the others do."""
    first = x[:1]
    pairs = [torch.cat([first, other]) for other in (first.clone(), _moved(first))]
    if _differ(field(pairs[1])[:1], field(pairs[0])[:1]):
        raise ValueError(
            "the rows of a batch must not interact: F at the first sample changes with the second. "
            "Call .eval() on the field, or use a norm that acts within a sample (norm='group')."
        )


def _check_attached(field: Field, x: Tensor) -> None:
    """A result without a graph is right for a constant field only."""
    with torch.inference_mode(False), torch.enable_grad():
        y = field(x.clone().requires_grad_())
    if not y.requires_grad and _differ(field(_moved(x)), y.detach()):
        raise ValueError(
            "F(x) must be differentiable in x by autograd: it depends on x, but is detached from it. "
            "Remove .detach(), .numpy() or torch.no_grad() from the field."
        )
