"""What stands on the page beside its figures: texts, pictures, columns, the ranking."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.result import NEVER, Attribution
from ctrak_lightning.errors import ReportError, metadata_heads
from ctrak_lightning.tasks import Spec
from ctrak_lightning.utilities.images import png_uri

MOST = 1000
"""Characters of a value that a page shows."""
_LINK = re.compile(r"https?://[^\s\"'<>\\^`{|}]+", re.IGNORECASE)
# Direction marks, embeddings, overrides and isolates: with them "gpj.exe" can be shown as
# "exe.jpg".
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SHOWN = {ord(character): f"[U+{ord(character):04X}]" for character in _DIRECTIONS}
_SHOWN |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: "\u2421"} | {code: f"[U+{code:04X}]" for code in range(0x80, 0xA0)}


def shown(text: str, most: int = MOST) -> str:
    """``text`` as a page shows it: what is invisible or turns the reading direction is spelt out,
    and what is too long is cut, with a word that says so.

    Example:
        >>> shown("a" * 12, most=10)
        'aaaaaaaaaa… (2 more characters)'
        >>> shown("cat\\u202egpj.exe")
        'cat[U+202E]gpj.exe'
    """
    more = len(text) - most
    cut = f"{text[:most]}… ({more:,} more characters)" if more > 0 else text
    # Lone surrogates, as the command line makes of bytes that are not UTF-8, could not be written.
    return cut.translate(_SHOWN).encode("utf-8", "backslashreplace").decode("utf-8")


def link(text: str) -> str | None:
    """``text`` if it is a web address and nothing else, else None: no other scheme becomes a link.

    Example:
        >>> link("javascript:alert(1)") is None
        True
    """
    return text if len(text) <= MOST and _LINK.fullmatch(text) else None


def spec_text(spec: Spec) -> str:
    """A concept's condition in words: the prompt, or ``attribute: value`` pairs; empty for the null
    condition."""
    if isinstance(spec, Mapping):
        return shown(", ".join(f"{key}: {value}" for key, value in spec.items()))
    return shown(spec)


THUMBNAIL = 128
"""Longest side, in pixels, that a page holds."""


class Thumbnails:
    """Thumbnails uint8 [N, h, w, 3] as data URIs, equal ones once."""

    def __init__(self, images: Tensor | None) -> None:
        self._images = images
        self.uris: list[str] = []
        self._index_of_uri: dict[str, int] = {}
        self._index_of_sample: dict[int, int] = {}

    def uri(self, sample: int) -> str | None:
        """The thumbnail of the sample at a position in the data set; None where there is none."""
        index = self.index(sample)
        return None if index is None else self.uris[index]

    def index(self, sample: int) -> int | None:
        """Where in ``uris`` the thumbnail of a sample is."""
        if self._images is None:
            return None
        if sample not in self._index_of_sample:
            uri = png_uri(self._images[sample], THUMBNAIL)
            if uri not in self._index_of_uri:
                self._index_of_uri[uri] = len(self.uris)
                self.uris.append(uri)
            self._index_of_sample[sample] = self._index_of_uri[uri]
        return self._index_of_sample[sample]


_GROUPS = ("owner", "artist")
_LICENCES = ("licence", "license")
_CAPTIONS = ("caption", "prompt", "text", "title")
_LINKS = ("uri", "url")


def damping_text(damping: Any) -> str:
    """Where a question's damping comes from, for a method whose ``damping`` is recorded so.

    Example:
        >>> damping_text({"class": "mine.Largest", "low": 0.1, "high": None})
        'As Largest(low=0.1, high=None) sets it.'
    """
    if damping == "agreement":
        return "Chosen where the checkpoints agree most, without looking at labels."
    if not isinstance(damping, dict):
        return "As the method sets it."
    name = str(damping.get("class")).rpartition(".")[2]
    arguments = ", ".join(f"{key}={value!r}" for key, value in damping.items() if key != "class")
    return f"As {shown(f'{name}({arguments})', 300)} sets it."


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of metadata columns: all of them, those that have a part of their own on the page (None
    where the store lacks it), and those of web addresses."""

    names: list[str]
    group: str | None
    licence: str | None
    caption: str | None
    links: list[str]

    @classmethod
    def of(cls, names: Sequence[str], group: str | None) -> Columns:
        """The columns of a store.

        Args:
            names: what the store has.
            group: whom shares are given to; by default the owner, else the artist.

        Raises:
            ReportError: the store lacks ``group``.
        """
        if group is not None and group not in names:
            known = ", ".join(sorted(names)) or "none"
            raise ReportError(
                f"report(group={group!r}): no such metadata column. The store has: {known}. HINT: "
                '`encode` gives the columns, for example Encoded(..., metadata={"owner": '
                'batch["owner"]}).'
            )
        chosen = group or _first(names, _GROUPS)
        licence, caption = _first(names, _LICENCES), _first(names, _CAPTIONS)
        first = [name for name in (chosen, licence, caption) if name is not None]
        return cls(
            names=list(dict.fromkeys([*first, *sorted(names)])),
            group=chosen,
            licence=licence,
            caption=caption,
            links=[name for name in names if name.lower() in _LINKS],
        )


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column of the first wanted name, in whatever case the store spells it."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


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
            _coded(head, [table.metadata[name][i] for i in used], name in columns.links)
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


def _exposures(attribution: Attribution, used: Sequence[int]) -> list[dict[str, Any]]:
    """How often each sample had entered an optimizer step, as a column, if that is known."""
    if attribution.exposures is None:
        return []
    counts = attribution.exposures[-1][list(used)].tolist()
    texts = [NEVER if count == 0 else "" if count < 0 else str(count) for count in counts]
    return [_coded("exposures", texts, False)]


def _coded(head: str, values: Sequence[str], links: bool) -> dict[str, Any]:
    """A column, equal values once; ``links`` says which of its values may become one."""
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
