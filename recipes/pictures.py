"""Pictures that the recipes write."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def image_grid(path: Path, images: Tensor, columns: int, scale: int = 2) -> None:
    """Writes images [n, 3, H, W] in [0, 1] as one PNG, row by row."""
    pixels = to_uint8(images)
    blank = np.full_like(pixels[:1], 255)
    pixels = np.concatenate([pixels, *[blank] * (-len(pixels) % columns)])
    rows = [
        np.concatenate(list(pixels[i : i + columns]), axis=1)
        for i in range(0, len(pixels), columns)
    ]
    grid = Image.fromarray(np.concatenate(rows, axis=0))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [n, 3, h, w] in [0, 1] as uint8 [n, h, w, 3]."""
    array: np.ndarray = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return array


def to_float(pixels: Tensor) -> Tensor:
    """Bytes to floats in [-1, 1], any shape."""
    return pixels.float().div(127.5).sub(1)


def read_square(path: Path, size: int) -> Tensor:
    """An image file as uint8 [3, size, size]: its centre square, resized.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # lets JPEG decode at a fraction of its size
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such image. HINT: unpack the data set anew, or name another root."
        ) from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}). HINT: fetch the file anew."
        ) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
