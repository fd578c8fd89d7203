"""Letters and pictures as arrays, for loggers."""

import unicodedata
from functools import lru_cache

import torch
from PIL import Image, ImageFont
from torch import Tensor

REPLACEMENT = "?"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_UNASSIGNED = "\uffff"


@lru_cache
def font(size: int) -> Font:
    """Pillow's own font at ``size`` pixels, the same on every machine."""
    return ImageFont.load_default(size)


def one_line(text: str) -> str:
    """``text`` without line breaks, tabs and whatever else is no letter to see; such characters
    become spaces.

    Example:
        >>> one_line(" a\\tb\\x00\\u202ec\\n")
        'a b c'
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def drawable(text: str) -> str:
    """``text`` on one line, in the letters that the font has: accents are left out where it lacks
    them, and every other letter that it lacks becomes ``?`` (the font knows little beyond ASCII;
    tables, tags and the projector keep the text as it is).

    Example:
        >>> drawable("Zoé\\t猫")
        'Zoe ?'
    """
    return "".join(_drawable(letter) for letter in one_line(text))


def shortened(text: str, size: int, width: int) -> str:
    """As much of ``text`` as fits into ``width`` pixels, with an ellipsis where something is left
    out."""
    letters = drawable(text[:1000])
    if font(size).getlength(letters) <= width:
        return letters
    while letters and font(size).getlength(letters + "…") > width:
        letters = letters[:-1]
    return letters.rstrip() + "…"


def wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels, broken between words where that is
    possible."""
    lines: list[str] = []
    rest = drawable(text[:1000])
    while rest and len(lines) < most - 1 and font(size).getlength(rest) > width:
        fitting = next(
            n for n in range(len(rest), 0, -1) if n == 1 or font(size).getlength(rest[:n]) <= width
        )
        cut = rest.rfind(" ", 1, fitting + 1)
        cut = fitting if cut < 1 else cut
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*lines, shortened(rest, size, width)] if rest else lines


@lru_cache(maxsize=4096)
def _drawable(letter: str) -> str:
    if _has(letter):
        return letter
    base = unicodedata.normalize("NFKD", letter)
    if unicodedata.combining(letter):
        return ""
    kept = "".join(part for part in base if part != letter and _has(part))
    return kept or REPLACEMENT


@lru_cache(maxsize=4096)
def _has(letter: str) -> bool:
    return letter == " " or _shape(letter) != _shape(_UNASSIGNED)


def _shape(letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font(24).getmask(letter)
    return mask.size, bytes(mask)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with no side longer than ``side``: enlarged by a whole factor without
    interpolation, so that every pixel stays a square of one colour, or reduced smoothly."""
    longest = max(image.size)
    if longest > side:
        size = tuple(max(1, round(length * side / longest)) for length in image.size)
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = side // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def squares(thumbnails: Tensor) -> Tensor:
    """Thumbnails uint8 [n, h, w, 3] centred on white squares [n, s, s, 3], with s the longer
    side."""
    n, height, width, channels = thumbnails.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = torch.full((n, side, side, channels), 255, dtype=torch.uint8)
    padded[:, top : top + height, left : left + width] = thumbnails
    return padded
