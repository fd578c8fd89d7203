"""Figures of several training seeds as means with intervals, and as Markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.metrics import bootstrap_interval, functional

Figures = Mapping[str, Tensor]
MEAN = "Mean [95 % bootstrap interval over questions]"
NOTE = f"{MEAN}; in brackets what the best damping by the metric itself would give (an oracle)."
RETRIEVAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "P@10": functional.precision_at_k,
    "R-precision": functional.r_precision,
    "mAP": functional.average_precision,
    "AUROC": functional.auroc,
}


def summarised(
    per_seed: Sequence[Figures], grids: Sequence[Mapping[str, Figures]]
) -> dict[str, dict[str, Any]]:
    """Each figure's mean, interval, mean per seed, the mean at its best damping, and at each damping.

    Args:
        per_seed: one value per question [Q] for each figure, for each training seed. The interval is over questions, each
            averaged over the seeds first.
        grids: for each training seed the same figures at every damping.
    """
    summary = {}
    for key in per_seed[0]:
        values = torch.stack([figures[key].double() for figures in per_seed])  # [seeds, Q]
        low, high = bootstrap_interval(values.mean(0))
        best = [max(float(figures[key].mean()) for figures in grid.values()) for grid in grids]
        dampings = dict.fromkeys(damping for grid in grids for damping in grid)
        by_damping = {
            damping: sum(float(grid[damping][key].mean()) for grid in grids if damping in grid) / len(grids)
            for damping in dampings
        }
        summary[key] = {
            "mean": float(values.mean()),
            "low": float(low),
            "high": float(high),
            "per_seed": values.mean(1).tolist(),
            "oracle": sum(best) / len(best),
            "by_damping": {damping: round(mean, 4) for damping, mean in by_damping.items()},
        }
    return summary


def markdown(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]], keys: Sequence[str], *, oracle: bool = True
) -> list[str]:
    """The lines of a table with a row per method and a column per figure, with or without the best damping's."""
    lines = [f"| method | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row[key]['mean']:.2f} [{row[key]['low']:.2f}, {row[key]['high']:.2f}]"
            + (f" ({row[key]['oracle']:.2f})" if oracle else "")
            for key in keys
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


class Table:
    """The rows of a benchmark, as they come in: the figures of each method at its own damping and at the whole grid.

    Args:
        columns: the figures that the Markdown shows; the JSON has all of them.
        oracle: whether rows have a grid of dampings to show the best of.
    """

    def __init__(self, columns: Sequence[str], *, oracle: bool = True) -> None:
        self.columns, self.oracle = list(columns), oracle
        self._honest: dict[str, list[Figures]] = {}
        self._grids: dict[str, list[Mapping[str, Figures]]] = {}

    def add(self, name: str, grid: Mapping[str, Figures], damping: str) -> None:
        """Adds the next training seed of a row: its figures, one value per question [Q] each, by damping.

        Args:
            name: of the row.
            grid: the figures at every damping.
            damping: the honest one, fixed beforehand.
        """
        self._honest.setdefault(name, []).append(grid[damping])
        self._grids.setdefault(name, []).append(grid)

    def rows(self) -> dict[str, dict[str, Any]]:
        """:func:`summarised` for every row."""
        return {name: summarised(figures, self._grids[name]) for name, figures in self._honest.items()}

    def write(self, path: Path, facts: Mapping[str, Any], head: str) -> str:
        """Writes ``<path>.json`` (``facts`` and the rows) and ``<path>.md`` (``head`` and the table); returns the latter."""
        rows = self.rows()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**facts, "rows": rows}, indent=1)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        note = NOTE if self.oracle else f"{MEAN}."
        lines = [head, note, "", *markdown(rows, self.columns, oracle=self.oracle)]
        text = "\n".join(lines) + "\n"
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        return text
