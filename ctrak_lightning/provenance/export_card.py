"""The training data and the provenance of a model, as a section of its model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ctrak_lightning.provenance.recorded_store import RecordedStore
from ctrak_lightning.provenance.summary import block

MOST_ROWS = 50
COLUMNS = ("owner", "licence", "license")
_PLAIN = frozenset(" -,")


def model_card(path: str | Path) -> str:
    """A Markdown section: what :func:`~ctrak_lightning.provenance.summary.block` says, and how many
    samples each owner and each licence has. Texts of the store are shown as they are, never as
    markup. Samples that were forgotten are not counted.

    Raises:
        StoreError, CorruptStoreError: as :meth:`RecordedStore.open`.
    """
    recorded = RecordedStore.open(path)
    table = recorded.store.samples
    lines = ["## Training data and provenance", ""]
    lines += _table(("", ""), list(block(recorded.store).items()))
    for column in COLUMNS:
        if column in table.metadata:
            counts = Counter(table.metadata[column]).most_common()
            rows = [(value or "not given", str(count)) for value, count in counts[:MOST_ROWS]]
            if len(counts) > MOST_ROWS:
                rest = sum(count for _, count in counts[MOST_ROWS:])
                rows.append((f"{len(counts) - MOST_ROWS} others", str(rest)))
            lines += ["", f"### Samples by {column}", "", *_table((column, "samples"), rows)]
    lines += [
        "",
        "The ledger that this is taken from is checked with `ctrak verify`. It shows what was "
        "recorded, not that what was recorded is true.",
        "",
    ]
    return "\n".join(lines)


def escape(text: str) -> str:
    """``text`` as Markdown that shows it and does nothing else: every ASCII mark becomes a
    character reference, which no dialect takes for markup, and what breaks lines or turns the
    direction of writing becomes visible.

    Example:
        >>> escape("<b>|[x](y)")
        '&#60;b&#62;&#124;&#91;x&#93;&#40;y&#41;'
    """
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    # Not printable: control characters, and those that turn the direction of writing.
    if not character.isprintable() and character != " ":
        return " " if character.isspace() else "\ufffd"
    if character.isascii() and not character.isalnum() and character not in _PLAIN:
        return f"&#{ord(character)};"
    return character


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> list[str]:
    shown = [f"| {escape(name)} | {escape(value)} |" for name, value in rows]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *shown]
