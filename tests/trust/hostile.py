"""Every argument of every row with every hostile value: python -m tests.trust.hostile [NAME …]."""

from __future__ import annotations

import sys
from collections import Counter

import torch

from trust import rows, table


def campaign(only: list[str]) -> tuple[Counter[str], list[str]]:
    """How many calls gave a result, were refused, or broke, and a line of each that broke."""
    counts: Counter[str] = Counter()
    broken = []
    for row in table.rows(slow=False):
        if only and not any(name in row.name for name in only):
            continue
        for argument, value in rows.hostile_calls(row):
            try:
                outcome = rows.attempt(row, rows.PLAIN, {argument: rows.hostile_values()[value]})
                counts["held" if outcome.held else "refused"] += 1
            except rows.Broken as error:
                counts["broken"] += 1
                broken.append(str(error))
    return counts, broken


if __name__ == "__main__":
    torch.set_num_threads(1)
    counted, lines = campaign(sys.argv[1:])
    print("\n".join(lines))
    print(", ".join(f"{number} {what}" for what, number in counted.items()))
