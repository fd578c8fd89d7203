"""A concept's picture: the generated image, the training images that taught it most, and those that
taught it least."""

from dataclasses import dataclass

from PIL import Image, ImageDraw

from ctrak_lightning.attribution import Attribution, Record
from ctrak_lightning.panels.drawing import fitted, font, shortened, wrapped
from ctrak_lightning.panels.tables import CAPTION, described
from ctrak_lightning.panels.watch import Answer, Shown
from ctrak_lightning.utilities.images import picture

CELL, GENERATED, COLUMNS = 128, 272, 4
MARGIN, GUTTER, PITCH = 24, 36, 154
HEADER, LABEL, TEXT = 60, 34, 74
BARS = 5
INK, FAINT, RULE, MAT = (26, 29, 33), (92, 97, 106), (222, 225, 230), (244, 245, 247)
FOR, AGAINST, BAR = (20, 112, 66), (178, 44, 50), (58, 110, 165)
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things are: boxes (left, top, right, bottom) in pixels.

    Args:
        top: number of proponents.
        bottom: number of opponents.
    """

    top: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole."""
        width = self._left + COLUMNS * PITCH - (PITCH - CELL) + MARGIN
        lowest = self._opponents_top + self._height(self.bottom)
        return width, max(lowest, HEADER + LABEL + GENERATED + 2 * CELL) + MARGIN // 2

    @property
    def generated(self) -> Box:
        """The generated image's."""
        return MARGIN, HEADER + LABEL, MARGIN + GENERATED, HEADER + LABEL + GENERATED

    def proponent(self, i: int) -> Box:
        """That of the ``i``-th proponent's image, from 0."""
        return self._cell(i, HEADER)

    def opponent(self, i: int) -> Box:
        """That of the ``i``-th opponent's image, from 0."""
        return self._cell(i, self._opponents_top)

    @property
    def _left(self) -> int:
        return MARGIN + GENERATED + GUTTER

    @property
    def _opponents_top(self) -> int:
        return HEADER + self._height(self.top)

    @staticmethod
    def _height(count: int) -> int:
        return LABEL + -(-count // COLUMNS) * (CELL + TEXT) if count else 0

    def _cell(self, i: int, top: int) -> Box:
        x = self._left + i % COLUMNS * PITCH
        y = top + LABEL + i // COLUMNS * (CELL + TEXT)
        return x, y, x + CELL, y + CELL


def concept_grid(answer: Answer, shown: Shown) -> Image.Image:
    """The picture of a concept's answer, RGB, at the size of :class:`Geometry`.

    Small images are enlarged without interpolation, large ones reduced. Where there is no image (a
    task without ``decode``, a store without thumbnails) the frame says so or shows the sample's id.
    Letters that the font lacks are replaced; see
    :func:`~ctrak_lightning.panels.drawing.drawable`.

    Args:
        answer: of the concept, with a result.
        shown: how many proponents and opponents, and the shares for the bars.

    Raises:
        ValueError: the answer has no result.
    """
    if answer.result is None:
        raise ValueError(
            f"concept_grid({answer.concept.name!r}): no result to show ({answer.problem}). HINT: "
            "see ranking()."
        )
    return _Sheet(answer, answer.result, shown).drawn()


class _Sheet:
    def __init__(self, answer: Answer, result: Attribution, shown: Shown) -> None:
        self.answer, self.result, self.shown = answer, result, shown
        self.proponents = result.top(shown.top)
        self.opponents = result.bottom(shown.bottom) if shown.bottom else []
        self.geometry = Geometry(len(self.proponents), len(self.opponents))
        wanted = {record.sample_id for record in (*self.proponents, *self.opponents)}
        ids = enumerate(result.samples.sample_ids)
        self.positions = {sample_id: i for i, sample_id in ids if sample_id in wanted}
        self.image = Image.new("RGB", self.geometry.size, "white")
        self.draw = ImageDraw.Draw(self.image)

    def drawn(self) -> Image.Image:
        self._header()
        self._left_column()
        sections = (
            ("PROPONENTS: highest scores", FOR, self.proponents, self.geometry.proponent),
            ("OPPONENTS: lowest scores", AGAINST, self.opponents, self.geometry.opponent),
        )
        for label, colour, records, box in sections:
            if records:
                self._label(box(0), label, colour, self.geometry.size[0] - MARGIN)
            for i, record in enumerate(records):
                self._cell(box(i), record)
        return self.image

    def _header(self) -> None:
        width = self.geometry.size[0] - 2 * MARGIN
        facts = f"step {self.result.steps[-1]}"
        colour = FAINT
        if self.answer.says_nothing:
            facts, colour = f"the ranking says nothing, {facts}", AGAINST
        room = int(font(20).getlength(facts))
        name = shortened(self.answer.concept.name, 28, width - room - GUTTER)
        self.draw.text((MARGIN, 14), name, INK, font(28))
        self.draw.text((MARGIN + width - room, 22), facts, colour, font(20))

    def _left_column(self) -> None:
        left, _, right, y = box = self.geometry.generated
        self._label(box, f"GENERATED, seed {self.result.seed}", INK, right)
        if self.result.image is None:
            self._frame(box)
            for i, line in enumerate(
                wrapped("no image: the task has no decode()", 18, GENERATED - 40, 3)
            ):
                self.draw.text((left + 20, box[1] + 24 + 24 * i), line, FAINT, font(18))
        else:
            self._place(picture(self.result.image), box)
        y += 14
        concept = self.answer.concept
        for text in (
            f"with: {described(concept.present)}",
            f"without: {described(concept.absent)}",
        ):
            for line in wrapped(text, 17, GENERATED, 2):
                self.draw.text((left, y), line, FAINT, font(17))
                y += 22
        if self.shown.shares:
            self._bars(left, right, y + 16)

    def _bars(self, left: int, right: int, y: int) -> None:
        self.draw.text(
            (left, y), shortened(f"share by {self.shown.group}", 18, right - left), INK, font(18)
        )
        y += 28
        for share in self.shown.shares[:BARS]:
            if y + 36 > self.geometry.size[1]:
                return
            number = f"{share.share:.0%}"
            room = int(font(17).getlength(number))
            self.draw.text(
                (left, y), shortened(share.group, 17, right - left - room - 12), INK, font(17)
            )
            self.draw.text((right - room, y), number, INK, font(17))
            self.draw.rectangle((left, y + 23, right - 1, y + 28), RULE)
            if (length := round((right - left) * share.share)) > 0:
                self.draw.rectangle((left, y + 23, left + length - 1, y + 28), BAR)
            y += 40

    def _label(self, box: Box, text: str, colour: tuple[int, int, int], right: int) -> None:
        self.draw.text((box[0], box[1] - LABEL + 4), text, colour, font(16))
        self.draw.line((box[0], box[1] - 8, right - 1, box[1] - 8), colour, 2)

    def _cell(self, box: Box, record: Record) -> None:
        left, top, _, bottom = box
        thumbnails = self.result.samples.thumbnails
        if thumbnails is not None:
            self._place(picture(thumbnails[self.positions[record.sample_id]]), box)
        else:
            self._frame(box)
            for i, line in enumerate(wrapped(record.sample_id, 16, CELL - 16, 5)):
                self.draw.text((left + 8, top + 10 + 21 * i), line, INK, font(16))
        width = PITCH - 10
        rank, score = f"#{record.rank}", f"{record.score:+.2f}"
        self.draw.text((left, bottom + 3), rank, FAINT, font(20))
        colour = FOR if record.score > 0 else AGAINST
        self.draw.text(
            (left + font(20).getlength(rank + "  "), bottom + 3), score, colour, font(20)
        )
        lines = [
            record.metadata.get(self.shown.group or ""),
            record.metadata.get(CAPTION, record.sample_id),
        ]
        sizes = [(17, INK, 26), (14, FAINT, 47)]
        for text, (size, ink, y) in zip(lines, sizes, strict=True):
            if text is not None:
                self.draw.text((left, bottom + y), shortened(text, size, width), ink, font(size))

    def _place(self, image: Image.Image, box: Box) -> None:
        self._frame(box)
        small = fitted(image, box[2] - box[0])
        left = box[0] + (box[2] - box[0] - small.width) // 2
        top = box[1] + (box[3] - box[1] - small.height) // 2
        self.image.paste(small, (left, top))

    def _frame(self, box: Box) -> None:
        self.draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), MAT, RULE)
