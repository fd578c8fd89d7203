"""What a ledger says, for people to read: a summary, and a model card's section."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrak_lightning.provenance.history import History, replay
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.provenance.recording import RecordedStore
from ctrak_lightning.provenance.signature import read_signature
from ctrak_lightning.store import TraceStore


def ledger_summary(store: TraceStore) -> dict[str, str]:
    """What a store's ledger says of where its traces come from, as labels and texts in the order in
    which to show them.

    Nothing is recomputed: :func:`~ctrak_lightning.provenance.verify` does that.

    Raises:
        CorruptStoreError: the ledger is damaged.
    """
    ledger = Ledger(store.path)
    if not ledger.exists:
        return {"Run": store.run_id, "Ledger": "none: attach ProvenanceRecorder to keep one"}
    entries = ledger.entries()
    history = replay(entries)
    found = {"Run": history.run_id or store.run_id} | _run(history)
    if history.dataset is not None:
        found["Samples"] = (
            f"{history.dataset['size']} in the store, {len(history.tombstones)} forgotten"
        )
        found["Dataset digest"] = str(history.dataset["commitments"]["root"])
    steps = [f"step {step}" for step in sorted(history.checkpoints)]
    found["Checkpoints"] = ", ".join(steps) or "none"
    found["Questions recorded"] = str(len(history.queries))
    found["Ledger"] = f"{len(entries)} entries"
    found["Ledger head"] = entries[-1].sha256 if entries else "none"
    found["Signature"] = _signature(ledger, len(entries))
    return found


def _run(history: History) -> dict[str, str]:
    if not history.runs:
        return {}
    first, last = history.runs[0].facts, history.runs[-1].facts
    base, code, parent = first["base_model"], last["code"], first["parent"]
    found = {"Begun": history.runs[0].time}
    if len(history.runs) > 1:
        found["Resumed"] = f"{len(history.runs) - 1} times, last at {history.runs[-1].time}"
    found["Base model"] = _model(base)
    found["Base model, frozen weights"] = str(base["frozen"])
    found["Base model, trained weights at the start"] = str(base["trained"])
    if parent is not None:
        found["Parent run"] = (
            f"{parent['run_id']}, weights {parent['weights']} to its last checkpoint's"
        )
    found["Code"] = ", ".join(
        f"{name} {version}" for name, version in sorted(code["packages"].items())
    )
    found["Commit"] = _commit(code["git"])
    return found


def _model(base: dict[str, Any]) -> str:
    name = str(base["name"] or "not named")
    return f"{name}, revision {base['revision']}" if base["revision"] else name


def _commit(git: dict[str, Any] | None) -> str:
    if git is None:
        return "none: the run was not started in a git repository"
    state = {True: ", with changes that are not committed", False: "", None: ", state unknown"}
    return f"{git['commit']}{state[git['dirty']]}"


def _signature(ledger: Ledger, entries: int) -> str:
    document = read_signature(ledger.root)
    if document is None:
        return "none"
    if "problem" in document:
        return f"damaged: {document['problem']}"
    later = entries - document["entries"]
    since = f", {later} later ones not" if later > 0 else ""
    return (
        f"the first {document['entries']} entries{since}, by {document['public_key']} (not "
        "checked here)"
    )


MOST_ROWS = 50
COLUMNS = ("owner", "licence", "license")
_PLAIN = frozenset(" -,")


def model_card(path: str | Path) -> str:
    """A Markdown section: what :func:`ledger_summary` says, and how many samples each owner and
    each licence has. Texts of the store are shown as they are, never as markup. Samples that were
    forgotten are not counted.

    Raises:
        StoreError, CorruptStoreError: as :meth:`RecordedStore.open`.
    """
    recorded = RecordedStore.open(path)
    table = recorded.store.samples
    lines = ["## Training data and provenance", ""]
    lines += _table(("", ""), list(ledger_summary(recorded.store).items()))
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
