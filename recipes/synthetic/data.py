"""Synthetic: one coloured shape on white, with combinations of factors that are never shown."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from recipes.synthetic.render import render
from recipes.synthetic.variants import Combo, Variant, caption, find_variant, prompt


class Figures(Dataset[dict[str, Any]]):
    """Rendered images of ``combos`` in turn, so that every prefix is balanced.

    Image ``i`` depends on (seed, i) alone: a larger set begins with the smaller one.

    Args:
        variant: the construction.
        combos: the combinations to show.
        images: how many images.
        size: their height and width in pixels.
        seed: of sizes and positions.
    """

    def __init__(self, variant: Variant, combos: Sequence[Combo], images: int, size: int, seed: int) -> None:
        self.variant = variant
        self.combos = [combos[i % len(combos)] for i in range(images)]
        rendered = [
            render(variant, combo, size, np.random.default_rng([seed, i]))
            for i, combo in enumerate(self.combos)
        ]
        self.pixels = (
            torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).contiguous()
        )  # uint8 [n, 3, H, W]

    def __len__(self) -> int:
        return len(self.combos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        combo = self.combos[index]
        return {
            "image": to_float(self.pixels[index]),
            **combo,
            "sample_id": f"{self.variant.name}-{index:05d}",
            "caption": caption(combo),
            "prompt": prompt(combo),
        }


class Synthetic(L.LightningDataModule):
    """The *Synthetic* benchmark's training images.

    Args:
        variant: ``"paper"``, shape x colour without red triangles, or ``"hard"``, shape x colour x fill with a fifth of the
            combinations held out.
        images: how many; the variant's default if None.
        size: height and width in pixels; the variant's default if None.
        batch_size: images per batch.
        seed: of sizes, positions, and the held-out combinations.
        traced: the first so many images are those to trace; the variant's default if None.

    Raises:
        ValueError: an unknown variant, too few images to show every combination, or more traced images than images.
    """

    def __init__(
        self,
        variant: Literal["paper", "hard"] = "paper",
        images: int | None = None,
        size: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        traced: int | None = None,
    ) -> None:
        super().__init__()
        self.variant = find_variant(variant)
        self.batch_size = batch_size
        self.held_out = self.variant.held_out(seed)
        self.in_distribution = [combo for combo in self.variant.combos() if combo not in self.held_out]
        images = self.variant.images if images is None else images
        self.traced = min(self.variant.traced, images) if traced is None else traced
        if images < len(self.in_distribution) or not 1 <= self.traced <= images:
            raise ValueError(
                f"Synthetic({variant!r}, images={images}, traced={self.traced}): expected at least one image for each of "
                f"the {len(self.in_distribution)} combinations shown, and 1 <= traced <= images. HINT: more images."
            )
        size = self.variant.size if size is None else size
        self.train_set = Figures(self.variant, self.in_distribution, images, size, seed)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the first ``traced`` training images, in their own order."""
        return DataLoader(Subset(self.train_set, range(self.traced)), self.batch_size)


def to_float(pixels: Tensor) -> Tensor:
    """Bytes to floats in [-1, 1], any shape."""
    return pixels.float().div(127.5).sub(1)
