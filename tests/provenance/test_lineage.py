"""A run names its parent, and what became of it is told."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrak_lightning import TraceStore, TraceWriter
from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance import Ledger, lineage
from ctrak_lightning.provenance.parents import parent_facts

from ..store.store_builder import Capture
from .builder import recorded


class Named(Capture):
    """A capture of a run of its own."""

    run_id = "run"

    def open(self, path: Path) -> TraceWriter:
        return TraceWriter(path, self.header(), run_id=self.run_id, shard_rows=self.shard_rows)


def named(
    path: Path, parent: Path | None = None, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """A recorded store whose run has the name of its folder."""
    capture = Named()
    capture.run_id = path.name
    given: dict[str, Any] = {}
    if parent is not None:
        given["parent"] = parent_facts(parent, path, weights or {})
    return recorded(path, capture, **given)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three stores, each the parent of the one before."""
    oldest = named(tmp_path / "oldest")
    last = TraceStore(oldest).checkpoints[-1].weights()
    middle = named(tmp_path / "middle", oldest, last)
    return [
        named(tmp_path / "youngest", middle, {name: value + 1 for name, value in last.items()}),
        middle,
        oldest,
    ]


def test_the_chain_is_followed_to_its_beginning(chain: list[Path]) -> None:
    links = lineage(chain[0])
    assert [link.path for link in links] == chain
    assert [link.run_id for link in links] == ["youngest", "middle", "oldest"]
    assert [link.weights for link in links] == ["different", "equal", None]
    assert [link.problems for link in links] == [[], [], []]


def test_weights_are_compared_by_name_and_bytes(chain: list[Path]) -> None:
    oldest = chain[2]
    weights = TraceStore(oldest).checkpoints[-1].weights()
    more = weights | {"other": torch.ones(2)}
    assert parent_facts(oldest, oldest, more)["weights"] == "equal"
    assert (
        parent_facts(oldest, oldest, weights | {"b": weights["b"].double()})["weights"]
        == "different"
    )
    assert parent_facts(oldest, oldest, {"b": weights["b"]})["weights"] == "not comparable"
    first = TraceStore(oldest).checkpoints[0].weights()
    assert parent_facts(oldest, oldest, first)["weights"] == "different"


def test_stores_that_are_moved_together_are_found(chain: list[Path], tmp_path: Path) -> None:
    for path in chain:
        shutil.move(path, tmp_path / "moved" / path.name)
    links = lineage(tmp_path / "moved" / "youngest")
    assert [link.run_id for link in links] == ["youngest", "middle", "oldest"]
    assert all(not link.problems for link in links)


def test_a_parent_that_is_gone_is_named(chain: list[Path]) -> None:
    shutil.rmtree(chain[1])
    links = lineage(chain[0])
    assert [link.run_id for link in links] == ["youngest", "middle"]
    assert links[1].problems == ["its store is not there, or has no ledger"]


def test_a_parent_that_was_changed_is_named(chain: list[Path], tmp_path: Path) -> None:
    path = chain[2] / "ledger.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    Ledger(chain[2]).append("query", {"later": True})
    assert lineage(chain[0])[2].problems == []  # entries may be added

    path.write_bytes(b"".join(whole[:-1]))
    assert lineage(chain[0])[2].problems == [
        "its ledger has 3 entries, 4 were there when its child began"
    ]

    Ledger(chain[2]).append("query", {"instead": True})
    [problem] = lineage(chain[0])[2].problems
    assert "entry 3 of its ledger is not the one that was its head" in problem

    path.write_bytes(b"".join(whole).replace(b'"rank":4', b'"rank":5'))
    [problem] = lineage(chain[0])[2].problems
    assert "its sha256 is not that of its content" in problem

    shutil.rmtree(chain[2])
    named(tmp_path / "stranger")
    shutil.move(tmp_path / "stranger", chain[2])
    assert lineage(chain[0])[2].problems == ["the store that is there is of another run, stranger"]


def test_a_circle_ends(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only forged ledgers name each other."""
    from ctrak_lightning.provenance import parents

    facts = parents._parent_of(Ledger(chain[0]).entries())
    assert facts is not None
    monkeypatch.setattr(parents, "_parent_of", lambda entries: facts if entries else None)
    links = lineage(chain[0])
    assert [link.run_id for link in links] == ["youngest", "middle", "middle"]
    assert links[-1].problems == ["is a run that comes before: a circle"]


def test_no_ledger_no_lineage(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no ledger\.jsonl"):
        lineage(Capture().run(tmp_path))
