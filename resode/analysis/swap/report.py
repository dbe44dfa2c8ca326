"""The same weights under other solvers and steps: is the network an ODE?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resode.blocks import ResidualStack
from resode.modes import evaluating
from resode.tableaus import METHODS, get_tableau
from resode.tables import plain_table, read_records, records_text

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SwapRow:
    """One solver and step.

    Args:
        solver: the method's name.
        substeps: equal steps a block; None for an adaptive solver, which chooses them.
        step_size: step in depth time, η / substeps, of the first stack; None likewise.
        accuracy: fraction of the samples classified right.
        accuracy_recalibrated: the same with batch-norm statistics measured under this solver; None
            where that was not asked for.
        logit_drift: ‖z − z₀‖ / ‖z₀‖ over all samples, z₀ the logits of the network as it came.
        nfe: field evaluations a sample, summed over the stacks.
        as_trained: whether this is the solver and step the network came with.
    """

    solver: str
    substeps: int | None
    step_size: float | None
    accuracy: float
    accuracy_recalibrated: float | None
    logit_drift: float
    nfe: float
    as_trained: bool


@dataclass(frozen=True)
class SwapReport:
    """What `swap_report` found: `rows`, one a solver and step, in the order asked for."""

    rows: list[SwapRow]

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, under their field names."""
        Path(path).write_text(records_text(SwapRow, self.rows), encoding="utf-8")

    @classmethod
    def from_csv(cls, path: str | Path) -> SwapReport:
        """The report that `to_csv`, or `resode swap`, wrote.

        Args:
            path: the table; values come back to the last digit.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it has other columns, or an entry that is none of its column.

        Example:
            >>> import tempfile
            >>> report = SwapReport([SwapRow("euler", 1, 1.0, 0.9, None, 0.0, 3.0, True)])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.to_csv(folder + "/swap.csv")
            ...     SwapReport.from_csv(folder + "/swap.csv") == report
            True
        """
        try:
            return cls(read_records(SwapRow, path))
        except ValueError as error:
            raise ValueError(f"{path} is no swap table, as `resode swap RUN` writes one: {error}.") from None

    def critical_steps(self, drop: float = 0.01) -> dict[str, float]:
        """For each fixed-step solver the largest step that, as all finer ones, keeps the trained accuracy.

        Args:
            drop: how much less accuracy still counts as kept, as a fraction of all samples.

        Returns:
            The step by solver; 0 where the finest one loses more: the network is no ODE under that solver.

        Raises:
            ValueError: the report has no row for the solver and step that the network came with.

        Example:
            >>> trained = SwapRow("euler", 1, 1.0, 0.90, None, 0.0, 1.0, True)
            >>> coarse = SwapRow("rk4", 1, 1.0, 0.70, None, 0.5, 4.0, False)
            >>> fine = SwapRow("rk4", 2, 0.5, 0.90, None, 0.1, 8.0, False)
            >>> SwapReport([trained, coarse, fine]).critical_steps()
            {'euler': 1.0, 'rk4': 0.5}
        """
        trained = [row.accuracy for row in self.rows if row.as_trained]
        if not trained:
            raise ValueError(
                "the report has no row of the network as it was trained; add its solver and substeps to it."
            )
        found: dict[str, float] = {}
        broken: set[str] = set()
        fixed = [row for row in self.rows if row.step_size is not None]
        for row in sorted(fixed, key=lambda row: row.step_size or 0.0):
            if row.accuracy < trained[0] - drop:
                broken.add(row.solver)
            if row.solver not in broken:
                found[row.solver] = float(row.step_size or 0.0)
        return {row.solver: found.get(row.solver, 0.0) for row in fixed}

    def plot(self, path: str | Path | None = None):
        """Accuracy against step size, one line a solver; the matplotlib figure, saved where `path` says."""
        from resode import plots

        return plots.swap_accuracy(self, path)

    def __str__(self) -> str:
        recalibrated = any(row.accuracy_recalibrated is not None for row in self.rows)
        columns = ["solver", "substeps", "accuracy", "recalibrated", "logit drift", "F evaluations", ""]
        table = []
        for row in self.rows:
            steps = "adaptive" if row.substeps is None else str(row.substeps)
            again = row.accuracy_recalibrated
            cells = [row.solver, steps, f"{row.accuracy:.2%}", "—" if again is None else f"{again:.2%}"]
            cells += [f"{row.logit_drift:.2e}", f"{row.nfe:.1f}", "as trained" if row.as_trained else ""]
            table.append(cells)
        shown = [number for number, name in enumerate(columns) if name != "recalibrated" or recalibrated]
        columns, *table = [[row[number] for number in shown] for row in (columns, *table)]
        return "\n".join(plain_table(columns, table))


def swap_report(
    model: nn.Module,
    loader: Batches,
    solvers: Sequence[str] = ("euler", "midpoint", "rk4", "dopri5"),
    substeps: Sequence[int] = (1, 2, 4),
    *,
    recalibrate: Batches | None = None,
) -> SwapReport:
    """Accuracy, logit drift and cost of the same weights under other solvers and steps.

    A network that has learnt an ODE keeps its accuracy under every finer solver; one that has learnt
    the steps of its own solver does not.

    Args:
        model: a classifier with at least one `ResidualStack` inside, giving logits (B, classes). Its
            solvers, training mode and statistics are put back afterwards.
        loader: batches (images, labels), iterated once a row; labels int64 (B,).
        solvers: explicit methods' names; adaptive ones give one row, at the stacks' own tolerances.
        substeps: equal steps a block for the others.
        recalibrate: training batches; if given, each row also gets the accuracy with batch-norm
            statistics measured anew under its solver (a swap meets other statistics than training did).

    Returns:
        The report; str() is a table, .rows the data, .to_csv and .plot write it.

    Raises:
        ValueError: no ResidualStack in the model, an unknown solver, or an empty loader.

    Source:
        Ott et al., ResNet After All? Neural ODEs and Their Numerical Solution (2021).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(ResidualStack(nn.Linear(4, 4), depth=3, step_size=0.1), nn.Linear(4, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> [row.nfe for row in swap_report(model, data, ["euler", "rk4"], [1]).rows]
        [3.0, 12.0]
    """
    stacks = [module for module in model.modules() if isinstance(module, ResidualStack)]
    if not stacks:
        raise ValueError(
            "a solver can be swapped only in a resode.ResidualStack, and this model holds none. "
            "The odenet… networks do; a post-activation ResNet's blocks are no solver steps."
        )
    for name in solvers:
        if not get_tableau(name).explicit:
            raise ValueError(f"{name!r} is implicit; a stack takes explicit solvers only.")
    wanted = [(name, n) for name in solvers for n in ([None] if METHODS[name].adaptive else substeps)]
    came_with = [(stack.solver, stack.substeps) for stack in stacks]
    batches, training_batches = _reusable(loader), _reusable(recalibrate or ())
    original = _evaluate(model, stacks, batches)

    def row(solver: str, n: int | None, as_trained: bool) -> SwapRow:
        logits, labels, nfe = original if as_trained else _evaluate(model, stacks, batches)
        recalibrated = None
        if recalibrate is not None:
            recalibrated = _recalibrated_accuracy(model, stacks, training_batches, batches)
        return SwapRow(
            solver=solver,
            substeps=n,
            step_size=None if n is None else stacks[0].step_size / n,
            accuracy=_accuracy(logits, labels),
            accuracy_recalibrated=recalibrated,
            logit_drift=float((logits - original[0]).norm() / original[0].norm()),
            nfe=nfe,
            as_trained=as_trained,
        )

    first = came_with[0] if len(set(came_with)) == 1 else None
    trained = None if first is None else (first[0], None if METHODS[first[0]].adaptive else first[1])
    rows = []
    try:
        for name, n in wanted:
            for stack in stacks:
                stack.solver, stack.substeps = name, 1 if n is None else n
            rows.append(row(name, n, (name, n) == trained))
    finally:
        for stack, (name, n) in zip(stacks, came_with, strict=True):
            stack.solver, stack.substeps = name, n
    return SwapReport(rows)


def _reusable(batches: Batches) -> Batches:
    """Batches that can be iterated again and again: a generator's are kept."""
    return list(batches) if iter(batches) is batches else batches


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def _evaluate(
    model: nn.Module, stacks: list[ResidualStack], batches: Batches
) -> tuple[Tensor, Tensor, float]:
    """Logits (N, classes) in float64, labels (N,), and field evaluations a sample, in evaluation mode."""
    device = next(model.parameters()).device
    logits, labels, calls = [], [], 0.0
    with evaluating(model):
        for images, targets in batches:
            logits.append(model(images.to(device)).double())
            labels.append(targets.to(device))
            for stack in stacks:
                assert stack.stats is not None
                calls += len(images) * float(torch.as_tensor(stack.stats.nfe, dtype=torch.float64).mean())
    if not logits:
        raise ValueError("the loader gave no batches; it must hold at least one (images, labels).")
    result = torch.cat(logits)
    return result, torch.cat(labels), calls / len(result)


@torch.no_grad()
def _recalibrated_accuracy(
    model: nn.Module, stacks: list[ResidualStack], training_batches: Batches, batches: Batches
) -> float:
    """Accuracy with batch-norm statistics averaged over the training batches under the present solver."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [({k: v.clone() for k, v in m.named_buffers()}, m.momentum) for m in norms]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # a plain average over the batches
                m.train()
            for images, _ in training_batches:
                model(images.to(device))
            return _accuracy(*_evaluate(model, stacks, batches)[:2])
    finally:
        for m, (buffers, momentum) in zip(norms, saved, strict=True):
            m.momentum = momentum
            for name, value in m.named_buffers():
                value.copy_(buffers[name])
