"""The same weights under other solvers and steps: is the network an ODE?"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from resode.analysis.diagnose.forecast import INPUTS, drift, forecast, verdict
from resode.analysis.swap.modified import BlockDistance, block_distances
from resode.blocks import ResidualStack
from resode.blocks.solving import other_solver, stacks_of
from resode.blocks.statistics import measure_statistics, put_back, tracked_norms
from resode.checks import checked
from resode.modes import evaluating
from resode.progress import Progress
from resode.results import Result
from resode.tableaus import get_tableau
from resode.tables import plain_table, read_records, records_text, short

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SwapRow:
    """One solver and step.

    Args:
        solver: the method's name.
        substeps: equal steps a block; None for an adaptive solver, which chooses them.
        step_size: step in depth time, η / substeps, of the first stack; None likewise.
        forecast: "keeps", "may lose" or "loses", said before a label was looked at, of the recalibrated
            accuracy; see `resode.analysis.diagnose.forecast`.
        accuracy: fraction of the samples classified right, as the network is.
        accuracy_recalibrated: the same with batch-norm statistics measured anew under this solver; None
            where there are none to measure, or that was not wanted.
        logit_drift: ‖z − z₀‖ / ‖z₀‖ over all samples, z₀ the logits of the network as it came.
        drift_recalibrated: the same with statistics measured anew under this solver and the trained one, or
            None.
        defect: ‖Φ(x) − Φ₀(x)‖ / ‖Φ₀(x)‖ of the block's map Φ that differs most from the trained one Φ₀.
        worst_block: that block's name.
        nfe: field evaluations a sample, summed over the stacks.
        as_trained: whether this is the solver and step the network came with.
    """

    solver: str
    substeps: int | None
    step_size: float | None
    forecast: str
    accuracy: float
    accuracy_recalibrated: float | None
    logit_drift: float
    drift_recalibrated: float | None
    defect: float
    worst_block: str
    nfe: float
    as_trained: bool

    @property
    def kept(self) -> float:
        """The accuracy that is the solver's own doing: recalibrated where there is batch norm."""
        return self.accuracy if self.accuracy_recalibrated is None else self.accuracy_recalibrated

    @property
    def batch_norm_share(self) -> float:
        """What batch norm's statistics of another solver cost: accuracy that recalibration brings back."""
        return self.kept - self.accuracy


@dataclass(frozen=True, repr=False)
class SwapReport(Result):
    """What `swap_report` found.

    Args:
        rows: one a solver and step, in the order asked for.
        calibration: what batch norm's statistics were measured at: "training batches", "these inputs", or
            "nothing".
        distances: how far each block is from the flow of its own F, as trained:
            `resode.distance_from_ode`, the mean over up to 64 inputs.
        distances_note: what is to be said of them, or why there are none.
    """

    rows: list[SwapRow]
    calibration: str = "nothing"
    distances: list[BlockDistance] = field(default_factory=list)
    distances_note: str = ""

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, under their field names."""
        Path(path).write_text(records_text(SwapRow, self.rows), encoding="utf-8")

    def distances_to_csv(self, path: str | Path) -> None:
        """Write the blocks' distances from an ODE as CSV."""
        Path(path).write_text(records_text(BlockDistance, self.distances), encoding="utf-8")

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
            >>> row = SwapRow("euler", 1, 1.0, "keeps", 0.9, None, 0.0, None, 0.0, "", 3.0, True)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     SwapReport([row]).to_csv(folder + "/swap.csv")
            ...     SwapReport.from_csv(folder + "/swap.csv").rows == [row]
            True
        """
        try:
            return cls(read_records(SwapRow, path, added=_ADDED))
        except ValueError as error:
            raise ValueError(f"{path} is no swap table, as `resode swap RUN` writes one: {error}.") from None

    def critical_steps(self, drop: float = 0.01) -> dict[str, float]:
        """For each fixed-step solver the largest step that keeps the accuracy, as all finer ones do.

        It is the recalibrated accuracy where there is batch norm. A network that keeps it as trained and
        loses it at finer steps has learnt its solver's steps: then there is no such step.

        Args:
            drop: how much less accuracy still counts as kept, as a fraction of all samples.

        Returns:
            The step by solver; 0 where the finest one loses more: the network is no ODE under that solver.

        Raises:
            ValueError: the report has no row for the solver and step that the network came with.

        Example:
            >>> def row(solver, n, accuracy, trained=False):
            ...     return SwapRow(solver, n, 1 / n, "", accuracy, None, 0.0, None, 0.0, "", 1.0, trained)
            >>> rows = [row("euler", 1, 0.9, True), row("rk4", 1, 0.7), row("rk4", 2, 0.9)]
            >>> SwapReport(rows).critical_steps()
            {'euler': 1.0, 'rk4': 0.5}
        """
        trained = self._trained()
        found: dict[str, float] = {}
        broken: set[str] = set()
        fixed = [row for row in self.rows if row.step_size is not None]
        for row in sorted(fixed, key=lambda row: row.step_size or 0.0):
            if row.kept < trained.kept - drop:
                broken.add(row.solver)
            if row.solver not in broken:
                found[row.solver] = float(row.step_size or 0.0)
        return {row.solver: found.get(row.solver, 0.0) for row in fixed}

    def _trained(self) -> SwapRow:
        """The row of the network as it came."""
        for row in self.rows:
            if row.as_trained:
                return row
        raise ValueError(
            "the report has no row of the network as it was trained; add its solver and substeps to it."
        )

    def causes(self, drop: float = 0.01) -> str:
        """Where accuracy is lost, and to what: a line for the worst row, or that nothing is.

        Example:
            >>> own = SwapRow("euler", 1, 1.0, "keeps", 0.95, 0.95, 0.0, 0.0, 0.0, "", 7.0, True)
            >>> rk4 = SwapRow("rk4", 1, 1.0, "loses", 0.80, 0.90, 0.6, 0.4, 0.3, "1.fields.0", 28.0, False)
            >>> print(SwapReport([own, rk4], "training batches").causes())
            rk4 loses 15.0 points: 10.0 to batch norm's statistics (measured anew at training batches,
            they come back), 5.0 to the solver: the network has learnt its own solver's steps. Train it
            with resode.SwapProof (--swap-proof).
        """
        try:
            trained = self._trained()
        except ValueError:
            return "Without a row of the network as it was trained, nothing can be said of what a swap loses."
        worst = min(self.rows, key=lambda row: min(row.accuracy, row.kept))
        lost = trained.accuracy - worst.accuracy
        by_solver = max(trained.kept - worst.kept, 0.0)
        if max(lost, by_solver) <= drop:
            return f"No solver and step here loses more than {100 * drop:g} of 100 images."
        by_norm = max(lost - by_solver, 0.0)
        steps = "" if worst.substeps in (None, 1) else f" with {worst.substeps} substeps"
        parts = []
        if by_norm > drop / 2:
            parts.append(
                f"{100 * by_norm:.1f} to batch norm's statistics (measured anew at {self.calibration}, they "
                "come back)"
            )
        if by_solver > drop / 2:
            parts.append(
                f"{100 * by_solver:.1f} to the solver: the network has learnt its own solver's steps. Train "
                "it with resode.SwapProof (--swap-proof)"
            )
        said = f"{worst.solver}{steps} loses {100 * lost:.1f} points: {', '.join(parts)}."
        return textwrap.fill(said, 92)

    def about_distances(self) -> str:
        """What the blocks' distances from an ODE say, in a sentence; empty where none were looked at.

        Example:
            >>> SwapReport([], distances_note="not measured: dopri5 follows the flow.").about_distances()
            'Distance from an ODE: not measured: dopri5 follows the flow.'
        """
        if not self.distances:
            return f"Distance from an ODE: {self.distances_note}" if self.distances_note else ""
        mean = sum(d.distance for d in self.distances) / len(self.distances)
        return (
            "Distance from an ODE as trained, how far a step is from the flow of its own F, against F, to "
            f"leading order: {mean:.2g} on average. {self.distances_note}"
        ).strip()

    def furthest(self, most: int = 10) -> list[list[str]]:
        """The blocks furthest from an ODE, largest first: name and distance.

        Example:
            >>> SwapReport([], distances=[BlockDistance("0.fields.0", 0.05)]).furthest()
            [['0.fields.0', '0.05']]
        """
        found = sorted(self.distances, key=lambda d: -d.distance)[:most]
        return [[d.block, short(d.distance)] for d in found]

    def plot(self, path: str | Path | None = None):
        """Accuracy and drift against step size, one line a solver, and each block's distance from an ODE.

        Args:
            path: where to save it.

        Returns:
            The matplotlib figure.
        """
        from resode import plots

        return plots.swap_accuracy(self, path)

    def _headline(self) -> str:
        accuracies = (f"{r.solver} {100 * r.accuracy:.1f} %" for r in self.rows)
        return f"{len(self.rows)} rows, as they are: {', '.join(accuracies)}"

    def __str__(self) -> str:
        recalibrated = any(row.accuracy_recalibrated is not None for row in self.rows)
        columns = ["solver", "substeps", "forecast", "accuracy", "recalibrated", "drift", "F calls", ""]
        table = []
        for row in self.rows:
            steps = "adaptive" if row.substeps is None else str(row.substeps)
            value = row.accuracy_recalibrated
            cells = [row.solver, steps, row.forecast, f"{row.accuracy:.2%}"]
            cells += ["—" if value is None else f"{value:.2%}", f"{row.logit_drift:.1e}", f"{row.nfe:.1f}"]
            table.append([*cells, "as trained" if row.as_trained else ""])
        shown = [number for number, name in enumerate(columns) if name != "recalibrated" or recalibrated]
        columns, *table = [[row[number] for number in shown] for row in (columns, *table)]
        lines = [*plain_table(columns, table), self.causes()]
        if about := self.about_distances():
            lines.append(textwrap.fill(about, 92))
        if self.distances:
            lines += plain_table(["furthest blocks", "distance"], self.furthest())
        return "\n".join(lines)


@checked
def swap_report(
    model: nn.Module,
    loader: Batches,
    solvers: Sequence[str] = ("euler", "midpoint", "rk4", "dopri5"),
    substeps: Sequence[int] = (1, 2, 4),
    *,
    recalibrate: Batches | bool = True,
    progress: bool = True,
) -> SwapReport:
    """Accuracy, logit drift and cost of the same weights under other solvers and steps, by cause.

    A network that has learnt an ODE keeps its accuracy under every finer solver; one that has learnt the
    steps of its own solver does not. Batch norm's share stands apart: its statistics belong to the solver
    that made them, and are measured anew, without labels, under every other: as training takes them, or over
    all evaluations of F where the outputs are then nearer by a twentieth to those of the network as trained.

    Args:
        model: a classifier with at least one `ResidualStack` inside, giving logits (B, classes). Its
            solvers, modes and statistics are put back afterwards.
        loader: batches (images, labels), iterated a few times a row; labels int64 (B,).
        solvers: explicit methods' names; adaptive ones give one row, at the stacks' own tolerances.
        substeps: equal steps a block for the others.
        recalibrate: what statistics are measured anew at: training batches, or True for the loader's inputs
            without their labels; False not to.
        progress: say on a terminal how far it is, after two seconds.

    Returns:
        The report; str() is a table, .rows the data, .to_csv and .plot write it.

    Raises:
        ValueError: no ResidualStack in the model, an unknown solver, an empty loader or one that gives other
            things than (inputs, labels), and batches to recalibrate with where there is no batch norm, or
            whose inputs have another shape than the loader's.

    Source:
        Ott et al., ResNet After All? Neural ODEs and Their Numerical Solution (2021).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(ResidualStack(nn.Linear(4, 4), depth=3, step_size=0.1), nn.Linear(4, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> [row.nfe for row in swap_report(model, data, ["euler", "rk4"], [1]).rows]
        [3.0, 12.0]
    """
    stacks = stacks_of(model)
    if not stacks:
        raise ValueError(
            "a solver can be swapped only in a resode.ResidualStack, and this model holds none. "
            "resode.convert makes stacks of the blocks of other networks; a post-activation ResNet's blocks "
            "are no solver steps."
        )
    for name in solvers:
        if not get_tableau(name).explicit:
            raise ValueError(f"{name!r} is implicit; a stack takes explicit solvers only.")
    wanted = [(name, n) for name in solvers for n in ([None] if get_tableau(name).adaptive else substeps)]
    came_with = {(stack.solver, stack.substeps) for stack in stacks}
    trained = next(iter(came_with)) if len(came_with) == 1 else None
    swap = _Swap(model, stacks, _reusable(loader), *_calibration(model, loader, recalibrate))
    rows = []
    with Progress("swap", progress) as say:
        for number, (name, n) in enumerate(wanted, 1):
            say(f"{name}{'' if n is None else f', substeps {n}'}, {number} of {len(wanted)}")
            own = trained is not None and trained == (name, trained[1] if get_tableau(name).adaptive else n)
            rows.append(swap.row(name, n, own))
        say("the blocks' distances from an ODE")
        return SwapReport(rows, swap.calibration, *block_distances(model, swap.some))


# By what share the outputs must be nearer under statistics over all evaluations to leave those of training.
_NEARER = 0.05

# Columns that version 0.1.0 had not.
_ADDED = {"forecast": "not made", "drift_recalibrated": None, "defect": math.nan, "worst_block": ""}


def _calibration(
    model: nn.Module, loader: Batches, recalibrate: Batches | bool
) -> tuple[Batches | None, str]:
    """What statistics are measured at, and what that is called."""
    norms = tracked_norms(model)
    if isinstance(recalibrate, bool):
        return (_reusable(loader), "these inputs") if recalibrate and norms else (None, "nothing")
    if not norms:
        raise ValueError(
            "recalibration measures the running statistics of batch norms, and this model has none: leave "
            "recalibrate out."
        )
    return _reusable(recalibrate), "training batches"


def _reusable(batches: Batches) -> Batches:
    """Batches that can be iterated again and again: a generator's are kept."""
    return list(batches) if iter(batches) is batches else batches


def _first(batches: Batches, what: str) -> Tensor:
    """The first inputs.

    Raises:
        ValueError: there are none, or they are no pairs of inputs and labels (B,).
    """
    for batch in batches:
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)
        if not pair or not isinstance(batch[1], Tensor):
            came = f"a tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"{what} must give batches (inputs, labels), two tensors: got {came}. A DataLoader or a list "
                "of such pairs does."
            )
        if batch[1].shape != batch[0].shape[:1]:
            raise ValueError(
                f"labels are a class for each input, shape (B,): {what} gave inputs {tuple(batch[0].shape)} "
                f"with labels {tuple(batch[1].shape)}."
            )
        return batch[0]
    raise ValueError(f"{what} gave no batches; it must hold at least one (inputs, labels).")


def _one_evaluation(stack: ResidualStack) -> bool:
    """Whether a block call is one evaluation of F."""
    return len(stack.tableau.b) == 1 and stack.substeps == 1


def _statistics(norms: Iterable[nn.Module]) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


class _Swap:
    """A model with its batches, as it came, to be looked at under one solver after the other."""

    def __init__(
        self,
        model: nn.Module,
        stacks: list[ResidualStack],
        batches: Batches,
        training_batches: Batches | None,
        calibration: str,
    ) -> None:
        self.model, self.stacks = model, stacks
        self.batches, self.training_batches, self.calibration = batches, training_batches, calibration
        self.device = next(model.parameters()).device
        shown = _first(batches, "the loader")
        if training_batches is not None and training_batches is not batches:
            given = _first(training_batches, "recalibrate")
            if given.shape[1:] != shown.shape[1:]:
                raise ValueError(
                    f"statistics are measured at inputs like the loader's: got {tuple(given.shape[1:])} a "
                    f"sample, the loader gives {tuple(shown.shape[1:])}. Pass batches made likewise."
                )
        self.logits, self.labels, self.nfe = self._evaluate()
        first = next(iter(batches))[0]  # spaced, because data sets may lie sorted
        self.some = first[:: max(1, len(first) // INPUTS)][:INPUTS].to(self.device)
        self.own_logits = self.logits
        self.before = self._outputs()
        if training_batches is not None:  # so that a row's drift is the solver's, not the statistics' lag
            with self._recalibrated(as_trained=True):
                self.own_logits, self.before = self._evaluate()[0], self._outputs()

    def row(self, solver: str, substeps: int | None, as_trained: bool) -> SwapRow:
        """What one solver and step do; the forecast first, which sees no label."""
        n = 1 if substeps is None else substeps
        foretold = forecast(self.model, self.some, solver, n)
        recalibrated: tuple[Tensor, Tensor, float] | None = None
        said = foretold.verdict
        with other_solver(self.model, solver, n):
            if self.training_batches is not None:
                with self._recalibrated(as_trained):
                    said = verdict(drift(self._outputs(), self.before))
                    recalibrated = self._evaluate()
            found = (self.logits, self.labels, self.nfe) if as_trained else self._evaluate()
        return SwapRow(
            solver=solver,
            substeps=substeps,
            step_size=None if substeps is None else self.stacks[0].step_size / substeps,
            forecast=said,
            accuracy=_accuracy(*found[:2]),
            accuracy_recalibrated=None if recalibrated is None else _accuracy(*recalibrated[:2]),
            logit_drift=drift(found[0], self.logits),
            drift_recalibrated=None if recalibrated is None else drift(recalibrated[0], self.own_logits),
            defect=foretold.defect,
            worst_block=foretold.worst_block,
            nfe=found[2],
            as_trained=as_trained,
        )

    @contextmanager
    def _recalibrated(self, as_trained: bool) -> Iterator[None]:
        """Batch-norm statistics of the present solver; the model's own afterwards.

        Taken as training takes them, at the first evaluation of a block call, or over all evaluations, which
        makes up for a part of what another solver changes: where the outputs are then nearer to those of the
        network as trained, by a margin. No label is asked.
        """
        norms = tracked_norms(self.model)
        own = _statistics(norms)
        ways = (False,) if as_trained or all(map(_one_evaluation, self.stacks)) else (False, True)
        kept: tuple[float, list[dict[str, Tensor]]] | None = None
        try:
            for every in ways:
                inputs = (images.to(self.device) for images, _ in self.training_batches or ())
                measure_statistics(self.model, inputs, every_evaluation=every)
                if len(ways) > 1:
                    moved = drift(self._outputs(), self.before)
                    if kept is None or moved < kept[0] * (1 - _NEARER):
                        kept = moved, _statistics(norms)
            if kept is not None:
                put_back(norms, kept[1])
            yield
        finally:
            put_back(norms, own)

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        with evaluating(self.model):
            return self.model(self.some)

    @torch.no_grad()
    def _evaluate(self) -> tuple[Tensor, Tensor, float]:
        """Logits (N, classes) in float64, labels (N,), and field evaluations a sample, in evaluation mode."""
        logits, labels, calls = [], [], 0.0
        with evaluating(self.model):
            for images, targets in self.batches:
                logits.append(self.model(images.to(self.device)).double())
                labels.append(targets.to(self.device))
                for stack in self.stacks:
                    assert stack.stats is not None
                    calls += len(images) * float(torch.as_tensor(stack.stats.nfe, dtype=torch.float64).mean())
        result = torch.cat(logits)
        return result, torch.cat(labels), calls / len(result)
