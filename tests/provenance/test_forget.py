"""A store that forgot a sample is one that never saw it, whenever it is interrupted."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from ctrak_lightning import Concept, TraceStore
from ctrak_lightning.errors import (
    CorruptStoreError,
    DatasetChangedError,
    StoreError,
    StoreLockedError,
)
from ctrak_lightning.provenance import (
    Ledger,
    LedgerWarning,
    forget,
    forgetting,
    recording,
    signature,
    verify,
)
from ctrak_lightning.provenance.commitments import commit
from ctrak_lightning.provenance.forgetting import finish
from ctrak_lightning.provenance.recording import QueryLog, record_run, result_digest, sync
from ctrak_lightning.provenance.signature import sign
from ctrak_lightning.store import SampleTable, TraceWriter, Visits
from ctrak_lightning.store.files import FileRecord, write_atomically
from ctrak_lightning.store.manifest import read_manifest, write_manifest
from ctrak_lightning.store.samples import write_samples
from ctrak_lightning.store.schema import WRITER_LOCK

from ..store.store_builder import Capture, make_table, read_bytes
from .builder import recorded, run_facts
from .keys import write_keys

GONE = ["image/003.png", "image/008.png"]
STAY = [0, 1, 2, 4, 5, 6, 7, 9]


@dataclass
class Partial(Capture):
    """The same capture of some of the samples, optionally with visits."""

    stay: tuple[int, ...] = tuple(range(10))
    visits: bool = False

    def header(self) -> Any:
        facts = self.table().facts() | {"latent_shape": [3, 8, 8]}
        return super().header().__class__(**super().header().to_dict() | {"dataset": facts})

    def table(self) -> SampleTable:
        return make_table(self.n).take(self.stay)

    def run(self, path: Path, batch: int = 3) -> Path:
        writer = TraceWriter(path, self.header(), run_id="run", shard_rows=self.shard_rows)
        writer.write_samples(self.table())
        keep = torch.tensor(self.stay)
        for step in self.steps:
            features, loss = self.traces(step)
            options = {"epoch": step // 100, "learning_rate": 0.1, "weights": self.weights(step)}
            with writer.begin_checkpoint(step, **options) as checkpoint:
                if self.visits:
                    checkpoint.write_visits(self._visits(keep))
                order = torch.argsort(self.order(step)[keep])
                checkpoint.append(order, features[keep][order], loss[keep][order])
                checkpoint.seal()
        return path

    def _visits(self, keep: torch.Tensor) -> Visits:
        """Sample i was seen i % 3 times, at timestep i + 0.5, after 10 i, 10 i + 1, ... steps."""
        counts = keep % 3
        times = [(i + 0.5, 10 * i + j) for i in keep.tolist() for j in range(i % 3)]
        return Visits(
            counts=counts,
            timesteps=torch.tensor([t for t, _ in times]),
            steps=torch.tensor([s for _, s in times], dtype=torch.int64),
        )


def assert_same_content(left: Path, right: Path) -> None:
    """Equal but for the names of files and the shards' boundaries; kernels to 1e-6 of the largest
    entry."""
    mine, theirs = TraceStore(left), TraceStore(right)
    assert mine.header == theirs.header
    assert mine.samples.sample_ids == theirs.samples.sample_ids
    assert mine.samples.content_sha256 == theirs.samples.content_sha256
    assert mine.samples.metadata == theirs.samples.metadata
    assert torch.equal(mine.samples.thumbnails, theirs.samples.thumbnails)
    assert len(mine.checkpoints) == len(theirs.checkpoints)
    for one, other in zip(mine.checkpoints, theirs.checkpoints, strict=True):
        assert torch.equal(one.features(), other.features())
        assert torch.equal(one.losses(), other.losses())
        assert torch.equal(one.norms(), other.norms())
        kernel, expected = one.kernel(), other.kernel()
        assert kernel.side == expected.side
        gram = expected.gram()
        assert (kernel.gram() - gram).abs().max() <= 1e-6 * gram.abs().max()
        torch.testing.assert_close(kernel.mean, expected.mean, rtol=1e-9, atol=1e-9)
        assert abs(kernel.trace - expected.trace) <= 1e-6 * expected.trace
        seen, wanted = one.visits(), other.visits()
        assert (seen is None) == (wanted is None)
        if seen is not None and wanted is not None:
            for name in ("counts", "timesteps", "steps"):
                assert torch.equal(getattr(seen, name), getattr(wanted, name))


@pytest.mark.parametrize("visits", [False, True])
@pytest.mark.parametrize(
    ("dtype", "k"), [("float32", 6), ("float16", 6), ("int8", 6), ("float32", 9), ("float32", 24)]
)
def test_the_store_is_one_that_never_saw_the_samples(
    tmp_path: Path, dtype: str, k: int, visits: bool
) -> None:
    """Also where fewer samples than features are left (k = 9: ten samples, then eight) and the
    kernel changes its side."""
    options: dict[str, Any] = {"k": k, "visits": visits, "changes": {"dtype": dtype}}
    recorded(tmp_path / "store", Partial(**options))
    expected = Partial(**options, stay=tuple(STAY)).run(tmp_path / "expected")
    done = forget(tmp_path / "store", list(reversed(GONE)))
    assert (done.sample_ids, done.remaining) == (GONE, 8)
    assert_same_content(tmp_path / "store", expected)
    assert verify(tmp_path / "store", deep=True) == []
    assert TraceStore(tmp_path / "store").verify() == []


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A recorded store with visits, whose header describes its samples as a capture's does."""
    return recorded(tmp_path / "store", Partial(visits=True))


def places_of(path: Path, *texts: str) -> list[str]:
    """Files that have one of ``texts`` in them."""
    return [
        name
        for name, content in read_bytes(path).items()
        if any(text.encode() in content for text in texts)
    ]


def test_nothing_of_the_sample_is_left_in_any_file(store: Path) -> None:
    traces = [c.features()[3].numpy().tobytes() for c in TraceStore(store).checkpoints]
    [image] = TraceStore(store).samples.thumbnails[3:4].numpy()
    with h5py.File(store / "commitments.h5") as file:
        salt = file["salts"][3].tobytes()
    unit = [
        c.rows_of(torch.tensor([3])).unit.numpy().tobytes() for c in TraceStore(store).checkpoints
    ]
    content = TraceStore(store).samples.content_sha256[3]
    old = TraceStore(store).samples.fingerprint()
    assert places_of(store, GONE[0]) == ["samples.h5"]
    forget(store, GONE[:1])
    assert places_of(store, GONE[0], content, old) == []
    for secret in (*unit, *traces, image.tobytes(), salt):
        assert [name for name, data in read_bytes(store).items() if secret in data] == []


def test_the_ledger_keeps_a_tombstone_that_says_nothing_and_can_be_checked_by_who_has_the_salt(
    store: Path,
) -> None:
    with h5py.File(store / "commitments.h5") as file:
        salt, commitment = file["salts"][3].tobytes(), file["hashes"][3].tobytes().hex()
    table = TraceStore(store).samples
    before = (store / "ledger.jsonl").read_bytes()
    done = forget(store, GONE[:1])
    assert done.tombstones == [commitment]
    assert (store / "ledger.jsonl").read_bytes().startswith(before)
    entry = Ledger(store).entries()[-1]
    assert (entry.kind, entry.facts["tombstones"], entry.facts["dataset"]["size"]) == (
        "forget",
        [commitment],
        9,
    )
    row = {
        "sample_id": table.sample_ids[3],
        "content_sha256": table.content_sha256[3],
        "metadata": {"artist": "ann", "licence/url": ""},
        "thumbnail": hashlib.sha256(table.thumbnails[3].numpy().tobytes()).hexdigest(),
        "thumbnail_shape": [2, 2, 3],
    }
    text = json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(salt + text).hexdigest() == commitment


def digests_of(path: Path) -> set[str]:
    """What somebody who has every file of a store, or guesses one to the last byte, can compare
    with a ledger."""
    table = TraceStore(path).samples
    files = [data for name, data in read_bytes(path).items() if "weights" not in name]
    return {hashlib.sha256(data).hexdigest() for data in files} | set(
        map(str, table.facts().values())
    )


def test_a_guess_of_the_row_cannot_be_confirmed(store: Path, tmp_path: Path) -> None:
    """The whole table as it was, guessed to the last byte, and every other file: the ledger has no
    digest of any of it."""
    picture = torch.full((3, 8, 8), 0.5)
    log = QueryLog(store, 0, None)
    concept = Concept("this very sample", {"artist": "ann"}, {}, image=picture)
    ids, scores = TraceStore(store).samples.sample_ids, [float(i) for i in range(10)]
    log.note(
        [concept.to_dict()],
        [0],
        [(ids, scores)],
        dampings=[None],
        methods=[{}],
        steps=[300],
        samples="all",
    )
    before, guess = digests_of(store), TraceStore(store).samples
    with h5py.File(store / "commitments.h5") as file:
        salt = file["salt"][:].tobytes()
    secrets = before | {concept.to_dict()["image"]["sha256"], result_digest(ids, scores)}
    forget(store, GONE[:1])
    write_samples(tmp_path / "guess.h5", guess)
    assert (
        hashlib.sha256((tmp_path / "guess.h5").read_bytes()).hexdigest() in secrets
    )  # the guess is right
    ledger = (store / "ledger.jsonl").read_text()
    kept = {digest for digest in secrets if len(digest) == 64 and digest in ledger}
    kept -= {known["sha256"] for known in commitment_files(store)}
    assert kept == set()
    assert places_of(store, salt.hex()) == []
    assert [name for name, data in read_bytes(store).items() if salt in data] == []


def commitment_files(path: Path) -> list[dict[str, Any]]:
    """What the ledger says of the files of commitments, which nobody can guess."""
    entries = [entry for entry in Ledger(path).entries() if entry.kind in ("dataset", "forget")]
    return [entry.facts.get("dataset", entry.facts)["commitments"] for entry in entries]


def test_a_ledger_that_an_earlier_version_began_goes_on_and_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "commit", lambda table: replace(commit(table), salt=b""))
    store = recorded(tmp_path / "store", Partial())
    [samples] = [e.facts["samples"] for e in Ledger(store).entries() if e.kind == "dataset"]
    assert samples["sha256"] == hashlib.sha256((store / "samples.h5").read_bytes()).hexdigest()
    assert verify(store) == []
    with pytest.warns(
        LedgerWarning, match=r"without a salt.*can see from them that it was there.*HINT"
    ):
        forget(store, GONE[:1])
    assert verify(store, deep=True) == []
    forget(
        store, GONE[1:]
    )  # what the first forgetting recorded is salted: no warning, which would be an error
    assert verify(store, deep=True) == []


def test_an_edition_whose_samples_are_others_is_not_recorded(store: Path) -> None:
    """What looks like a forgetting that a crash cut off, and is somebody's own table under the next
    edition's name."""
    original = read_manifest(store)
    table = TraceStore(store).samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            forgetting, "_finish", lambda root: read_manifest(root)
        )  # stops before the ledger
        forget(store, GONE)
    manifest = read_manifest(store)
    assert manifest.edition == original.edition + 1
    stolen = replace(
        table.take(STAY), metadata={"artist": ["mallory"] * 8, "licence/url": [""] * 8}
    )
    known = write_atomically(store / manifest.samples, lambda path: write_samples(path, stolen))
    write_manifest(store, manifest.with_files({manifest.samples: known}))
    before = (store / "ledger.jsonl").read_bytes()
    for completes in (finish, sync):
        with pytest.raises(
            CorruptStoreError, match="8 samples that are not those of the edition before"
        ):
            completes(store)
    assert (store / "ledger.jsonl").read_bytes() == before


def test_what_has_nothing_of_the_samples_in_it_is_carried_over(tmp_path: Path) -> None:
    """Companions of any kind, as long as their names are those of no edition; the ledger vouches
    for them."""
    store = Partial(steps=(300,)).run(tmp_path / "store")
    names = ["buffers.safetensors", "function.h5", "weights.safetensors"]
    content = {name: f"of no sample: {name}".encode() for name in names[:2]}
    for name, data in content.items():
        (store / "checkpoint-00000300" / name).write_bytes(data)
    files = {f"checkpoint-00000300/{name}" for name in names}
    added = {path: FileRecord.of(store / path) for path in files}
    write_manifest(store, read_manifest(store).with_files(added))
    record_run(store, run_facts(store), resumed=False)
    forget(store, GONE)
    known = read_manifest(store).files
    assert {path: known[path] for path in files} == added
    for entry in Ledger(store).entries():
        for facts in {
            "checkpoint": [entry.facts],
            "forget": entry.facts.get("checkpoints", []),
        }.get(entry.kind, []):
            assert files < facts["files"].keys()
    assert TraceStore(store).verify() == []


def test_again_and_again(store: Path, tmp_path: Path) -> None:
    for number, sample_id in enumerate(
        ("image/000.png", "image/009.png", "image/004.png"), start=1
    ):
        forget(store, [sample_id])
        assert verify(store, deep=True) == []
        assert (store / f"samples-e{number}.h5").exists()
    expected = Partial(visits=True, stay=(1, 2, 3, 5, 6, 7, 8)).run(tmp_path / "expected")
    assert_same_content(store, expected)
    kept = {path.name for path in store.rglob("*.h5")}
    assert kept == {
        f"{name}-e3.h5"
        for name in (
            "samples",
            "commitments",
            "kernel",
            "visits",
            "rank0-00000",
            "rank0-00001",
            "rank0-00002",
        )
    }
    assert [e.kind for e in Ledger(store).entries()].count("forget") == 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            ["image/03.png"],
            r"has no sample 'image/03\.png'.*Near: 'image/00.*nothing|Near: 'image/0",
        ),
        (["image/003.png", "x" * 10**6], r"has no sample 'xxx.*\.\.\.; nothing was forgotten"),
        (["../../x"], r"has no sample '\.\./\.\./x'"),
        ([""], "has no sample ''"),
        ([], "expected at least one sample"),
        (
            [f"image/{i:03d}.png" for i in range(10)],
            "these are all of its 10 samples.*HINT: delete",
        ),
    ],
)
def test_what_cannot_be_forgotten_changes_nothing(
    store: Path, ids: list[str], message: str
) -> None:
    before = read_bytes(store)
    with pytest.raises(StoreError, match=message) as caught:
        forget(store, ids)
    assert len(str(caught.value)) < 1000
    assert read_bytes(store) == before


def test_strange_ids_are_forgotten_like_others(tmp_path: Path) -> None:
    strange = ["../../x", "ünï/\U0001f600", "-rf", "a\nb", "'\"; DROP", "é" * 5000, "plain"]
    path = tmp_path / "store"
    capture = Capture(n=7, steps=(300,))
    with capture.open(path) as writer:
        writer.write_samples(SampleTable(strange, [""] * 7))
        capture.run_checkpoint(writer, 300)
    record_run(path, run_facts(path), resumed=False)
    for sample_id in strange[:-1]:
        forget(path, [sample_id])
    assert TraceStore(path).samples.sample_ids == ["plain"]
    assert verify(path, deep=True) == []
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_store_without_a_ledger_forgets_too(tmp_path: Path) -> None:
    path = Partial().run(tmp_path / "store")
    done = forget(path, GONE)
    assert done.tombstones == []
    assert_same_content(path, Partial(stay=tuple(STAY)).run(tmp_path / "expected"))
    assert verify(path, deep=True) == []


def test_unsealed_checkpoints_go_whole(store: Path) -> None:
    capture = Partial(visits=True)
    Capture.run_checkpoint(capture, TraceWriter(store, capture.header(), shard_rows=4), 900, stop=9)
    assert (store / "checkpoint-00000900").exists()
    assert forget(store, GONE).unsealed == [900]
    assert not (store / "checkpoint-00000900").exists()
    assert verify(store) == []


@pytest.mark.parametrize(
    "name", ["checkpoint-00000300/rank0-00000.h5", "samples.h5", "manifest.json"]
)
def test_a_store_that_was_tampered_with_is_not_written_anew(store: Path, name: str) -> None:
    """Else the next edition's entry would vouch for what somebody changed."""
    content = (store / name).read_bytes()
    changed = content.replace(b'"learning_rate": 0.1', b'"learning_rate": 0.2')
    (store / name).write_bytes(
        changed if changed != content else content[:-1] + bytes([content[-1] ^ 1])
    )
    before = read_bytes(store)
    with pytest.raises(CorruptStoreError):
        forget(store, GONE)
    assert {k: v for k, v in read_bytes(store).items() if k != "ledger.lock"} == {
        k: v for k, v in before.items() if k != "ledger.lock"
    }


def test_a_run_that_goes_on_with_the_whole_data_set_is_refused(store: Path) -> None:
    forget(store, GONE)
    before = read_bytes(store)
    with pytest.raises(
        DatasetChangedError, match=r"dataset\.size.*have been forgotten from this store.*HINT"
    ):
        Partial(visits=True, steps=(300, 600, 900)).run(store)
    assert read_bytes(store) == before


def test_a_run_that_goes_on_without_the_sample_continues_the_store(store: Path) -> None:
    forget(store, GONE)
    capture = Partial(stay=tuple(STAY), steps=(900,), visits=True)
    capture.run(store)
    assert [entry.kind for entry in sync(store)] == ["checkpoint"]
    assert [c.step for c in TraceStore(store).checkpoints] == [300, 600, 900]
    assert len(TraceStore(store)) == 8
    assert verify(store, deep=True) == []
    forget(store, ["image/000.png"])
    assert verify(store, deep=True) == []
    assert len(TraceStore(store).checkpoints[2].features()) == 7


def test_forgetting_and_signing_are_refused_while_a_run_has_the_store(
    store: Path, tmp_path: Path
) -> None:
    capture = Partial(visits=True)
    private, public = write_keys(tmp_path)
    with TraceWriter(store, capture.header(), shard_rows=4) as writer:
        before = read_bytes(store)
        for change in (
            lambda: forget(store, GONE),
            lambda: finish(store),
            lambda: sign(store, private),
        ):
            with pytest.raises(
                StoreLockedError, match=rf"process \({os.getpid()} on .*traces into it"
            ):
                change()
        assert read_bytes(store) == before
        # What the run records itself, and what it is asked meanwhile, goes on.
        Capture.run_checkpoint(capture, writer, 900)
        assert [entry.kind for entry in sync(store)] == ["checkpoint"]
        QueryLog(store, 0, None).note(
            [{}], [0], [(["a"], [1.0])], dampings=[None], methods=[{}], steps=[900], samples="all"
        )
    sign(store, private)
    assert verify(store, public_key=public) == []
    forget(store, GONE)
    with pytest.raises(StoreError, match="its writer was closed"):
        writer.begin_checkpoint(1200, epoch=9)
    assert [entry.kind for entry in Ledger(store).entries()][-3:] == [
        "checkpoint",
        "query",
        "forget",
    ]


def test_a_capture_that_is_under_way_does_not_bring_the_sample_back(store: Path) -> None:
    """Where the lock does not hold: on some network file systems, or once somebody has deleted its
    file."""
    writer = TraceWriter(store, Partial(visits=True).header(), shard_rows=4)
    (store / WRITER_LOCK).unlink()
    forget(store, GONE)
    with pytest.raises(StoreLockedError, match="writer.lock was removed or replaced.*HINT"):
        writer.begin_checkpoint(900, epoch=9)
    assert verify(store) == []


@pytest.mark.parametrize("locks_hold", [True, False])
def test_a_capture_that_begins_meanwhile_is_refused_or_ends_the_forgetting(
    store: Path, monkeypatch: pytest.MonkeyPatch, locks_hold: bool
) -> None:
    real = forgetting.rewrite_without

    def interfering(*args: Any) -> Any:
        after = real(*args)
        if not locks_hold:
            (store / WRITER_LOCK).unlink()
        Partial(visits=True, steps=(900,)).run(store)
        return after

    monkeypatch.setattr(forgetting, "rewrite_without", interfering)
    message = (
        "which forgets samples since"
        if locks_hold
        else "another process has written to the store meanwhile"
    )
    with pytest.raises(StoreError, match=f"{message}.*HINT") as caught:
        forget(store, GONE)
    assert isinstance(caught.value, StoreLockedError) == locks_hold
    steps = [300, 600] if locks_hold else [300, 600, 900]
    assert [c.step for c in TraceStore(store).checkpoints] == steps
    sync(store)
    finish(store)
    assert verify(store) == []


def test_what_is_done_without_the_lock_is_not_kept(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has deleted the lock meanwhile, and nobody has written yet."""
    private, _ = write_keys(tmp_path)
    before = read_bytes(store)
    for module, name, change in (
        (forgetting, "rewrite_without", lambda: forget(store, GONE)),
        (signature, "replay", lambda: sign(store, private)),
    ):
        real = getattr(module, name)

        def unlocking(*args: Any, real: Any = real) -> Any:
            (store / WRITER_LOCK).unlink()
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, unlocking)
            with pytest.raises(StoreLockedError, match="removed or replaced"):
                change()
        (store / WRITER_LOCK).touch()
        assert read_bytes(store) == before


class Crash(BaseException):
    """Not an Exception: nothing tidies up after it, as after a power cut."""


def crash_at(tick: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Raises just before or just after the ``tick``-th operation on files; returns how many there
    have been."""
    ticks = 0

    def tick_once() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == tick:
            raise Crash

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick_once()
            result = original(*args, **kwargs)
            tick_once()
            return result

        patch.setattr(owner, name, wrapped)

    for owner, name in (
        (os, "replace"),
        (os, "write"),
        (os, "ftruncate"),
        (Path, "unlink"),
        (Path, "write_bytes"),
    ):
        wrap(owner, name)
    return lambda: ticks


def test_a_crash_at_any_step_leaves_the_old_store_or_the_new_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": (300,), "shard_rows": 5, "visits": True}
    original = recorded(tmp_path / "original", Partial(**options))
    expected = Partial(**options, stay=tuple(STAY)).run(tmp_path / "expected")
    old = {name: data for name, data in read_bytes(original).items() if name != "ledger.lock"}
    outcomes = []
    for tick in range(1, 1000):
        path = shutil.copytree(original, tmp_path / str(tick))
        with pytest.MonkeyPatch.context() as patch:
            done = crash_at(tick, patch)
            try:
                forget(path, GONE)
            except Crash:
                pass
            else:
                assert done() < tick
                break
        is_new = TraceStore(path).samples.sample_ids[3] != GONE[0]
        outcomes.append(is_new)
        if is_new:
            assert_same_content(path, expected)
        else:
            assert {name: read_bytes(path)[name] for name in old} == old
        finish(path)
        assert verify(path) == []
        kinds = [entry.kind for entry in Ledger(path).entries()]
        assert kinds.count("forget") == is_new
        if is_new:
            assert places_of(path, *GONE) == []
        else:
            assert read_bytes(path).keys() - {"ledger.lock"} == old.keys()
            forget(path, GONE)
            assert_same_content(path, expected)
        shutil.rmtree(path)
    assert outcomes == sorted(outcomes)  # first the old ones, then the new ones
    assert outcomes.count(False) > 20
    assert outcomes.count(True) > 10


def test_verify_names_what_an_interrupted_forgetting_left(store: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        write = os.write

        def crashing(descriptor: int, content: bytes) -> int:
            if b'"forget"' in content:
                raise Crash
            return write(descriptor, content)

        patch.setattr(os, "write", crashing)
        with pytest.raises(Crash):
            forget(store, GONE)
    problems = verify(store)
    assert any("there is no entry of it: it was interrupted" in line for line in problems)
    assert "samples.h5: not recorded in the manifest" in problems
    assert any(
        entry.kind == "forget" for entry in sync(store)
    )  # a run that begins completes it too
    finish(store)
    assert verify(store) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_sigkill_at_many_steps_leaves_the_old_store_or_the_new_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.provenance.forget_worker", str(tmp_path)]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["bad"] == []
    assert report["old"] >= 5
    assert report["new"] >= 2
