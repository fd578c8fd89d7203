"""The writer refuses what would make a store say something that is not so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from store_builder import Capture, make_header, make_table, make_traces, read_bytes
from torch import Tensor

from ctrak_lightning.errors import (
    CorruptStoreError,
    DatasetChangedError,
    GradientError,
    StoreError,
    StoreMismatchError,
)
from ctrak_lightning.store import TraceStore, TraceWriter
from ctrak_lightning.store.samples import ChangedMetadataWarning, read_samples
from ctrak_lightning.store.schema import ABSENT
from ctrak_lightning.store.writer import default_shard_rows

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def writer(tmp_path: Path) -> TraceWriter:
    writer = TraceWriter(tmp_path / "store", make_header(), shard_rows=4)
    writer.write_samples(make_table())
    return writer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projection": {"dim": 4096, "seed": 0}},
            r"projection\.dim: the store has 2048, this run 4096",
        ),
        ({"projection": {"dim": 2048}}, r"projection\.seed: the store has 0, this run nothing"),
        (
            {"method": {"name": "concept_trak", "timesteps": [10, 501]}},
            r"method\.timesteps: .*\[10, 500\], .*501\]",
        ),
        ({"method": {}}, r"method\.name: .*; method\.timesteps: "),
        (
            {"model": {"architecture": "b"}},
            r"model\.architecture: the store has 'a1', this run 'b'",
        ),
        ({"dim": 7}, r"(: |; )dim: the store has 6, this run 7"),
        ({"dtype": "float16"}, r"dtype: the store has 'float32', this run 'float16'"),
    ],
)
def test_other_header_names_each_field_with_both_values(
    writer: TraceWriter, changes: dict[str, Any], message: str
) -> None:
    writer.close()
    before = read_bytes(writer.path)
    with pytest.raises(StoreMismatchError, match=message) as caught:
        TraceWriter(writer.path, make_header(**changes))
    assert not isinstance(caught.value, DatasetChangedError)
    assert read_bytes(writer.path) == before


def test_other_dataset_in_the_header(writer: TraceWriter) -> None:
    writer.close()
    with pytest.raises(DatasetChangedError, match=r"dataset\.size: the store has 10, this run 11"):
        TraceWriter(writer.path, make_header(dataset={"size": 11}))


def test_differences_tell_true_from_one_and_absent_from_null() -> None:
    mine = make_header(method={"a": True, "b": None, "c": {"d": 1}, "e": (1, 2)})
    other = make_header(method={"a": 1, "c": {"d": 2}, "e": [1, 2]})
    assert mine.differences(other) == [
        ("method.a", True, 1),
        ("method.b", None, ABSENT),
        ("method.c.d", 1, 2),
    ]
    assert mine.differences(mine) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"lr": NAN}},
        {"method": {"dtype": torch.float32}},
        {"projection": {1: "a"}},
        {"projection": []},
        {"model": {"a": 1}},
        {"dim": 0},
        {"dim": True},
        {"dim": 2.0},
        {"dtype": "int4"},
        {"dtype": None},
    ],
)
def test_header_refuses_what_json_cannot_hold(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="StoreHeader"):
        make_header(**changes)


def test_run_id_is_random_once_and_then_kept(tmp_path: Path) -> None:
    first, second = (TraceWriter(tmp_path / name, make_header()).run_id for name in "ab")
    assert first != second
    assert len(first) == 32
    assert TraceWriter(tmp_path / "a", make_header()).run_id == first
    assert TraceWriter(tmp_path / "a", make_header(), run_id="other").run_id == first


def test_unwritable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="HINT") as caught:
            TraceWriter(path, make_header())
        assert isinstance(caught.value.__cause__, OSError)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    TraceWriter(tmp_path / "store", make_header())
    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(
        StoreError, match=r"manifest\.json cannot be written.*Permission denied.*HINT"
    ) as caught:
        TraceWriter(tmp_path / "store", make_header())
    assert isinstance(caught.value.__cause__, PermissionError)


def test_foreign_files_are_not_mixed_with(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"thesis\.tex.*HINT"):
        TraceWriter(tmp_path, make_header())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "options", [{"shard_rows": 0}, {"shard_rows": 1.5}, {"queue_shards": 0}, {"run_id": ""}]
)
def test_options_are_checked_before_a_folder_is_made(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(StoreError, match=next(iter(options))):
        TraceWriter(tmp_path / "store", make_header(), **options)
    assert not (tmp_path / "store").exists()


def test_changed_samples_are_named(writer: TraceWriter) -> None:
    ids, digests = make_table().sample_ids, make_table().content_sha256
    writer.close()
    again = TraceWriter(writer.path, make_header())
    with pytest.warns(ChangedMetadataWarning, match="'artist' is not given any more.*HINT"):
        again.write_samples(make_table(metadata={}, thumbnails=None))
    assert read_samples(writer.path / "samples.h5").metadata == make_table().metadata
    for table, message in (
        (make_table(sample_ids=["new", *ids[1:]]), r"1 added: 'new'; 1 removed: 'image/000\.png'"),
        (
            make_table(content_sha256=["f" * 64, *digests[1:]]),
            r"1 changed content: 'image/000\.png'",
        ),
        (
            make_table(sample_ids=ids[::-1], content_sha256=digests[::-1]),
            "same samples in another order",
        ),
        (make_table(20), r"10 added: 'image/010\.png', .*'image/014\.png' and 5 more"),
    ):
        with pytest.raises(DatasetChangedError, match=message):
            again.write_samples(table)


def append(writer: TraceWriter, **changes: Any) -> None:
    features, loss = make_traces(10, 6)
    arguments: dict[str, Tensor] = {
        "indices": torch.arange(4, 7),
        "features": features[4:7].clone(),
        "loss": loss[4:7].clone(),
    }
    with writer.begin_checkpoint(300, epoch=3) as checkpoint:
        if checkpoint.rows_done == 0:
            checkpoint.append(torch.arange(4), features[:4], loss[:4])
            checkpoint.flush()
        checkpoint.append(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(3, 5)}, r"features.*\[3, 5\].*\[n, 6\]"),
        ({"features": torch.ones(6)}, "features"),
        ({"features": torch.ones(3, 6).double()}, r"features.*float64.*float32"),
        ({"features": torch.ones(3, 6).half()}, r"features.*float16.*float32"),
        ({"loss": torch.ones(2)}, r"loss.*\[2\].*\[3\]"),
        ({"loss": torch.ones(3, 1)}, "loss"),
        ({"indices": torch.tensor([4, 5])}, "indices"),
        ({"indices": torch.tensor([4, 5, 6], dtype=torch.int32)}, "indices.*int32.*int64"),
        ({"indices": torch.tensor([4, 5, 10])}, r"\[10\] lie outside the sample table.*0 to 9"),
        ({"indices": torch.tensor([4, 5, -1])}, r"\[-1\] lie outside"),
        ({"indices": torch.tensor([4, 5, 5])}, r"more than one trace of 'image/005\.png'"),
        (
            {"indices": torch.tensor([4, 5, 3])},
            r"more than one trace of 'image/003\.png'.*rows_done=4",
        ),
    ],
)
def test_append_refuses_wrong_arrays(
    writer: TraceWriter, changes: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        append(writer, **changes)


def bad_row(row: int, value: float, column: slice = slice(2, 3)) -> Tensor:
    features = make_traces(10, 6)[0][4:7].clone()
    features[row, column] = value
    return features


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"features": bad_row(0, NAN)}, r"features that are not finite: 'image/004\.png'\."),
        ({"features": bad_row(1, -INF)}, r"features that are not finite: 'image/005\.png'\."),
        ({"features": bad_row(2, 0.0, slice(None))}, r"all zero: 'image/006\.png'\."),
        (
            {"features": bad_row(2, 3e38, slice(None))},
            r"norm is beyond float32: 'image/006\.png'\.",
        ),
        (
            {"loss": torch.tensor([0.0, NAN, INF])},
            r"2 of 3.*a loss.*: 'image/005\.png', 'image/006\.png'\.",
        ),
    ],
)
def test_rows_that_are_not_usable_are_named_and_leave_earlier_shards(
    writer: TraceWriter, changes: dict[str, Tensor], names: str
) -> None:
    with pytest.raises(GradientError, match=names):
        append(writer, **changes)
    features, loss = make_traces(10, 6)
    with writer.begin_checkpoint(300, epoch=3) as checkpoint:
        assert checkpoint.rows_done == 4
        checkpoint.append(torch.arange(4, 10), features[4:], loss[4:])
        checkpoint.seal()
    store = TraceStore(writer.path)
    assert store.verify() == []
    torch.testing.assert_close(store.checkpoints[0].features(), features, rtol=1e-6, atol=0)


def test_a_refused_batch_leaves_nothing_behind(writer: TraceWriter) -> None:
    features, loss = make_traces(10, 6)
    checkpoint = writer.begin_checkpoint(300, epoch=3)
    broken = features.clone()
    broken[9, 0] = NAN
    with pytest.raises(GradientError, match="image/009"):
        checkpoint.append(torch.arange(10), broken, loss)
    checkpoint.append(torch.arange(10), features, loss)
    checkpoint.seal()
    torch.testing.assert_close(
        TraceStore(writer.path).checkpoints[0].features(), features, rtol=1e-6, atol=0
    )


def test_at_most_five_samples_are_named(writer: TraceWriter) -> None:
    with pytest.raises(GradientError, match=r"10 of 10.*image/004\.png' and 5 more\."):
        writer.begin_checkpoint(1, epoch=0).append(
            torch.arange(10), torch.zeros(10, 6), torch.zeros(10)
        )


def test_seal_requires_every_sample(writer: TraceWriter) -> None:
    features, loss = make_traces(10, 6)
    checkpoint = writer.begin_checkpoint(300, epoch=3)
    checkpoint.append(torch.arange(7), features[:7], loss[:7])
    with pytest.raises(StoreError, match=r"3 of 10 samples have no trace: 'image/007\.png'"):
        checkpoint.seal()
    checkpoint.flush()
    assert checkpoint.rows_done == 4, "a seal that is refused must not write the rows that are left"
    checkpoint.append(torch.arange(7, 10), features[7:], loss[7:])
    checkpoint.seal()
    assert writer.sealed_steps == [300]
    for call in (
        checkpoint.seal,
        lambda: checkpoint.append(torch.arange(1), features[:1], loss[:1]),
    ):
        with pytest.raises(StoreError, match="checkpoint 300 is sealed"):
            call()
    with pytest.raises(StoreError, match=r"sealed already.*HINT"):
        writer.begin_checkpoint(300, epoch=3)


def test_one_checkpoint_is_open_at_a_time(writer: TraceWriter) -> None:
    features, loss = make_traces(10, 6)
    old = writer.begin_checkpoint(300, epoch=3)
    old.append(torch.arange(3), features[:3], loss[:3])
    new = writer.begin_checkpoint(300, epoch=3)
    with pytest.raises(StoreError, match="is closed"):
        old.append(torch.arange(3, 6), features[3:6], loss[3:6])
    new.append(torch.arange(10), features, loss)
    new.seal()
    assert len(TraceStore(writer.path).checkpoints[0].features()) == 10


def test_continuing_with_another_model_is_refused(writer: TraceWriter) -> None:
    writer.begin_checkpoint(300, epoch=3, learning_rate=0.1)
    for changes in (
        {"epoch": 4, "learning_rate": 0.1},
        {"epoch": 3, "learning_rate": 0.2},
        {"epoch": 3},
    ):
        with pytest.raises(StoreError, match=r"it was begun at epoch 3 with learning rate 0\.1"):
            writer.begin_checkpoint(300, **changes)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (-1, {"epoch": 0}),
        (1, {"epoch": -1}),
        (1.0, {"epoch": 0}),
        (1, {"epoch": 0, "learning_rate": NAN}),
    ],
)
def test_impossible_checkpoints(writer: TraceWriter, step: Any, options: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="begin_checkpoint"):
        writer.begin_checkpoint(step, **options)


def test_checkpoints_need_samples(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="write_samples"):
        TraceWriter(tmp_path, make_header()).begin_checkpoint(1, epoch=0)


def test_discard_after_removes_later_checkpoints_and_their_files(
    tmp_path: Path, capture: Capture
) -> None:
    three = Capture(steps=(300, 600, 900))
    whole = read_bytes(three.run(tmp_path / "whole"))
    three.run(tmp_path / "store")
    writer = three.open(tmp_path / "store")
    late = writer.begin_checkpoint(1200, epoch=12)
    assert writer.discard_after(1200) == []
    assert writer.discard_after(300) == [600, 900, 1200]
    with pytest.raises(StoreError, match="is closed"):
        late.append(torch.arange(1), torch.ones(1, 6), torch.ones(1))
    assert writer.sealed_steps == [300]
    assert sorted(entry.name for entry in (tmp_path / "store").iterdir()) == [
        "checkpoint-00000300",
        "manifest.json",
        "samples.h5",
        "writer.lock",
    ]
    assert TraceStore(tmp_path / "store").verify() == []
    writer.close()
    assert read_bytes(three.run(tmp_path / "store")) == whole
    assert three.open(tmp_path / "store").discard_after(-1) == [300, 600, 900]


def test_a_step_captured_out_of_order_is_listed_in_order(writer: TraceWriter) -> None:
    features, loss = make_traces(10, 6)
    for step in (600, 300):
        with writer.begin_checkpoint(step, epoch=0) as checkpoint:
            checkpoint.append(torch.arange(10), features, loss)
            checkpoint.seal()
    assert writer.sealed_steps == [300, 600]
    assert [checkpoint.step for checkpoint in TraceStore(writer.path).checkpoints] == [300, 600]


def test_writer_refuses_a_damaged_store(tmp_path: Path, capture: Capture) -> None:
    capture.run(tmp_path)
    (tmp_path / "checkpoint-00000300" / "rank0-00001.h5").unlink()
    with pytest.raises(CorruptStoreError, match=r"rank0-00001\.h5 is missing"):
        capture.open(tmp_path)


@pytest.mark.parametrize(
    ("samples", "dim", "dtype", "rows"),
    [
        (10, 4096, "int8", 1024),
        (65_536, 4096, "int8", 1024),
        (200_000, 4096, "int8", 3125),
        (10**6, 4096, "int8", 8192),
        (10**6, 4096, "float32", 2048),
        (10**6, 10**6, "float32", 1024),
    ],
)
def test_shards_grow_with_the_store_up_to_32_mib(
    samples: int, dim: int, dtype: str, rows: int
) -> None:
    assert default_shard_rows(make_header(dim=dim, dtype=dtype), samples) == rows


def test_shards_have_1024_rows_by_default(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, make_header())
    writer.write_samples(make_table(2000))
    with writer.begin_checkpoint(1, epoch=0) as checkpoint:
        checkpoint.append(torch.arange(2000), *make_traces(2000, 6))
        checkpoint.seal()
    assert [len(index) for index, _ in TraceStore(tmp_path).checkpoints[0].shards()] == [1024, 976]
