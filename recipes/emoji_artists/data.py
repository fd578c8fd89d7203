"""EmojiArtists: 500 objects drawn by 8 artists, 32x32 RGB on white (licences in ``data/NOTICE``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DATA = Path(__file__).parent / "data" / "emoji_artists.npz"
NEW_ARTISTS = ("twemoji", "openmoji")
BASE_OBJECTS = 400
NEW_OBJECTS = 64
SPLIT_SEED = 20251
METADATA = ("object", "artist", "owner", "licence", "category", "caption")

LICENCES = {
    "noto": "Apache-2.0 (Google)",
    "noto-v1": "Apache-2.0 (Google)",
    "twemoji": "CC BY 4.0 (Twitter)",
    "openmoji": "CC BY-SA 4.0 (OpenMoji)",
    "fluent-emoji-flat": "MIT (Microsoft)",
    "fluent-emoji-high-contrast": "MIT (Microsoft)",
    "emojione": "CC BY 4.0 (JoyPixels)",
    "emojione-monotone": "CC BY 4.0 (JoyPixels)",
}


@dataclass(frozen=True)
class Emoji:
    """The arrays of the data file: ``images`` uint8 [500, 8, 32, 32, 3] and the names along its first two axes."""

    images: np.ndarray
    objects: list[str]
    categories: list[str]
    artists: list[str]

    @classmethod
    def load(cls, path: Path = DATA) -> "Emoji":
        with np.load(path) as file:
            return cls(
                file["images"],
                file["objects"].tolist(),
                file["categories"].tolist(),
                file["artists"].tolist(),
            )

    def split_objects(self) -> tuple[list[str], list[str]]:
        """The 400 objects the base model knows and the 64 that only the fine-tune sees; 36 stay untouched."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.objects))
        names = [self.objects[i] for i in order]
        return sorted(names[:BASE_OBJECTS]), sorted(names[BASE_OBJECTS : BASE_OBJECTS + NEW_OBJECTS])

    def base_artists(self) -> list[str]:
        return [artist for artist in self.artists if artist not in NEW_ARTISTS]


def held_out_artist(index: int, artists: list[str]) -> str:
    """The artist whose drawing of the ``index``-th new object is never shown: each artist in turn."""
    return artists[index % len(artists)]


class EmojiPairs(Dataset[dict[str, Any]]):
    """One item per (object, artist) pair: image float [3, 32, 32] in [-1, 1], its names, and ``sample_id``."""

    def __init__(self, emoji: Emoji, pairs: list[tuple[str, str]]) -> None:
        self.pairs = pairs
        rows = [emoji.objects.index(name) for name, _ in pairs]
        columns = [emoji.artists.index(name) for _, name in pairs]
        self.categories = [emoji.categories[row] for row in rows]
        pixels = torch.from_numpy(emoji.images[rows, columns]).permute(0, 3, 1, 2)
        self.images = pixels.float().div_(127.5).sub_(1).contiguous()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, artist = self.pairs[index]
        return {
            "image": self.images[index],
            "object": name,
            "artist": artist,
            "sample_id": f"{artist}/{name}",
            "owner": artist,
            "licence": LICENCES[artist],
            "category": self.categories[index],
            "caption": f"{name} by {artist}",
        }


class EmojiArtists(L.LightningDataModule):
    """EmojiArtists in one of two splits.

    Args:
        split: ``"base"`` for the 400 x 6 images of pre-training, ``"new"`` for the fine-tune: 64 new objects by
            ``artists``, one artist per object held out.
        artists: of the fine-tune; all eight by default.
        batch_size: images per training batch.
    """

    def __init__(self, split: str = "new", artists: list[str] | None = None, batch_size: int = 32) -> None:
        super().__init__()
        if split not in ("base", "new"):
            raise ValueError(f"EmojiArtists(split={split!r}): expected 'base' or 'new'.")
        self.batch_size = batch_size
        emoji = Emoji.load()
        artists = artists or emoji.artists
        unknown = sorted(set(artists) - set(emoji.artists))
        if unknown:
            raise ValueError(
                f"EmojiArtists(artists={artists}): unknown {unknown}. Known: {', '.join(emoji.artists)}."
            )
        base_objects, new_objects = emoji.split_objects()
        self.held_out: list[tuple[str, str]] = []
        if split == "base":
            pairs = [(name, artist) for name in base_objects for artist in emoji.base_artists()]
        else:
            self.held_out = [(name, held_out_artist(i, artists)) for i, name in enumerate(new_objects)]
            pairs = [(name, artist) for name in new_objects for artist in artists]
            pairs = [pair for pair in pairs if pair not in set(self.held_out)]
        self.train_set = EmojiPairs(emoji, pairs)
        self.held_out_set = EmojiPairs(emoji, self.held_out)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the training images in their own order."""
        return DataLoader(self.train_set, self.batch_size)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [n, 3, h, w] in [0, 1] as uint8 [n, h, w, 3]."""
    array: np.ndarray = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return array
