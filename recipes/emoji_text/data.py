"""EmojiArtists with captions."""

from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset, Subset

from ..emoji_artists.data import EmojiArtists, EmojiPairs
from .captions import BOTH, caption

METADATA = ("object", "artist", "owner", "licence", "category")


class CaptionedEmoji(Dataset[dict[str, Any]]):
    """Image [3, 32, 32] in [-1, 1], ``caption``, ``sample_id`` and facts, as DiffusersTask expects
    them. Every image has one caption; their wordings take turns."""

    def __init__(self, pairs: EmojiPairs) -> None:
        self.source = pairs
        self.pairs = pairs.pairs
        self.images = pairs.images
        objects, artists = (sorted(set(names)) for names in zip(*self.pairs, strict=True))
        # A Latin square, so that no artist and no object has a wording of its own.
        self.captions = [
            caption(BOTH[(objects.index(name) + artists.index(artist)) % len(BOTH)], name, artist)
            for name, artist in self.pairs
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[index]
        facts = {name: item[name] for name in METADATA}
        return {
            "image": item["image"],
            "caption": self.captions[index],
            "sample_id": item["sample_id"],
            **facts,
        }


class EmojiCaptions(L.LightningDataModule):
    """The fine-tune's images with captions: 64 new objects by ``artists`` but one each.

    Args:
        artists: all eight by default.
        batch_size: images per training batch.
        kept: positions in the training set to train on; all by default. All are traced.
    """

    def __init__(
        self, artists: list[str] | None = None, batch_size: int = 32, kept: list[int] | None = None
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        source = EmojiArtists("new", artists)
        self.held_out = source.held_out
        self.held_out_images = source.held_out_set.images
        self.train_set = CaptionedEmoji(source.train_set)
        self.kept = list(range(len(self.train_set))) if kept is None else kept

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            Subset(self.train_set, self.kept), self.batch_size, shuffle=True, drop_last=True
        )

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the training images in their own order."""
        return DataLoader(self.train_set, self.batch_size)
