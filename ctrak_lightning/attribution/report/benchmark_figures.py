"""What the method of a page reached on the recipes' data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """A benchmark figure as text, with the same of label search and chance, if known, and where it comes from."""

    measure: str
    value: str
    label_search: str
    chance: str
    data: str
    file: str


def benchmark_figures(method: str) -> list[Figure]:
    """The shipped figures of the preset of that name; they are those of ``recipes/emoji_artists/results``."""
    text = files(__package__).joinpath("benchmarks.json").read_text(encoding="utf-8")
    return [
        Figure(
            row["measure"],
            _text(row["figure"]),
            _text(row["label_search"]),
            _text(row.get("chance")),
            row["data"],
            row["file"],
        )
        for row in json.loads(text)
        if row["method"] == method
    ]


def figure_sources(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    """The data and the file of each figure, once, in order."""
    return list(dict.fromkeys((figure.data, figure.file) for figure in figures))


def _text(number: dict[str, Any] | None) -> str:
    if number is None:
        return "-"
    interval = f" [{number['low']:.2f}, {number['high']:.2f}]" if "low" in number else ""
    return f"{number['value']:.2f}{interval}"
