"""Board: the panels of a few concepts in TensorBoard. For callbacks and for raw training loops."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrak_lightning.attribution import Attribution, Concept, Share
from ctrak_lightning.panels.grid import concept_grid
from ctrak_lightning.panels.projector import embedding
from ctrak_lightning.panels.tables import MOST, OTHERS, ShareCurves, ranking
from ctrak_lightning.panels.tags import ROOT, TagNames, layout
from ctrak_lightning.panels.watch import Answer, Shown
from ctrak_lightning.store import Checkpoint, TraceStore

QUANTILES = (0.1, 0.5, 0.9)
BINS = 64


class Board:
    """Writes what the traces say of a few concepts under ``ctrak/``.

    The number of tags does not grow with the samples or owners: at most 16 for each concept, and a
    dozen.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        concepts: those that are written of, in this order.
        group: the metadata column to share each concept out by, or None.
        top: proponents to show.
        bottom: opponents to show.
    """

    def __init__(
        self,
        writer: Any,
        concepts: Sequence[Concept],
        *,
        group: str | None,
        top: int = 8,
        bottom: int = 4,
    ) -> None:
        self.writer = writer
        self.group, self.top, self.bottom = group, top, bottom
        self.names = TagNames().one_each([concept.name for concept in concepts])
        self._titles = [concept.name for concept in concepts]
        self._owners = TagNames(reserved=[OTHERS])
        self._curves = [ShareCurves() for _ in concepts]

    @property
    def metrics(self) -> list[str]:
        """Tags of the scalars that sum a run up."""
        kinds = ("strength", "contributors")
        return [f"{ROOT}/{kind}/{name}" for kind in kinds for name in self.names] + [
            f"{ROOT}/overhead/{part}" for part in ("tracer", "monitor")
        ]

    def write_layout(self) -> None:
        """Groups the curves in the Custom Scalars dashboard; once."""
        charts = dict(zip(self.names, self._titles, strict=True))
        self.writer.add_custom_scalars(layout(charts, self.group))

    def write(self, answers: Sequence[Answer], checkpoint: Checkpoint, step: int) -> None:
        """The panels of every concept, and the norms of the checkpoint's traces, at ``step`` of the
        x axis."""
        for i, answer in enumerate(answers):
            self._write_concept(i, answer, step)
        norms = checkpoint.norms().double()
        norms = norms[norms > 0]  # of the samples that were trained on
        for q in QUANTILES:
            self._scalar(
                f"trace_norm/q{round(100 * q)}", float(np.quantile(norms.numpy(), q)), step
            )

    def write_cost(
        self, seconds: Mapping[str, float], overhead: Mapping[str, float], step: int
    ) -> None:
        """Seconds that each part took for the last checkpoint, and the share of the run's time that
        it took so far."""
        for kind, values in (("seconds", seconds), ("overhead", overhead)):
            for name, value in values.items():
                self._scalar(f"{kind}/{name}", value, step)

    def write_projector(self, answers: Sequence[Answer], store: TraceStore, step: int) -> None:
        """The traces of the last checkpoint as points; files of their own beside the event file, so
        once in a run."""
        results = [answer.result for answer in answers if answer.result is not None]
        found = embedding(store.checkpoints[-1], store.samples, results)
        sprites = None
        if found.sprites is not None:
            # The writer multiplies by 255 and cuts off; v / 255 is never rounded down in float32,
            # so every value comes back.
            sprites = (found.sprites.permute(0, 3, 1, 2).float() / 255).contiguous()
        self.writer.add_embedding(
            found.points,
            metadata=found.rows,
            metadata_header=found.header,
            label_img=sprites,
            global_step=step,
            tag=ROOT,
        )

    def _write_concept(self, i: int, answer: Answer, step: int) -> None:
        name, result = self.names[i], answer.result
        shares = [] if result is None else self._shares(result)
        shown = Shown(group=self.group, top=self.top, bottom=self.bottom, shares=shares[:MOST])
        self.writer.add_text(f"{ROOT}/ranking/{name}", ranking(answer, shown), step)
        if result is None:
            return
        picture = np.asarray(concept_grid(answer, shown))
        self.writer.add_image(f"{ROOT}/concept/{name}", picture, step, dataformats="HWC")
        self.writer.add_histogram(f"{ROOT}/scores/{name}", result.scores.numpy(), step, bins=BINS)
        self._scalar(f"strength/{name}", result.strength, step)
        self._scalar(f"contributors/{name}", result.effective_contributors(), step)
        self._write_shares(i, shares, step)

    def _shares(self, result: Attribution) -> list[Share]:
        # Where the ranking says nothing, its shares are withheld, and their curves have no point.
        if (
            self.group is None
            or result.confidence.says_nothing
            or not bool((result.scores > 0).any())
        ):
            return []
        # No interval is drawn, so one resample is enough.
        return result.by_group(self.group, resamples=1)

    def _write_shares(self, i: int, shares: Sequence[Share], step: int) -> None:
        if not shares:
            return
        by_group, others = self._curves[i].values(shares)
        for group, share in by_group.items():
            self._scalar(f"share/{self.names[i]}/{self._owners.of(group)}", share, step)
        if others is not None:
            self._scalar(f"share/{self.names[i]}/{OTHERS}", others, step)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if not math.isnan(value):  # the strength of methods that look at one condition
            self.writer.add_scalar(f"{ROOT}/{tag}", value, step)
