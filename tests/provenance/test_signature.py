"""A signature is of one ledger, up to one entry, by one key."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance import Ledger, forget, sign, verify
from ctrak_lightning.provenance.commitments import commit
from ctrak_lightning.provenance.run_facts import (
    checkpoint_facts,
    dataset_facts,
    put_commitments,
    stored_digest,
)
from ctrak_lightning.store import TraceWriter
from ctrak_lightning.store.files import write_atomically
from ctrak_lightning.store.manifest import read_manifest, write_manifest
from ctrak_lightning.store.samples import write_samples

from ..store.store_builder import Capture, make_table
from .builder import recorded, run_facts
from .keys import write_keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


def test_the_signature_is_of_the_documented_text(store: Path, keys: tuple[Path, Path]) -> None:
    """Checked from the files alone, without the library."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    sign(store, keys[0])
    document = json.loads((store / "ledger.signature.json").read_text())
    signature = bytes.fromhex(document.pop("signature"))
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    load_pem_public_key(keys[1].read_bytes()).verify(signature, text)  # type: ignore[call-arg, union-attr]
    last = json.loads((store / "ledger.jsonl").read_text().splitlines()[-1])
    assert (document["head"], document["entries"], document["run_id"]) == (last["sha256"], 4, "run")


def test_a_signed_store_stays_valid_while_it_is_asked(store: Path, keys: tuple[Path, Path]) -> None:
    sign(store, keys[0])
    assert verify(store, public_key=keys[1]) == []
    Ledger(store).append("query", {})
    assert verify(store, public_key=keys[1]) == []


def test_what_was_forgotten_after_the_signature_is_to_be_signed_anew(
    store: Path, keys: tuple[Path, Path]
) -> None:
    sign(store, keys[0])
    Ledger(store).append("query", {})
    forget(store, ["image/003.png"])
    assert verify(store) == []
    [problem] = verify(store, public_key=keys[1])
    assert problem.startswith("ledger.jsonl: entry 5 (forget) came after the signature")
    assert problem.endswith("then sign again")
    sign(store, keys[0])
    assert verify(store, public_key=keys[1]) == []


AGAIN: dict[str, Any] = {"steps": [300, 600]}
LATER: dict[str, Callable[[Path], list[tuple[Any, dict[str, Any]]]]] = {
    "discarded": lambda store: [("discarded", AGAIN)],
    "checkpoint": lambda store: [
        ("discarded", AGAIN),
        *[(e.kind, e.facts) for e in Ledger(store).entries() if e.kind == "checkpoint"],
    ],
    "run_resumed": lambda store: [("run_resumed", run_facts(store))],
    "run_begun": lambda store: [("run_begun", run_facts(store))],
    "run_ended": lambda store: [("run_ended", {"step": 900, "epoch": 9})],
    "run_failed": lambda store: [
        ("run_failed", {"step": 900, "epoch": 9, "error": "KeyboardInterrupt"})
    ],
}


@pytest.mark.parametrize("kind", LATER)
def test_any_entry_after_the_signature_but_a_question_is_a_problem(
    store: Path, keys: tuple[Path, Path], kind: str
) -> None:
    sign(store, keys[0])
    news = LATER[kind](store)
    Ledger(store).append_all(news)
    found = [
        line for line in verify(store, public_key=keys[1]) if "came after the signature" in line
    ]
    assert len(found) == len(news)
    assert f"({kind}) came after the signature" in found[-1]


def test_the_whole_content_cannot_be_replaced_behind_a_signature(
    store: Path, keys: tuple[Path, Path]
) -> None:
    """Other owners and other traces, all of it as the library itself would write and record it."""
    sign(store, keys[0])
    manifest = read_manifest(store)
    steps = [record.step for record in manifest.checkpoints]
    TraceWriter(store, manifest.header).discard_after(0)
    table = make_table(metadata={"artist": ["mallory"] * 10, "licence/url": [""] * 10})
    known = write_atomically(store / "samples.h5", lambda path: write_samples(path, table))
    write_manifest(store, read_manifest(store).with_files({"samples.h5": known}))
    capture = Capture(steps=tuple(steps))
    writer = capture.open(store)
    for step in steps:
        capture.run_checkpoint(writer, step)
    manifest, commitments = read_manifest(store), commit(table)
    described = dataset_facts(
        manifest, table, put_commitments(store, 0, commitments), commitments.salt
    )
    checkpoints = [
        checkpoint_facts(manifest, record, stored_digest(store, manifest, record), commitments.salt)
        for record in manifest.checkpoints
    ]
    news: list[tuple[Any, dict[str, Any]]] = [
        ("discarded", {"steps": steps}),
        ("dataset", described),
    ]
    Ledger(store).append_all([*news, *(("checkpoint", facts) for facts in checkpoints)])
    found = problems(store, public_key=keys[1])
    for number, kind in enumerate(("discarded", "dataset", "checkpoint", "checkpoint"), start=4):
        assert f"entry {number} ({kind}) came after the signature" in found
    # Without a key too: only forgetting changes what a store's samples are.
    assert "the samples have been described before" in problems(store)


def test_an_unsealed_checkpoint_is_not_under_the_signature(
    store: Path, keys: tuple[Path, Path]
) -> None:
    sign(store, keys[0])
    Capture.run_checkpoint(capture := Capture(), capture.open(store), 900, stop=9)
    assert verify(store) == []
    assert problems(store, public_key=keys[1]) == (
        "manifest.json: checkpoint 900 is not sealed: no signature vouches for its rows"
    )


def problems(store: Path, **options: Any) -> str:
    return "\n".join(verify(store, **options))


def test_another_key_and_no_signature_are_found(
    store: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    assert "is missing, the ledger is not signed" in problems(store, public_key=keys[1])
    sign(store, write_keys(tmp_path, "mallory")[0])
    assert verify(store) == []  # by itself a signature shows no more than that its key signed
    assert "is signed with another key" in problems(store, public_key=keys[1])


def test_a_chain_that_was_cut_or_written_anew_is_found(
    store: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    Ledger(store).append_all([("query", {"n": 1}), ("query", {"n": 2})])
    sign(store, keys[0])
    whole = (store / "ledger.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (store / "ledger.jsonl").write_bytes(b"".join(lines[:5]))
    assert "has 5 sound entries, 6 were signed" in problems(store)
    # A whole new chain that is sound in itself: the same store with another question.
    (store / "ledger.jsonl").write_bytes(b"".join(lines[:5]))
    Ledger(store).append("query", {"n": 3})
    assert problems(store) == "ledger.jsonl: entry 5 is not the one that was signed"


def test_a_signature_of_another_store_is_found(
    store: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    other = recorded(tmp_path / "other", Capture(steps=(300,)))
    sign(other, keys[0])
    shutil.copy(other / "ledger.signature.json", store / "ledger.signature.json")
    assert "is not the one that was signed" in problems(store, public_key=keys[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("entries", 3),
        ("entries", 0),
        ("entries", "4"),
        ("head", "0" * 64),
        ("time", "2020-01-01T00:00:00Z"),
        ("run_id", "other"),
        ("algorithm", "none"),
        ("signature", "00" * 64),
        ("signature", "xyz"),
        ("public_key", "00" * 5),
    ],
)
def test_a_signature_file_that_was_edited_is_found(
    store: Path, keys: tuple[Path, Path], name: str, value: Any
) -> None:
    sign(store, keys[0])
    document = json.loads((store / "ledger.signature.json").read_text()) | {name: value}
    (store / "ledger.signature.json").write_text(
        json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
    )
    assert "ledger.signature.json" in problems(store)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "x" * 10**5, "\xff"])
def test_files_that_are_no_signature(store: Path, text: str) -> None:
    (store / "ledger.signature.json").write_text(text, encoding="latin-1")
    assert "ledger.signature.json: " in problems(store)


def test_keys_that_cannot_be_used(store: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    (tmp_path / "text.pem").write_text("no key")
    elliptic = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ec.pem").write_bytes(elliptic)
    for name in ("text.pem", "ec.pem", "absent.pem", keys[1].name):
        with pytest.raises(StoreError, match=r"no Ed25519 private key.*HINT: openssl genpkey"):
            sign(store, tmp_path / name)
    with pytest.raises(StoreError, match=r"no Ed25519 public key.*HINT: openssl pkey"):
        verify(store, public_key=keys[0])
    assert not (store / "ledger.signature.json").exists()


def test_what_is_not_signed(store: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(StoreError, match=r"has no ledger\.jsonl"):
        sign(Capture().run(tmp_path / "plain"), keys[0])
    content = bytearray((store / "ledger.jsonl").read_bytes())
    content[100] ^= 1
    (store / "ledger.jsonl").write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"ledger\.jsonl: entry 0"):
        sign(store, keys[0])


def test_without_cryptography_the_extra_is_named_and_the_rest_works(
    store: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(
        StoreError, match=r"`cryptography`, which is not installed.*ctrak-lightning\[sign\]"
    ):
        sign(store, keys[0])
    assert verify(store) == []


def test_the_package_is_imported_only_when_it_is_used(store: Path) -> None:
    text = (
        "import sys; from ctrak_lightning.provenance import verify; import "
        f"ctrak_lightning.callbacks; assert verify({str(store)!r}) == []; assert not [n for n in "
        "sys.modules if n.split('.')[0] in ('cryptography', 'prov', 'mlcroissant')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


def test_the_same_signature_in_other_letters_is_found(store: Path, keys: tuple[Path, Path]) -> None:
    sign(store, keys[0])
    path = store / "ledger.signature.json"
    document = json.loads(path.read_text())
    document["signature"] = document["signature"].upper()
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")
    assert "ledger.signature.json" in problems(store)
