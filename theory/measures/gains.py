r"""What a block, or a chain of blocks, does to the length of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resode.jacobian.linearize import Field, jacobian


@dataclass(frozen=True, eq=False)
class BlockGains:
    """By what factors the block x + ηF(x) stretches, sample by sample.

    Args:
        singular_values: of I + ηJ, descending, shape (batch, n).
        eigenvalues: of I + ηJ, complex, shape (batch, n), in no order.
        norm: ε = ‖ηJ‖₂, shape (batch,).
        radius: ρ(ηJ), likewise; equal to the norm where J is normal, else smaller.
    """

    singular_values: Tensor
    eigenvalues: Tensor
    norm: Tensor
    radius: Tensor

    @property
    def lower(self) -> Tensor:
        """max(0, 1 − ε), which no singular value falls below."""
        return (1 - self.norm).clamp_min(0)

    @property
    def upper(self) -> Tensor:
        """1 + ε, which none exceeds."""
        return 1 + self.norm


def block_gains(field: Field, x: Tensor, *, step_size: float = 1.0) -> BlockGains:
    r"""Singular values and eigenvalues of the block's Jacobian I + ηJ, with ε = ‖ηJ‖₂ that bounds them.

    Weyl: |σ_i(I + ηJ) − 1| ≤ ‖ηJ‖₂ for every i. The bound takes the norm; ρ(ηJ) bounds nothing where J is not
    normal. J is formed; `profile_depth` has the outermost values without forming it.

    Args:
        field: F, as `resode.analysis.jacobian` demands.
        x: states, shape (batch, *state).
        step_size: η.

    Raises:
        TypeError, ValueError: as `resode.analysis.jacobian`.

    Source:
        Horn & Johnson, Matrix Analysis (2nd ed. 2013), corollary 7.3.5.

    Example:
        >>> gains = block_gains(lambda x: -0.25 * x, torch.ones(1, 2))
        >>> gains.singular_values.tolist(), gains.lower.tolist(), gains.upper.tolist()
        ([[0.75, 0.75]], [0.75], [1.25])
    """
    scaled = step_size * jacobian(field, x)
    block = torch.eye(scaled.shape[-1], dtype=x.dtype, device=x.device) + scaled
    return BlockGains(
        singular_values=torch.linalg.svdvals(block),
        eigenvalues=torch.linalg.eigvals(block),
        norm=torch.linalg.matrix_norm(scaled, 2),
        radius=torch.linalg.eigvals(scaled).abs().amax(-1),
    )


def gradient_norms(blocks: Sequence[Field], x: Tensor, g: Tensor) -> Tensor:
    r"""‖∂⟨g, x_L⟩ / ∂x_l‖₂ for every l: how long the gradient g at the end is before every block.

    Args:
        blocks: whole blocks, x_{l+1} = block_l(x_l), residual or not; shapes may change.
        x: x_0, shape (batch, *state), floating-point; rows must not interact.
        g: the gradient at x_L, of its shape.

    Returns:
        Shape (L + 1, batch); the last row is ‖g‖₂.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: no block, or g of another shape than x_L.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> gradient_norms([lambda x: x + x, lambda x: x / 4], x, x).tolist()
        [[2.5], [1.25], [5.0]]
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
    if not len(blocks):
        raise ValueError("blocks must hold at least one block.")
    with torch.inference_mode(False), torch.enable_grad():
        states = [x.detach().clone().requires_grad_()]
        for block in blocks:
            y = block(states[-1])
            states.append(y if y.requires_grad else y.detach().requires_grad_())  # the start of a new graph
        last = states[-1]
        if g.shape != last.shape:
            raise ValueError(
                f"g is the gradient at x_L, so it has its shape: got x_L {tuple(last.shape)}, "
                f"g {tuple(g.shape)}."
            )
        found = torch.autograd.grad(last, states, g, allow_unused=True)
    return torch.stack(
        [g.new_zeros(len(x)) if f is None else f.reshape(len(x), -1).norm(dim=1) for f in found]
    )
