"""Attribution: the answer to one query."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.diagnostics import (
    Confidence,
    beside,
    judged,
    losses_of,
    self_check_of,
    stability,
)
from ctrak_lightning.attribution.parts import Parts
from ctrak_lightning.attribution.scoring import (
    drawn_ensemble,
    ensemble,
    factors_of,
    soft_thresholded,
    standardised,
)
from ctrak_lightning.errors import csv_cell, metadata_heads, visible
from ctrak_lightning.store import SampleTable, TraceStore
from ctrak_lightning.utilities.images import png_uri

_DRAWS_AT_ONCE = 2**24  # sample positions drawn, 128 MiB


def group_shares(positive: Tensor, membership: Tensor, groups: int) -> Tensor:
    """Each group's share [G] of what the samples add [N], float64; all zero where nothing is added.

    Args:
        positive: what each sample adds [N], 0 or more.
        membership: the group of each sample [N], int64.
        groups: their number, G.
    """
    totals = torch.zeros(groups, dtype=torch.float64).index_add_(0, membership, positive)
    return totals / totals.sum().clamp(min=torch.finfo(torch.float64).tiny)


def bootstrapped_shares(
    positive: Callable[[Tensor], Tensor],
    checkpoints: int,
    membership: Tensor,
    groups: int,
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Low [G] and high [G] of the percentile bootstrap over checkpoints and samples (Efron 1979).

    Args:
        positive: what each sample adds [N], for checkpoints that were drawn so many times each [M].
        checkpoints: their number, M; of a single one only the samples are drawn.
        membership: the group of each sample [N].
        groups: their number, G.
        confidence: of the interval.
        resamples: how many.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = len(membership)
    drawn = torch.randint(checkpoints, (resamples, checkpoints), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=checkpoints) for row in drawn]).double()
    # Few checkpoints can be drawn in few ways only, and what each way gives is computed once.
    ways, which = torch.unique(counts, dim=0, return_inverse=True)
    shares = torch.zeros(resamples, groups, dtype=torch.float64)
    for way, pattern in enumerate(ways):
        adds = positive(pattern)
        rows = (which == way).nonzero().flatten()
        for part in rows.split(max(1, _DRAWS_AT_ONCE // samples)):
            draws = torch.randint(samples, (len(part), samples), generator=generator)
            sums = torch.zeros(len(part), groups, dtype=torch.float64)
            sums.scatter_add_(1, membership[draws], adds[draws])
            shares[part] = sums / sums.sum(1, keepdim=True).clamp(
                min=torch.finfo(torch.float64).tiny
            )
    tail = (1 - confidence) / 2
    low, high = torch.quantile(shares, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


_ROWS = 10
_LOOK = (
    "Look at the generated image and at `.confidence` first: if the concept is not learnt, the "
    "ranking says nothing."
)
RESERVED = ("verdict", "rank", "score", "sample_id", "exposures", "remark")
NEVER = "never trained on up to this checkpoint"
"""What is said of a sample that had entered no optimizer step."""


@dataclass(frozen=True, slots=True)
class Record:
    """One training sample in a ranking; rank 1 taught the concept most. ``exposures``: how often it
    had entered an optimizer step at the last checkpoint; None where that is not known."""

    sample_id: str
    score: float
    rank: int
    metadata: dict[str, str]
    exposures: int | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A group's share of a concept, in [0, 1], with the bounds of its bootstrap interval."""

    group: str
    share: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Scores of every training sample for one concept; higher means that the sample taught the
    concept.

    Args:
        concept: the question.
        seed: of the generated image.
        checkpoint_scores: raw scores per checkpoint [M, N].
        steps: training step of each checkpoint.
        samples: ids and metadata of the N samples.
        method: the method's facts, as JSON values.
        strength: relative size of the concept direction (see
            :func:`ctrak_lightning.capture.trace.trace_query`).
        image: the generated image [3, H, W] in [0, 1], or None.
        damping: of the kernel, as used for this query (where the method's is ``"agreement"``, the
            one it chose); None: no kernel.
        weights: of the checkpoints, where the method adds them with weights of their own (learning
            rates); else None.
        parts: the scores split by timestep and by group of layers, where that was asked for.
        exposures: how often each sample had entered an optimizer step at each checkpoint, int64 [M,
            N]; -1 at one where that is not known, None where it is at none. A sample with 0 scores
            0 at that checkpoint.
        store: the traces that were asked, where they are at hand; a report takes self-check and
            provenance from them.
    """

    concept: Concept
    seed: int
    checkpoint_scores: Tensor
    steps: list[int]
    samples: SampleTable
    method: dict[str, Any]
    strength: float
    image: Tensor | None = None
    damping: float | None = None
    weights: list[float] | None = None
    parts: Parts | None = None
    exposures: Tensor | None = None
    store: TraceStore | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """The question, how far it can be trusted where that was looked at, and the ten highest
        scores."""
        rows = [[visible(cell) for cell in row] for row in self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for rank, score, *texts in rows:
            cells = [rank.rjust(widths[0]), score.rjust(widths[1])]
            cells += map(str.ljust, texts, widths[2:])
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self._title(), self._trust(), *lines])

    def _repr_html_(self) -> str:
        """What a notebook shows: the same, with the generated image and the thumbnails."""
        thumbnails = self.samples.thumbnails
        shown = () if thumbnails is None else thumbnails[self.ranked()[:_ROWS]]
        table = ""
        for row, pixels in zip_longest(self._rows(), [None, *shown]):
            cells = "".join(f"<td>{escape(visible(cell))}</td>" for cell in row)
            table += f"<tr><td>{_picture(pixels, 48, longest=128)}</td>{cells}</tr>"
        return (
            f"<p><b>{escape(self._title())}</b><br>{escape(self._trust())}</p>"
            f"{_picture(self.image, 128, longest=768)}<table>{table}</table>"
        )

    def _rows(self) -> list[list[str]]:
        """The heads, and the ten highest scores."""
        own = ["rank", "score", "sample_id"]
        columns = sorted(self.samples.metadata)
        rows = [[*own, *metadata_heads(columns, own)]]
        for one in self.top(_ROWS):
            texts = [one.metadata[name] for name in columns]
            rows.append([str(one.rank), f"{one.score:.3f}", one.sample_id, *texts])
        return rows

    def _title(self) -> str:
        return visible(
            f"Attribution of {self.concept.name!r}: {len(self.samples)} samples, "
            f"checkpoints at steps {self.steps}, method {self.method['name']!r}"
        )

    def _trust(self) -> str:
        """The verdict, where it was asked for: it reads the whole store, which showing a result
        must not."""
        known = vars(self).get("confidence")
        return _LOOK if known is None or not known.says_nothing else known.verdict

    @property
    def scores(self) -> Tensor:
        """Checkpoint-ensembled scores [N], float32: each checkpoint in units of its own standard
        deviation (over the samples that had been trained on), averaged; or the sum with the
        method's own weights."""
        return ensemble(self.checkpoint_scores.double(), self.weights, self.exposed).float()

    @property
    def untrained(self) -> Tensor:
        """Which samples had entered no optimizer step at the last checkpoint, as far as is known,
        bool [N]."""
        if self.exposures is None:
            return torch.zeros(len(self.samples), dtype=torch.bool)
        return self.exposures[-1] == 0

    @property
    def exposed(self) -> Tensor | None:
        """Which samples had been trained on at each checkpoint, bool [M, N]; None where all had, as
        far as is known."""
        return None if self.exposures is None or bool(self.exposures.all()) else self.exposures != 0

    def _trained(self) -> Tensor | None:
        """Which samples had been trained on at the last checkpoint, bool [N]; None where all had,
        as far as is known."""
        untrained = self.untrained
        return ~untrained if bool(untrained.any()) else None

    @cached_property
    def confidence(self) -> Confidence:
        """How far the ranking can be trusted, and whether it says anything at all: look here, and
        at the generated image, first.

        The self-check reads the traces once for each damping that was used, not for each concept.

        Raises:
            CorruptStoreError: the store is damaged.
        """
        check, loss, moved = None, None, None
        if self.store is not None:
            asked = (bool(self.method["residual"]), bool(self.method.get("per_exposure")))
            factors = factors_of(*asked, self.store.checkpoints)
            check = self_check_of(self.store, self.damping, factors, self.weights)
            # Those of training steps have training's own scale and timesteps.
            if self.method["training"]["trajectory"]["class"] != "InTraining":
                loss, moved = losses_of(self.store)
        # An image that was given does not show what the model has learnt.
        made = None if self.concept.kind == "given" else self.image
        noise, thumbnails = None, self.samples.thumbnails
        if made is not None and thumbnails is not None and thumbnails[:, 1:, 1:].numel():
            noise = beside(made, thumbnails)
        return judged(
            strength=None if math.isnan(self.strength) else self.strength,
            checkpoints=len(self.steps),
            stability=stability(self.checkpoint_scores, self.weights, self.exposed),
            self_check=check,
            loss=loss,
            moved=moved,
            noise=noise,
            positive=bool((self.scores > 0).any()),
        )

    def contributions(self, threshold: float = 2.0) -> Tensor:
        """What each sample adds, for sums over groups of samples [N], float32: the scores in units
        of their own standard deviation around their median, soft-thresholded.

        A concept is taught by few samples; the small scores of all the others are noise that adds
        up in a sum. The ranking is that of the scores; samples within the threshold add nothing.

        Args:
            threshold: in standard deviations; 0 keeps all.

        Raises:
            ValueError: ``threshold`` is negative.
        """
        return soft_thresholded(self.scores.double(), _checked(threshold), self._trained()).float()

    def effective_contributors(self, threshold: float = 2.0) -> float:
        """How many samples the concept is spread over: the inverse Simpson index ``1 / sum(p^2)``
        of the shares ``p`` of the positive :meth:`contributions` (Hill 1973, order 2); n if n
        samples contribute equally, 0 if none does.

        Args:
            threshold: of the contributions.

        Raises:
            ValueError: ``threshold`` is negative.
        """
        positive = self.contributions(threshold).double().clamp(min=0)
        total = positive.sum()
        return float(total.square() / positive.square().sum()) if total > 0 else 0.0

    def order(self) -> Tensor:
        """The positions of all samples [N], int64, best first (ties by position in the data set);
        those that were never trained on are the last."""
        scores = self.scores.masked_fill(self.untrained, -torch.inf)
        return torch.argsort(scores, descending=True, stable=True)

    def ranked(self) -> Tensor:
        """The positions of the samples that were trained on, int64, best first."""
        order = self.order()
        return order[: len(order) - int(self.untrained.sum())]

    def timeline(self) -> Tensor:
        """The scores of each checkpoint [M, N], float32, each in units of its own standard
        deviation."""
        return standardised(self.checkpoint_scores.double(), self.exposed).float()

    def top(self, n: int = 10) -> list[Record]:
        """The ``n`` samples that taught the concept most, best first (ties by position in the data
        set); none that was never trained on.

        Raises:
            ValueError: ``n`` is below 1.
        """
        if n < 1:
            raise ValueError(f"top({n}): expected at least 1.")
        return self._records(self.ranked()[:n])

    def bottom(self, n: int = 10) -> list[Record]:
        """The ``n`` samples with the lowest scores, the opponents of the concept, lowest first;
        ranks are those of :meth:`top`.

        Raises:
            ValueError: ``n`` is below 1.
        """
        if n < 1:
            raise ValueError(f"bottom({n}): expected at least 1.")
        return self._records(self.ranked()[-n:], last=True)[::-1]

    def _records(self, positions: Tensor, last: bool = False) -> list[Record]:
        """Records of consecutive places of the ranking: its first ones, or the last ones of those
        that were trained on."""
        scores = self.scores
        before = len(self.ranked()) - len(positions) if last else 0
        exposures = None if self.exposures is None else self.exposures[-1]
        return [
            Record(
                self.samples.sample_ids[i],
                float(scores[i]),
                rank,
                self.samples.metadata_of(i),
                None if exposures is None or exposures[i] < 0 else int(exposures[i]),
            )
            for rank, i in enumerate(positions.tolist(), start=before + 1)
        ]

    def by_group(
        self,
        column: str,
        *,
        threshold: float | None = None,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> list[Share]:
        """Each group's share of the concept, largest first: the positive scores of its samples over
        all positive scores.

        The interval is the percentile bootstrap (Efron 1979) over samples and over checkpoints,
        both drawn anew in every resample: it says how much the shares hang on single images and on
        single moments of the run, not whether the method is right. Where
        ``confidence.says_nothing``, neither do shares; pages, exports and panels withhold them
        then, so that nobody pays by them. It is narrower than what another run of the same
        fine-tune may say: on EmojiArtists it covered that in 70 % of the cases, with
        ``threshold=2`` in 91 % (``recipes/benchmarks/README.md``).

        Args:
            column: a metadata column, such as ``"owner"``.
            threshold: share out the :meth:`contributions` at this threshold instead of the scores,
                so that the many small scores of a large data set do not add up to a share.
            confidence: of the interval.
            resamples: bootstrap resamples.
            seed: of the resampling.

        Raises:
            ValueError: no such column (the message lists them), an argument out of range, or
                nothing positive to share out.
        """
        if column not in self.samples.metadata:
            known = ", ".join(sorted(self.samples.metadata)) or "none"
            raise ValueError(
                f"by_group({column!r}): no such metadata column. The store has: {known}."
            )
        if not 0 < confidence < 1 or resamples < 1:
            raise ValueError(
                f"by_group({column!r}, confidence={confidence}, resamples={resamples}): expected a "
                "confidence between 0 and 1, and at least one resample."
            )
        values = self.samples.metadata[column]
        groups = sorted(set(values))
        places = {group: i for i, group in enumerate(groups)}
        membership = torch.tensor([places[value] for value in values])
        every = torch.ones(len(self.steps), dtype=torch.float64)
        found = group_shares(self._positive(every, threshold), membership, len(groups))
        if not found.sum() > 0:
            if threshold is None:
                problem, hint = "no sample has a positive score", "look at `confidence` first."
            else:
                problem = f"no sample's score is {threshold:g} deviations above the median"
                hint = "a lower threshold, or None, which shares out all positive scores."
            raise ValueError(
                f"by_group({column!r}, threshold={threshold}): {problem} for "
                f"{self.concept.name!r}, so there is nothing to share out. HINT: {hint}"
            )
        low, high = bootstrapped_shares(
            lambda drawn: self._positive(drawn, threshold),
            len(self.steps),
            membership,
            len(groups),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        counts = torch.bincount(membership, minlength=len(groups))
        shares = [
            Share(group, float(found[i]), float(low[i]), float(high[i]), int(counts[i]))
            for i, group in enumerate(groups)
        ]
        return sorted(shares, key=lambda share: (-share.share, share.group))

    def _positive(self, drawn: Tensor, threshold: float | None) -> Tensor:
        """What each sample adds to a share [N], float64, from checkpoints that were drawn so many
        times each [M]."""
        scores = drawn_ensemble(self.checkpoint_scores.double(), drawn, self.weights, self.exposed)
        if threshold is not None:
            scores = soft_thresholded(scores, _checked(threshold), self._trained())
        return scores.clamp(min=0)

    def to_csv(self, path: str | Path) -> None:
        """Writes the whole ranking, one row per sample: verdict (empty, or in every row the
        sentence that the ranking says nothing), rank, score, sample_id, how often the sample had
        entered an optimizer step (empty where that is not known), a remark where it never had, and
        the metadata columns.

        Text that a spreadsheet would compute gets an apostrophe before it
        (:func:`ctrak_lightning.errors.csv_cell`); a metadata column of the name of one of ours
        becomes ``metadata.score``, say.
        """
        columns = sorted(self.samples.metadata)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*RESERVED, *map(csv_cell, metadata_heads(columns, RESERVED))])
            for record in self._records(self.order()):
                known = "" if record.exposures is None else record.exposures
                facts = [csv_cell(record.sample_id), known, NEVER if record.exposures == 0 else ""]
                texts = [csv_cell(record.metadata[column]) for column in columns]
                writer.writerow(
                    [self.confidence.verdict, record.rank, repr(record.score), *facts, *texts]
                )

    def to_json(self, path: str | Path) -> None:
        """Writes whether the ranking says anything and why not, the question, the method, the
        ranking and the scores per checkpoint."""
        timeline = self.timeline()
        positions = {sample_id: i for i, sample_id in enumerate(self.samples.sample_ids)}
        document = {
            "confidence": self.confidence.to_dict(),
            "concept": self.concept.to_dict(),
            "seed": self.seed,
            "method": self.method,
            "damping": self.damping,
            "steps": self.steps,
            "strength": None if math.isnan(self.strength) else self.strength,
            "samples": [
                {
                    "rank": record.rank,
                    "score": record.score,
                    "sample_id": record.sample_id,
                    "exposures": record.exposures,
                    "timeline": timeline[:, positions[record.sample_id]].tolist(),
                    "metadata": record.metadata,
                }
                for record in self._records(self.order())
            ],
        }
        Path(path).write_text(
            json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )

    def report(self, path: str | Path, *, group: str | None = None) -> None:
        """Writes one self-contained HTML page: the image, the ranking with opponents, the owners'
        shares, when and where the influence arises, how far to trust it, and where the traces come
        from (:func:`ctrak_lightning.report.write_report`, which puts several concepts
        on one page).

        Args:
            path: of the file, replaced if it exists.
            group: the metadata column whose values share out the concept; by default ``owner``,
                else ``artist``, else none.

        Raises:
            ReportError: no such column, or the file cannot be written.
        """
        # The page is made of results: this is the one import upward, for whoever has a result.
        from ctrak_lightning.report import write_report

        write_report(path, self, group=group)


def _picture(pixels: Tensor | None, width: int, longest: int) -> str:
    if pixels is None:
        return ""
    uri = png_uri(pixels, longest)
    return f'<img src="{uri}" width="{width}" style="image-rendering: pixelated">'


def _checked(threshold: float) -> float:
    if threshold < 0:
        raise ValueError(f"contributions(threshold={threshold}): expected 0 or more.")
    return threshold
