r"""Rooted trees, and the vector field whose flow a Runge-Kutta step is, as a series over them.

A tree τ = [τ₁ … τ_m] stands for the elementary differential F(τ)(x) = F^(m)(x)[F(τ₁)(x), …, F(τ_m)(x)] of a
field F; the tree of one vertex for F itself. With |τ| vertices and σ(τ) symmetries, a step and its modified
field are

    Φ(x) = x + Σ h^|τ| a(τ)/σ(τ) F(τ)(x),        F̃(x) = Σ h^(|τ|−1) b(τ)/σ(τ) F(τ)(x),

and Φ is the flow of F̃ after time h where a = Σ_j ∂_b^(j−1) b / j!, a logarithm: (∂_b c)(τ) sums c(θ) b(τ∖θ)
over the edges of τ, each of which cuts it into the part θ at the root and the rest.

Source:
    Hairer, Lubich & Wanner, Geometric Numerical Integration (2006), III.1 and IX.9; Chartier, Hairer &
    Vilmart, Found. Comput. Math. 10 (2010), on the substitution law.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from math import factorial, prod
from typing import TypeAlias

from resode.tableaus import ButcherTableau, get_tableau

Tree: TypeAlias = tuple["Tree", ...]
"""A rooted tree: its subtrees, sorted; () has one vertex."""


@cache
def trees(n: int) -> tuple[Tree, ...]:
    """All rooted trees of n vertices.

    Example:
        >>> [len(trees(n)) for n in range(1, 8)]
        [1, 1, 2, 4, 9, 20, 48]
    """
    return tuple(sorted(_forests(n - 1, n - 1)))


def _forests(n: int, largest: int) -> Iterator[Tree]:
    """Multisets of trees, n vertices in all, none above `largest`; each once."""
    if n == 0:
        yield ()
        return
    for size in range(min(n, largest), 0, -1):
        kinds = trees(size)
        for count in range(1, n // size + 1):
            for first in _multisets(kinds, count):
                for rest in _forests(n - count * size, size - 1):
                    yield tuple(sorted((*first, *rest)))


def _multisets(kinds: tuple[Tree, ...], count: int) -> Iterator[Tree]:
    if count == 0:
        yield ()
        return
    for i, kind in enumerate(kinds):
        for rest in _multisets(kinds[i:], count - 1):
            yield (kind, *rest)


@cache
def vertices(tree: Tree) -> int:
    """|τ|, the number of vertices."""
    return 1 + sum(map(vertices, tree))


@cache
def symmetry(tree: Tree) -> int:
    """σ(τ), the number of ways to reorder subtrees that leave the tree as it is.

    Example:
        >>> symmetry(((), (), ((),)))
        2
    """
    return prod(symmetry(kind) ** n * factorial(n) for kind, n in Counter(tree).items())


@cache
def splits(tree: Tree) -> tuple[tuple[Tree, Tree], ...]:
    """(θ, τ∖θ) for every edge of the tree."""
    found = []
    for i, child in enumerate(tree):
        others = tree[:i] + tree[i + 1 :]
        found.append((others, child))
        found += [(tuple(sorted((*others, part))), cut) for part, cut in splits(child)]
    return tuple(found)


@cache
def step_coefficient(tableau: ButcherTableau, tree: Tree) -> Fraction:
    """a(τ) of a step: Σ_i b_i over the stages, with a_ij for every edge."""
    b = [Fraction(x) for x in tableau.b]
    return sum((x * w for x, w in zip(b, _stage_weights(tableau, tree), strict=True)), Fraction(0))


@cache
def _stage_weights(tableau: ButcherTableau, tree: Tree) -> tuple[Fraction, ...]:
    """The product over the subtrees of Σ_j a_ij of theirs, for each stage i."""
    result = [Fraction(1)] * len(tableau.b)
    for child in tree:
        inner = _stage_weights(tableau, child)
        for i, row in enumerate(tableau.a):
            result[i] *= sum((Fraction(a) * w for a, w in zip(row, inner, strict=True) if a), Fraction(0))
    return tuple(result)


@cache
def modified_coefficient(method: str | ButcherTableau, tree: Tree) -> Fraction:
    r"""b(τ) of the modified field; 1 for one vertex, and 0 up to the method's order.

    Example:
        >>> chain, tall, bush = ((),), (((),),), ((), ())  # F'F, F'F'F and F''(F, F)
        >>> [str(modified_coefficient("euler", tree)) for tree in (chain, tall, bush)]
        ['-1/2', '1/3', '1/6']
    """
    tableau = get_tableau(method)
    if vertices(tree) <= tableau.order:  # the order conditions, which decimal coefficients meet to rounding
        return Fraction(int(tree == ()))
    known = sum(
        (_derived(tableau, tree, j) / factorial(j) for j in range(2, vertices(tree) + 1)), Fraction(0)
    )
    return step_coefficient(tableau, tree) - known


@cache
def _derived(tableau: ButcherTableau, tree: Tree, j: int) -> Fraction:
    """(∂_b^(j−1) b)(τ)."""
    if j == 1:
        return modified_coefficient(tableau, tree)
    if vertices(tree) < j:
        return Fraction(0)
    return sum(
        (
            _derived(tableau, part, j - 1) * modified_coefficient(tableau, cut)
            for part, cut in splits(tree)
            if vertices(part) >= j - 1
        ),
        Fraction(0),
    )
