"""Stores are read in pieces, each byte once, and never held as a whole."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from store_builder import Capture, make_header, make_table

from ctrak_lightning.attribution.scoring import scores_by_damping
from ctrak_lightning.errors import CorruptStoreError
from ctrak_lightning.store import TraceStore, TraceWriter, stored_rows
from ctrak_lightning.store.arrays import RowArray


@pytest.fixture
def store(tmp_path: Path, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> TraceStore:
    monkeypatch.setattr(
        stored_rows, "BLOCK_BYTES", 3 * capture.k * 4
    )  # shards of 4 rows, blocks of 3 and 1
    return TraceStore(capture.run(tmp_path))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ctrak")]


def test_blocks_are_the_shards_in_pieces(store: TraceStore, capture: Capture) -> None:
    order = capture.order(300)
    features, loss = capture.traces(300)
    blocks = []
    for rows in store.checkpoints[0].blocks():
        time.sleep(
            0.05
        )  # the thread has read as far ahead as it will, and must not have touched this block
        blocks.append((rows.index.clone(), rows.features(), rows.loss))
    assert [len(index) for index, _, _ in blocks] == [3, 1, 3, 1, 2]
    assert torch.equal(torch.cat([index for index, _, _ in blocks]), order)
    torch.testing.assert_close(
        torch.cat([rows for _, rows, _ in blocks]), features[order], rtol=1e-6, atol=0
    )
    assert torch.equal(torch.cat([losses for _, _, losses in blocks]), loss[order])


def test_the_reading_thread_ends_with_its_reader(store: TraceStore) -> None:
    blocks = store.checkpoints[0].blocks()
    next(blocks)
    assert readers() != []
    blocks.close()  # type: ignore[attr-defined]
    assert readers() == []
    list(store.checkpoints[0].blocks())
    assert readers() == []


def test_what_the_thread_meets_is_raised_where_blocks_are_used(store: TraceStore) -> None:
    shard = store.path / "checkpoint-00000300/rank0-00001.h5"
    content = shard.read_bytes()
    (values,) = [rows.unit for rows in [store.checkpoints[0].rows_of(Capture().order(300)[4:8])]]
    start = content.index(values.numpy().tobytes())
    shard.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    with pytest.raises(
        CorruptStoreError, match=r"rank0-00001\.h5: features of row 0 are not those"
    ):
        list(store.checkpoints[0].blocks())
    with pytest.raises(
        CorruptStoreError, match=r"rank0-00001\.h5: features of row 0 are not those"
    ):
        list(store.checkpoints[0]._stored.columns())
    assert readers() == []


@pytest.mark.parametrize("samples", [[3], [9, 0, 4, 5, 6], [2, 2, 7], list(range(10))])
def test_rows_of_any_samples_in_any_order(store: TraceStore, samples: list[int]) -> None:
    checkpoint = store.checkpoints[1]
    found = checkpoint.rows_of(torch.tensor(samples))
    assert found.index.tolist() == samples
    assert torch.equal(found.features(), checkpoint.features()[samples])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("k", [8, 21, 64])
def test_columns_side_by_side_are_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, k: int
) -> None:
    monkeypatch.setattr(stored_rows, "_COLUMNS_BYTES", 16 * 4 * 10)
    checkpoint = TraceStore(Capture(k=k, changes={"dtype": dtype}).run(tmp_path)).checkpoints[0]
    parts = list(checkpoint._stored.columns())
    assert [part.shape[1] for part in parts] == [min(16, k - start) for start in range(0, k, 16)]
    assert torch.equal(torch.cat(parts, 1), checkpoint.features())


@pytest.mark.parametrize("k", [6, 21])
def test_sealing_and_scoring_read_every_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    values = 0
    read, read_columns = RowArray.read, RowArray.read_columns

    def counted(
        self: RowArray, start: int, stop: int, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        nonlocal values
        values += (stop - start) * self.shape[1]
        return read(self, start, stop, into)

    def counted_columns(self: RowArray, start: int, stop: int) -> torch.Tensor:
        nonlocal values
        values += (stop - start) * self.shape[0]
        return read_columns(self, start, stop)

    monkeypatch.setattr(RowArray, "read", counted)
    monkeypatch.setattr(RowArray, "read_columns", counted_columns)
    path = Capture(k=k, steps=(300,)).run(tmp_path)
    assert values == 10 * k
    scores_by_damping(torch.ones(7, k), TraceStore(path).checkpoints[0], (0.1, 1.0, None))
    assert values == 2 * 10 * k


MEASURE = """
import sys, torch
from pathlib import Path
from ctrak_lightning.attribution.scoring import scores_by_damping
from ctrak_lightning.store import TraceStore

def peak_mb():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

store = TraceStore(sys.argv[1])
queries = torch.randn(2, store.header.dim)
scores_by_damping(torch.randn(2, 64), TraceStore(sys.argv[2]).checkpoints[0], (1.0,))
before = peak_mb()
scores_by_damping(queries, store.checkpoints[0], (1.0,))
print(peak_mb() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="asks Linux for the peak of a process"
)
def test_a_store_larger_than_the_memory_it_is_read_in(tmp_path: Path) -> None:
    n, k = 2**17, 512  # 64 MiB of int8; 256 as float32, 512 as float64
    block = torch.randn(2**16, k)
    for name, size in (("large", n), ("small", 1024)):
        width = k if name == "large" else 64
        writer = TraceWriter(
            tmp_path / name, make_header(dim=width, dtype="int8"), shard_rows=2**16
        )
        writer.write_samples(make_table(size, thumbnails=None, metadata={}))
        with writer.begin_checkpoint(1, epoch=0) as checkpoint:
            for index in torch.arange(size).split(len(block)):
                checkpoint.append(index, block[: len(index), :width], torch.zeros(len(index)))
            checkpoint.seal()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    # 2 MiB of scores in float64, two blocks of 4 MiB and their int32 products, and the kernel of 2
    # MiB
    assert float(done.stdout) < 48
