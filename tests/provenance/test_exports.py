"""What others read: valid by the libraries that define it, without what was forgotten, and
inert."""

import json
import re
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrak_lightning import TraceStore
from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance import (
    Ledger,
    croissant,
    forget,
    ledger_summary,
    model_card,
    prov_json,
)
from ctrak_lightning.provenance.recording import record_run
from ctrak_lightning.provenance.summary import escape
from ctrak_lightning.store import SampleTable

from ..store.store_builder import Capture
from .builder import run_facts

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b\n\n# title",
    "[x](javascript:alert(1))",
    "https://evil.example @someone",
    "\u202egnp.exe",
    "plain",
    "",
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A recorded store of seven samples with hostile owners, columns and ids."""
    path = tmp_path / "hostile"
    capture = Capture(n=7, steps=(300, 600))
    writer = capture.open(path)
    metadata = {
        "owner": HOSTILE,
        "licence": ["CC-BY", "MIT"] * 3 + [""],
        "a/b <i>": HOSTILE,
        "uri": [""] * 7,
    }
    ids = [f"{i}{text}" for i, text in enumerate(HOSTILE)]
    writer.write_samples(SampleTable(ids, ["0" * 64] * 7, metadata))
    for step in capture.steps:
        capture.run_checkpoint(writer, step)
    record_run(path, run_facts(path), resumed=False)
    question = {
        "concept": {"name": "<b>"},
        "asker": "me",
        "steps": [300],
        "result_sha256": "1" * 64,
    }
    Ledger(path).append_all(
        [("query", question), ("run_ended", {"step": 600, "epoch": 6, "weights": "2" * 64})]
    )
    return path


def read_prov(document: dict[str, Any]) -> Any:
    from prov.model import ProvDocument

    return ProvDocument.deserialize(content=json.dumps(document), format="json")


def test_prov_is_read_by_the_prov_package_and_says_what_made_what(store: Path) -> None:
    from prov import model

    document = read_prov(prov_json(store))
    entities = {
        str(e.identifier): dict(e.attributes) for e in document.get_records(model.ProvEntity)
    }
    samples = [name for name in entities if name.startswith("ctrak:sample-")]
    assert len(samples) == 7
    ids = {str(v) for e in samples for k, v in entities[e].items() if str(k) == "ctrak:sample_id"}
    assert ids == set(TraceStore(store).samples.sample_ids)
    members = list(document.get_records(model.ProvMembership))
    assert len(members) == 7
    made = {(str(r.args[0]), str(r.args[1])) for r in document.get_records(model.ProvGeneration)}
    assert made == {
        ("ctrak:weights-300", "ctrak:run-0"),
        ("ctrak:traces-300", "ctrak:run-0"),
        ("ctrak:weights-600", "ctrak:run-0"),
        ("ctrak:traces-600", "ctrak:run-0"),
        ("ctrak:answer-0", "ctrak:query-0"),
    }
    used = {(str(r.args[0]), str(r.args[1])) for r in document.get_records(model.ProvUsage)}
    assert used == {
        ("ctrak:run-0", "ctrak:base-model"),
        ("ctrak:run-0", "ctrak:dataset"),
        ("ctrak:query-0", "ctrak:traces-300"),
    }
    [run] = [
        a for a in document.get_records(model.ProvActivity) if str(a.identifier) == "ctrak:run-0"
    ]
    assert run.get_startTime() is not None
    assert run.get_endTime() >= run.get_startTime()
    owners = {str(a.identifier) for a in document.get_records(model.ProvAgent)} - {"ctrak:software"}
    assert len(owners) == 6  # one of seven samples has no owner
    # What the library writes again says the same.
    again = read_prov(json.loads(document.serialize(format="json")))
    assert again == document


def test_croissant_is_valid_by_mlcroissant_and_has_the_rows(store: Path, no_network: None) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    document = croissant(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = mlcroissant.Dataset(jsonld=document)
    assert dataset.metadata.issues.errors == set()
    rows = list(dataset.records("samples"))
    table = TraceStore(store).samples
    found = [_text(row["samples/sample_id"]) for row in rows]
    assert found == table.sample_ids
    number = sorted(table.metadata).index("owner")
    assert [_text(row[f"samples/column_{number}"]) for row in rows] == HOSTILE
    [file] = dataset.metadata.distribution
    assert file.sha256 == TraceStore(store)._manifest.files["samples.h5"].sha256
    assert document["license"] == ["CC-BY", "MIT"]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@pytest.mark.parametrize(
    "export", [prov_json, croissant, model_card, lambda path: ledger_summary(TraceStore(path))]
)
def test_what_was_forgotten_does_not_appear(store: Path, export: Any) -> None:
    text = json.dumps(export(store))
    gone = TraceStore(store).samples.sample_ids[5]
    assert export is not prov_json or gone in text
    forget(store, [gone])
    after = json.dumps(export(store))
    assert gone not in after
    assert after != text


def test_exports_are_of_a_store_that_is_what_its_ledger_says(store: Path, tmp_path: Path) -> None:
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"epoch": 3', '"epoch": 4'))
    for export in (prov_json, croissant, model_card):
        with pytest.raises(CorruptStoreError, match="is not what its ledger says"):
            export(store)
        with pytest.raises(StoreError, match=r"has no ledger\.jsonl"):
            export(Capture().run(tmp_path / "plain"))


def test_a_model_card_counts_the_samples_and_is_inert(store: Path) -> None:
    text = model_card(store)
    assert "base&#47;model, revision r1" in text
    assert "| CC-BY | 3 |" in text
    assert "| MIT | 3 |" in text
    assert "| not given | 1 |" in text
    assert Ledger(store).entries()[-1].sha256 in text
    for sign in ("<script", "](", "\u202e", "https:", "@"):
        assert sign not in text
    # Every line of a table has its two cells, whatever stands in them.
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in rows)
    assert sum("title" in line for line in text.splitlines()) == 1


@given(st.text(max_size=40))
def test_escaped_text_has_no_character_that_markdown_knows(text: str) -> None:
    import html

    shown = escape(text)
    assert not re.search(r"[\\`*_{}\[\]()<>+.!|~:@\"'/=$^\n\r\t]", shown)
    assert not re.search(r"&(?!#\d+;)", shown)
    printable = "".join(c for c in text if c.isprintable())
    if text == printable and not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", text):
        assert html.unescape(shown) == text


def test_the_block_says_what_the_ledger_says(store: Path) -> None:
    found = ledger_summary(TraceStore(store))
    entries = Ledger(store).entries()
    assert found["Ledger head"] == entries[-1].sha256
    assert found["Ledger"] == f"{len(entries)} entries"
    assert found["Base model"] == "base/model, revision r1"
    assert found["Commit"] == f"{'c' * 40}, with changes that are not committed"
    assert found["Checkpoints"] == "step 300, step 600"
    assert found["Samples"] == "7 in the store, 0 forgotten"
    assert (found["Questions recorded"], found["Signature"]) == ("1", "none")
    assert found["Dataset digest"] == entries[1].facts["commitments"]["root"]
    assert all(isinstance(value, str) for value in found.values())
    forget(store, [TraceStore(store).samples.sample_ids[0]])
    assert ledger_summary(TraceStore(store))["Samples"] == "6 in the store, 1 forgotten"


def test_the_block_of_a_store_without_a_ledger(tmp_path: Path) -> None:
    found = ledger_summary(TraceStore(Capture().run(tmp_path)))
    assert found == {"Run": "run", "Ledger": "none: attach ProvenanceRecorder to keep one"}
