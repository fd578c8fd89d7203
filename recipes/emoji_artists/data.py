"""EmojiArtists: 500 objects drawn by 8 artists, 32x32 RGB on white (licences in
``data/NOTICE``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

DATA = Path(__file__).parent / "data" / "emoji_artists.npz"
NEW_ARTISTS = ("twemoji", "openmoji")
BASE_OBJECTS = 400
NEW_OBJECTS = 64
SPLIT_SEED = 20251
KINDS = ("object", "artist")
METADATA = (*KINDS, "object_token", "artist_token", "owner", "licence", "category", "caption")
Setting = Literal["labelled", "hidden", "mislabelled"]
SETTINGS = ("labelled", "hidden", "mislabelled")
HIDDEN_SHARE, WRONG_SHARE = 1 / 3, 0.1
NO_TOKEN = ""

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
    """The arrays of the data file: ``images`` uint8 [500, 8, 32, 32, 3] and the names along its
    first two axes."""

    images: np.ndarray
    objects: list[str]
    categories: list[str]
    artists: list[str]

    @classmethod
    def load(cls, path: Path = DATA) -> "Emoji":
        with np.load(path) as file:
            names = (file[name].tolist() for name in ("objects", "categories", "artists"))
            return cls(file["images"], *names)

    def split_objects(self) -> tuple[list[str], list[str]]:
        """The 400 objects the base model knows and the 64 that only the fine-tune sees."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.objects))
        names = [self.objects[i] for i in order]
        new = names[BASE_OBJECTS : BASE_OBJECTS + NEW_OBJECTS]
        return sorted(names[:BASE_OBJECTS]), sorted(new)

    def base_artists(self) -> list[str]:
        return [artist for artist in self.artists if artist not in NEW_ARTISTS]


def held_out_artist(index: int, artists: list[str]) -> str:
    """The artist, each in turn, whose drawing of the ``index``-th new object is never shown."""
    return artists[index % len(artists)]


def tokens(pairs: list[tuple[str, str]], setting: Setting) -> list[tuple[str, str]]:
    """What the network is told of each image, as (object, artist); :data:`NO_TOKEN` for nothing.

    - ``labelled``: the truth;
    - ``hidden``: a third of the images of every object never carry its token, and a third of every
      artist's neither;
    - ``mislabelled``: a tenth of all images carry another object's token, a tenth another artist's.

    Raises:
        ValueError: an unknown setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"tokens(setting={setting!r}): expected one of {SETTINGS}.")
    rng = np.random.default_rng(SPLIT_SEED + SETTINGS.index(setting))
    told = [list(pair) for pair in pairs]
    if setting == "hidden":
        for axis in range(len(KINDS)):
            for name in sorted({pair[axis] for pair in pairs}):
                rows = [i for i, pair in enumerate(pairs) if pair[axis] == name]
                for i in rng.choice(rows, int(len(rows) * HIDDEN_SHARE), replace=False):
                    told[i][axis] = NO_TOKEN
    if setting == "mislabelled":
        order = rng.permutation(len(pairs))
        wrong = int(len(pairs) * WRONG_SHARE)
        for axis in range(len(KINDS)):
            names = sorted({pair[axis] for pair in pairs})
            for i in order[axis * wrong : (axis + 1) * wrong].tolist():
                told[i][axis] = str(rng.choice([name for name in names if name != pairs[i][axis]]))
    return [(name, artist) for name, artist in told]


class EmojiPairs(Dataset[dict[str, Any]]):
    """One item per (object, artist) pair: image float [3, 32, 32] in [-1, 1], names, ``sample_id``.

    Args:
        emoji: the data.
        pairs: what each image shows.
        told: what the network is told of each image (see :func:`tokens`); the truth by default.
    """

    def __init__(
        self, emoji: Emoji, pairs: list[tuple[str, str]], told: list[tuple[str, str]] | None = None
    ) -> None:
        self.pairs = pairs
        self.told = pairs if told is None else told
        rows = [emoji.objects.index(name) for name, _ in pairs]
        columns = [emoji.artists.index(name) for _, name in pairs]
        self.categories = [emoji.categories[row] for row in rows]
        pixels = torch.from_numpy(emoji.images[rows, columns]).permute(0, 3, 1, 2)
        self.images = pixels.float().div_(127.5).sub_(1).contiguous()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, artist = self.pairs[index]
        object_token, artist_token = self.told[index]
        return {
            "image": self.images[index],
            "object": name,
            "artist": artist,
            "object_token": object_token,
            "artist_token": artist_token,
            "sample_id": f"{artist}/{name}",
            "owner": artist,
            "licence": LICENCES[artist],
            "category": self.categories[index],
            "caption": f"{object_token or 'something'} by {artist_token or 'somebody'}",
        }


class EmojiArtists(L.LightningDataModule):
    """EmojiArtists in one of two splits.

    Args:
        split: ``"base"`` for the 400 x 6 images of pre-training, ``"new"`` for the fine-tune: 64
            new objects by ``artists``, one artist per object held out.
        artists: of the fine-tune; all eight by default.
        batch_size: images per training batch.
        setting: what the network is told of the training images (see :func:`tokens`).
        kept: positions in the training set to train on; all by default. All are traced.
    """

    def __init__(
        self,
        split: str = "new",
        artists: list[str] | None = None,
        batch_size: int = 32,
        setting: Setting = "labelled",
        kept: list[int] | None = None,
    ) -> None:
        super().__init__()
        if split not in ("base", "new"):
            raise ValueError(f"EmojiArtists(split={split!r}): expected 'base' or 'new'.")
        self.batch_size = batch_size
        self.setting: Setting = setting
        emoji = Emoji.load()
        artists = artists or emoji.artists
        unknown = sorted(set(artists) - set(emoji.artists))
        if unknown:
            raise ValueError(
                f"EmojiArtists(artists={artists}): unknown {unknown}. Known: "
                f"{', '.join(emoji.artists)}."
            )
        base_objects, new_objects = emoji.split_objects()
        self.held_out: list[tuple[str, str]] = []
        if split == "base":
            pairs = [(name, artist) for name in base_objects for artist in emoji.base_artists()]
        else:
            self.held_out = [
                (name, held_out_artist(i, artists)) for i, name in enumerate(new_objects)
            ]
            pairs = [(name, artist) for name in new_objects for artist in artists]
            pairs = [pair for pair in pairs if pair not in set(self.held_out)]
        self.train_set = EmojiPairs(emoji, pairs, tokens(pairs, setting))
        self.kept = list(range(len(pairs))) if kept is None else kept
        self.held_out_set = EmojiPairs(emoji, self.held_out)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        kept = Subset(self.train_set, self.kept)
        return DataLoader(kept, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the training images in their own order."""
        return DataLoader(self.train_set, self.batch_size)
