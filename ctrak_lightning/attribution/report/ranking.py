"""The rankings as the page's script reads them: compact JSON values, each sample's text once for
all concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctrak_lightning.attribution.report.columns import Columns
from ctrak_lightning.attribution.report.pictures import Thumbnails
from ctrak_lightning.attribution.report.text import link, shown
from ctrak_lightning.attribution.result import NEVER, Attribution
from ctrak_lightning.escaping import metadata_heads
from ctrak_lightning.traces import SampleTable

BEST, LOWEST = 9000, 1000
"""Rows of each concept that a page holds, where there are more."""
PICTURED_BEST, PICTURED_LOWEST = 300, 30
"""Rows of each concept with thumbnail, timeline and parts."""

_OURS = ("rank", "score", "sample", "image", "exposures")


@dataclass(frozen=True, slots=True)
class Ranking:
    """Positions in the data set of the rows that a page holds, with their ranks, best first."""

    samples: list[int]
    ranks: list[int]
    total: int

    @property
    def pictured(self) -> list[int]:
        """The rows (not the samples) that have a thumbnail."""
        count = len(self.samples)
        return sorted(
            {*range(min(PICTURED_BEST, count)), *range(max(0, count - PICTURED_LOWEST), count)}
        )


def ranking(attribution: Attribution) -> Ranking:
    """The ranking of all samples; of very many, its two ends."""
    order = attribution.order().tolist()
    ranks = list(range(1, len(order) + 1))
    if len(order) > BEST + LOWEST:
        return Ranking(order[:BEST] + order[-LOWEST:], ranks[:BEST] + ranks[-LOWEST:], len(order))
    return Ranking(order, ranks, len(order))


def page_data(
    attributions: Sequence[Attribution],
    rankings: Sequence[Ranking],
    columns: Columns,
    thumbnails: Thumbnails,
) -> dict[str, Any]:
    """What the page's script shows: samples, thumbnails, and each concept's rows."""
    table = attributions[0].samples
    used = sorted({sample for each in rankings for sample in each.samples})
    place = {sample: i for i, sample in enumerate(used)}
    pictured = sorted({each.samples[row] for each in rankings for row in each.pictured})
    pictures = {place[sample]: thumbnails.index(sample) for sample in pictured}
    return {
        "ids": [shown(table.sample_ids[sample]) for sample in used],
        "columns": [
            _column(table, name, head, used, name in columns.links)
            for name, head in zip(columns.names, metadata_heads(columns.names, _OURS), strict=True)
        ]
        + _exposures(attributions[0], used),
        "group": columns.group and columns.names.index(columns.group),
        "licence": columns.licence and columns.names.index(columns.licence),
        "caption": columns.caption and columns.names.index(columns.caption),
        "steps": attributions[0].steps,
        "thumbnails": thumbnails.uris,
        "pictures": {place: index for place, index in pictures.items() if index is not None},
        "concepts": [
            _concept(attribution, each, place)
            for attribution, each in zip(attributions, rankings, strict=True)
        ],
    }


def _column(
    table: SampleTable, name: str, head: str, used: Sequence[int], links: bool
) -> dict[str, Any]:
    """A metadata column under its ``head``; ``links`` says which of its values may become one."""
    return _coded(head, [table.metadata[name][sample] for sample in used], links)


def _exposures(attribution: Attribution, used: Sequence[int]) -> list[dict[str, Any]]:
    """How often each sample had entered an optimizer step, as a column, if that is known."""
    if attribution.exposures is None:
        return []
    counts = attribution.exposures[-1][list(used)].tolist()
    texts = [NEVER if count == 0 else "" if count < 0 else str(count) for count in counts]
    return [_coded("exposures", texts, False)]


def _coded(head: str, values: Sequence[str], links: bool) -> dict[str, Any]:
    """A column, equal values once."""
    codes = {value: code for code, value in enumerate(dict.fromkeys(values))}
    return {
        "name": shown(head),
        "values": [shown(value) for value in codes],
        "links": [link(value) is not None for value in codes] if links else None,
        "codes": [codes[value] for value in values],
    }


def _concept(attribution: Attribution, rows: Ranking, place: dict[int, int]) -> dict[str, Any]:
    scores, timeline, parts = attribution.scores, attribution.timeline(), attribution.parts
    chosen = [rows.samples[row] for row in rows.pictured]
    found: dict[str, Any] = {
        "samples": [place[sample] for sample in rows.samples],
        "ranks": rows.ranks,
        "scores": _rounded(scores[rows.samples]),
        "detailed": rows.pictured,
        "timeline": [_rounded(row) for row in timeline[:, chosen]],
    }
    if parts is not None:
        found["timesteps"] = parts.timesteps
        found["by_timestep"] = [_rounded(row) for row in parts.by_timestep[:, chosen]]
        found["by_layer_group"] = {
            name: _rounded(row[chosen]) for name, row in parts.by_layer_group.items()
        }
    return found


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
