"""ImageFolder: the DataModule of a folder of images with ``metadata.jsonl``, Hugging Face's
imagefolder layout."""

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

FILE = "metadata.jsonl"
OWN = ("image", "sample_id", "caption", "class", "original_size", "crop_top_left")
"""The names that a batch has of its own."""


class ImageFolderError(ValueError):
    """A folder of images, or a line of its ``metadata.jsonl``, is not as it should be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of ``metadata.jsonl``.

    Args:
        line: its number, from 1.
        path: the image's file.
        sample_id: the id that rankings name.
        caption: what the image shows, or None where no column was asked for.
        label: its class, or None where no column was asked for.
        metadata: all other columns, as strings; numbers and lists as JSON writes them, absent
            values as ``""``.
    """

    line: int
    path: Path
    sample_id: str
    caption: str | None = None
    label: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def read_rows(
    root: Path,
    *,
    caption_column: str | None = None,
    class_column: str | None = None,
    id_column: str | None = None,
) -> list[Row]:
    """The lines of ``<root>/metadata.jsonl``, in their order.

    Args:
        root: the folder.
        caption_column: the column of captions, if there are any; Hugging Face's is ``"text"``.
        class_column: the column of classes, if there are any.
        id_column: the column of ids; None takes ``file_name``.

    Raises:
        ImageFolderError: there is no such file; or a line is no JSON object, lacks ``file_name`` or
            a column asked for, names a file that is not there or lies outside the folder, repeats
            an id, or has a column by one of a batch's own names. The message names the line.
    """
    path = root / FILE
    if not path.is_file():
        raise ImageFolderError(
            f'{path}: no such file. Expected a JSON object a line, such as {{"file_name": "a.png", '
            f'"text": "a cat"}}, beside the images it names. HINT: `python -m '
            "recipes.emoji_folder` writes such a folder."
        )
    asked = {"caption": caption_column, "class": class_column, "id": id_column}
    rows: list[Row] = []
    seen: dict[str, int] = {}
    # A caption may hold other breaks, such as U+2028.
    for line, text in enumerate(_text_of(path).split("\n"), 1):
        if text.strip():
            row = _row(root, line, _parsed(path, line, text), asked)
            if row.sample_id in seen:
                raise ImageFolderError(
                    f"{path}, line {line}: the id {row.sample_id!r} is that of line "
                    f"{seen[row.sample_id]}, and scores are by id. HINT: remove the line; or name "
                    "a column of unique ids with `id_column`."
                )
            seen[row.sample_id] = line
            rows.append(row)
    if not rows:
        raise ImageFolderError(f"{path}: no lines. Expected one for each image.")
    names = dict.fromkeys(name for row in rows for name in row.metadata)
    for row in rows:
        row.metadata.update({name: row.metadata.get(name, "") for name in names})
    return rows


def check_images(rows: list[Row], smallest: int) -> None:
    """Looks at every image's head, without decoding it.

    Raises:
        ImageFolderError: one cannot be read, is not RGB, or is smaller than ``smallest`` pixels;
            the message names its line.
    """
    for row in rows:
        with open_image(row) as image:
            if image.mode != "RGB":
                raise ImageFolderError(
                    f"{_where(row)}: {row.path.name} is of mode {image.mode}, expected RGB. HINT: "
                    "convert it, `Image.open(path).convert('RGB').save(path)`; transparent ones "
                    "onto a background of your choice first."
                )
            if min(image.size) < smallest:
                raise ImageFolderError(
                    f"{_where(row)}: {row.path.name} has {image.width}x{image.height} pixels, and "
                    f"the resolution is {smallest}. HINT: leave it out, or train at a lower "
                    "resolution; an enlarged image teaches the model blur."
                )


def open_image(row: Row) -> Image.Image:
    """The image of a row, not decoded yet.

    Raises:
        ImageFolderError: it cannot be read; the message names its line.
    """
    try:
        return Image.open(row.path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise unreadable(row, error) from error


def unreadable(row: Row, error: Exception) -> ImageFolderError:
    """What is said of an image that cannot be read."""
    return ImageFolderError(
        f"{_where(row)}: {row.path.name} cannot be read as an image ({error}). HINT: fetch the "
        "file anew, or remove the line."
    )


class Images(Dataset[dict[str, Any]]):
    """One item per row: ``image`` float [3, R, R] in [-1, 1], ``sample_id``, ``caption`` and
    ``class`` where there are any, the row's metadata, and what Stable Diffusion XL is told of an
    image: ``original_size`` (height, width) as in the file, and ``crop_top_left`` (top, left) of
    the cut in the resized image.

    The shortest side is resized to ``R`` pixels, then a square is cut out: the centre, or anywhere.

    Args:
        rows: the images.
        resolution: R.
        random_crop: cut anywhere.
        random_flip: mirror every other image.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        resolution: int,
        *,
        random_crop: bool = False,
        random_flip: bool = False,
    ) -> None:
        self.rows, self.resolution = list(rows), resolution
        self.random_crop, self.random_flip = random_crop, random_flip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image, size = self._read(row)
        if self.random_flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        corner = self._corner(image)
        top, left = corner
        square = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        named = {"caption": row.caption, "class": row.label}
        return {
            "image": pixels.float().div_(127.5).sub_(1).contiguous(),
            "sample_id": row.sample_id,
            "original_size": torch.tensor(size),
            "crop_top_left": torch.tensor(corner),
            **{name: value for name, value in named.items() if value is not None},
            **row.metadata,
        }

    def _read(self, row: Row) -> tuple[Image.Image, tuple[int, int]]:
        """The image upright and resized, and the size (height, width) that it had."""
        try:
            with open_image(row) as image:
                upright = ImageOps.exif_transpose(image)
                size = (upright.height, upright.width)
                scale = self.resolution / min(size)
                width, height = (max(self.resolution, round(side * scale)) for side in upright.size)
                return upright.resize((width, height), Image.Resampling.LANCZOS), size
        except (OSError, SyntaxError) as error:
            raise unreadable(row, error) from error

    def _corner(self, image: Image.Image) -> tuple[int, int]:
        spare = (image.height - self.resolution, image.width - self.resolution)
        if self.random_crop:
            return int(torch.randint(spare[0] + 1, ())), int(torch.randint(spare[1] + 1, ()))
        return spare[0] // 2, spare[1] // 2


class ImageFolder(L.LightningDataModule):
    """A folder of images with ``metadata.jsonl``. All its columns that are not the caption, the
    class or the id become the samples' metadata (owner, licence, ...).

    Args:
        root: the folder.
        batch_size: images per batch.
        resolution: height and width of the images in pixels; None takes those of the model.
        caption_column, class_column, id_column: see :func:`~recipes.images.read_rows`.
        random_crop, random_flip: see :class:`Images`; of training alone, not of traces.
        workers: processes that read images.

    Raises:
        ImageFolderError: the folder, a line or an image is not as it should be.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 4,
        resolution: int | None = None,
        caption_column: str | None = "text",
        class_column: str | None = None,
        id_column: str | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.rows = read_rows(
            Path(root),
            caption_column=caption_column,
            class_column=class_column,
            id_column=id_column,
        )
        self.batch_size, self.resolution, self.workers = batch_size, resolution, workers
        self.augmentation = {"random_crop": random_crop, "random_flip": random_flip}

    @override
    def setup(self, stage: str) -> None:
        self.resolution = self.resolution or self._resolution_of_the_model()
        check_images(self.rows, self.resolution)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.resolution is not None
        images = Images(self.rows, self.resolution, **self.augmentation)
        return DataLoader(images, self.batch_size, shuffle=True, num_workers=self.workers)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: all images in the order of their lines, without augmentation."""
        assert self.resolution is not None
        return DataLoader(
            Images(self.rows, self.resolution), self.batch_size, num_workers=self.workers
        )

    def _resolution_of_the_model(self) -> int:
        trainer: Any = self.trainer
        task: Any = getattr(trainer.lightning_module, "task", None)
        height, width = getattr(task, "resolution", (0, 0))
        if not height or height != width:
            raise ImageFolderError(
                f"ImageFolder(resolution=None): the model's is {height}x{width}, expected a "
                "square. HINT: `resolution: 512`."
            )
        return int(height)


def _where(row: Row) -> str:
    return f"{FILE}, line {row.line}"


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImageFolderError(f"{path}: no UTF-8 ({error}). HINT: save it as UTF-8.") from error


def _parsed(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ImageFolderError(
            f"{path}, line {line}: no valid JSON ({error}). Expected one object a line."
        ) from error
    if not isinstance(facts, dict):
        raise ImageFolderError(
            f"{path}, line {line}: {type(facts).__name__}, expected a JSON object."
        )
    return facts


def _row(root: Path, line: int, facts: Mapping[str, Any], asked: Mapping[str, str | None]) -> Row:
    where = f"{root / FILE}, line {line}"
    name = facts.get("file_name")
    if not isinstance(name, str) or not name:
        raise ImageFolderError(
            f"{where}: no `file_name`; the line has {sorted(facts)}. Expected the image's path "
            f"under {root}."
        )
    # By its words alone: that a file under the folder is a link to elsewhere is the doing of
    # whoever laid the folder out, as Hugging Face's cache is; the list may come from somebody else.
    clean = posixpath.normpath(name.replace("\\", "/"))
    if posixpath.isabs(clean) or clean.split("/")[0] == ".." or PureWindowsPath(name).is_absolute():
        raise ImageFolderError(
            f"{where}: {name!r} is outside {root}. HINT: move the image into the folder and name "
            "it from there."
        )
    path = root / name
    if not path.is_file():
        raise ImageFolderError(
            f"{where}: {name!r} is not there. HINT: fetch the file, or remove the line."
        )
    values = {}
    for kind, column in asked.items():
        value = None if column is None else facts.get(column)
        if column is not None and (value is None or not str(value).strip()):
            raise ImageFolderError(
                f"{where}: no {kind}; column {column!r} is {value!r} and the line has "
                f"{sorted(facts)}. HINT: `{kind}_column` names the column, and every image needs a "
                "value."
            )
        values[kind] = None if value is None else str(value)
    used = {*asked.values(), None if asked["id"] else "file_name"}
    rest = {key: value for key, value in facts.items() if key not in used}
    taken = sorted(set(rest) & set(OWN))
    if taken:
        raise ImageFolderError(
            f"{where}: columns {taken} have names that a batch has of its own ({', '.join(OWN)}). "
            "HINT: rename them, or, if one is the caption, the class or the id, say so with "
            "`caption_column`, `class_column` or `id_column`."
        )
    return Row(
        line=line,
        path=path,
        sample_id=values["id"] or clean,
        caption=values["caption"],
        label=values["class"],
        metadata={key: _text(value) for key, value in rest.items()},
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
