"""What a page says of how far its ranking can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ctrak_lightning.attribution.result import Attribution
from ctrak_lightning.attribution.trust import SelfCheck, self_check, stability
from ctrak_lightning.tracing import FAINT

UNSTABLE = 0.3
"""A correlation between the halves of the ensemble below this gets a warning."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A benchmark figure as text, with the same of label search and chance, if known, and where it comes from."""

    measure: str
    value: str
    label_search: str
    chance: str
    data: str
    file: str


@dataclass(frozen=True, slots=True)
class Confidence:
    """Of one concept. ``strength`` is None where the method looks at one condition only, ``stability`` of one checkpoint,
    ``self_check`` where the store is not at hand; ``warnings`` are sentences, the gravest first."""

    strength: float | None
    is_faint: bool
    checkpoints: int
    stability: float | None
    self_check: SelfCheck | None
    warnings: list[str]


class Examiner:
    """Examines several concepts of one store, the self-check of each damping once."""

    def __init__(self) -> None:
        self._checks: dict[float | None, SelfCheck] = {}

    def examine(self, attribution: Attribution) -> Confidence:
        """How far one concept's ranking can be trusted."""
        strength = None if math.isnan(attribution.strength) else attribution.strength
        halves = stability(attribution.checkpoint_scores, attribution.weights)
        check = self._check(attribution)
        is_faint = strength is not None and strength < FAINT
        warnings = []
        if is_faint:
            warnings.append(
                f"The model hardly tells “with the concept” from “without it”: the concept's strength is {strength:.1e}, below "
                f"{FAINT:g}, which is within noise. It has not learnt this concept, and the ranking below says nothing."
            )
        if not bool((attribution.scores > 0).any()):
            warnings.append("No training image has a positive score for this concept.")
        if check is not None and 2 * check.first < check.asked:
            warnings.append(
                f"Only {check.first} of {check.asked} training images, taken as questions, rank themselves first: these traces "
                "hardly tell the images apart."
            )
        if halves is not None and halves < UNSTABLE:
            warnings.append(
                f"The rankings of the two halves of the checkpoints hardly agree (rank correlation {halves:.2f})."
            )
        if len(attribution.steps) < 2:
            warnings.append(
                "The ranking rests on a single checkpoint, so nothing can be said of its stability or of when the concept was "
                "learnt."
            )
        return Confidence(strength, is_faint, len(attribution.steps), halves, check, warnings)

    def _check(self, attribution: Attribution) -> SelfCheck | None:
        if attribution.store is None:
            return None
        damping = attribution.damping
        if damping not in self._checks:
            self._checks[damping] = self_check(
                attribution.store.checkpoints,
                damping,
                residual=attribution.method["residual"],
                weights=attribution.weights,
            )
        return self._checks[damping]


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
