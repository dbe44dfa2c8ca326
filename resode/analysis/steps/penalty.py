r"""A penalty that pushes a network's eigenvalues, times its step, back into a method's stability region."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resode.analysis.steps.blocks import block_groups
from resode.checks import check_number, check_whole, checked
from resode.jacobian.krylov import KrylovSchur
from resode.jacobian.linearize import Field
from resode.jacobian.products import JacobianProducts, full_precision
from resode.modes import evaluating
from resode.stability.function import stability_product
from resode.tableaus import ButcherTableau, explicit_tableau

_CONDITION = 20.0  # of an eigenvalue, beyond which its gradient is scaled down


class StepLimitPenalty:
    r"""Mean of max(0, |R(z)| − 1 + margin·|z|)/(1 + |z|), z = hλ, over a block's outer eigenvalues.

    λ are Ritz values of the block's Jacobian in a Krylov space of `vectors` dimensions, which has found those
    that lie outside; their gradient with respect to the weights is taken with the space held. The margin
    is a cone at z = 0: a mode that barely decays counts too, unless its angle to the negative axis has a
    cosine of at least about `margin`; λ = 0, of which ReLU makes many, costs nothing. The denominator is
    held, so that far modes do not blow up the gradient.

    Args:
        solver: an explicit method's name in METHODS, or a tableau; None for each block's own.
        margin: how far inside, in units of |z|; 0 to less than 1.
        weight: factor of the sum over the blocks.
        samples: states of a batch to take at each block.
        vectors: dimensions of the space.

    Raises:
        ValueError: an unknown or implicit method; a margin outside [0, 1); fewer than one sample or vector; a
            weight that is negative.

    Example:
        >>> penalty = StepLimitPenalty("euler", margin=0.1, vectors=2)
        >>> w = torch.tensor([[-3.0, 0.0], [0.0, -1.0]], requires_grad=True)
        >>> value = penalty.of_field(lambda x: x @ w.T, torch.ones(1, 2), step=1.0)
        >>> round(value.item(), 4)  # z = −3 has |1 − 3| − 1 + 0.3 = 1.3, over 4; z = −1 lies inside
        0.1625
        >>> value.backward(); [round(g, 2) + 0.0 for g in w.grad.diagonal().tolist()]
        [-0.14, 0.0]
    """

    @checked
    def __init__(
        self,
        solver: str | ButcherTableau | None,
        margin: float = 0.1,
        *,
        weight: float = 1.0,
        samples: int = 2,
        vectors: int = 24,
    ) -> None:
        self.tableau = None if solver is None else explicit_tableau(solver, "a penalty takes")
        check_number("margin", margin, least=0, below=1)
        check_whole("samples", samples, 1)
        check_whole("vectors", vectors, 1)
        check_number("weight", weight, least=0)
        self.margin, self.weight, self.samples, self.vectors = margin, weight, samples, vectors

    def __repr__(self) -> str:
        """As it was made; a run's config.yaml keeps it."""
        solver = None if self.tableau is None else self.tableau.name
        return (
            f"StepLimitPenalty({solver!r}, {self.margin:g}, weight={self.weight:g}, samples={self.samples}, "
            f"vectors={self.vectors})"
        )

    def of_field(
        self, field: Field, x: Tensor, step: float | Tensor, solver: str | ButcherTableau | None = None
    ) -> Tensor:
        """The penalty of one field F, evaluation mode, at states x (batch, *state), for steps of length h."""
        tableau = self.tableau if solver is None else explicit_tableau(solver, "a penalty takes")
        if tableau is None:
            raise ValueError("the penalty was made without a method: pass solver=, an explicit one.")
        x = x.detach()[: self.samples]
        x = x if x.dtype == torch.float64 else x.float()
        with full_precision():
            basis = self._space(field, x)
        rows, k, n = basis.shape
        with torch.enable_grad(), full_precision():
            copies = x.repeat_interleave(k, dim=0).requires_grad_()
            y = field(copies)
            if not y.requires_grad:  # of x: J = 0
                return x.new_zeros(())
            (pulled,) = torch.autograd.grad(
                y, copies, basis.reshape(copies.shape), create_graph=True, allow_unused=True
            )
            if pulled is None:
                return x.new_zeros(())
            projected = pulled.reshape(rows, k, n) @ basis.transpose(1, 2)
            z = step * _eigenvalues(projected.double())
            size = (z.real**2 + z.imag**2 + 1e-24).sqrt()
            return (self._excess(tableau, z, size) / (1 + size.detach())).mean()

    def __call__(self, network: nn.Module, images: Tensor) -> Tensor:
        """The penalty of every block of a network, at the states that the first images reach there.

        Add it to the loss: gradients flow to the blocks' weights. Blocks are linearized in evaluation
        mode, as they will be used; the network is left in the mode it was in.

        Args:
            network: any with blocks, see `resode.analysis.steps.blocks.block_groups`.
            images: a batch, of which `samples` are used.
        """
        values = []
        groups = block_groups(network, images[: self.samples])
        with evaluating(network):
            for group in groups:
                solver = group.method if self.tableau is None else None
                if group.states[0].dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"weights in {group.states[0].dtype} do not resolve the eigenvalues of a penalty: "
                        "keep the network in float32, and its passes under torch.autocast."
                    )
                for field, x, step in zip(group.fields, group.states, group.steps, strict=True):
                    values.append(self.of_field(field, x, step, solver).double())
        return self.weight * torch.stack(values).sum()

    def _space(self, field: Field, x: Tensor) -> Tensor:
        """An orthonormal basis (rows, k, n) of each sample's Krylov space of Jᵀ.

        Not by `spectrum`, which gives eigenvalues without a graph: J is projected onto the basis anew, with
        the weights' graph, and all of its Ritz values are differentiated.
        """
        products = JacobianProducts(field, x)
        n = x[0].numel()
        start = torch.randn(len(x), n, generator=torch.Generator().manual_seed(25), dtype=x.dtype)
        krylov = KrylovSchur(products.vjp, start.to(x.device), min(self.vectors, n))
        krylov.grow(krylov.size)
        q, _ = torch.linalg.qr(krylov.basis[:, : krylov.used].double().transpose(1, 2))
        return q.transpose(1, 2).to(x.dtype)

    def _excess(self, tableau: ButcherTableau, z: Tensor, size: Tensor) -> Tensor:
        r = stability_product(tableau, lambda x: z * x, torch.ones_like(z))
        amplification = (r.real**2 + r.imag**2 + 1e-24).sqrt()
        return torch.relu(amplification - 1 + self.margin * size - 1e-9)


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues (…, k), whose derivative w(dH)v is scaled down where one is ill-conditioned.

    Near a defective eigenvalue the derivative has no bound, and one such sample would end a training run.
    """
    with torch.no_grad():
        values, right = torch.linalg.eig(matrices)
        left, info = torch.linalg.inv_ex(right)
        sizes = left.norm(dim=-1)  # the condition numbers: right has unit columns
        trust = torch.where(torch.isfinite(sizes), (_CONDITION / sizes).clamp(max=1.0), 0.0)
        left = torch.where((trust > 0)[..., None], left, torch.zeros_like(left))
        left = left * (info == 0)[..., None, None]
    moved = (left @ matrices.to(left.dtype) * right.transpose(-1, -2)).sum(-1)
    return values + trust * (moved - moved.detach())
