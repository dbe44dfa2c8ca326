"""The first page: what is wrong, if anything, in five headings that fit a narrow terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from resode.analysis.diagnose.findings import WHOLE, Finding
from resode.analysis.diagnose.forecast import Forecast
from resode.results import Result
from resode.tables import records_text, short

WIDTH = 80


@dataclass(frozen=True)
class DiagnosisRow:
    """One residual addition.

    Args:
        block: its module's name, numbered where a module holds several additions.
        shortcut: c where its shortcut is c·x, nan where it is something else.
        gain: of a random perturbation through the block.
        branch_gain: through its branch alone.
        sigma: its largest singular value, from below.
        growth: ‖y‖ / ‖x‖.
        gradient: ‖∂L/∂x‖.
        cause: what was found there, or an empty string.
    """

    block: str
    shortcut: float
    gain: float
    branch_gain: float
    sigma: float
    growth: float
    gradient: float
    cause: str


@dataclass(frozen=True)
class Whole:
    """The whole depth, from the first block's x to the last block's y.

    Args:
        gain: of a random perturbation.
        sigma: largest singular value, from below, in the worst sample.
        state_growth: ‖x_L‖ / ‖x_0‖ there.
        usual: the range in which healthy networks' sigma lies.
    """

    gain: float
    sigma: float
    state_growth: float
    usual: tuple[float, float]


@dataclass(frozen=True)
class Training:
    """The learning rate against its limit 2(1 + β)/λ_max for gradient descent, here without momentum β.

    Args:
        lr: the learning rate.
        limit: 2/λ_max of the loss's Hessian.
        ratio: lr / limit.
    """

    lr: float
    limit: float
    ratio: float


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What is wrong with a network, if anything.

    Args:
        findings: most harmful first; [] where nothing is unusual.
        whole: the whole depth's gain; None without residual blocks.
        swap: a `Forecast` by solver; {} without a `ResidualStack`.
        training: the learning rate over its limit; None without `lr` or `target`.
        rows: one a residual addition, in the order of the forward pass.
        samples: inputs that were looked at.
        solver: of its stacks, or an empty string.
        layers: weighted layers, where there are no residual blocks.
        notes: what was done or could not be measured.
    """

    findings: list[Finding]
    whole: Whole | None
    swap: dict[str, Forecast]
    training: Training | None
    rows: list[DiagnosisRow]
    samples: int
    solver: str = ""
    layers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing unusual was found."""
        return not self.findings

    def __str__(self) -> str:
        return self.page(WIDTH)

    def page(self, width: int = WIDTH) -> str:
        """The first page, folded at words to so many columns."""
        lines: list[str] = []
        for heading, texts in self._sections():
            for i, text in enumerate(texts):
                start = f"{heading:<9}" if i == 0 else " " * 9
                lines += textwrap.wrap(
                    text,
                    max(width, 24),
                    initial_indent=start,
                    subsequent_indent=" " * 9,
                    break_on_hyphens=False,
                )
        return "\n".join(lines)

    def _sections(self) -> Iterator[tuple[str, list[str]]]:
        yield "VERDICT", list(self._verdict())
        yield "WHOLE", [self._whole_line()]
        yield "BLOCKS", list(self._block_lines())
        yield "SWAP", list(self._swap_lines())
        yield "TRAIN", [self._train_line()]
        if self.notes:
            yield "NOTES", list(self.notes)

    def _verdict(self) -> Iterator[str]:
        if self.ok:
            yield f"nothing unusual ({self._looked_at()})."
        for i, f in enumerate(self.findings[:5]):
            yield f"{f.block}: {f.cause}. {f.text}"
            yield f"→ {f.advice}"
            if i == 4 and len(self.findings) > 5:
                yield f"… and {len(self.findings) - 5} more, in .findings."

    def _looked_at(self) -> str:
        if self.rows:
            return f"{_count(len(self.rows), 'residual addition')}, {_count(self.samples, 'sample')}"
        return f"no residual addition, {_count(self.layers, 'layer')}, {_count(self.samples, 'sample')}"

    def _whole_line(self) -> str:
        w = self.whole
        if w is None:
            return "no residual block adds a branch to the state that it starts from."
        low, high = w.usual
        return (
            f"gain {short(w.gain)}, at most {short(w.sigma)} (usual {low:g} to {high:g}); ‖x_L‖/‖x_0‖ "
            f"{short(w.state_growth)}."
        )

    def _block_lines(self) -> Iterator[str]:
        known = sorted(r.branch_gain for r in self.rows if math.isfinite(r.branch_gain))
        if not known:
            yield "no branch's gain to compare."
            return
        odd = [r for r in self.rows if r.cause]
        yield (
            f"branch gains {short(known[0])} to {short(known[-1])}, median "
            f"{short(known[len(known) // 2])}; {len(odd) or 'none'} of {len(self.rows)} "
            f"{'stand' if len(odd) > 1 else 'stands'} out."
        )
        for r in odd[:5]:
            yield f"{r.block}: {r.cause}; gain {short(r.gain)}, branch {short(r.branch_gain)}"

    def _swap_lines(self) -> Iterator[str]:
        if not self.swap:
            yield "no ResidualStack, so no solver to swap."
        for solver, f in self.swap.items():
            if solver == self.solver:
                yield f"{solver}: as it is."
                continue
            where = f"; {f.worst_block} {short(f.defect)}" if f.worst_block else ""
            yield f"{solver} as it is {f.verdict} accuracy (drift {short(f.drift)}{where})."

    def _train_line(self) -> str:
        t = self.training
        if t is None:
            return "give a target and lr= (--lr) to judge a learning rate."
        times = "times" if t.ratio >= 1 else "of"
        return f"lr {t.lr:.3g} is {short(t.ratio)} {times} its limit {short(t.limit)} for gradient descent."

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV, under their field names."""
        Path(path).write_text(records_text(DiagnosisRow, self.rows), encoding="utf-8")

    def plot(self, path: str | Path | None = None) -> Any:
        """The gain by block with what stands out marked; see `resode.plots.block_gains`."""
        from resode import plots

        return plots.block_gains(self, path)

    def _repr_html_(self) -> str:
        """The first page as a table, for notebooks and reports."""
        rows = "".join(
            f'<tr><th style="text-align:left;vertical-align:top">{heading}</th><td style="text-align:left">'
            + "<br>".join(escape(text) for text in texts)
            + "</td></tr>"
            for heading, texts in self._sections()
        )
        return f"<table>{rows}</table>"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


__all__ = ["WHOLE", "Diagnosis", "DiagnosisRow", "Training", "Whole"]
