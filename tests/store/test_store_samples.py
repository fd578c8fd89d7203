"""Sample ids and metadata are any text, and come back as they were."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import Capture, make_table, read_bytes

from ctrak_lightning.errors import StoreError
from ctrak_lightning.store import ChangedMetadataWarning, SampleTable
from ctrak_lightning.store.samples import count_samples, read_samples, write_samples

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
IDS = st.lists(
    TEXT | st.sampled_from(["", ".", "..", "a/b", "/etc/passwd", "ä\n", "🎨"]),
    min_size=1,
    unique=True,
)
COLUMNS = st.sampled_from([".", "..", "a/b", "%2F", "%", "/", "licence", "é"]) | TEXT.filter(bool)


@settings(max_examples=80)
@given(data=st.data())
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ids = data.draw(IDS)
    column = st.lists(TEXT, min_size=len(ids), max_size=len(ids))
    table = SampleTable(
        ids, data.draw(column), data.draw(st.dictionaries(COLUMNS, column, max_size=3))
    )
    path = tmp_path_factory.mktemp("samples") / "samples.h5"
    write_samples(path, table)
    stored = read_samples(path)
    assert (stored.sample_ids, stored.content_sha256) == (table.sample_ids, table.content_sha256)
    assert stored.metadata == table.metadata
    assert stored.thumbnails is None
    assert stored.fingerprint() == table.fingerprint()
    assert count_samples(path) == len(stored) == len(ids)


def test_thumbnails_and_records(tmp_path: Path) -> None:
    table = make_table()
    write_samples(tmp_path / "samples.h5", table)
    stored = read_samples(tmp_path / "samples.h5")
    assert stored.thumbnails is not None
    assert table.thumbnails is not None
    assert torch.equal(stored.thumbnails, table.thumbnails)
    assert stored.record(3) == {
        "index": 3,
        "sample_id": "image/003.png",
        "content_sha256": f"{3:064x}",
        "metadata": {"artist": "ann", "licence/url": ""},
    }
    for position in (-1, 10):
        with pytest.raises(IndexError, match="0 to 9"):
            stored.record(position)


def test_some_samples_are_read_without_the_others(tmp_path: Path) -> None:
    table = make_table()
    write_samples(tmp_path / "samples.h5", table)
    some = read_samples(tmp_path / "samples.h5", [2, 3, 7])
    assert some.sample_ids == [table.sample_ids[i] for i in (2, 3, 7)]
    assert some.content_sha256 == [table.content_sha256[i] for i in (2, 3, 7)]
    assert some.metadata == {
        name: [values[i] for i in (2, 3, 7)] for name, values in table.metadata.items()
    }
    assert some.thumbnails is not None
    assert table.thumbnails is not None
    assert torch.equal(some.thumbnails, table.thumbnails[[2, 3, 7]])


def test_fingerprint_depends_on_ids_their_order_and_their_ends() -> None:
    prints = {
        SampleTable(ids, [""] * len(ids)).fingerprint()
        for ids in (["a", "b"], ["b", "a"], ["ab"], ["", "ab"])
    }
    assert len(prints) == 4
    assert make_table(metadata={}).fingerprint() == make_table().fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_ids": []}, "at least one sample"),
        ({"sample_ids": ["a", "b", "a", "b"]}, "2 sample ids occur more than once: 'a', 'b'"),
        ({"sample_ids": ["a", "b", "c", "d\0"]}, r"sample_ids\[3\].*NUL"),
        ({"sample_ids": ["a", "b", "c", "\ud800"]}, r"sample_ids\[3\].*not valid Unicode"),
        ({"sample_ids": ["a", "b", "c", 4]}, r"sample_ids\[3\] is 4, expected a str"),
        ({"sample_ids": "abcd"}, "expected a list of str"),
        ({"content_sha256": ["", ""]}, "content_sha256 has 2 values for 4 samples"),
        ({"metadata": {"owner": ["a"]}}, r"metadata\['owner'\] has 1 values for 4"),
        ({"metadata": {"owner": ["a", "b", "c", None]}}, r"metadata\['owner'\]\[3\] is None"),
        ({"metadata": {"": ["a"] * 4}}, "not empty"),
        ({"metadata": {"a\0": ["a"] * 4}}, "NUL"),
        ({"thumbnails": torch.zeros(4, 2, 2, 3)}, r"expected uint8 \[4, h, w, 3\]"),
        (
            {"thumbnails": torch.zeros(3, 2, 2, 3, dtype=torch.uint8)},
            r"expected uint8 \[4, h, w, 3\]",
        ),
        (
            {"thumbnails": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)},
            r"expected uint8 \[4, h, w, 3\]",
        ),
        (
            {"thumbnails": torch.zeros(4, 0, 2, 3, dtype=torch.uint8)},
            r"expected uint8 \[4, h, w, 3\]",
        ),
    ],
)
def test_tables_that_cannot_be_stored(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        make_table(4, **changes)


def test_metadata_that_changed_is_told_and_not_taken(tmp_path: Path) -> None:
    table = make_table()
    columns: dict[str, list[str]] = {**table.metadata, "owner": ["anna"] * 10}
    stored = SampleTable(table.sample_ids, table.content_sha256, columns)
    with Capture().open(tmp_path) as writer:
        writer.write_samples(stored)
    before = read_bytes(tmp_path)
    # Thumbnails, and the order of the columns, may be others.
    with warnings.catch_warnings(), Capture().open(tmp_path) as writer:
        warnings.simplefilter("error")
        writer.write_samples(
            SampleTable(*table_of(table, dict(reversed(columns.items()))), table.thumbnails)
        )
    now = {
        "artist": columns["artist"],
        "owner": ["anna"] * 7 + ["bert\x1b"] * 3,
        "caption": [""] * 10,
    }
    told = (
        r"\(column 'caption' is new; column 'licence/url' is not given any more; column 'owner' differs for 3 of 10 samples, "
        r"such as 'image/007\.png': recorded 'anna', now 'bert\\x1b'\)\. The store keeps what it recorded.*HINT: .*new folder"
    )
    with (
        Capture().open(tmp_path) as writer,
        pytest.warns(ChangedMetadataWarning, match=told) as seen,
    ):
        writer.write_samples(SampleTable(*table_of(table, now)))
    assert [Path(warning.filename).name for warning in seen] == [Path(__file__).name]
    assert read_bytes(tmp_path) == before


def table_of(
    table: SampleTable, columns: dict[str, list[str]]
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    return table.sample_ids, table.content_sha256, columns
