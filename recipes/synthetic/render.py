"""Draws one shape on white: deterministic, with Pillow, several times too large and then reduced."""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from recipes.synthetic.variants import Variant

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


def render(variant: Variant, combo: Mapping[str, str], size: int, rng: np.random.Generator) -> np.ndarray:
    """One image uint8 [size, size, 3] of a combination of factors; ``rng`` chooses size and position.

    The fill, where the variant has that factor, is cut from patterned paper: stripes and dots lie on the image's own grid.
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
    """The coloured ground, plain, with white stripes, or with white dots; both patterns have a period of four pixels."""
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
    curve = [
        (
            16 * math.sin(t) ** 3,
            13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t),
        )
        for t in turns
    ]
    return [(u / 16, -(v + 2.5) / 15) for u, v in curve]


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
