"""ImageFolder: the DataModule of a folder of images with ``metadata.jsonl``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from recipes.imagefolder import (
    ImageFolderError,
    Row,
    check_images,
    open_image,
    read_rows,
    unreadable,
)


class Images(Dataset[dict[str, Any]]):
    """One item per row: ``image`` float [3, R, R] in [-1, 1], ``sample_id``, ``caption`` and ``class`` where there are any, the
    row's metadata, and what Stable Diffusion XL is told of an image: ``original_size`` (height, width) as in the file, and
    ``crop_top_left`` (top, left) of the cut in the resized image.

    The shortest side is resized to ``R`` pixels, then a square is cut out: the centre, or anywhere.

    Args:
        rows: the images.
        resolution: R.
        random_crop: cut anywhere.
        random_flip: mirror every other image.
    """

    def __init__(
        self, rows: Sequence[Row], resolution: int, *, random_crop: bool = False, random_flip: bool = False
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
            return tuple(int(torch.randint(each + 1, ())) for each in spare)  # type: ignore[return-value]
        return spare[0] // 2, spare[1] // 2


class ImageFolder(L.LightningDataModule):
    """A folder of images with ``metadata.jsonl``. All its columns that are not the caption, the class or the id become the
    samples' metadata (owner, licence, ...).

    Args:
        root: the folder.
        batch_size: images per batch.
        resolution: height and width of the images in pixels; None takes those of the model.
        caption_column, class_column, id_column: see :func:`~recipes.imagefolder.read_rows`.
        random_crop, random_flip: see :class:`Images`; of training alone, traces are of the images as they are.
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
            Path(root), caption_column=caption_column, class_column=class_column, id_column=id_column
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
        return DataLoader(Images(self.rows, self.resolution), self.batch_size, num_workers=self.workers)

    def _resolution_of_the_model(self) -> int:
        trainer: Any = self.trainer
        task: Any = getattr(trainer.lightning_module, "task", None)
        height, width = getattr(task, "resolution", (0, 0))
        if not height or height != width:
            raise ImageFolderError(
                f"ImageFolder(resolution=None): the model's is {height}x{width}, expected a square. HINT: `resolution: 512`."
            )
        return int(height)
