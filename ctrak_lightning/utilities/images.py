"""Images in tensors as pictures that a page, a notebook or a logger shows."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor


def picture(pixels: Tensor) -> Image.Image:
    """A float image [3, H, W] in [0, 1], or a uint8 thumbnail [h, w, 3], as a Pillow image."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.detach().nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


def png_uri(pixels: Tensor, longest: int) -> str:
    """The same as a data URI; scaled down if a side is longer than ``longest``."""
    image = picture(pixels)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
