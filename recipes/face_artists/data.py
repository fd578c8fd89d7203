"""FaceArtists: 4,800 faces by three illustrators, put together from hand-drawn parts, 32x32 RGB
(licences in ``data/NOTICE``)."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..pictures import to_float

DATA = Path(__file__).parent / "data" / "face_artists.npz"
SIZE = 32
ATTRIBUTES = ("glasses", "beard", "smile")
VALUES = {1: "yes", 0: "no", -1: ""}
"""Of an attribute; none where the drawings carry no label, as the mouths of notionists do not."""
OWNERS = {
    "lorelei": "Lisa Wischofsky",
    "open-peeps": "Pablo Stanley",
    "notionists": "Zoish",
}
LICENCE = "CC0 1.0"


@dataclass(frozen=True)
class Faces:
    """N faces and what they were put together from.

    Args:
        pixels: uint8 [N, 3, 32, 32].
        sample_ids: ``artist/number``.
        artists: their illustrators.
        attributes: the value of every attribute (:data:`VALUES`).
        parts: the drawings of each face, such as ``{"hair": "variant08"}``; a part that it lacks is
            not there.
    """

    pixels: Tensor
    sample_ids: list[str]
    artists: list[str]
    attributes: list[dict[str, str]]
    parts: list[dict[str, str]]

    @classmethod
    def load(cls, artists: Sequence[str] = tuple(OWNERS), path: Path = DATA) -> "Faces":
        """All faces by these artists, in the order of the file.

        Raises:
            ValueError: an unknown artist.
        """
        if unknown := sorted(set(artists) - set(OWNERS)):
            raise ValueError(
                f"Faces.load(artists={list(artists)}): unknown {unknown}. Known: "
                f"{', '.join(OWNERS)}."
            )
        with np.load(path, allow_pickle=False) as file:
            columns = [file[name].tolist() for name in ATTRIBUTES]
            faces = cls(
                torch.from_numpy(file["images"]).permute(0, 3, 1, 2).contiguous(),
                file["sample_id"].tolist(),
                file["artist"].tolist(),
                [
                    {name: VALUES[value] for name, value in zip(ATTRIBUTES, row, strict=True)}
                    for row in zip(*columns, strict=True)
                ],
                [json.loads(text) for text in file["parts"].tolist()],
            )
        return faces.only([i for i, name in enumerate(faces.artists) if name in artists])

    def __len__(self) -> int:
        return len(self.sample_ids)

    def only(self, rows: Sequence[int]) -> "Faces":
        """Some of the faces, in the order asked."""
        columns = (self.sample_ids, self.artists, self.attributes, self.parts)
        return Faces(
            self.pixels[list(rows)],
            *([column[i] for i in rows] for column in columns),  # type: ignore[arg-type]
        )

    def variants(self, part: str) -> dict[str, list[int]]:
        """The faces that have each drawing of a part, the commonest drawing first."""
        counts = Counter(parts[part] for parts in self.parts if part in parts)
        order = sorted(counts, key=lambda name: (-counts[name], name))
        return {
            name: [i for i, parts in enumerate(self.parts) if parts.get(part) == name]
            for name in order
        }

    def images(self) -> Tensor:
        """In [-1, 1], float [N, 3, 32, 32]."""
        return to_float(self.pixels)


class FaceSet(Dataset[dict[str, Any]]):
    """One item per face: ``image`` [3, 32, 32] in [-1, 1], its attributes, and who drew it."""

    def __init__(self, faces: Faces) -> None:
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> dict[str, Any]:
        artist, attributes = self.faces.artists[index], self.faces.attributes[index]
        said = [
            name if value == "yes" else f"no {name}" for name, value in attributes.items() if value
        ]
        return {
            "image": to_float(self.faces.pixels[index]),
            **attributes,
            "artist": artist,
            "owner": OWNERS[artist],
            "licence": LICENCE,
            "sample_id": self.faces.sample_ids[index],
            "caption": f"{', '.join(said)}, by {artist}",
        }


class FaceArtists(L.LightningDataModule):
    """Faces to train on and to trace.

    Args:
        faces: the training set; all of it is traced.
        batch_size: images per batch.
        kept: positions in the training set to train on; all by default.
    """

    def __init__(self, faces: Faces, batch_size: int = 32, kept: list[int] | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train_set = FaceSet(faces)
        self.kept = list(range(len(faces))) if kept is None else kept

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        kept = Subset(self.train_set, self.kept)
        return DataLoader(kept, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the training faces in their own order."""
        return DataLoader(self.train_set, self.batch_size)
