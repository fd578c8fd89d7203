"""Which samples of a store are meant: by their ids, by a file of ids, by their metadata."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ctrak_lightning.errors import StoreError
from ctrak_lightning.traces.samples import SampleTable

_SHOWN = 5
_NEAR = 3
_VALUES = 10


def positions_of(table: SampleTable, sample_ids: Sequence[str], root: Path) -> list[int]:
    """Where the samples of these ids stand in the table of the store at ``root``, ascending.

    Raises:
        StoreError: no ids, one that the table does not have (names near ones), or all that it has.
    """
    wanted = [sample_ids] if isinstance(sample_ids, str) else list(dict.fromkeys(sample_ids))
    if not wanted:
        raise StoreError("forget(sample_ids=[]): expected at least one sample.")
    where = {sample_id: i for i, sample_id in enumerate(table.sample_ids)}
    if unknown := [sample_id for sample_id in wanted if sample_id not in where]:
        raise StoreError(
            f"{root} has no sample "
            f"{', '.join(_short(name) for name in unknown[:_SHOWN])}{f' and {len(unknown) - _SHOWN} more' if len(unknown) > _SHOWN else ''}; "
            f"nothing was forgotten. {_near(unknown[0], table.sample_ids)}HINT: ids are those of "
            "the data set, as Attribution.top() names them; a sample that was forgotten before is "
            "unknown too."
        )
    if len(wanted) == len(table):
        raise StoreError(
            f"{root}: these are all of its {len(table)} samples, and a store of none says nothing. "
            "HINT: delete the folder."
        )
    return sorted(where[sample_id] for sample_id in wanted)


def ids_where(table: SampleTable, conditions: Sequence[str]) -> list[str]:
    """The ids of the samples that meet all of ``conditions``, each ``column=value``, in the order
    of the table.

    Raises:
        StoreError: a condition is of no column, or no sample meets it, or not all of them; says
            which columns and values there are.

    Example:
        >>> table = SampleTable(["a", "b"], ["", ""], {"owner": ["anna", "bo"]})
        >>> ids_where(table, ["owner=bo"])
        ['b']
    """
    each = {condition: _meeting(table, condition) for condition in conditions}
    found = set(range(len(table))).intersection(*each.values())
    if not found:
        counts = ", ".join(
            f"{len(places)} have {_short(condition)}" for condition, places in each.items()
        )
        raise StoreError(
            f"--where: no sample meets all of the conditions ({counts}); nothing was forgotten. "
            "HINT: all must hold; forget in two steps what meets one or the other."
        )
    return [table.sample_ids[i] for i in sorted(found)]


def read_ids(path: str | Path) -> list[str]:
    """The ids in a file of text, one a line, as they stand there; empty lines are left out.

    Raises:
        StoreError: it cannot be read as UTF-8, or has none.
    """
    try:
        # Not splitlines(): an id may hold what Unicode takes for the end of a line.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"--ids-from {path}: cannot be read ({error}). HINT: a file of UTF-8 text, one id a "
            "line."
        ) from error
    found = [line for line in (line.removesuffix("\r") for line in lines) if line]
    if not found:
        raise StoreError(
            f"--ids-from {path}: has no id; nothing was forgotten. HINT: one id a line."
        )
    return found


def _meeting(table: SampleTable, condition: str) -> set[int]:
    named = [column for column in table.metadata if condition.startswith(f"{column}=")]
    if not named:
        known = ", ".join(map(repr, sorted(table.metadata))) or "none"
        raise StoreError(
            f"--where {_short(condition)}: no such metadata column; nothing was forgotten. The "
            f"store has: {known}. HINT: --where owner=anna, of the column and the value as they "
            "were traced."
        )
    column = max(named, key=len)  # a column's name may have a "=" in it
    value = condition[len(column) + 1 :]
    places = {i for i, given in enumerate(table.metadata[column]) if given == value}
    if not places:
        raise StoreError(
            f"--where {_short(condition)}: no sample has that value; nothing was forgotten. "
            f"{_near(value, set(table.metadata[column]))}The values of {column!r}: "
            f"{_listed(table.metadata[column])}."
        )
    return places


def _listed(values: Sequence[str]) -> str:
    counts = Counter(values).most_common()
    shown = ", ".join(f"{_short(value)} ({count})" for value, count in counts[:_VALUES])
    return shown if len(counts) <= _VALUES else f"{shown} and {len(counts) - _VALUES} more"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:200], list(known), n=_NEAR, cutoff=0.6)
    return f"Near: {', '.join(_short(one) for one in near)}. " if near else ""


def _short(name: object) -> str:
    shown = repr(name)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
