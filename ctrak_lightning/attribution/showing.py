"""One answer in a few lines: on a terminal, and in a notebook with its pictures."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ctrak_lightning.escaping import metadata_heads, visible

if TYPE_CHECKING:
    from ctrak_lightning.attribution.result import Attribution

ROWS = 10
_LOOK = (
    "Look at the generated image and at `.confidence` first: if the concept is not learnt, the "
    "ranking says nothing."
)


def text_of(attribution: Attribution) -> str:
    """The question, how far it can be trusted where that was looked at, and the ten highest
    scores."""
    rows = [[visible(cell) for cell in row] for row in _rows(attribution)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for rank, score, *texts in rows:
        cells = [rank.rjust(widths[0]), score.rjust(widths[1]), *map(str.ljust, texts, widths[2:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([visible(_head(attribution)), _trust(attribution), *lines])


def html_of(attribution: Attribution) -> str:
    """The same as a table, with the generated image and the thumbnails."""
    # They know of this module.
    from ctrak_lightning.attribution.report.pictures import Thumbnails, generated_uri

    thumbnails = Thumbnails(attribution.samples.thumbnails)
    pictures = [thumbnails.uri(position) for position in attribution.ranked()[:ROWS].tolist()]
    table = ""
    for picture, row in zip([None, *pictures], _rows(attribution), strict=True):
        cells = "".join(f"<td>{escape(visible(cell))}</td>" for cell in row)
        table += f"<tr><td>{_picture(picture, 48)}</td>{cells}</tr>"
    return (
        f"<p><b>{escape(visible(_head(attribution)))}</b><br>{escape(_trust(attribution))}</p>"
        f"{_picture(generated_uri(attribution.image), 128)}<table>{table}</table>"
    )


def _rows(attribution: Attribution) -> list[list[str]]:
    """The heads, and the ten highest scores."""
    own = ["rank", "score", "sample_id"]
    columns = sorted(attribution.samples.metadata)
    rows = [[*own, *metadata_heads(columns, own)]]
    for one in attribution.top(ROWS):
        rows.append(
            [
                str(one.rank),
                f"{one.score:.3f}",
                one.sample_id,
                *(one.metadata[name] for name in columns),
            ]
        )
    return rows


def _head(attribution: Attribution) -> str:
    return (
        f"Attribution of {attribution.concept.name!r}: {len(attribution.samples)} samples, "
        f"checkpoints at steps {attribution.steps}, method {attribution.method['name']!r}"
    )


def _trust(attribution: Attribution) -> str:
    """The verdict, where it was asked for: it reads the whole store, which showing a result must
    not."""
    known = vars(attribution).get("confidence")
    return _LOOK if known is None or not known.says_nothing else known.verdict


def _picture(uri: str | None, size: int) -> str:
    return (
        ""
        if uri is None
        else f'<img src="{uri}" width="{size}" style="image-rendering: pixelated">'
    )
