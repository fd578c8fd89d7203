"""A store from somebody else may hold links, pipes and arrays of any size: none of them is
followed, waited for or read."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance import Ledger, LedgerWarning, forget, verify
from ctrak_lightning.provenance.commitments import read_commitments
from ctrak_lightning.provenance.recording import QueryLog
from ctrak_lightning.provenance.signature import sign
from ctrak_lightning.store import TraceStore
from ctrak_lightning.store.files import FileRecord
from ctrak_lightning.store.kernel import read_kernel
from ctrak_lightning.store.manifest import parse_manifest, read_text, write_manifest
from ctrak_lightning.store.samples import read_samples

from ..store.store_builder import Capture, read_bytes
from .builder import recorded
from .keys import write_keys

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="makes links and pipes")
FOLDER = "checkpoint-00000300"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed")
    store = recorded(folder / "store", Capture(steps=(300,)))
    sign(store, write_keys(folder)[0])
    return store


@pytest.fixture
def store(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "store"))


def use(store: Path) -> None:
    """Everything that is done to a store; what fails, fails with a typed error."""
    for do in (
        lambda: read_everything(TraceStore(store)),
        lambda: Capture(steps=(300, 600)).run(store),
        lambda: Ledger(store).append("query", {}),
        lambda: forget(store, ["image/003.png"]),
    ):
        with contextlib.suppress(StoreError):
            do()


def read_everything(store: TraceStore) -> None:
    assert len(store.samples) == 10
    for checkpoint in store.checkpoints:
        checkpoint.features(), checkpoint.kernel(), checkpoint.weights()


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "samples.h5",
        FOLDER,
        f"{FOLDER}/rank0-00000.h5",
        f"{FOLDER}/kernel.h5",
        f"{FOLDER}/weights.safetensors",
        "ledger.jsonl",
        "ledger.signature.json",
        "commitments.h5",
        "ledger.lock",
        "writer.lock",
    ],
)
def test_no_file_is_read_or_written_through_a_link(store: Path, tmp_path: Path, name: str) -> None:
    """Not even where the link leads to the very bytes that were sealed."""
    outside = tmp_path / "outside"
    shutil.move(store / name, outside)
    (store / name).symlink_to(outside)
    before = read_bytes(outside) if outside.is_dir() else outside.read_bytes()
    found = verify(store)
    assert any(line.startswith(name) or f"/{name}" in line for line in found), found
    assert any("is a link" in line for line in found)
    use(store)
    assert (read_bytes(outside) if outside.is_dir() else outside.read_bytes()) == before


def test_what_a_link_leads_to_is_neither_made_nor_changed(store: Path, tmp_path: Path) -> None:
    victim = tmp_path / "token"
    victim.write_text("a secret, without an end of line")
    (store / "ledger.jsonl").unlink()
    (store / "ledger.jsonl").symlink_to(victim)
    (store / "manifest.json.ctrak-tmp").symlink_to(victim)
    (store / "extra").symlink_to(tmp_path)
    for name in ("ledger.lock", "writer.lock"):
        (store / name).unlink(missing_ok=True)
        (store / name).symlink_to(tmp_path / f"made by {name}")
    assert {line.split(":")[0] for line in verify(store)} >= {
        "extra",
        "manifest.json.ctrak-tmp",
        "ledger.jsonl",
    }
    with pytest.warns(LedgerWarning, match="is a link"):
        QueryLog(store, 0, None).note(
            [{}], [0], [(["a"], [1.0])], dampings=[None], methods=[{}], steps=[1], samples="all"
        )
    use(store)
    assert victim.read_text() == "a secret, without an end of line"
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("made by")]


def test_the_folder_of_a_store_may_be_a_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to(store)
    read_everything(TraceStore(tmp_path / "scratch"))
    Capture(steps=(300, 600)).run(tmp_path / "scratch")
    assert TraceStore(tmp_path / "scratch").verify() == []


@pytest.mark.parametrize(
    "name", ["manifest.json", "samples.h5", f"{FOLDER}/kernel.h5", "ledger.jsonl", "writer.lock"]
)
def test_a_pipe_is_not_waited_for(store: Path, name: str) -> None:
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)
    use(store)
    if name != "writer.lock":
        assert any("is no regular file" in line for line in verify(store))


def table_with(store: Path, change: Callable[[h5py.File], None]) -> None:
    """A hostile sample table that its manifest vouches for."""
    with h5py.File(store / "samples.h5", "r+") as file:
        change(file)
    files = {"samples.h5": FileRecord.of(store / "samples.h5")}
    write_manifest(store, parse_manifest(read_text(store / "manifest.json")).with_files(files))


def column(**options: Any) -> Callable[[h5py.File], None]:
    return lambda file: file["metadata"].create_dataset("x", **options)


def thumbnails(file: h5py.File) -> None:
    del file["thumbnails"]
    shape, chunks = (10, 100_000, 100_000, 3), (1, 512, 512, 3)
    file.create_dataset("thumbnails", shape=shape, dtype="uint8", chunks=chunks, compression="gzip")


def overflowing(file: h5py.File) -> None:
    del file["thumbnails"]
    file.create_dataset(
        "thumbnails", shape=(10, 2**40, 2**40, 3), dtype="uint8", chunks=(1, 1, 1, 3)
    )


def no_metadata(file: h5py.File) -> None:
    del file["metadata"]
    file["metadata"] = [1]


def linked_metadata(file: h5py.File) -> None:
    del file["metadata"]
    file["metadata"] = h5py.ExternalLink("/etc/passwd", "/x")


def one_long_text(file: h5py.File) -> None:
    """Every row of a column points to the same long text: 10,000 rows of 16 bytes that ask for
    gigabytes."""
    texts = ["x" * 200_000, *[""] * 9]
    file["metadata"].create_dataset("x", data=texts, dtype=h5py.string_dtype("utf-8"))


TEXT = h5py.string_dtype("utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (column(shape=(2**40,), dtype=TEXT, chunks=(1024,)), "more than the file holds"),
        (column(shape=(2**29,), dtype=TEXT, chunks=(1024,)), "more than the file holds"),
        (column(shape=(10,), dtype=TEXT, chunks=(10,)), "not one run of texts"),
        (column(shape=(10,), dtype=TEXT), "not one run of texts, or was never written"),
        (column(shape=(10, 2), dtype=TEXT), r"expected texts \(10,\)"),
        (column(shape=(9,), dtype=TEXT), r"expected texts \(10,\)"),
        (column(data=list(range(10))), "expected texts"),
        (column(data=np.array([b"ab"] * 10)), "expected texts"),
        (column(data=[b"\xff"] * 10, dtype=TEXT), "utf-8"),
        (column(data=h5py.Empty("f")), "more than the file holds"),
        (lambda file: file["metadata"].create_group("x"), "not a dataset"),
        (thumbnails, "more than the file holds"),
        (overflowing, "more than the file holds|HDF5 reports"),
        (no_metadata, "metadata is not a group"),
        (linked_metadata, "metadata is not a group"),
    ],
)
def test_shapes_are_checked_before_they_are_read(
    store: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    table_with(store, change)
    with pytest.raises(CorruptStoreError, match=message):
        read_samples(store / "samples.h5")
    assert any("samples.h5" in line for line in verify(store))


def test_many_texts_do_not_share_a_long_one(store: Path) -> None:
    path = store / "samples.h5"
    table_with(store, one_long_text)
    with h5py.File(path) as file:
        offset = file["metadata/x"].id.get_offset()
    pointers = np.memmap(path, np.uint8, "r+", offset, (10, 16))
    assert read_samples(path).metadata["x"][0] == "x" * 200_000
    pointers[:] = pointers[0]
    pointers.flush()
    with pytest.raises(CorruptStoreError, match="longer than the file"):
        read_samples(path)


def test_arrays_beside_the_table_are_bounded_too(store: Path) -> None:
    for name, dataset, dtype in (
        (f"{FOLDER}/kernel.h5", "mean", "f8"),
        ("commitments.h5", "salts", "u1"),
    ):
        with h5py.File(store / name, "r+") as file:
            shape = (2**40,) if dtype == "f8" else (2**40, 32)
            del file[dataset]
            file.create_dataset(dataset, shape=shape, dtype=dtype, chunks=(64, *shape[1:]))
    with pytest.raises(CorruptStoreError, match="more than the file holds"):
        read_kernel(store / FOLDER / "kernel.h5", 10, 6)
    with pytest.raises(CorruptStoreError, match="more than the file holds"):
        read_commitments(store / "commitments.h5", 2**40)
