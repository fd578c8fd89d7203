"""Figures of several training seeds as means with intervals, and the pages of ``results/``."""

import argparse
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.metrics import bootstrap_interval, functional

RESULTS = Path(__file__).parent / "results"
Figures = Mapping[str, Tensor]
MEAN = "Mean [95 % bootstrap interval over questions]"
NOTE = f"{MEAN}; in brackets what the best damping by the metric itself would give (an oracle)."
RETRIEVAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "P@10": functional.precision_at_k,
    "R-precision": functional.r_precision,
    "mAP": functional.average_precision,
    "AUROC": functional.auroc,
}
_SECTION = re.compile(r"^(?=`python -m )", re.MULTILINE)


def retrieval(scores: Tensor, relevant: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Every retrieval metric of scores [Q, N] per kind of question, one value per question, named
    ``"mAP, object"``."""
    return {
        f"{title}, {kind}": values[torch.tensor([each == kind for each in kinds])]
        for title, metric in RETRIEVAL.items()
        for values in [metric(scores, relevant)]
        for kind in dict.fromkeys(kinds)
    }


def parser_of(module: str, doc: str | None, results: Path = RESULTS) -> argparse.ArgumentParser:
    """The parser of ``python -m <module>``, with the folder of the page that it writes."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m {module}", description=doc, formatter_class=layout)
    parser.add_argument("--results", type=Path, default=results, help="folder of the page")
    return parser


def command_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command as it was given, without what is the default and without folders."""
    words = parser.prog.split()
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        told = value is not None and value != action.default and not isinstance(value, Path)
        if not told or not action.option_strings:
            continue
        words.append(action.option_strings[0])
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def machine() -> str:
    """What figures depend on, if only in their last digits."""
    return f"{platform.machine()}, torch {torch.__version__}"


def publish(path: Path, text: str) -> None:
    """Prints a section, which begins with its command in backquotes, and writes it to its page: in
    place of what that command wrote there before, or at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = {part.split("`")[1]: part.rstrip() for part in _SECTION.split(known) if part.strip()}
    sections[text.split("`")[1]] = text.rstrip()
    path.write_text("\n\n".join(sections.values()) + "\n", encoding="utf-8")
    print(text)


def grid(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def summarised(
    per_seed: Sequence[Figures], grids: Sequence[Mapping[str, Figures]]
) -> dict[str, dict[str, Any]]:
    """Each figure's mean, interval, mean at its best damping, and mean at each damping, of one
    value per question [Q] for every training seed, and of the same at every damping (``grids``).
    The interval is over questions, each averaged over the seeds first."""
    summary = {}
    for key in per_seed[0]:
        values = torch.stack([figures[key].double() for figures in per_seed])  # [seeds, Q]
        low, high = bootstrap_interval(values.mean(0))
        best = [max(float(figures[key].mean()) for figures in grid.values()) for grid in grids]
        dampings = dict.fromkeys(damping for grid in grids for damping in grid)
        by_damping = {}
        for damping in dampings:
            means = [float(grid[damping][key].mean()) for grid in grids if damping in grid]
            by_damping[damping] = sum(means) / len(means)
        summary[key] = {
            "mean": float(values.mean()),
            "low": float(low),
            "high": float(high),
            "oracle": sum(best) / len(best),
            "by_damping": by_damping,
        }
    return summary


def markdown(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]], keys: Sequence[str], *, oracle: bool = True
) -> list[str]:
    """A row per method and a column per figure, with or without the best damping's."""
    return grid(
        ["method", *keys],
        (
            [name, *(interval(row[key]) + f" ({row[key]['oracle']:.2f})" * oracle for key in keys)]
            for name, row in rows.items()
        ),
    )


def interval(figure: Mapping[str, Any], scale: float = 1.0) -> str:
    """``0.85 [0.81, 0.89]``; without brackets where there is no interval."""
    shown = f"{scale * figure['mean']:.2f}"
    if figure["low"] is None:
        return shown
    return f"{shown} [{scale * figure['low']:.2f}, {scale * figure['high']:.2f}]"


class Table:
    """The rows of a benchmark as they come in: each method's figures at its own and all dampings.

    Args:
        columns: the figures to show; all of the first row by default.
        oracle: whether rows have a grid of dampings to show the best of.
    """

    def __init__(self, columns: Sequence[str] | None = None, *, oracle: bool = True) -> None:
        self.columns, self.oracle = columns, oracle
        self.honest: dict[str, list[Figures]] = {}
        self._grids: dict[str, list[Mapping[str, Figures]]] = {}

    def add(self, name: str, grid: Mapping[str, Figures], damping: str) -> None:
        """Adds the next training seed of a row: its figures, one value per question [Q] each, at
        every damping, and the honest damping, fixed beforehand."""
        self.honest.setdefault(name, []).append(grid[damping])
        self._grids.setdefault(name, []).append(grid)

    def fill(
        self,
        found: Mapping[str, Mapping[str, Tensor]],
        figures: Callable[[Tensor], Figures],
        dampings: Mapping[str, str],
    ) -> None:
        """Adds a training seed of every row, from its scores [Q, N] by damping; of those without an
        honest damping from their only scores."""
        for name, scores in found.items():
            grid = {damping: figures(each) for damping, each in scores.items()}
            self.add(name, grid, dampings.get(name, next(iter(grid))))

    def rows(self) -> dict[str, dict[str, Any]]:
        """:func:`summarised` for every row."""
        return {name: summarised(found, self._grids[name]) for name, found in self.honest.items()}

    def page(self, head: str) -> str:
        """``head``, which begins with the command, and the table."""
        rows = self.rows()
        columns = list(next(iter(rows.values()))) if self.columns is None else self.columns
        note = NOTE if self.oracle else f"{MEAN}."
        return "\n".join([head, note, "", *markdown(rows, columns, oracle=self.oracle)]) + "\n"
