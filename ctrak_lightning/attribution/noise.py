"""Whether a generated image is noise, told by how its neighbouring pixels go together beside those
of the training images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOOKED_AT = 256
"""Training images, evenly spaced over the data set, at most."""


def neighbours(images: Tensor) -> Tensor:
    """Correlation of neighbouring pixels [B] of images [B, C, H, W]: near 0 of noise, 1 of a flat
    image."""
    centred = images.double() - images.double().mean((2, 3), keepdim=True)
    pairs = [(centred[..., :-1], centred[..., 1:]), (centred[..., :-1, :], centred[..., 1:, :])]
    products = torch.stack([(a * b).flatten(1).sum(1) for a, b in pairs]).sum(0)
    sizes = torch.stack([(a.square() + b.square()).flatten(1).sum(1) / 2 for a, b in pairs]).sum(0)
    return torch.where(sizes > 0, products / sizes.clamp(min=torch.finfo(sizes.dtype).tiny), 1.0)


def beside(image: Tensor, thumbnails: Tensor) -> tuple[float, float]:
    """The correlation of an image's neighbouring pixels at the size of the thumbnails, and the 1 %
    quantile of theirs.

    Args:
        image: [3, H, W].
        thumbnails: uint8 [N, h, w, 3].
    """
    total = len(thumbnails)
    count = min(LOOKED_AT, total)
    rows = torch.tensor([i * total // count for i in range(count)])
    training = thumbnails[rows].permute(0, 3, 1, 2).float()
    own = F.interpolate(image.detach().cpu().float().unsqueeze(0), training.shape[-2:], mode="area")
    return float(neighbours(own)), float(neighbours(training).quantile(0.01))
