"""CelebA-HQ with the attributes of CelebAMask-HQ: three binary attributes as factors, one triple of their values held out."""

import difflib
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from recipes.pictures import read_square
from recipes.synthetic.data import to_float

ANNOTATIONS = "CelebAMask-HQ-attribute-anno.txt"
IMAGES = "CelebA-HQ-img"
LAYOUT = f"expected <root>/{ANNOTATIONS} and <root>/{IMAGES}/0.jpg, 1.jpg, ..., as CelebAMask-HQ is published"
SUFFIXES = (".jpg", ".jpeg", ".png")
VALUES = ("no", "yes")
ATTRIBUTES = ("Male", "Smiling", "Eyeglasses")

Combo = dict[str, str]


@dataclass(frozen=True, slots=True)
class Annotations:
    """An attribute list: ``names`` of the A attributes, ``files`` of the N images, ``values`` bool [N, A]."""

    names: list[str]
    files: list[str]
    values: Tensor

    def columns(self, attributes: Sequence[str]) -> list[int]:
        """The positions of some attributes.

        Raises:
            ValueError: one is unknown; the message lists the known ones, the nearest first.
        """
        for name in attributes:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=3)
                known = near + [other for other in self.names if other not in near]
                raise ValueError(f"Unknown attribute {name!r}. Known: {', '.join(known)}.")
        return [self.names.index(name) for name in attributes]


def read_annotations(path: Path) -> Annotations:
    """Reads an attribute list: the number of images, the attributes' names, then ``0.jpg  -1 1 ...`` for every image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of that form, or there are fewer or more images than the first line says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {LAYOUT}. HINT: --root is the folder that holds it.")
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 3 or len(lines[0]) != 1 or not lines[0][0].isdigit():
        raise ValueError(
            f"{path}: expected the number of images in the first line, the attributes' names in the second, then a line for "
            "each image."
        )
    names, rows = lines[1], lines[2:]
    for number, row in enumerate(rows):
        if len(row) != 1 + len(names) or not set(row[1:]) <= {"1", "-1"}:
            raise ValueError(
                f"{path}: image line {number + 1} ({row[0]!r}) has {len(row) - 1} values, expected {len(names)} values of 1 "
                "or -1. HINT: fetch the file anew."
            )
    files = [row[0] for row in rows]
    if len(rows) != int(lines[0][0]) or len(set(files)) != len(files):
        raise ValueError(
            f"{path}: {len(rows)} image lines with {len(set(files))} different names, and the first line says {lines[0][0]}. "
            "HINT: fetch the file anew."
        )
    return Annotations(names, files, torch.tensor([[value == "1" for value in row[1:]] for row in rows]))


def find_images(folder: Path, files: Sequence[str]) -> list[Path]:
    """The file of each annotated image: of that very name, or with that number and another padding or suffix (resized
    copies of the data set have names such as ``00000.png``).

    Raises:
        FileNotFoundError: the folder or some of the images are not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {LAYOUT}. HINT: --images names another folder.")
    present = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    by_name = {path.name: path for path in present}
    by_number = {_number(path.name): path for path in present}
    found = [by_name.get(name) or by_number.get(_number(name)) for name in files]
    missing = [name for name, path in zip(files, found, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(files)} annotated images are missing, the first {missing[:3]}; {LAYOUT}."
        )
    return [path for path in found if path is not None]


def read_images(paths: Sequence[Path], size: int, cache: Path | None = None) -> Tensor:
    """Images as uint8 [N, 3, size, size]; with ``cache``, a safetensors file that is read if it is of these very files."""
    facts = [f"{path} {path.stat().st_size}" for path in paths]
    key = hashlib.sha256("\n".join([str(size), *facts]).encode()).hexdigest()
    if cache is not None and cache.exists():
        with safe_open(cache, "pt") as file:
            if file.metadata()["key"] == key:
                pixels: Tensor = file.get_tensor("pixels")
                return pixels
    pixels = torch.stack([read_square(path, size) for path in tqdm(paths, "images", leave=False)])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": pixels}, cache, {"key": key})
    return pixels


def caption(combo: Combo) -> str:
    """``"Male, no Smiling"``."""
    return ", ".join(name if value == "yes" else f"no {name}" for name, value in combo.items())


class Faces(Dataset[dict[str, Any]]):
    """One item per image: float [3, H, W] in [-1, 1], its attributes, ``sample_id`` and ``caption``.

    Args:
        pixels: uint8 [N, 3, H, W].
        combos: the values of the attributes.
        files: the images' names, which are their sample ids.
    """

    def __init__(self, pixels: Tensor, combos: list[Combo], files: list[str]) -> None:
        self.pixels, self.combos, self.files = pixels, combos, files

    def __len__(self) -> int:
        return len(self.combos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        combo = self.combos[index]
        return {
            "image": to_float(self.pixels[index]),
            **combo,
            "sample_id": self.files[index],
            "caption": caption(combo),
        }


class CelebAHQ(L.LightningDataModule):
    """CelebA-HQ without the images that show the held-out triple.

    Args:
        root: the folder of the attribute list and of the images.
        attributes: three names of the attribute list.
        held_out: the values (``"yes"``, ``"no"``) of the triple that training never sees.
        size: height and width in pixels.
        images: the folder of the images; ``<root>/CelebA-HQ-img`` by default.
        batch_size: images per batch.
        traced: how many training images to trace, chosen by ``seed``; all by default.
        seed: of that choice.
        cache: file for the resized images.

    Raises:
        FileNotFoundError: a file or folder is missing; the message says what is expected.
        ValueError: an unknown attribute, not three different ones, a triple that no image shows, an attribute that has one
            value only once the triple is gone, or more traced images than there are.
    """

    def __init__(
        self,
        root: str | Path,
        attributes: Sequence[str] = ATTRIBUTES,
        held_out: Sequence[str] = ("yes", "yes", "yes"),
        size: int = 64,
        images: str | Path | None = None,
        batch_size: int = 64,
        traced: int | None = None,
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        if len(set(attributes)) != 3 or len(attributes) != 3 or len(held_out) != 3:
            raise ValueError(
                f"CelebAHQ(attributes={list(attributes)}, held_out={list(held_out)}): expected three different attributes "
                "and a value for each."
            )
        if not set(held_out) <= set(VALUES):
            raise ValueError(f"CelebAHQ(held_out={list(held_out)}): expected values among {VALUES}.")
        annotations = read_annotations(Path(root) / ANNOTATIONS)
        chosen = annotations.values[:, annotations.columns(attributes)].tolist()
        folder = Path(root) / IMAGES if images is None else Path(images)
        paths = find_images(folder, annotations.files)
        self.factors = dict.fromkeys(attributes, VALUES)
        self.held_out: Combo = dict(zip(attributes, held_out, strict=True))
        self.size = size
        self.batch_size = batch_size
        self.combos = [
            {name: VALUES[value] for name, value in zip(attributes, row, strict=True)} for row in chosen
        ]
        kept = [i for i, combo in enumerate(self.combos) if combo != self.held_out]
        self._check_shown(kept)
        traced = len(kept) if traced is None else traced
        if not 1 <= traced <= len(kept):
            raise ValueError(
                f"CelebAHQ(traced={traced}): expected between 1 and {len(kept)}, the images left to train on."
            )
        self.pixels = read_images(paths, size, cache)  # uint8 [N, 3, size, size], the held-out triple's too
        self.train_set = Faces(
            self.pixels[kept], [self.combos[i] for i in kept], [annotations.files[i] for i in kept]
        )
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        self.traced: list[int] = order[:traced].sort().values.tolist()

    def _check_shown(self, kept: list[int]) -> None:
        if len(kept) == len(self.combos):
            raise ValueError(
                f"CelebAHQ(held_out={self.held_out}): no image shows this triple, so nothing is held out. HINT: choose other "
                "attributes or values."
            )
        for name in self.factors:
            found = {self.combos[i][name] for i in kept}
            if found != set(VALUES):
                raise ValueError(
                    f"CelebAHQ(held_out={self.held_out}): without the triple, {name} is {sorted(found)} in all images, so it "
                    "cannot be learnt. HINT: choose other attributes or values."
                )

    def all_combos(self) -> list[Combo]:
        """Every triple of values, the held-out one included."""
        return [
            dict(zip(self.factors, values, strict=True)) for values in itertools.product(VALUES, repeat=3)
        ]

    def traced_combos(self) -> list[Combo]:
        """What the traced images show, in the order of :meth:`trace_dataloader`."""
        return [self.train_set.combos[i] for i in self.traced]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace, in the order of the attribute list."""
        return DataLoader(Subset(self.train_set, self.traced), self.batch_size)


def _number(name: str) -> int | str:
    """The number that a file is named by, without padding; a name that is none stays as it is."""
    stem = Path(name).stem
    return int(stem) if stem.isdigit() else name
