"""Which eigenvalues of a large spectrum bind the step, found without solving every ray.

It decides speed only: an eigenvalue is left out when the signs of Bernstein coefficients, rounding bounded,
prove that it cannot narrow what the others leave stable.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resode.stability.polynomials import Intervals
from resode.stability.unstable_rays import (
    NEAR,
    UNIT,
    Complexes,
    Floats,
    Indices,
    RayPolynomials,
    bernstein_matrix,
    by_axis,
    complement,
)

_TIE = 1e-13  # relative distance below which two exits are the same
_PICKED = 512  # eigenvalues whose rays are solved in one round
_CHUNK = 2048  # rays at a time whose coefficients stay in cache
_PER_OCTAVE = 8
_NODES = 2.0 ** (-np.arange(50 * _PER_OCTAVE + 1) / _PER_OCTAVE)  # of |cos θ|, from the real axis on


def binding(rays: RayPolynomials, eigenvalues: Complexes, stable: Intervals) -> Indices:
    """Indices of a subset that leaves stable, within given intervals of h, what the whole spectrum does.

    Eigenvalues are added worst first. The others go as soon as the Bernstein coefficients of g on what
    is still stable prove that they cannot narrow it: for a million eigenvalues one pass of matrix
    products, and the roots on a few hundred rays. None is 0, and the intervals are disjoint and in order.
    """
    modulus = np.abs(eigenvalues)
    rest = np.arange(len(eigenvalues))
    if rays.covers_left_half:
        rest = rest[eigenvalues.real > 0]
    badness = _badness(rays, eigenvalues[rest], modulus[rest])
    chosen = [rest[:0]]
    while rest.size and stable:
        picked = np.argpartition(-badness, min(_PICKED, rest.size) - 1)[:_PICKED]
        chosen.append(rest[picked])
        stable = _narrowed(rays, stable, eigenvalues[rest[picked]])
        if not stable:
            break
        badness[picked] = np.nan
        left = np.flatnonzero(~np.isnan(badness))
        left = left[~_stable_on(rays, stable, eigenvalues[rest[left]], modulus[rest[left]])]
        rest, badness = rest[left], badness[left]
    return np.concatenate(chosen)


def _narrowed(rays: RayPolynomials, stable: Intervals, eigenvalues: Complexes) -> Intervals:
    """What these eigenvalues leave of the stable intervals."""
    ends = [0.0, *(end for pair in stable for end in pair), np.inf]
    outside = np.array(ends).reshape(-1, 2)
    return complement(np.concatenate([outside, rays.unstable(eigenvalues).reshape(-1, 2)]))


def _badness(rays: RayPolynomials, eigenvalues: Complexes, modulus: Floats) -> Floats:
    """A guess of the order in which eigenvalues bind; it decides speed only.

    1/(first exit) for those that decay and the length of the first growth for the others, each over its
    maximum in the same direction or quadrant, so that all kinds are tried in every round.
    """
    badness = np.zeros(len(modulus))
    for axis, index in by_axis(eigenvalues).items():
        for side in (-1, 1) if axis == "none" else (0,):
            here = index[side * eigenvalues.real[index] >= 0]
            if side:
                ends = _ends_on_nodes(rays)[side][_bin(eigenvalues.real[here] / modulus[here])]
            else:
                ends = np.array([b if a == 0 else a for a, b in rays.axes[axis][:1]] or [np.inf])
            exits = side < 0 or (side == 0 and bool((rays.axes[axis][:1, 0] > 0).any()))
            ends = np.clip(ends, 1e-30, 1e30)
            badness[here] = modulus[here] / ends if exits else ends / modulus[here]
            badness[here] /= badness[here].max(initial=0.0) or 1.0
    return badness


@lru_cache(maxsize=64)
def _ends_on_nodes(rays: RayPolynomials) -> dict[int, Floats]:
    """First exit (−1) and end of the first growth (1) along rays with cos θ = ∓_NODES."""
    ends = {}
    for side in (-1, 1):
        table = rays.unstable(side * _NODES + 1j * np.sqrt(np.maximum(1 - _NODES**2, 1e-30)))
        found = table[:, 0, 0 if side < 0 else 1] if table.shape[1] else np.full(len(_NODES), np.inf)
        ends[side] = found
    return ends


@lru_cache(maxsize=64)
def _safe(rays: RayPolynomials) -> Floats:
    """For each bin of −cos θ between two nodes an r up to which g ≤ 0 is proven on the whole bin.

    By the signs of g's Bernstein coefficients in r and x together.
    """
    powers = rays.tables[1]  # of rⁿ·x^m
    size = powers.shape[1]
    exits = _ends_on_nodes(rays)[-1]
    exits = np.minimum(np.minimum(exits[:-1], exits[1:]), 1e3 * rays.scale)
    in_x = bernstein_matrix(size - 1, -_NODES[:-1] * (1 + 1e-9), -_NODES[1:] * (1 - 1e-9))
    in_x = in_x.reshape(-1, size).T
    in_r = np.concatenate([bernstein_matrix(rays.degree, q / 4, (q + 1) / 4) for q in range(4)])
    values = powers @ in_x
    mass = (np.abs(powers) @ np.abs(in_x)) * (UNIT * 8 * (rays.degree + size))
    safe = np.zeros(len(exits))
    for share in (0.5, 0.8, 0.9):
        scaled = (share * exits) ** np.arange(rays.degree + 1)[:, None]
        scaled = np.repeat(scaled, size, axis=1)
        highest = (in_r @ (values * scaled) + in_r @ (mass * scaled)).max(axis=0)
        safe = np.where(highest.reshape(-1, size).max(axis=1) <= 0, share * exits, safe)
    return safe


def _stable_on(
    rays: RayPolynomials, stable: Intervals, eigenvalues: Complexes, modulus: Floats
) -> NDArray[np.bool_]:
    """Whether g ≤ 0 on each of the intervals of h is proven, for each λ."""
    groups = by_axis(eigenvalues)
    x = eigenvalues.real / modulus
    proven = (x < 0) & (modulus * stable[-1][1] <= np.append(_safe(rays), 0.0)[_bin(x)])
    none = groups.pop("none")
    for axis, index in groups.items():
        proven[index] = True
        for start, stop in rays.axes[axis]:
            for a, b in stable:
                overlap = (start < b * modulus[index] * (1 - _TIE)) & (stop > a * modulus[index] * (1 + _TIE))
                proven[index[overlap]] = False
    scales = [b if math.isfinite(b) else (a or 1.0) for a, b in stable]
    matrices = [bernstein_matrix(rays.degree, a / s, b / s) for (a, b), s in zip(stable, scales, strict=True)]
    for near in (True, False):
        rest = none[~proven[none] & ((np.abs(x[none]) < NEAR) == near)]
        for first in range(0, len(rest), _CHUNK):
            part = rest[first : first + _CHUNK]
            values, mass = rays.coefficients(x[part])
            good = np.ones(len(part), dtype=bool)
            for scale, matrix in zip(scales, matrices, strict=True):
                good &= _negative(values, mass, modulus[part] * scale, matrix)
            proven[part] = good
    return proven


def _negative(values: Floats, mass: Floats, r: Floats, matrix: Floats) -> NDArray[np.bool_]:
    """Whether Σ values_n (r·t)ⁿ is proven not to be positive on the matrix's interval of t, for each r."""
    powers = np.empty_like(values)
    powers[0] = 1
    with np.errstate(over="ignore", invalid="ignore"):
        for n in range(1, len(powers)):
            np.multiply(powers[n - 1], r, out=powers[n])
        cell = matrix @ (values * powers)
        powers *= mass
        bound = matrix @ powers
        bound *= UNIT * (4 * len(values) + 16)
        highest = cell + bound
        good = (highest[1:-1] <= 0).all(axis=0)
        # At an end another eigenvalue may bind at the same h up to rounding: a simple root within
        # _TIE of the interval's length from its end is that, and moves nothing.
        for end, inner in ((0, 1), (-1, -2)):
            tie = highest[end] <= _TIE * (len(values) - 1) * (cell[end] - cell[inner])
            good &= (highest[end] <= 0) | tie
    return good


def _bin(x: Floats) -> Indices:
    """Bin of |x|: k with _NODES[k] ≥ |x| > _NODES[k + 1], the last node for all that is smaller."""
    with np.errstate(divide="ignore"):
        return np.minimum(-_PER_OCTAVE * np.log2(np.abs(x)), len(_NODES) - 1).astype(np.intp)
