"""Whatever is changed in a recorded store is found, and named."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from ctrak_lightning import TraceStore, TraceWriter
from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance import Ledger, forget, recording, sign, verify
from ctrak_lightning.provenance.commitments import commit
from ctrak_lightning.provenance.recording import sync
from ctrak_lightning.store.files import FileRecord
from ctrak_lightning.store.kernel import read_kernel, write_kernel
from ctrak_lightning.store.samples import read_samples, write_samples
from ctrak_lightning.store.shards import open_shard, write_shard

from ..store.store_builder import Capture
from .builder import recorded
from .keys import write_keys

SHARD = "checkpoint-00000300/rank0-00001.h5"
KERNEL = "checkpoint-00000600/kernel.h5"
WEIGHTS = "checkpoint-00000600/weights.safetensors"


def test_a_store_that_nobody_touched(store: Path) -> None:
    assert verify(store, deep=True) == []
    assert TraceStore(store).verify() == []


def flips(path: Path, count: int, seed: int) -> list[tuple[str, int, int]]:
    """Flips ``count`` random bytes over all files one after the other; those that :func:`verify`
    did not find."""
    files = {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()
    }
    names = [name for name, content in files.items() if content]
    draw, missed = random.Random(seed), []
    for number in range(count):
        # Each file in its turn: by size alone the small ones, which say most, would hardly be
        # drawn.
        name = names[number % len(names)]
        place, bit = draw.randrange(len(files[name])), 1 << draw.randrange(8)
        content = bytearray(files[name])
        content[place] ^= bit
        (path / name).write_bytes(content)
        if not verify(path):
            missed.append((name, place, bit))
        (path / name).write_bytes(files[name])
    return missed


@pytest.fixture
def signed(store: Path, tmp_path: Path) -> Path:
    """A recorded store with a signature, of which every kind of file is there."""
    sign(store, write_keys(tmp_path)[0])
    return store


def test_every_one_of_130_flipped_bytes_is_found(signed: Path) -> None:
    assert flips(signed, 130, seed=1) == []
    assert verify(signed) == []


@pytest.mark.slow
def test_every_one_of_1000_flipped_bytes_is_found(signed: Path) -> None:
    assert flips(signed, 1000, seed=2) == []


def named_problem(path: Path, *words: str, **options: Any) -> None:
    """There are problems, and one of them has all of ``words``."""
    problems = verify(path, **options)
    assert any(all(word in line for word in words) for line in problems), problems


@pytest.mark.parametrize(
    "name", ["samples.h5", "commitments.h5", SHARD, KERNEL, WEIGHTS, "manifest.json"]
)
def test_missing_cut_and_emptied_files_are_named(store: Path, name: str) -> None:
    content = (store / name).read_bytes()
    for change in (content[:-1], content + b"\0", b""):
        (store / name).write_bytes(change)
        named_problem(store, Path(name).name)
    (store / name).unlink()
    named_problem(store, Path(name).name)


def test_files_that_were_swapped_are_named(store: Path) -> None:
    other = "checkpoint-00000300/rank0-00000.h5"
    first, second = (store / SHARD).read_bytes(), (store / other).read_bytes()
    (store / SHARD).write_bytes(second)
    (store / other).write_bytes(first)
    named_problem(store, SHARD, "sha256")
    named_problem(store, other, "sha256")


@pytest.mark.parametrize(
    "name", ["extra", "checkpoint-00000300/rank0-00009.h5", "samples-e1.h5", "a/b/c"]
)
def test_files_that_were_added_are_named(store: Path, name: str) -> None:
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_bytes(b"x")
    named_problem(store, f"{name}: not recorded")


def test_content_of_the_lock_file_is_named(store: Path) -> None:
    (store / "ledger.lock").write_text("x")
    named_problem(store, "ledger.lock", "not empty")


def reseal(path: Path, name: str) -> None:
    """Records the file ``name`` as it is now, as a hand would that knows how manifests are made."""
    text = json.loads((path / "manifest.json").read_text())
    known = FileRecord.of(path / name)
    text["files"][name] = {"sha256": known.sha256, "bytes": known.bytes}
    write_text(path, text)


def write_text(path: Path, content: Any) -> None:
    (path / "manifest.json").write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")


def edit_samples(path: Path) -> None:
    table = read_samples(path / "samples.h5")
    table.metadata["artist"][3] = "somebody else"
    write_samples(path / "samples.h5", table)


def edit_shard(path: Path) -> None:
    shard = open_shard(path / SHARD, dim=6, dtype="float32", samples=10)
    rows = shard.read(0, len(shard))
    rows.norm[0] *= 2
    write_shard(path / SHARD, rows)


def edit_kernel(path: Path) -> None:
    kernel = read_kernel(path / KERNEL, 10, 6)
    kernel.eigenvalues[-1] *= 1.01
    write_kernel(path / KERNEL, kernel)


@pytest.mark.parametrize(
    ("name", "edit"), [("samples.h5", edit_samples), (SHARD, edit_shard), (KERNEL, edit_kernel)]
)
def test_a_file_edited_together_with_the_manifest_is_found_through_the_ledger(
    store: Path, name: str, edit: Callable[[Path], None]
) -> None:
    edit(store)
    reseal(store, name)
    assert TraceStore(store).verify() == []  # the manifest alone does not know
    named_problem(store, name, "the ledger records")


def test_an_edited_sample_is_named(store: Path) -> None:
    edit_samples(store)
    reseal(store, "samples.h5")
    named_problem(store, "samples.h5", "1 samples are not those", "'image/003.png'")


def test_an_edited_kernel_is_found_from_the_shards_without_a_ledger(tmp_path: Path) -> None:
    path = Capture().run(tmp_path / "store")
    edit_kernel(path)
    reseal(path, KERNEL)
    assert verify(path) == []
    named_problem(path, KERNEL, "is not the kernel of the traces", deep=True)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("run_id",), "another"),
        (("header", "method", "name"), "another"),
        (("header", "projection", "seed"), 7),
        (("header", "model", "architecture"), "a2"),
        (("header", "dataset", "size"), 11),
        (("header", "dataset", "owner"), "mallory"),
        (("schema",), 4),
        (("checkpoints", 0, "learning_rate"), 0.2),
        (("checkpoints", 1, "epoch"), 7),
        (("checkpoints", 1, "sealed"), False),
    ],
)
def test_a_manifest_that_was_edited_in_its_own_style_is_found(
    store: Path, keys: tuple[Any, ...], value: Any
) -> None:
    content = json.loads((store / "manifest.json").read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    write_text(store, content)
    assert verify(store) != []


def test_a_store_of_an_earlier_schema_is_what_that_version_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest has the earlier number, and its ledger no salt of the edition."""
    monkeypatch.setattr(recording, "commit", lambda table: replace(commit(table), salt=b""))
    path = recorded(tmp_path / "store")
    content = json.loads((path / "manifest.json").read_text())
    write_text(path, content | {"schema": 4})
    assert verify(path, deep=True) == []
    assert TraceStore(path).checkpoints[0].features().shape == (10, 6)


def test_a_manifest_in_another_style_is_found(store: Path) -> None:
    (store / "manifest.json").write_text(
        json.dumps(json.loads((store / "manifest.json").read_text()))
    )
    named_problem(store, "manifest.json", "is not written as the library writes it")


def test_a_checkpoint_that_was_taken_out_with_its_record_is_found(store: Path) -> None:
    content = json.loads((store / "manifest.json").read_text())
    content["checkpoints"] = content["checkpoints"][:1]
    content["files"] = {
        name: known for name, known in content["files"].items() if "600" not in name
    }
    write_text(store, content)
    shutil.rmtree(store / "checkpoint-00000600")
    assert TraceStore(store).verify() == []
    named_problem(store, "lacks checkpoint 600")


def lines(path: Path) -> list[bytes]:
    return (path / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def test_entries_in_another_order_and_entries_removed_are_found(store: Path) -> None:
    whole = lines(store)
    assert len(whole) == 4  # run, dataset, two checkpoints
    for change in (
        [*whole[:2], whole[3], whole[2]],
        [whole[0], *whole[2:]],
        whole[:3],
        whole[:2],
        whole[:1],
        [],
    ):
        (store / "ledger.jsonl").write_bytes(b"".join(change))
        named_problem(store, "ledger")


def test_what_a_chain_without_signature_cannot_prove(store: Path, tmp_path: Path) -> None:
    """The last entries, where nothing else refers to them, can be taken away unseen; a signature
    tells."""
    Ledger(store).append("query", {"asker": "somebody"})
    private, public = write_keys(tmp_path)
    whole = lines(store)
    (store / "ledger.jsonl").write_bytes(b"".join(whole[:-1]))
    assert verify(store) == []
    (store / "ledger.jsonl").write_bytes(b"".join(whole))
    sign(store, private)
    assert verify(store, public_key=public) == []
    (store / "ledger.jsonl").write_bytes(b"".join(whole[:-1]))
    named_problem(store, "has 4 sound entries, 5 were signed")


def test_a_torn_last_line_is_named_and_mended_by_the_next_entry(store: Path) -> None:
    with (store / "ledger.jsonl").open("ab") as file:
        file.write(b'{"facts":{"con')
    named_problem(store, "ledger.jsonl: ends with 14 bytes of an entry whose writing was cut off")
    Ledger(store).append("query", {})
    assert verify(store) == []


class Other(Capture):
    """The same of another run."""

    def open(self, path: Path) -> TraceWriter:
        return TraceWriter(path, self.header(), run_id="other", shard_rows=self.shard_rows)


def test_a_ledger_of_another_store_is_found(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    recorded(other, Other())
    for name in ("ledger.jsonl", "commitments.h5"):
        shutil.copy(other / name, store / name)
    named_problem(store, "run_id is 'run', the ledger is of run 'other'")


def test_a_store_without_a_ledger_is_held_against_its_manifest(tmp_path: Path) -> None:
    path = Capture().run(tmp_path / "store")
    assert verify(path, deep=True) == []
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1] + b"\xaa")
    named_problem(path, SHARD, "the manifest records")


def test_a_ledger_that_was_deleted_leaves_a_trace(store: Path) -> None:
    (store / "ledger.jsonl").unlink()
    named_problem(store, "ledger.jsonl: is missing", "commitments.h5")


def test_a_ledger_that_was_deleted_after_a_forgetting_leaves_a_trace_too(store: Path) -> None:
    forget(store, ["image/003.png"])
    (store / "ledger.jsonl").unlink()
    named_problem(store, "ledger.jsonl: is missing", "commitments-e1.h5")


def test_samples_that_are_gone_with_their_commitments_are_missed(tmp_path: Path) -> None:
    """From a store that has no checkpoint yet, whose manifest says nothing of them any more."""
    store = recorded(tmp_path / "store", Capture(steps=()))
    assert verify(store) == []
    for name in ("samples.h5", "commitments.h5"):
        (store / name).unlink()
    write_text(store, json.loads((store / "manifest.json").read_text()) | {"files": {}})
    named_problem(store, "commitments.h5", "no file can be held against the ledger")


def test_with_the_manifest_gone_the_ledger_still_speaks_of_the_files(store: Path) -> None:
    (store / "manifest.json").write_text("{")
    (store / SHARD).write_bytes(b"x")
    problems = verify(store)
    assert any("manifest.json" in line for line in problems)
    assert f"{SHARD}: is not the file that the ledger records" in problems


def test_a_checkpoint_that_a_run_without_recorder_added_is_named_and_can_be_recorded(
    store: Path,
) -> None:
    Capture(steps=(300, 600, 900)).run(store)
    named_problem(store, "checkpoint 900 is not in the ledger")
    assert [entry.kind for entry in sync(store)] == ["checkpoint"]
    assert verify(store) == []
    assert sync(store) == []


def test_facts_that_no_library_writes_are_refused(store: Path) -> None:
    Ledger(store).append("checkpoint", {"step": 900})
    named_problem(store, "entry 4 of the ledger (checkpoint) has facts")


def test_an_interrupted_capture_is_no_problem(store: Path) -> None:
    capture = Capture()
    capture.run_checkpoint(capture.open(store), 900, stop=5)
    assert verify(store) == []


def test_places_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no manifest\.json.*HINT"):
        verify(tmp_path)


def test_int8_and_float16_kernels_follow_from_their_shards(tmp_path: Path) -> None:
    for dtype in ("int8", "float16"):
        path = recorded(tmp_path / dtype, Capture(n=20, changes={"dtype": dtype}))
        assert verify(path, deep=True) == []
        path = recorded(tmp_path / f"{dtype}-dual", Capture(k=24, changes={"dtype": dtype}))
        assert verify(path, deep=True) == []


def test_the_ledger_vouches_for_every_file(store: Path) -> None:
    from ctrak_lightning.provenance.history import replay

    present = {str(p.relative_to(store)) for p in store.rglob("*") if p.is_file()}
    assert replay(Ledger(store).entries()).files().keys() == present - {
        "manifest.json",
        "ledger.jsonl",
        "ledger.lock",
        "writer.lock",
    }
    with h5py.File(store / "commitments.h5") as file:
        assert torch.from_numpy(file["salts"][:]).unique(dim=0).shape == (10, 32)
