r"""The outer eigenvalues of many large Jacobians at once: a sketched Krylov–Schur method.

Krylov spaces find first what lies outside: the largest, rightmost and leftmost eigenvalues and those highest
above the real axis. Every sample has a space of its own, and all of them grow by one batched product. On a
processor the products of a convolutional field cost less than making their results orthogonal, which reads
the whole basis: so inner products are taken of sketches, a few hundred random Fourier coefficients a vector,
in float64, and the basis is read once a vector, in the field's own dtype. The relation

    A V = V H + v bᵀ

holds to that dtype's rounding all the same: a Ritz pair (θ, Vy) of H has the residual |bᵀy|.

Source:
    Stewart, A Krylov-Schur algorithm for large eigenproblems, SIAM J. Matrix Anal. Appl. 23 (2002);
    Balabanov & Grigori, Randomized Gram-Schmidt process, SIAM J. Sci. Comput. 44 (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.linalg.lapack
import torch
from torch import Tensor

from resode.stability.rays import Complexes, Floats

Operator = Callable[[Tensor], Tensor]

_PLAIN = 2048  # entries up to which vectors are not sketched
_BREAKDOWN = 16.0  # times ε: what is left of a product that lies in the space


@dataclass
class Ritz:
    """What a Krylov space of one sample knows of the spectrum.

    Args:
        values: Ritz values θ, shape (j,).
        residuals: ‖A v − θ v‖₂ of each unit Ritz vector v.
        conditions: 1/|w*v| of each, within the space.
        vectors: their coordinates in the basis, (j, j), one a column.
        scale: ‖H‖₂, about ‖A‖₂.
        exhausted: whether the space is the whole of R^n.
    """

    values: Complexes
    residuals: Floats
    conditions: Floats
    vectors: Complexes
    scale: float
    exhausted: bool = False

    @property
    def errors(self) -> Floats:
        """Condition times residual: how far an eigenvalue may lie from its Ritz value, to first order."""
        return self.conditions * self.residuals


class Sketch:
    """A random map to `size` dimensions that keeps the inner products of a small space; none for small n.

    Of every block of 1,024 entries: random signs, a Fourier transform and some of its coefficients; then the
    sum over the blocks, again with random signs.

    Source:
        Balabanov, Beaupère, Grigori & Lederer, Block subsampled randomized Hadamard transform (2023).
    """

    def __init__(self, n: int, size: int, device: torch.device) -> None:
        self.plain = n <= _PLAIN
        if self.plain:
            return
        generator = torch.Generator().manual_seed(20)
        self.length = max(1024, 2 * size)
        self.blocks = -(-n // self.length)

        def signs(*shape: int) -> Tensor:
            return (2.0 * torch.randint(0, 2, shape, generator=generator) - 1).to(device)

        self.signs = signs(n)
        self.chosen = (1 + torch.randperm(self.length // 2 - 1, generator=generator)[: size // 2]).to(device)
        self.sum_signs = signs(self.blocks, len(self.chosen))

    def __call__(self, v: Tensor) -> Tensor:
        """The sketch (rows, size) of v (rows, n), in float64."""
        if self.plain:
            return v.double()
        v = v * self.signs.to(v.dtype)
        v = torch.nn.functional.pad(v, (0, self.blocks * self.length - v.shape[1]))
        z = torch.fft.rfft(v.view(len(v), self.blocks, self.length))[..., self.chosen]
        z = (z * self.sum_signs).sum(1)
        return torch.view_as_real(z).flatten(1).double() / len(self.chosen) ** 0.5


class KrylovSchur:
    """A Krylov space for each row of a batch, that can grow and be cut back to what is wanted.

    Args:
        product: A v (rows, n) of v (rows, n).
        start: first vectors, shape (rows, n), not 0.
        size: vectors of a space, at most.
    """

    def __init__(self, product: Operator, start: Tensor, size: int) -> None:
        rows, n = start.shape
        self.product = product
        self.size = min(size, n)
        self.used = 0
        self.eps = torch.finfo(start.dtype).eps
        self.sketch = Sketch(n, 4 * size, start.device)
        self.basis = torch.empty(rows, self.size + 1, n, dtype=start.dtype, device=start.device)
        first = self.sketch(start)
        norm = first.norm(dim=1, keepdim=True)
        self.sketched = torch.zeros(
            rows, self.size + 1, first.shape[1], dtype=torch.float64, device=start.device
        )
        self.basis[:, 0] = start / norm.to(start.dtype)
        self.sketched[:, 0] = first / norm
        self.h = torch.zeros(rows, self.size + 1, self.size, dtype=torch.float64, device=start.device)
        self.largest = torch.zeros(rows, 1, dtype=torch.float64, device=start.device)
        self.generator = torch.Generator().manual_seed(21)

    @property
    def whole(self) -> bool:
        """Whether the space has as many vectors as there are dimensions."""
        return self.used == self.basis.shape[2]

    def grow(self, count: int) -> None:
        """Add `count` vectors to every space, or as many as there is room for."""
        for _ in range(min(count, self.size - self.used)):
            j = self.used
            w = self.product(self.basis[:, j])
            sketched = self.sketch(w)
            length = sketched.norm(dim=1, keepdim=True)
            w, sketched, c = self._orthogonal(w, sketched, j + 1)
            if self.sketch.plain:  # the exact inner product, so that a second pass brings full orthogonality
                w, sketched, more = self._orthogonal(w, self.sketch(w), j + 1)
                c = c + more
            norm = sketched.norm(dim=1, keepdim=True)
            self.largest = torch.maximum(self.largest, length)
            broken = norm <= _BREAKDOWN * self.eps * self.largest
            self.h[:, : j + 1, j] = c
            self.h[:, j + 1, j] = torch.where(broken, 0.0, norm)[:, 0]
            if bool(broken.any()):
                w, sketched, norm = self._afresh(w, sketched, norm, broken, j + 1)
            self.basis[:, j + 1] = w / norm.to(w.dtype)
            self.sketched[:, j + 1] = sketched / norm
            self.used += 1

    def _orthogonal(self, w: Tensor, sketched: Tensor, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """W without its part in the first j vectors, its sketch, and that part's coordinates."""
        known = self.sketched[:, :j]
        c = (known @ sketched[:, :, None])[..., 0]
        left = sketched - (c[:, None] @ known)[:, 0]
        again = (known @ left[:, :, None])[..., 0]
        left = left - (again[:, None] @ known)[:, 0]
        c = c + again
        w = torch.baddbmm(w[:, None], c[:, None].to(w.dtype), self.basis[:, :j], alpha=-1)[:, 0]
        return w, left, c

    def _afresh(
        self, w: Tensor, sketched: Tensor, norm: Tensor, broken: Tensor, j: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A random direction where the space is invariant, so that what it cannot reach is found too."""
        noise = torch.randn(w.shape, generator=self.generator, dtype=w.dtype).to(w.device)
        if j < w.shape[1]:
            for _ in range(2):
                noise, of_noise, _ = self._orthogonal(noise, self.sketch(noise), j)
                length = of_noise.norm(dim=1, keepdim=True)
                noise = noise / length.to(noise.dtype)
                of_noise = of_noise / length
        else:
            noise, of_noise = torch.zeros_like(w), torch.zeros_like(sketched)
        one = torch.ones_like(norm)
        return (
            torch.where(broken, noise, w),
            torch.where(broken, of_noise, sketched),
            torch.where(broken, one, norm),
        )

    def ritz(self, row: int) -> Ritz:
        """Ritz values of one row, with their errors."""
        j = self.used
        h = self.h[row, : j + 1, :j].cpu().numpy()
        scale = float(np.linalg.norm(h, 2))
        values, vectors = np.linalg.eig(h[:j])
        residuals = np.zeros(j) if self.whole else np.abs(h[j] @ vectors)
        try:
            conditions = np.linalg.norm(np.linalg.inv(vectors), axis=1)
        except np.linalg.LinAlgError:
            conditions = np.full(j, np.inf)
        return Ritz(
            values.astype(np.complex128), residuals, conditions, vectors.astype(complex), scale, self.whole
        )

    def vector(self, row: int, coordinates: Complexes) -> Tensor:
        """The vectors with these coordinates (j, k), complex (k, n)."""
        basis = self.basis[row, : self.used].double()
        real, imaginary = (
            torch.as_tensor(np.ascontiguousarray(part.T), device=basis.device) @ basis
            for part in (coordinates.real, coordinates.imag)
        )
        return torch.complex(real, imaginary)

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows."""
        self.basis, self.sketched = self.basis[rows], self.sketched[rows]
        self.h, self.largest = self.h[rows], self.largest[rows]

    def cut(self, keep: int, wanted: Callable[[int, Complexes], np.ndarray]) -> None:
        """Restart: keep an invariant subspace of H of `keep` dimensions in every row.

        Args:
            keep: its dimension, even and less than what is used.
            wanted: (row, Ritz values) to their order, the most wanted first.
        """
        j, k = self.used, keep
        rows = self.basis.shape[0]
        turned = np.zeros((rows, j, k))
        h = self.h.cpu().numpy()
        new = np.zeros_like(h)
        for row in range(rows):
            t, z = scipy.linalg.schur(h[row, :j, :j], output="real")
            t, z = _ordered(t, z, k, lambda values, row=row: wanted(row, values))
            turned[row] = z[:, :k]
            new[row, :k, :k] = t[:k, :k]
            new[row, k, :k] = h[row, j, :j] @ z[:, :k]
        turn = torch.as_tensor(turned, device=self.basis.device).transpose(1, 2)
        last, last_sketched = self.basis[:, j].clone(), self.sketched[:, j].clone()
        for row in range(rows):  # one at a time, to need no second basis
            self.basis[row, :k] = turn[row].to(self.basis.dtype) @ self.basis[row, :j]
        self.sketched[:, :k] = turn @ self.sketched[:, :j]
        self.basis[:, k], self.sketched[:, k] = last, last_sketched
        self.h = torch.as_tensor(new, device=self.basis.device)
        self.used = k


def _ordered(
    t: np.ndarray, z: np.ndarray, keep: int, wanted: Callable[[Complexes], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """A real Schur form with the wanted eigenvalues first; pairs stay together."""
    none = np.zeros(len(t), dtype=np.int32)
    _, _, real, imaginary, *_ = scipy.linalg.lapack.dtrsen(none, t, z, job=b"N")
    values = real + 1j * imaginary
    select = none.copy()
    lone: list[int] = []
    for i in wanted(values):
        pair = [i, i + 1] if imaginary[i] > 0 else [i - 1, i] if imaginary[i] < 0 else [i]
        if select[i] or select.sum() + len(pair) > keep:
            continue
        select[pair] = 1
        lone += pair if len(pair) == 1 else []
    if (
        select.sum() < keep
    ):  # one place left, and pairs alone to fill it: keep is even, so some real one has a place
        select[lone[-1]] = 0
        i = next(i for i in wanted(values) if imaginary[i] > 0 and not select[i])
        select[[i, i + 1]] = 1
    ordered, vectors, *_, info = scipy.linalg.lapack.dtrsen(select, t, z, job=b"N")
    return (ordered, vectors) if info == 0 else (t, z)


def outermost(values: Complexes, shares: int = 8) -> np.ndarray:
    """The order of eigenvalues from the outside in, as seen from directions around the upper half plane.

    Example:
        >>> outermost(np.array([0.1, -5.0, 2j, -2j, 1.0, -0.1]))[:4]
        array([1, 2, 4, 0])
    """
    upper = values.real + 1j * np.abs(values.imag)
    rank = np.full(len(values), len(values))
    for angle in np.linspace(0, np.pi, shares + 1):
        along = (upper * np.exp(-1j * angle)).real
        order = np.argsort(-along, kind="stable")
        rank[order] = np.minimum(rank[order], np.arange(len(values)))
    return np.argsort(rank, kind="stable")
