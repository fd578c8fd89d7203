"""Synthetic: one coloured shape on white, and combinations of factors that are never shown."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, Subset

from ...pictures import to_float

Combo = dict[str, str]
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A construction of the *Synthetic* benchmark.

    Args:
        name: as in ``Synthetic(variant=...)``.
        factors: the values of each factor.
        size: default height and width in pixels.
        patch: default side of the pixel patches that the network sees as channels.
        channels: the network's, at the resolution of its input and at half of it.
        half_size: least and largest half-size of a shape, as a share of ``size``.
        outline: its outline's width, as a share of ``size``.
        images: default number of training images.
        traced: default number of traced ones.
    """

    name: str
    factors: dict[str, tuple[str, ...]]
    size: int
    patch: int
    channels: tuple[int, int]
    half_size: tuple[float, float]
    outline: float
    images: int
    traced: int

    def combos(self) -> list[Combo]:
        """Every combination of factor values."""
        return [
            dict(zip(self.factors, values, strict=True))
            for values in itertools.product(*self.factors.values())
        ]

    def held_out(self, seed: int) -> list[Combo]:
        """The combinations that are never shown: red triangle; in the hard variant a fifth of all,
        chosen by ``seed``.

        Every value of every factor remains in some combination that is shown.
        """
        if self.name == "paper":
            return [{"shape": "triangle", "colour": "red"}]
        combos = self.combos()
        rng = np.random.default_rng([seed, len(combos)])
        while True:
            order = rng.permutation(len(combos)).tolist()
            chosen = set(order[: round(HELD_OUT_SHARE * len(combos))])
            shown = [combo for i, combo in enumerate(combos) if i not in chosen]
            seen = {name: {combo[name] for combo in shown} for name in self.factors}
            if all(seen[name] == set(values) for name, values in self.factors.items()):
                return [combos[i] for i in sorted(chosen)]


VARIANTS = {
    # The paper's: 64 pixels, half-size 10, outline 2.
    "paper": Variant(
        name="paper",
        factors={"shape": ("triangle", "circle"), "colour": ("red", "blue")},
        size=16,
        patch=1,
        channels=(32, 64),
        half_size=(10 / 64, 10 / 64),
        outline=2 / 64,
        images=1200,
        traced=360,
    ),
    "hard": Variant(
        name="hard",
        factors={
            "shape": ("triangle", "circle", "square", "cross", "star", "heart"),
            "colour": ("red", "blue", "green", "yellow", "magenta", "cyan"),
            "fill": ("plain", "striped", "dotted"),
        },
        size=24,
        patch=2,
        channels=(48, 64),
        half_size=(0.28, 0.42),
        outline=1 / 24,
        images=4300,
        traced=860,
    ),
}


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r}: expected one of {', '.join(map(repr, VARIANTS))}.")
    return VARIANTS[name]


def caption(combo: Combo) -> str:
    """``"striped red heart"``: the fill, the colour and the shape, as far as they are named."""
    return " ".join(combo[name] for name in ("fill", "colour", "shape") if name in combo)


def prompt(combo: Combo) -> str:
    """``"a striped red heart"``; "a red thing" where no shape is named (as a counter-prompt would
    say); nothing where nothing is."""
    if not combo:
        return ""
    return f"a {caption(combo)}" + ("" if "shape" in combo else " thing")


class Figures(Dataset[dict[str, Any]]):
    """So many rendered images of ``combos`` in turn, so that every prefix is balanced. Image ``i``
    depends on (seed, i) alone: a larger set begins with the smaller one."""

    def __init__(
        self, variant: Variant, combos: Sequence[Combo], images: int, size: int, seed: int
    ) -> None:
        self.variant = variant
        self.combos = [combos[i % len(combos)] for i in range(images)]
        rendered = [
            render(variant, combo, size, np.random.default_rng([seed, i]))
            for i, combo in enumerate(self.combos)
        ]
        pixels = torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)
        self.pixels = pixels.contiguous()  # uint8 [n, 3, H, W]

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
        variant: ``"paper"``, shape x colour without red triangles, or ``"hard"``, shape x colour x
            fill with a fifth of the combinations held out.
        images: how many; the variant's default if None.
        size: height and width in pixels; the variant's default if None.
        batch_size: images per batch.
        seed: of sizes, positions, and the held-out combinations.
        traced: the first so many images are those to trace; the variant's default if None.

    Raises:
        ValueError: an unknown variant, too few images to show every combination, or more traced
            images than images.
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
        self.in_distribution = [
            combo for combo in self.variant.combos() if combo not in self.held_out
        ]
        images = self.variant.images if images is None else images
        self.traced = min(self.variant.traced, images) if traced is None else traced
        if images < len(self.in_distribution) or not 1 <= self.traced <= images:
            raise ValueError(
                f"Synthetic({variant!r}, images={images}, traced={self.traced}): expected at least "
                f"one image for each of the {len(self.in_distribution)} combinations shown, and 1 "
                "<= traced <= images. HINT: more images."
            )
        size = self.variant.size if size is None else size
        self.train_set = Figures(self.variant, self.in_distribution, images, size, seed)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the first ``traced`` training images, in their own order."""
        return DataLoader(Subset(self.train_set, range(self.traced)), self.batch_size)


SUPERSAMPLE = 8
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
COLOURS = {
    "red": (230, 30, 30),
    "blue": (40, 70, 230),
    "green": (20, 160, 60),
    "yellow": (245, 210, 20),
    "magenta": (220, 50, 210),
    "cyan": (30, 200, 220),
}

Points = list[tuple[float, float]]


def render(
    variant: Variant, combo: Mapping[str, str], size: int, rng: np.random.Generator
) -> np.ndarray:
    """One image uint8 [size, size, 3] of a combination; ``rng`` chooses size and position.

    The fill, where the variant has that factor, is cut from patterned paper: stripes and dots lie
    on the image's own grid.
    """
    canvas = size * SUPERSAMPLE
    half = rng.uniform(*variant.half_size) * canvas
    outline = variant.outline * canvas
    reach = half + outline / 2
    x, y = rng.uniform(reach, canvas - reach, size=2)
    points = [(x + half * u, y + half * v) for u, v in POINTS[combo["shape"]]]

    paper = _paper(combo.get("fill", "plain"), COLOURS[combo["colour"]], size)
    mask = Image.new("L", paper.size, 0)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image = Image.new("RGB", paper.size, WHITE)
    image.paste(paper, mask=mask)
    ImageDraw.Draw(image).line([*points, *points[:2]], BLACK, round(outline), joint="curve")
    return np.asarray(image.reduce(SUPERSAMPLE))


def _paper(fill: str, colour: tuple[int, int, int], size: int) -> Image.Image:
    """The coloured ground, plain, with white stripes, or with white dots; both patterns have a
    period of four pixels."""
    canvas, period = size * SUPERSAMPLE, 4 * SUPERSAMPLE
    paper = Image.new("RGB", (canvas, canvas), colour)
    draw = ImageDraw.Draw(paper)
    for top in range(0, canvas, period):
        if fill == "striped":
            draw.rectangle((0, top, canvas, top + period // 2 - 1), WHITE)
        elif fill == "dotted":
            for left in range(0, canvas, period):
                draw.ellipse((left, top, left + period // 2 - 1, top + period // 2 - 1), WHITE)
    return paper


def _regular(corners: int, turn: float = 0.0, inner: float = 1.0) -> Points:
    """Points on the unit circle from the top, clockwise; every second one at radius ``inner``."""
    angles = [2 * math.pi * i / corners + turn for i in range(corners)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> Points:
    turns = [2 * math.pi * i / 64 for i in range(64)]
    waves = {1: 13, 2: -5, 3: -2, 4: -1}
    heights = [sum(size * math.cos(n * t) for n, size in waves.items()) for t in turns]
    return [(math.sin(t) ** 3, -(v + 2.5) / 15) for t, v in zip(turns, heights, strict=True)]


ARM = 0.36
# Outlines within [-1, 1] x [-1, 1], y downward.
POINTS: dict[str, Points] = {
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "circle": _regular(64),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "cross": [
        *[(-ARM, -1.0), (ARM, -1.0), (ARM, -ARM), (1.0, -ARM), (1.0, ARM), (ARM, ARM)],
        *[(ARM, 1.0), (-ARM, 1.0), (-ARM, ARM), (-1.0, ARM), (-1.0, -ARM), (-ARM, -ARM)],
    ],
    "star": _regular(10, inner=0.45),
    "heart": _heart(),
}
