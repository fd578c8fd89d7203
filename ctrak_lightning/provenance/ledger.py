"""The ledger of a store: what happened to it, as a chain of entries of which none can be changed
without a trace."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, get_args

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store.files import fsync_folder, is_there, open_file, reading
from ctrak_lightning.store.lock import ledger_lock
from ctrak_lightning.store.schema import LEDGER, is_integer
from ctrak_lightning.utilities.naming import utc_now


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only; equal values give equal bytes.

    Raises:
        ValueError, TypeError: the value is not JSON (a number that is not finite, an object of
            Python's).
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def digest(value: Any) -> str:
    """sha256 (hex) of :func:`canonical`."""
    return hashlib.sha256(canonical(value)).hexdigest()


Kind = Literal[
    "run_begun",
    "dataset",
    "checkpoint",
    "discarded",
    "run_resumed",
    "run_ended",
    "run_failed",
    "query",
    "forget",
]
NOTHING = "0" * 64
"""What stands for the hash of the entry before the first."""
LONGEST_LINE = 2**26
_TAIL = 2**16
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND
_SHA256 = re.compile("[0-9a-f]{64}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of a ledger."""

    sequence: int
    """Its number, from 0."""
    time: str
    """When it was made: UTC, ISO 8601, to the second."""
    kind: str
    """One of :data:`Kind`."""
    facts: dict[str, Any]
    """JSON values; ``docs/ledger.md`` lists them by kind."""
    previous: str
    """``sha256`` of the entry before, zeros for the first."""
    sha256: str
    """Of the canonical JSON of all of the above."""

    def line(self) -> bytes:
        """The entry as it stands in the file, with the end of the line."""
        return canonical({name: getattr(self, name) for name in self.__dataclass_fields__}) + b"\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What a ledger's file holds."""

    entries: list[Entry]
    """Those up to the first damage."""
    torn: bytes
    """What stands after the last end of a line: the beginning of an entry whose writing was cut
    off. No such entry was ever acknowledged; the next one that is made takes its place."""
    damage: str | None
    """What is wrong with the line after the last of the entries."""


class Ledger:
    """The ledger of the store at ``root``: JSON lines, each with the sha256 of the one before;
    lines are added, never changed.

    Adding is durable when it returns (fsync), one process at a time
    (:func:`~ctrak_lightning.store.lock.ledger_lock`), and all or nothing: what a kill cuts off is
    no entry, and the next one that is added takes its place.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.path = self.root / LEDGER

    @property
    def exists(self) -> bool:
        """Whether the store has a ledger."""
        return is_there(self.path)

    def require(self) -> None:
        """Raises a StoreError if the store has no ledger."""
        if not self.exists:
            raise StoreError(
                f"{self.root} has no {LEDGER}. HINT: attach ProvenanceRecorder() beside "
                "ConceptTracer to keep one."
            )

    def chain(self) -> Chain:
        """The whole file, as far as it can be followed.

        Raises:
            StoreError: there is no ledger, or it cannot be read.
        """
        self.require()
        entries: list[Entry] = []
        try:
            with BufferedReader(reading(self.path)) as file:
                while line := file.readline(LONGEST_LINE):
                    if not line.endswith(b"\n"):
                        damage = _damage_of_torn(line)
                        return Chain(entries=entries, torn=b"" if damage else line, damage=damage)
                    try:
                        entry = _parse(line)
                        _require_following(entry, entries[-1] if entries else None)
                        entries.append(entry)
                    except ValueError as error:
                        return Chain(entries=entries, torn=b"", damage=str(error))
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read ({error}).") from error
        return Chain(entries=entries, torn=b"", damage=None)

    def entries(self) -> list[Entry]:
        """All entries, each held against the one before.

        Raises:
            StoreError: there is no ledger.
            CorruptStoreError: a line is not what was written, or does not follow from the one
                before.
        """
        chain = self.chain()
        if chain.damage is not None:
            raise _corrupt(self.path, f"entry {len(chain.entries)}: {chain.damage}")
        return chain.entries

    def append(self, kind: Kind, facts: dict[str, Any]) -> Entry:
        """Adds one entry, and creates the ledger if there is none. See :meth:`append_all`."""
        return self.append_all([(kind, facts)])[0]

    def append_all(self, news: Sequence[tuple[Kind, dict[str, Any]]]) -> list[Entry]:
        """Adds entries, durably.

        Raises:
            StoreError: the ledger cannot be written, another process keeps it, or an entry is
                longer than 64 MiB.
            CorruptStoreError: the last entry that is there is not what was written.
        """
        with ledger_lock(self.root):
            return self.write(news)

    def write(self, news: Sequence[tuple[Kind, dict[str, Any]]]) -> list[Entry]:
        """As :meth:`append_all`, for those who hold the lock."""
        try:
            created = not self.path.exists()
            descriptor = open_file(self.path, _FLAGS)
            try:
                return self._add(descriptor, news)
            finally:
                os.close(descriptor)
                if created:
                    fsync_folder(self.root)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written ({error}). HINT: check the permissions and the "
                "free space of its folder; the entries that are there are intact."
            ) from error

    def _add(self, descriptor: int, news: Sequence[tuple[Kind, dict[str, Any]]]) -> list[Entry]:
        last, end, unended = _last_entry(descriptor, self.path)
        entries: list[Entry] = []
        for kind, facts in news:
            last = _follow(last, kind, facts)
            entries.append(last)
        lines = [entry.line() for entry in entries]
        if longest := [line for line in lines if len(line) > LONGEST_LINE]:
            raise StoreError(
                f"{self.path}: an entry of {len(longest[0])} bytes, expected at most "
                f"{LONGEST_LINE}. HINT: forget fewer samples at a time; keep large values out of "
                "hyperparameters."
            )
        # What a kill cut off goes; a line that lacks nothing but its end gets it.
        os.ftruncate(descriptor, end)
        try:
            _write(descriptor, (b"\n" if unended else b"") + b"".join(lines))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
        return entries


def _follow(last: Entry | None, kind: Kind, facts: dict[str, Any]) -> Entry:
    content: dict[str, Any] = {
        "sequence": 0 if last is None else last.sequence + 1,
        "time": utc_now(),
        "kind": kind,
        "facts": facts,
        "previous": NOTHING if last is None else last.sha256,
    }
    return Entry(**content, sha256=digest(content))


def _read(descriptor: int, start: int, length: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    parts = []
    while length and (part := os.read(descriptor, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _last_entry(descriptor: int, path: Path) -> tuple[Entry | None, int, bool]:
    """The last entry, where it ends, and whether it lacks the end of its line. Only the end of the
    file is read."""
    size = os.fstat(descriptor).st_size
    tail = b""
    while len(tail) < size and tail.count(b"\n") < 2:
        length = min(size, max(_TAIL, 2 * len(tail)))
        if length > max(_TAIL, 2 * LONGEST_LINE):
            raise _corrupt(path, "its last lines are longer than any that is written")
        tail = _read(descriptor, size - length, length)
    start = size - len(tail)
    head, separator, torn = tail.rpartition(b"\n")
    end = start + len(head) + len(separator)
    if torn and _is_json(torn):
        try:
            return _parse(torn + b"\n"), size, True
        except ValueError as error:
            raise _corrupt(path, f"its last line: {error}") from error
    if torn and _begins_with_json(torn):
        raise _corrupt(path, "its last line goes on after the end of an entry")
    if not separator:
        return None, end, False
    try:
        return _parse(head.rpartition(b"\n")[2] + b"\n"), end, False
    except ValueError as error:
        raise _corrupt(path, f"its last line: {error}") from error


def _parse(line: bytes) -> Entry:
    """The entry of a line. Raises a ValueError that says what is wrong with it."""
    try:
        content = json.loads(line.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ValueError("is not a line of JSON") from error
    if not isinstance(content, dict) or content.keys() != set(Entry.__dataclass_fields__):
        raise ValueError(f"does not have the keys {', '.join(Entry.__dataclass_fields__)}")
    entry = Entry(**content)
    if (
        not is_integer(entry.sequence)
        or entry.kind not in get_args(Kind)
        or not isinstance(entry.facts, dict)
    ):
        raise ValueError("has a sequence number, a kind or facts that no entry has")
    if not all(isinstance(value, str) for value in (entry.time, entry.previous, entry.sha256)):
        raise ValueError("has a time or a hash that is no text")
    if not _TIME.fullmatch(entry.time) or not _SHA256.fullmatch(entry.previous):
        raise ValueError("has a time or a hash of another form")
    hashed = {name: value for name, value in content.items() if name != "sha256"}
    try:
        found = digest(hashed)
        same = entry.line() == line
    except ValueError as error:  # a number that is not finite
        raise ValueError(f"is not canonical JSON ({error})") from error
    if found != entry.sha256:
        raise ValueError("its sha256 is not that of its content: it was altered")
    if not same:
        raise ValueError("is not written as the library writes it")
    return entry


def _require_following(entry: Entry, last: Entry | None) -> None:
    """Raises a ValueError where ``entry`` is not the one after ``last``, the first where that is
    None."""
    expected = (0, NOTHING) if last is None else (last.sequence + 1, last.sha256)
    if (entry.sequence, entry.previous) != expected:
        raise ValueError(
            "does not follow from the entry before: entries were removed, added or put in another "
            "order"
        )


def _damage_of_torn(line: bytes) -> str | None:
    if len(line) >= LONGEST_LINE:
        return f"is longer than {LONGEST_LINE} bytes"
    if _is_json(line) or not _begins_with_json(line):
        return None
    return "goes on after the end of an entry"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _begins_with_json(text: bytes) -> bool:
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _corrupt(path: Path, problem: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path}: {problem}. HINT: the ledger was damaged or edited after it was written; restore "
        "it from a copy (`ctrak verify` names all that differs)."
    )
