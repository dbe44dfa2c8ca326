r"""The outer eigenvalues of many large Jacobians at once: a sketched Krylov–Schur method.

Krylov spaces find first what lies outside: the largest, rightmost and leftmost eigenvalues and those highest
above the real axis. Every sample has a space of its own, and all of them grow by one batched product. On a
processor the products of a convolutional field cost less than making their results orthogonal, which reads
the whole basis: so inner products are taken of sketches, a few hundred random Fourier coefficients a vector,
in float64, and the basis is read once a vector, in the field's own dtype. The relation

    J V = V H + v bᵀ

holds to that dtype's rounding all the same. Ritz values and their residuals come from sketches of V and JV.
Vectors are made orthogonal to the basis a few at a time (a few steps of the recurrence first see each other
alone), because reading the basis is what costs.

Source:
    Stewart, A Krylov-Schur algorithm for large eigenproblems, SIAM J. Matrix Anal. Appl. 23 (2002);
    Balabanov & Grigori, Randomized Gram-Schmidt process, SIAM J. Sci. Comput. 44 (2022);
    Hoemmen, Communication-avoiding Krylov subspace methods (2010).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy  # whose submodules are loaded when first named
import torch
from torch import Tensor

from resode.jacobian.lanczos import Operator
from resode.stability.unstable_rays import Complexes, Floats

_PLAIN = 2048  # entries up to which vectors are not sketched
_BREAKDOWN = 16.0  # times ε: what is left of a product that lies in the space


@dataclass
class Ritz:
    """What a Krylov space of one sample knows of the spectrum.

    Args:
        values: Ritz values θ, shape (j,).
        residuals: ‖J v − θ v‖₂ of each unit Ritz vector v.
        conditions: 1/|w*v| of each, within the space.
        vectors: their coordinates in the basis, (j, j), one a column.
        scale: ‖VᵀJV‖₂, about ‖J‖₂.
    """

    values: Complexes
    residuals: Floats
    conditions: Floats
    vectors: Complexes
    scale: float

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
    """A Krylov space of up to `size` vectors for each row, that can grow and be cut back to what is wanted.

    It starts from vectors (rows, n), not 0; `stride` of them are made orthogonal to the basis together.
    """

    def __init__(self, product: Operator, start: Tensor, size: int, stride: int = 1) -> None:
        rows, n = start.shape
        self.product = product
        self.size, self.stride = min(size, n), stride
        self.used = 0  # vectors whose images are known; one more is there
        self.eps = torch.finfo(start.dtype).eps
        self.sketch = Sketch(n, 4 * size, start.device)
        self.basis = torch.empty(rows, self.size + 1, n, dtype=start.dtype, device=start.device)
        first = self.sketch(start)
        norm = first.norm(dim=1, keepdim=True)
        self.sketched = first.new_zeros(rows, self.size + 1, first.shape[1])
        self.images = torch.zeros_like(self.sketched[:, :-1])
        self.basis[:, 0] = start / norm.to(start.dtype)
        self.sketched[:, 0] = first / norm
        self.largest = torch.zeros_like(norm)
        self.generator = torch.Generator().manual_seed(21)

    @property
    def whole(self) -> bool:
        """Whether the space has as many vectors as there are dimensions."""
        return self.used == self.basis.shape[2]

    def grow(self, count: int) -> None:
        """Add `count` vectors to every space, or as many as there is room for."""
        end = min(self.used + count, self.size)
        while self.used < end:
            self._extend(min(self.stride, end - self.used))

    def _extend(self, count: int) -> None:
        """Add `count` vectors: products of the last one, made orthogonal to each other and to the rest."""
        j = self.used
        rows, n = self.basis[:, j].shape
        block = self.basis.new_empty(rows, count + 1, n)  # the last vector, and what its products bring
        of_block = self.sketched.new_empty(rows, count + 1, self.sketched.shape[2])
        block[:, 0], of_block[:, 0] = self.basis[:, j], self.sketched[:, j]
        images = []
        for i in range(count):
            w = self.product(block[:, i])
            images.append(self.sketch(w))
            self.largest = torch.maximum(self.largest, images[-1].norm(dim=1, keepdim=True))
            of_w, near = images[-1][:, None], of_block[:, : i + 1]
            c = of_w @ near.transpose(1, 2)  # near enough to orthonormal here; exact below
            of_w = (of_w - c @ near)[:, 0]
            w = torch.baddbmm(w[:, None], c.to(w.dtype), block[:, : i + 1], alpha=-1)[:, 0]
            norm = of_w.norm(dim=1, keepdim=True)
            norm = torch.where(norm > _BREAKDOWN * self.eps * self.largest, norm, torch.ones_like(norm))
            block[:, i + 1], of_block[:, i + 1] = w / norm.to(w.dtype), of_w / norm
        self.images[:, j] = images[0]
        known = self.sketched[:, : j + 1]
        block, of_block = block[:, 1:], of_block[:, 1:]
        c, of_block = self._coordinates(of_block, known)
        block = torch.baddbmm(block, c.to(block.dtype), self.basis[:, : j + 1], alpha=-1)
        if self.sketch.plain:  # the exact inner product, so that a second pass brings full orthogonality
            more, of_block = self._coordinates(block.double(), known)
            block = torch.baddbmm(block, more.to(block.dtype), self.basis[:, : j + 1], alpha=-1)
            c = c + more
        # J times the new vectors, but for the last one, by what they are of known products.
        of_images = torch.stack(images[1:], 1) - c[:, :-1] @ self.images[:, : j + 1] if count > 1 else None
        self._append(block, of_block, of_images)
        self.used += count

    def _append(self, block: Tensor, of_block: Tensor, of_images: Tensor | None) -> None:
        """Append vectors, made orthonormal; of_images are J times all but the last."""
        first, count = self.used + 1, block.shape[1]
        q, r = torch.linalg.qr(of_block.transpose(1, 2))
        sizes = r.diagonal(dim1=1, dim2=2).abs()
        broken = (sizes <= _BREAKDOWN * self.eps) | (self.largest == 0)
        if bool(broken.any()):
            self._append_singly(block, of_block, of_images)
            return
        lower = r.transpose(1, 2)
        identity = torch.eye(count, dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        self.basis[:, first : first + count] = inverse.to(block.dtype) @ block
        self.sketched[:, first : first + count] = q.transpose(1, 2)
        if of_images is not None:
            self.images[:, first : first + count - 1] = inverse[:, :-1, :-1] @ of_images

    def _append_singly(self, block: Tensor, of_block: Tensor, of_images: Tensor | None) -> None:
        """The same where some vector vanishes, in some row: it is replaced by a random one."""
        for i in range(block.shape[1]):
            at = self.used + 1 + i
            w, of_w = block[:, i], of_block[:, i]
            image = None if of_images is None or i == of_images.shape[1] else of_images[:, i]
            for m in range(self.used + 1, at):
                d = (self.sketched[:, m] * of_w).sum(1, keepdim=True)
                w, of_w = w - d.to(w.dtype) * self.basis[:, m], of_w - d * self.sketched[:, m]
                image = None if image is None else image - d * self.images[:, m]
            norm = of_w.norm(dim=1, keepdim=True)
            broken = (norm <= _BREAKDOWN * self.eps) | (self.largest == 0)
            w, of_w, norm = self._afresh(w, of_w, norm, broken, at)
            self.basis[:, at], self.sketched[:, at] = w / norm.to(w.dtype), of_w / norm
            if image is not None:  # of what is replaced, the combination is lost too
                fresh = self.sketch(self.product(self.basis[:, at]))
                self.images[:, at] = torch.where(broken, fresh, image / norm)

    @staticmethod
    def _coordinates(of_block: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of vectors in the basis, and what is left of their sketches without that part."""
        c = of_block @ known.transpose(1, 2)
        left = of_block - c @ known
        more = left @ known.transpose(1, 2)
        return c + more, left - more @ known

    def _afresh(
        self, w: Tensor, of_w: Tensor, norm: Tensor, broken: Tensor, j: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A random direction where the space is invariant, so that what it cannot reach is found too."""
        noise = torch.randn(w.shape, generator=self.generator, dtype=w.dtype).to(w.device)
        of_noise = torch.zeros_like(of_w)
        if j < w.shape[1]:
            for _ in range(2):
                c, of_noise = self._coordinates(self.sketch(noise)[:, None], self.sketched[:, :j])
                noise = torch.baddbmm(noise[:, None], c.to(w.dtype), self.basis[:, :j], alpha=-1)[:, 0]
                length = of_noise[:, 0].norm(dim=1, keepdim=True)
                noise, of_noise = noise / length.to(noise.dtype), of_noise[:, 0] / length
        else:
            noise = torch.zeros_like(w)
        one = torch.ones_like(norm)
        return (
            torch.where(broken, noise, w),
            torch.where(broken, of_noise, of_w),
            torch.where(broken, one, norm),
        )

    def ritz(self, row: int) -> Ritz:
        """Ritz values of one row, with their errors."""
        j = self.used
        images = self.images[row, :j]
        h = self._projected(row)
        values, vectors = np.linalg.eig(h)
        # What JV has outside of the space lies along its next vector.
        rest = images @ self.sketched[row, j] if j < self.basis.shape[2] else torch.zeros(j)
        residuals = np.abs(rest.cpu().numpy() @ vectors)
        try:
            conditions = np.linalg.norm(np.linalg.inv(vectors), axis=1)
        except np.linalg.LinAlgError:
            conditions = np.full(j, np.inf)
        values, vectors = values.astype(np.complex128), vectors.astype(np.complex128)
        return Ritz(values, residuals, conditions, vectors, norm_estimate(h))

    def condition(self, row: int, value: complex) -> float:
        """1/cos of the angle between the left and right spaces of an eigenvalue that occurs several times."""
        h = self._projected(row)
        shifted = h - (value if value.imag else value.real) * np.eye(len(h))
        left, sizes, right = np.linalg.svd(shifted)
        several = max(1, int((sizes <= 1e3 * self.eps * norm_estimate(h)).sum()))
        cosines = np.linalg.svd(left[:, -several:].conj().T @ right[-several:].conj().T, compute_uv=False)
        return float(1 / cosines[-1]) if cosines[-1] > 2.0**-52 else float("inf")

    def vector(self, row: int, coordinates: Complexes) -> Tensor:
        """The vectors with these coordinates (j, k), complex (k, n)."""
        basis = self.basis[row, : self.used].double()
        real, imaginary = (
            torch.as_tensor(np.ascontiguousarray(part.T), device=basis.device) @ basis
            for part in (coordinates.real, coordinates.imag)
        )
        return torch.complex(real, imaginary)

    def select(self, rows: list[int]) -> None:
        """Go on with some of the rows, given in order."""
        for to, row in enumerate(rows):  # in place: rows only move down
            if to != row:
                self.basis[to, : self.used + 1] = self.basis[row, : self.used + 1]
        self.basis, self.sketched, self.images = (
            self.basis[: len(rows)],
            self.sketched[rows],
            self.images[rows],
        )
        self.largest = self.largest[rows]

    def cut(self, keep: int, wanted: Callable[[int, Complexes], np.ndarray]) -> None:
        """Restart: keep an invariant subspace of VᵀJV in every row, of an even number of dimensions.

        `wanted` orders the Ritz values of a row, the most wanted first.
        """
        j, k = self.used, keep
        rows = len(self.basis)
        turned = np.zeros((rows, j, k))
        for row in range(rows):
            t, z = scipy.linalg.schur(self._projected(row), output="real")[:2]
            turned[row] = _ordered(t, z, k, partial(wanted, row))[:, :k]
        turn = torch.as_tensor(turned, device=self.basis.device).transpose(1, 2)
        for row in range(rows):  # one at a time, to need no second basis
            self.basis[row, :k] = turn[row].to(self.basis.dtype) @ self.basis[row, :j]
        self.sketched[:, :k] = turn @ self.sketched[:, :j]
        self.images[:, :k] = turn @ self.images[:, :j]
        self.basis[:, k], self.sketched[:, k] = self.basis[:, j].clone(), self.sketched[:, j].clone()
        self.used = k

    def _projected(self, row: int) -> np.ndarray:
        """VᵀJV in the sketched inner product, (used, used)."""
        return (self.sketched[row, : self.used] @ self.images[row, : self.used].T).cpu().numpy()


def _reorder(*arguments: Any, **options: Any) -> Any:
    """LAPACK's dtrsen, which has no stub."""
    routine: Any = scipy.linalg.get_lapack_funcs("trsen", dtype=np.float64)
    return routine(*arguments, **options)


def norm_estimate(h: np.ndarray) -> float:
    """‖H‖₂ of a square matrix, from below, by power iteration."""
    v = np.random.default_rng(0).normal(size=len(h))
    size = 0.0
    for _ in range(12):
        v = h.conj().T @ (h @ v)
        size = float(np.linalg.norm(v))
        if size == 0:
            return 0.0
        v /= size
    return size**0.5


def _ordered(
    t: np.ndarray, z: np.ndarray, keep: int, wanted: Callable[[Complexes], np.ndarray]
) -> np.ndarray:
    """The vectors of a real Schur form with the wanted eigenvalues first; pairs stay together."""
    none = np.zeros(len(t), dtype=np.int32)
    _, _, real, imaginary, *_ = _reorder(none, t, z, job=b"N")
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
    return _reorder(select, t, z, job=b"N")[1]


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
