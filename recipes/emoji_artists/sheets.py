"""Contact sheets: a generated image beside the training images that taught its concepts."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ctrak_lightning import Attribution

from ..pictures import to_uint8

CELL, GAP, MARGIN, LINE = 96, 12, 20, 15
INK, FAINT, RIGHT, WRONG = (28, 30, 34), (110, 114, 122), (18, 128, 72), (150, 154, 162)
TOP = 10


def contact_sheet(
    path: Path,
    results: Sequence[Attribution],
    real: Tensor | None = None,
    kinds: Sequence[str] | None = None,
) -> None:
    """Writes one PNG: the generated image on the left, each result's top ten in a row on the right.

    Training images that carry the asked label have a green frame; the label is not used by the
    scores' ranking itself.

    Args:
        path: of the PNG.
        results: attributions of the same image, one row each.
        real: the artist's own drawing that training never saw [3, H, W] in [0, 1], shown below it.
        kinds: which column of the metadata each result is about, where the questions are prompts.
    """
    row = CELL + 4 * LINE + GAP
    left = MARGIN + CELL + 3 * GAP
    size = (left + TOP * (CELL + GAP) + MARGIN, 2 * MARGIN + 2 * LINE + len(results) * row)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    title, body = ImageFont.load_default(15), ImageFont.load_default(11)
    present = results[0].concept.present
    if isinstance(present, str):
        heading = present
        assert kinds is not None
    else:
        heading = f"{present['object']}, in the style of {present['artist']}"
        kinds = [_kind(result) for result in results]
    draw.text((MARGIN, MARGIN - 6), heading, INK, title)
    top = MARGIN + 2 * LINE
    _place(sheet, draw, results[0].image, (MARGIN, top), INK)
    draw.text((MARGIN, top + CELL + 4), f"generated, seed {results[0].seed}", FAINT, body)
    if real is not None:
        _place(sheet, draw, real, (MARGIN, top + row), WRONG)
        draw.text((MARGIN, top + row + CELL + 4), "held out: never shown", FAINT, body)
    for i, (result, kind) in enumerate(zip(results, kinds, strict=True)):
        y = top + i * row
        draw.text(
            (left, y - LINE - 2), f"who taught the {kind} '{result.concept.name}'?", INK, body
        )
        positions = {sample_id: j for j, sample_id in enumerate(result.samples.sample_ids)}
        for j, record in enumerate(result.top(TOP)):
            x = left + j * (CELL + GAP)
            hit = record.metadata[kind].replace("-", " ") == result.concept.name.replace("-", " ")
            thumbnails = result.samples.thumbnails
            assert thumbnails is not None
            picture = Image.fromarray(thumbnails[positions[record.sample_id]].numpy())
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
            draw.rectangle(
                (x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=RIGHT if hit else WRONG, width=2
            )
            draw.text((x, y + CELL + 4), f"{record.rank}.  score {record.score:.2f}", INK, body)
            draw.text((x, y + CELL + 4 + LINE), _short(record.metadata["object"]), FAINT, body)
            draw.text((x, y + CELL + 4 + 2 * LINE), _short(record.metadata["artist"]), FAINT, body)
    sheet.save(path, optimize=True)


def _kind(result: Attribution) -> str:
    """The attribute that the absent side lacks."""
    present, absent = result.concept.present, result.concept.absent
    assert not isinstance(present, str)
    assert not isinstance(absent, str)
    return next(key for key, value in present.items() if absent.get(key) != value)


def _place(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: Tensor | None,
    at: tuple[int, int],
    colour: tuple[int, int, int],
) -> None:
    if image is None:
        return
    picture = Image.fromarray(to_uint8(image[None])[0])
    sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), at)
    draw.rectangle(
        (at[0] - 2, at[1] - 2, at[0] + CELL + 1, at[1] + CELL + 1), outline=colour, width=2
    )


def _short(text: str, most: int = 17) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
