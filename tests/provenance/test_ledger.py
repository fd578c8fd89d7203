"""The chain itself: what it hashes, what it refuses, and what a kill leaves."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance import Ledger
from ctrak_lightning.provenance import ledger as ledger_module
from ctrak_lightning.store.lock import ledger_lock


def make(root: Path, n: int = 3) -> Ledger:
    ledger = Ledger(root)
    for i in range(n):
        ledger.append("query", {"number": i, "text": "ünï\u2028\U0001f600"})
    return ledger


def test_the_hashes_are_those_of_the_documented_text(tmp_path: Path) -> None:
    """Recomputed from the file alone, without the library."""
    make(tmp_path)
    previous = "0" * 64
    for number, line in enumerate((tmp_path / "ledger.jsonl").read_bytes().splitlines()):
        entry = json.loads(line)
        assert set(entry) == {"sequence", "time", "kind", "facts", "previous", "sha256"}
        assert (entry["sequence"], entry["previous"]) == (number, previous)
        previous = entry.pop("sha256")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == previous
    assert Ledger(tmp_path).entries()[1].facts == {"number": 1, "text": "ünï\u2028\U0001f600"}


def test_entries_are_kept_when_others_are_added(tmp_path: Path) -> None:
    ledger = make(tmp_path, 2)
    before = ledger.path.read_bytes()
    added = ledger.append_all([("query", {"number": 2}), ("discarded", {"steps": [1]})])
    assert ledger.path.read_bytes().startswith(before)
    assert ledger.entries()[2:] == added
    assert [entry.sequence for entry in added] == [2, 3]


def test_every_flipped_bit_of_a_ledger_is_found(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    whole = ledger.path.read_bytes()
    missed = []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        ledger.path.write_bytes(changed)
        chain = ledger.chain()
        if chain.damage is None and not chain.torn:
            missed.append(place)
    assert missed == []


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: [lines[0], lines[2]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[1], lines[1], lines[2]],
        lambda lines: [lines[0], b"\n", *lines[1:]],
        lambda lines: [lines[0].replace(b'"facts"', b' "facts"'), *lines[1:]],
        lambda lines: [lines[0], b"null\n"],
        lambda lines: [lines[0], b"[" * 10**5 + b"\n"],
        lambda lines: [lines[0], b'{"sequence":NaN}\n'],
        lambda lines: [*lines, b"\xff\xfe\n"],
    ],
)
def test_lines_that_were_moved_removed_added_or_rewritten(tmp_path: Path, change: Any) -> None:
    ledger = make(tmp_path)
    ledger.path.write_bytes(b"".join(change(ledger.path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(CorruptStoreError, match=r"ledger\.jsonl: entry \d.*HINT"):
        ledger.entries()


def test_an_entry_made_up_with_a_right_hash_does_not_follow(tmp_path: Path) -> None:
    """Whoever edits an entry and its own hash breaks the link of the next."""
    ledger = make(tmp_path)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[1])
    entry["facts"]["number"] = 7
    del entry["sha256"]
    entry["sha256"] = hashlib.sha256(
        json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    forged = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    ledger.path.write_bytes(lines[0] + forged + lines[2])
    chain = ledger.chain()
    assert len(chain.entries) == 2
    assert chain.damage is not None
    assert "does not follow" in chain.damage


@pytest.mark.parametrize("kept", [1, 10, 100, -2])
def test_a_torn_last_line_is_no_entry_and_gives_way_to_the_next(tmp_path: Path, kept: int) -> None:
    ledger = make(tmp_path)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    chain = ledger.chain()
    assert (len(chain.entries), chain.damage) == (2, None)
    assert chain.torn == lines[2][:kept]
    added = ledger.append("query", {"number": "new"})
    assert added.sequence == 2
    assert ledger.path.read_bytes() == b"".join(lines[:2]) + added.line()


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-1])
    assert ledger.chain().torn
    assert ledger.append("query", {}).sequence == 3
    assert ledger.path.read_bytes().startswith(whole)


def test_a_last_line_with_another_end_is_damage_and_no_torn_line(tmp_path: Path) -> None:
    """A flipped bit in the last byte must not make the next entry overwrite a sealed one."""
    ledger = make(tmp_path)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1] + b"\x0b")
    before = ledger.path.read_bytes()
    with pytest.raises(CorruptStoreError, match="goes on after the end"):
        ledger.append("query", {})
    assert ledger.path.read_bytes() == before


def test_nothing_is_added_after_a_damaged_entry(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    content = bytearray(ledger.path.read_bytes())
    content[-20] ^= 1
    ledger.path.write_bytes(content)
    with pytest.raises(CorruptStoreError, match="its last line"):
        ledger.append("query", {})


def test_long_lines_are_read_from_their_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make(tmp_path)
    last = ledger.append("query", {"text": "x" * 300_000})
    assert ledger.append("query", {}).previous == last.sha256
    monkeypatch.setattr(ledger_module, "LONGEST_LINE", 1000)
    with pytest.raises(StoreError, match="an entry of .* bytes, expected at most 1000"):
        ledger.append("query", {"text": "x" * 1000})
    with pytest.raises(CorruptStoreError, match="longer than 1000 bytes"):
        ledger.entries()


def test_a_full_disk_leaves_the_entries_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make(tmp_path)
    before, write = ledger.path.read_bytes(), os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) <= 50:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:50])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StoreError, match=r"No space left.*HINT"):
            ledger.append("query", {"text": "x" * 40})
    assert ledger.path.read_bytes() == before


def test_no_ledger_is_said(tmp_path: Path) -> None:
    assert not Ledger(tmp_path).exists
    with pytest.raises(StoreError, match=r"has no ledger\.jsonl. HINT: attach ProvenanceRecorder"):
        Ledger(tmp_path).entries()


@pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")
def test_two_processes_add_in_turn(tmp_path: Path) -> None:
    make(tmp_path, 1)
    children = []
    for number in range(3):
        if (child := os.fork()) == 0:
            for i in range(20):
                Ledger(tmp_path).append("query", {"from": number, "i": i})
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    entries = Ledger(tmp_path).entries()
    assert len(entries) == 61
    for number in range(3):
        assert [e.facts["i"] for e in entries if e.facts.get("from") == number] == list(range(20))


@pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")
def test_a_lock_that_another_process_holds_is_waited_for_and_told(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    if (child := os.fork()) == 0:
        with ledger_lock(tmp_path):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        with (
            pytest.raises(StoreError, match=r"another process is writing.*HINT"),
            ledger_lock(tmp_path, 0.2),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with ledger_lock(tmp_path, 0.2):  # a killed process gives it back
        pass


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_entries_and_at_most_a_torn_line(tmp_path: Path) -> None:
    ledger = make(tmp_path, 1)
    acknowledged = tmp_path / "acknowledged"
    acknowledged.write_text("0")
    for attempt in range(12):
        if (child := os.fork()) == 0:
            for i in range(10**6):
                added = Ledger(tmp_path).append(
                    "query", {"attempt": attempt, "i": i, "text": "y" * 3000}
                )
                acknowledged.write_text(str(added.sequence))
        time.sleep(0.01 + 0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        chain = ledger.chain()
        assert chain.damage is None
        assert len(chain.entries) > int(acknowledged.read_text() or 0)
        acknowledged.write_text("0")
    assert ledger.append("query", {}).sequence == len(ledger.entries()) - 1


def test_a_read_only_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, flags: int, mode: int = 0) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    make(tmp_path)
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(StoreError, match=r"ledger\.lock cannot be opened for writing.*HINT"):
        Ledger(tmp_path).append("query", {})
