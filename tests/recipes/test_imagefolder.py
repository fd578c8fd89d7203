"""Folders of images with metadata.jsonl: what is read, refused, and shown to the network."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from recipes import emoji_folder
from recipes.images import FILE, ImageFolder, ImageFolderError, Images, check_images, read_rows

LINES: list[dict[str, Any]] = [
    {"file_name": "b.png", "text": "a cat", "owner": "x", "year": 1999, "artist": "noto"},
    {"file_name": "sub/a.png", "text": "a dog\u2028asleep", "owner": "y", "artist": "twemoji"},
]


def ramp(width: int, height: int) -> Image.Image:
    """Red says the column and green the row of a pixel."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))


def shown(item: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The columns and rows [R, R] that an item shows of a ramp."""
    pixels = ((item["image"] + 1) * 127.5).round().int().numpy()
    return pixels[0], pixels[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    ramp(12, 8).save(tmp_path / "b.png")
    ramp(8, 20).save(tmp_path / "sub" / "a.png")
    write(tmp_path, LINES)
    return tmp_path


def write(folder: Path, lines: list[Any]) -> None:
    text = "\n".join(
        each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in lines
    )
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def test_rows_keep_the_order_the_captions_and_all_other_columns(folder: Path) -> None:
    rows = read_rows(folder, caption_column="text", class_column="artist")
    assert [row.sample_id for row in rows] == ["b.png", "sub/a.png"]
    assert [row.caption for row in rows] == ["a cat", "a dog\u2028asleep"]
    assert [row.label for row in rows] == ["noto", "twemoji"]
    assert [row.metadata for row in rows] == [
        {"owner": "x", "year": "1999"},
        {"owner": "y", "year": ""},
    ]
    by_owner = read_rows(folder, id_column="owner")
    assert [row.sample_id for row in by_owner] == ["x", "y"]
    assert [row.metadata["file_name"] for row in by_owner] == ["b.png", "sub/a.png"]


def test_a_mark_at_the_start_and_empty_lines_do_not_matter(folder: Path) -> None:
    plain = read_rows(folder)
    (folder / FILE).write_bytes(b"\xef\xbb\xbf" + (folder / FILE).read_bytes() + b"\r\n\n")
    assert read_rows(folder) == plain


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", r"metadata.jsonl, line 2: no valid JSON"),
        ("[1]", r"line 2: list, expected a JSON object"),
        ({"text": "a dog"}, r"line 2: no `file_name`; the line has \['text'\]"),
        ({"file_name": 3, "text": "a dog"}, r"line 2: no `file_name`"),
        ({"file_name": "c.png", "text": "a dog"}, r"line 2: 'c.png' is not there. HINT"),
        ({"file_name": "sub", "text": "a dog"}, r"line 2: 'sub' is not there"),
        ({"file_name": "../b.png", "text": "a dog"}, r"line 2: '../b.png' is outside .*HINT"),
        (
            {"file_name": "sub/../../x.png", "text": "a dog"},
            r"line 2: 'sub/../../x.png' is outside",
        ),
        ({"file_name": "..\\b.png", "text": "a dog"}, r"line 2: .* is outside"),
        ({"file_name": "/etc/hostname", "text": "a dog"}, r"line 2: '/etc/hostname' is outside"),
        ({"file_name": "C:\\b.png", "text": "a dog"}, r"line 2: .* is outside"),
        ({"file_name": "b.png", "text": "a dog"}, r"line 2: the id 'b.png' is that of line 1"),
        ({"file_name": "./b.png", "text": "a dog"}, r"line 2: the id 'b.png' is that of line 1"),
        (
            {"file_name": "sub/a.png"},
            r"line 2: no caption; column 'text' is None.*`caption_column`",
        ),
        ({"file_name": "sub/a.png", "text": "  "}, r"line 2: no caption; column 'text' is '  '"),
        (
            {"file_name": "sub/a.png", "text": "a", "image": "b"},
            r"line 2: columns \['image'\] have names that a batch",
        ),
        ({"file_name": "sub/a.png", "text": "a", "caption": "b"}, r"line 2: columns \['caption'\]"),
    ],
)
def test_a_line_that_is_not_as_it_should_be_is_named(
    folder: Path, second: Any, message: str
) -> None:
    write(folder, [LINES[0], second])
    with pytest.raises(ImageFolderError, match=message):
        read_rows(folder, caption_column="text")


def test_folders_without_a_list_or_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ImageFolderError, match="metadata.jsonl: no such file.*HINT: `python -m recipes"
    ):
        read_rows(tmp_path)
    (tmp_path / FILE).write_text("\n")
    with pytest.raises(ImageFolderError, match="no lines"):
        read_rows(tmp_path)
    (tmp_path / FILE).write_bytes(b'{"file_name": "\xff"}')
    with pytest.raises(ImageFolderError, match="no UTF-8"):
        read_rows(tmp_path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    captions=st.tuples(*[st.text(min_size=1).filter(str.strip)] * 2),
    owners=st.tuples(*[st.text()] * 2),
    ascii_only=st.booleans(),
)
def test_any_caption_and_owner_is_read_as_it_was_written(
    folder: Path, captions: tuple[str, str], owners: tuple[str, str], ascii_only: bool
) -> None:
    lines = [
        {"file_name": line["file_name"], "text": caption, "owner": owner}
        for line, caption, owner in zip(LINES, captions, owners, strict=True)
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=ascii_only) for line in lines)
    (folder / FILE).write_bytes(text.encode("utf-8"))
    rows = read_rows(folder, caption_column="text")
    assert tuple(row.caption for row in rows) == captions
    assert tuple(row.metadata["owner"] for row in rows) == owners


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.lists(st.sampled_from(["..", ".", "/", "\\", "sub", "a.png", "b.png"]), min_size=1).map(
        "".join
    )
)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    write(folder, [{"file_name": name}])
    try:
        (row,) = read_rows(folder)
    except ImageFolderError:
        return
    assert row.path.resolve().is_relative_to(folder.resolve())
    assert row.path.is_file()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_are_refused(folder: Path, mode: str) -> None:
    name = "sub/a.tif" if mode == "CMYK" else "sub/a.png"
    ramp(8, 20).convert(mode).save(folder / name)
    write(folder, [LINES[0], LINES[1] | {"file_name": name}])
    with pytest.raises(
        ImageFolderError, match=f"metadata.jsonl, line 2: .* is of mode {mode}, expected RGB"
    ):
        check_images(read_rows(folder), 8)


def test_small_and_broken_images_are_refused(folder: Path) -> None:
    check_images(read_rows(folder), 8)
    with pytest.raises(
        ImageFolderError, match="line 1: b.png has 12x8 pixels, and the resolution is 9"
    ):
        check_images(read_rows(folder), 9)
    (folder / "sub" / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageFolderError, match="line 2: a.png cannot be read as an image.*HINT"):
        check_images(read_rows(folder), 8)


def test_an_image_that_breaks_off_is_named_when_it_is_read(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = folder / "sub" / "a.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    rows = read_rows(folder)
    check_images(rows, 8)  # its head is whole
    with pytest.raises(ImageFolderError, match="line 2: a.png cannot be read as an image"):
        Images(rows, 8)[1]


def test_the_centre_is_cut_and_the_sizes_are_told(folder: Path) -> None:
    wide, tall = (Images(read_rows(folder), 8)[i] for i in range(2))
    columns, rows = shown(wide)
    assert (columns == np.arange(2, 10)).all()
    assert (rows == np.arange(8)[:, None]).all()
    assert wide["original_size"].tolist() == [8, 12]  # height, width
    assert wide["crop_top_left"].tolist() == [0, 2]
    assert tall["original_size"].tolist() == [20, 8]
    assert tall["crop_top_left"].tolist() == [6, 0]
    assert "caption" not in tall
    assert "class" not in tall
    assert (tall["sample_id"], tall["owner"]) == ("sub/a.png", "y")


def test_the_shortest_side_is_resized(folder: Path) -> None:
    ramp(60, 40).save(folder / "b.png")
    item = Images(read_rows(folder), 10)[0]
    assert item["image"].shape == (3, 10, 10)
    assert item["crop_top_left"].tolist() == [0, 2]  # of 15 x 10
    columns, rows = shown(item)
    # Four pixels become one: the middle of the j-th is 4 j + 1.5, and two of them were cut.
    assert abs(columns[5] - (4 * (np.arange(10) + 2) + 1.5)).max() <= 1
    assert abs(rows[:, 5] - (4 * np.arange(10) + 1.5)).max() <= 1


def test_images_are_turned_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    ramp(12, 8).save(folder / "b.png", exif=exif)
    item = Images(read_rows(folder), 8)[0]
    assert item["original_size"].tolist() == [12, 8]
    assert item["crop_top_left"].tolist() == [2, 0]
    columns, rows = shown(item)
    assert (columns == np.arange(2, 10)[:, None]).all()
    assert (rows == np.arange(8)[::-1]).all()


def test_training_alone_sees_other_cuts_and_mirrors(folder: Path) -> None:
    rows = read_rows(folder)
    images = Images(rows, 8, random_crop=True, random_flip=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        item = images[0]
        columns, _ = shown(item)
        left = int(item["crop_top_left"][1])
        mirrored = bool(columns[0, 0] > columns[0, -1])
        # The place of the cut is that in the image as it is shown, mirrored or not.
        expected = 11 - left - np.arange(8) if mirrored else left + np.arange(8)
        assert (columns[0] == expected).all()
        seen.add((left, mirrored))
    assert seen == {(left, mirrored) for left in range(5) for mirrored in (False, True)}

    data = ImageFolder(str(folder), batch_size=2, resolution=8, random_crop=True, random_flip=True)
    data.setup("fit")
    (traced,) = data.trace_dataloader()
    plain = Images(data.rows, 8)
    assert traced["sample_id"] == ["b.png", "sub/a.png"]
    assert torch.equal(traced["image"], torch.stack([plain[0]["image"], plain[1]["image"]]))
    assert traced["caption"] == ["a cat", "a dog\u2028asleep"]
    different = [
        not torch.equal(next(iter(data.train_dataloader()))["image"], traced["image"])
        for _ in range(8)
    ]
    assert any(different)


def test_the_resolution_is_the_models(folder: Path) -> None:
    def attached(resolution: tuple[int, int] | None) -> ImageFolder:
        data = ImageFolder(str(folder))
        task = None if resolution is None else SimpleNamespace(resolution=resolution)
        trainer: Any = SimpleNamespace(lightning_module=SimpleNamespace(task=task))
        data.trainer = trainer
        return data

    data = attached((6, 6))
    data.setup("fit")
    assert next(iter(data.trace_dataloader()))["image"].shape == (2, 3, 6, 6)
    with pytest.raises(ImageFolderError, match="the resolution is 16"):
        attached((16, 16)).setup("fit")
    for other in ((8, 6), None):
        with pytest.raises(ImageFolderError, match="expected a square. HINT: `resolution: 512`"):
            attached(other).setup("fit")


def test_the_emoji_folder_holds_the_drawings_their_captions_and_owners(tmp_path: Path) -> None:
    count = emoji_folder.write(tmp_path, objects=3, artists=["noto", "twemoji"])
    rows = read_rows(tmp_path, caption_column="text", class_column="artist")
    assert len(rows) == count == 3  # of six drawings, one of each object is held out
    check_images(rows, 32)
    angry = next(row for row in rows if row.sample_id == "noto/angry-face.png")
    assert (angry.caption, angry.label) == ("angry face by noto", "noto")
    assert angry.metadata["owner"] == "noto"
    assert angry.metadata["licence"] == "Apache-2.0 (Google)"
    drawings = emoji_folder.EmojiArtists("new", ["noto", "twemoji"]).train_set
    item = drawings[drawings.pairs.index(("angry-face", "noto"))]
    assert torch.allclose(Images(rows, 32)[rows.index(angry)]["image"], item["image"], atol=1e-6)
