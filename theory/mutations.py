"""Break the function that a page rests on, and see the page fail: `python -m theory.mutations [ID …]`.

A page that holds whatever the library computes proves nothing. Every page has at least one mutation here:
a function of the library, or of `theory.measures`, and what takes its place. The page runs at its small size
with the broken function and must say that its claim does not hold; that it stops for another reason does not
count.

Exit codes: 0 where every mutation was caught, 1 where a page held in spite of one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

os.environ["RESODE_FAST"] = "1"  # before theory.verdict reads it

from rich.console import Console
from rich.table import Table

from theory.__main__ import PAGES, chosen, run

Function = Callable[..., Any]


@dataclass(frozen=True)
class Mutation:
    """A function broken on purpose.

    Args:
        claim: the page that must notice.
        place: of the function, "module:name" or "module:Class.name".
        what: is wrong with it now, in words.
        mutant: from the function to what takes its place.
    """

    claim: str
    place: str
    what: str
    mutant: Callable[[Function], Any]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The broken function in every module that holds it; afterwards the whole one again."""
        module, _, name = self.place.partition(":")
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = owner.__dict__[last] if path else getattr(owner, last)
        if isinstance(original, property):
            broken: Any = property(self.mutant(original.fget))  # pyright: ignore[reportArgumentType]
        else:
            broken = self.mutant(original)
        holders = [(owner, last)] if path else list(_holders(original))
        for holder, key in holders:
            setattr(holder, key, broken)
        try:
            yield
        finally:
            for holder, key in holders:
                setattr(holder, key, original)


def _holders(value: Any) -> Iterator[tuple[Any, str]]:
    """Every module of the library that has the function under a name."""
    for name, module in list(sys.modules.items()):
        if module is not None and name.split(".")[0] in ("resode", "theory"):
            yield from ((module, key) for key, held in list(vars(module).items()) if held is value)


def scaled(factor: float) -> Callable[[Function], Function]:
    """Its result times a factor."""
    return lambda f: lambda *args, **kwargs: factor * f(*args, **kwargs)


def shifted_by(amount: float) -> Callable[[Function], Function]:
    """Its result plus an amount."""
    return lambda f: lambda *args, **kwargs: f(*args, **kwargs) + amount


def with_field(name: str, change: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """One field of the dataclass that it returns, changed."""

    def mutant(f: Function) -> Function:
        def broken(*args: Any, **kwargs: Any) -> Any:
            found = f(*args, **kwargs)
            return replace(found, **{name: change(getattr(found, name))})

        return broken

    return mutant


def _without_known(_: Function) -> Function:
    """A known part that is left out."""
    return lambda self, *args: self.learned(*args)


def _with_shortcuts(f: Function) -> Function:
    """A plain perceptron whose blocks have shortcuts."""

    def forward(self: Any, x: Any) -> Any:
        x = self.input(x.flatten(1))
        for block in self.blocks:
            x = x + block[0](x) / len(self.blocks)
        return self.linear(x)

    return forward


def _same_accuracy(f: Function) -> Function:
    """A report in which no solver loses anything."""

    def report(*args: Any, **kwargs: Any) -> Any:
        found = f(*args, **kwargs)
        own = next(row.accuracy for row in found.rows if row.as_trained)
        return replace(
            found, rows=[replace(row, accuracy=own, accuracy_recalibrated=own) for row in found.rows]
        )

    return report


def _rows_only(f: Function) -> Function:
    """A matrix whose rows alone sum to one."""
    return lambda logits: logits.softmax(-1)


def _linear_error(f: Function) -> Function:
    """Errors that fall like those of order one."""

    def found(*args: Any, **kwargs: Any) -> Any:
        result = f(*args, **kwargs)
        depths = result.depths[: len(result.errors)]  # without a reference the last depth has none
        return replace(result, order=1.0, errors=[result.errors[0] * depths[0] / d for d in depths])

    return found


MUTATIONS = [
    Mutation("A1", "resode.analysis:gradient_parts", "twice Jᵀg", with_field("residual", lambda v: 2 * v)),
    Mutation(
        "A2",
        "resode.analysis:product_norm",
        "a norm 0.1 % too large",
        with_field("norm", lambda v: 1.001 * v),
    ),
    Mutation(
        "A3",
        "theory.measures.gains:block_gains",
        "gains 1 % too large",
        with_field("singular_values", lambda v: 1.01 * v),
    ),
    Mutation(
        "A4",
        "resode.analysis:gradient_parts",
        "Sᵀg 1 % too large",
        with_field("identity", lambda v: 1.01 * v),
    ),
    Mutation(
        "A4",
        "resode.shortcuts:PadShortcut.forward",
        "an image turned upside down",
        lambda f: lambda self, x: f(self, x.flip(2)),
    ),
    Mutation(
        "A5",
        "resode.shortcuts:HighwayShortcut.forward",
        "a gate that lets all of x through",
        lambda f: lambda self, x, y: f(self, x, y) + x - x.detach(),
    ),
    Mutation(
        "A6",
        "theory.measures.gains:gradient_norms",
        "norms to the power 1.1",
        lambda f: lambda *a: f(*a) ** 1.1,
    ),
    Mutation("A7", "resode.analysis:count", "one multiply-add too many", with_field("macs", lambda v: v + 1)),
    Mutation("A8", "theory.measures.variation:total_variation", "2 % too much", scaled(1.02)),
    Mutation("A9", "resode.analysis:gradient_parts", "twice Jᵀg", with_field("residual", lambda v: 2 * v)),
    Mutation(
        "A9",
        "resode.analysis:product_norm",
        "a norm 0.1 % too large",
        with_field("norm", lambda v: 1.001 * v),
    ),
    Mutation(
        "A9",
        "resode.analysis:step_limit",
        "a limit 1 % too large",
        with_field("decaying_step", lambda v: 1.01 * v),
    ),
    Mutation(
        "B1",
        "resode.analysis:correction_along",
        "away from the target",
        lambda f: lambda path, target: f(path, 2 * path[:-1].mean(0) - target),
    ),
    Mutation("B1", "resode.analysis:correction_along", "cosines shifted by 0.1", shifted_by(0.1)),
    Mutation(
        "B2",
        "theory.measures.unrolled:unrolled_sum",
        "a term too much",
        lambda f: lambda *a: [replace(r, error=r.error + 1e-6) for r in f(*a)],
    ),
    Mutation(
        "B3",
        "resode.analysis:boosting_along",
        "cosines of the other sign",
        with_field("cosine", lambda v: -v),
    ),
    Mutation(
        "B4",
        "resode.fields:SoftThresholdField.forward",
        "a dead zone 1 % too small",
        lambda f: lambda self, x: f(self, x) + 1e-6,
    ),
    Mutation("B5", "theory.measures.conflict:GradientConflict.turning_step", "twice the step", scaled(2.0)),
    Mutation(
        "B5",
        "theory.measures.conflict:gradient_conflict",
        "slopes of the other sign",
        with_field("slope", lambda v: -v),
    ),
    Mutation(
        "B6",
        "theory.measures.collective:first_update",
        "gradients 1 % too large",
        with_field("gradients", lambda v: 1.01 * v),
    ),
    Mutation("B7", "resode.networks:PlainMLP.forward", "plain networks with shortcuts", _with_shortcuts),
    Mutation(
        "B8",
        "resode.analysis:loss_gradient_norms",
        "norms to the power 1.5",
        lambda f: lambda *a, **k: f(*a, **k) ** 1.5,
    ),
    Mutation("B8", "theory.measures.recovery:recovery", "half of what is read", scaled(0.5)),
    Mutation("B9", "resode.fields:KnownPlusLearned.forward", "the known part left out", _without_known),
    Mutation("B10", "resode.fields:KnownPlusLearned.forward", "the known part left out", _without_known),
    Mutation("B10", "theory.measures.learning_curve:LeastSquares.forward", "1 % too much", scaled(1.01)),
    Mutation("B11", "resode.analysis:largest_hessian_eigenvalue", "0.1 % too much", scaled(1.001)),
    Mutation("B11", "resode.networks:PlainMLP.forward", "plain networks with shortcuts", _with_shortcuts),
    Mutation("B12", "theory.measures.recovery:recovery", "half of what is read", scaled(0.5)),
    Mutation(
        "B12",
        "theory.measures.recovery:recovery",
        "all is read, whatever the features",
        lambda f: lambda *a: 0.95,
    ),
    Mutation("B13", "resode.training.recipe:Recipe.learning_rate", "1 % too high", scaled(1.01)),
    Mutation("C1", "resode.analysis:depth_convergence", "errors of order one", _linear_error),
    Mutation(
        "C2", "resode.analysis:find_fixed_points", "points 1e-6 off", with_field("points", lambda v: v + 1e-6)
    ),
    Mutation("C3", "resode:max_stable_step", "0.1 % too large", scaled(1.001)),
    Mutation(
        "C4",
        "resode.analysis:transient_growth",
        "a peak 1 % too high",
        with_field("peak", lambda v: 1.01 * v),
    ),
    Mutation("C4", "resode.analysis:logarithmic_norm", "1 % too large", scaled(1.01)),
    Mutation("C5", "resode:max_learning_rate", "1 % too large", scaled(1.01)),
    Mutation("C6", "resode:swap_report", "a report in which nothing is lost", _same_accuracy),
    Mutation("C7", "resode.analysis:depth_convergence", "errors of order one", _linear_error),
    Mutation("C8", "resode.analysis:lyapunov_exponents", "2 % too large", scaled(1.02)),
    Mutation(
        "C9",
        "resode:modified_field",
        "one correction, however many are asked for",
        lambda f: lambda stack, order=1: f(stack, 1),
    ),
    Mutation("C10", "resode.shortcuts:doubly_stochastic", "rows alone that sum to one", _rows_only),
    Mutation("C10", "resode.analysis:map_limit", "1 % too large", scaled(1.01)),
    Mutation(
        "C11",
        "resode:SwapProof.batch",
        "a draw that changes nothing",
        lambda f: lambda self, *a: contextlib.nullcontext(),
    ),
]
"""What was broken, at least once a page."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    claims = chosen(list(sys.argv[1:] if arguments is None else arguments))
    shown, survived = Table("claim", "broken", "how", "the page", "seconds"), 0
    console = Console(width=None if sys.stdout.isatty() else 140)
    for mutation in (m for m in MUTATIONS if m.claim in claims):
        begun = time.perf_counter()
        with mutation.applied():
            result, _, _ = run(PAGES[mutation.claim], show=False)
        caught = result.startswith("the claim does not hold")
        survived += not caught
        said = (
            "is caught" if caught else "HOLDS" if result == "holds" else f"stops: {result.splitlines()[-1]}"
        )
        name = mutation.place.partition(":")[2]
        shown.add_row(mutation.claim, name, mutation.what, said, f"{time.perf_counter() - begun:.1f}")
        print(
            f"{mutation.claim} {name}, {mutation.what}: {result.splitlines()[-1]}",
            file=sys.stderr,
            flush=True,
        )
    console.print(shown)
    total = sum(m.claim in claims for m in MUTATIONS)
    print(f"{total - survived} of {total} mutations caught.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
