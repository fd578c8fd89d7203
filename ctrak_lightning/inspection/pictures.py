"""Pictures of samples, at the size that a panel needs."""

import torch
from PIL import Image
from torch import Tensor


def picture(pixels: Tensor) -> Image.Image:
    """A float image [3, H, W] in [0, 1], or a uint8 thumbnail [h, w, 3], as a Pillow image."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with no side longer than ``side``: enlarged by a whole factor without
    interpolation, so that every pixel stays a square of one colour, or reduced smoothly."""
    longest = max(image.size)
    if longest > side:
        size = tuple(max(1, round(length * side / longest)) for length in image.size)
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = side // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def squares(thumbnails: Tensor) -> Tensor:
    """Thumbnails uint8 [n, h, w, 3] centred on white squares [n, s, s, 3], with s the longer
    side."""
    n, height, width, channels = thumbnails.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = torch.full((n, side, side, channels), 255, dtype=torch.uint8)
    padded[:, top : top + height, left : left + width] = thumbnails
    return padded
