"""Attributions: the answers to several questions, and what they have in common."""

import csv
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.result import Attribution
from ctrak_lightning.errors import csv_cell, metadata_heads, visible

ALIKE = 0.9
"""Two concepts of one image whose gradients have a larger cosine than this are hardly two
questions."""


class CoincidingConceptsWarning(UserWarning):
    """Two concepts ask for nearly the same, so that their rankings do not tell them apart.

    Why: the differences between present and absent are almost one direction, often since a
    counter-prompt left the concept in.

    What to do: print the concepts, look at both sides, and give an ``absent`` of your own.
    """


@dataclass(frozen=True, slots=True)
class RankedSample:
    """A training sample near the top of one or several rankings.

    Args:
        sample_id: its id.
        concepts: those in whose top it is.
        scores: by concept, of all of them; in units of each concept's own standard deviation.
        ranks: by concept, of all of them.
        metadata: of the sample.
    """

    sample_id: str
    concepts: list[str]
    scores: dict[str, float]
    ranks: dict[str, int]
    metadata: dict[str, str]


class Attributions(list[Attribution]):
    """The answers to several questions, in their order, and what they have in common.

    Args:
        results: the answers, of one store.
        cosines: between the questions' gradients [Q, Q], in [-1, 1], mean over the checkpoints.
            They are those of the gradients themselves, before the kernel: its damping may be
            another for each question, and questions that coincide before it coincide after it.
    """

    def __init__(self, results: Iterable[Attribution], cosines: Tensor) -> None:
        super().__init__(results)
        self.cosines = cosines

    @property
    def names(self) -> list[str]:
        """A name for each question: its concept's, with the place where that is not the only one of
        it."""
        given = [result.concept.name for result in self]
        while len(set(given)) < len(given):  # again, where a concept is called "owl (1)" itself
            given = [
                f"{name} ({i + 1})" if given.count(name) > 1 else name
                for i, name in enumerate(given)
            ]
        return given

    def shared(self, n: int = 10, *, least: int = 2) -> list[RankedSample]:
        """The samples in the top ``n`` of at least ``least`` questions, those of most questions
        first, then by their mean rank.

        Raises:
            ValueError: ``n`` is below 1, or ``least`` below 2.
        """
        if least < 2:
            raise ValueError(
                f"shared({n}, least={least}): expected at least 2. HINT: exclusive({n}) for those "
                "of one only."
            )
        found = [sample for sample in self._tops(n) if len(sample.concepts) >= least]
        return sorted(found, key=lambda sample: (-len(sample.concepts), sum(sample.ranks.values())))

    def exclusive(self, n: int = 10) -> list[RankedSample]:
        """The samples in the top ``n`` of one question only, question by question, best first.

        Raises:
            ValueError: ``n`` is below 1.
        """
        names = self.names
        found = [sample for sample in self._tops(n) if len(sample.concepts) == 1]
        return sorted(
            found, key=lambda one: (names.index(one.concepts[0]), one.ranks[one.concepts[0]])
        )

    def to_csv(self, path: str | Path) -> None:
        """Writes all samples in the data set's order: verdict for each question, sample_id, rank
        and score for each, and the metadata columns; verdicts, texts and names as
        :meth:`Attribution.to_csv` writes them."""
        names, columns = self.names, sorted(self[0].samples.metadata)
        ranks, scores = self._ranks(), [result.scores.tolist() for result in self]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            verdicts = [result.confidence.verdict for result in self]
            heads = [f"verdict {name}" for name in names] + ["sample_id"]
            heads += [*(f"{head} {name}" for name in names for head in ("rank", "score"))]
            writer.writerow([*heads, *map(csv_cell, metadata_heads(columns, heads))])
            for i, sample_id in enumerate(self[0].samples.sample_ids):
                values = [
                    value for q in range(len(names)) for value in (ranks[q][i], repr(scores[q][i]))
                ]
                metadata = self[0].samples.metadata_of(i)
                texts = [metadata[column] for column in columns]
                writer.writerow([*verdicts, csv_cell(sample_id), *values, *map(csv_cell, texts)])

    def to_json(self, path: str | Path, n: int = 10) -> None:
        """Writes the questions and whether their rankings say anything, their cosines, and what the
        top ``n`` share and do not share."""
        document: dict[str, Any] = {
            "concepts": [
                {"called": name, "confidence": result.confidence.to_dict()}
                | result.concept.to_dict()
                | {"seed": result.seed}
                for name, result in zip(self.names, self, strict=True)
            ],
            "cosines": self.cosines.tolist(),
            "top": n,
            "shared": [asdict(sample) for sample in self.shared(n)],
            "exclusive": [asdict(sample) for sample in self.exclusive(n)],
        }
        Path(path).write_text(
            json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )

    def table(self, n: int = 10) -> str:
        """What the top ``n`` share and do not share, as lines for a terminal: a row for each sample
        with its ranks, shared ones first."""
        names = self.names
        shared, exclusive = self.shared(n), self.exclusive(n)
        lines = [
            f"{name}: {one.confidence.verdict}"
            for name, one in zip(names, self, strict=True)
            if one.confidence.says_nothing
        ]
        lines += [str(result.concept) for result in self]
        for i, j, cosine in self._pairs():
            lines.append(f"cosine of {names[i]!r} and {names[j]!r}: {cosine:.2f}")
        lines.append(f"in the top {n}: {len(shared)} shared, {len(exclusive)} of one concept only")
        heads = [visible(name) for name in names]
        widths = [max(len(head), 6) for head in heads]
        lines.append(
            "  ".join(
                [*(head.rjust(width) for head, width in zip(heads, widths, strict=True)), "sample"]
            )
        )
        for sample in [*shared, *exclusive]:
            ranks = [
                f"{sample.ranks[name]}{' ' if name in sample.concepts else '-'}".rjust(width)
                for name, width in zip(names, widths, strict=True)
            ]
            lines.append("  ".join([*ranks, sample.sample_id]))
        return "\n".join(map(visible, lines))

    def __str__(self) -> str:
        return self.table()

    def _pairs(self) -> list[tuple[int, int, float]]:
        count = len(self)
        return [
            (i, j, float(self.cosines[i, j])) for i in range(count) for j in range(i + 1, count)
        ]

    def _ranks(self) -> list[list[int]]:
        """By question and sample, from 1."""
        found = []
        for result in self:
            order = result.order()
            ranks = torch.empty_like(order)
            ranks[order] = torch.arange(1, len(order) + 1)
            found.append(ranks.tolist())
        return found

    def _tops(self, n: int) -> list[RankedSample]:
        """The samples in any top ``n``, in the data set's order."""
        if n < 1:
            raise ValueError(f"{type(self).__name__}: the top {n}; expected at least 1.")
        names, ranks = self.names, self._ranks()
        scores = [result.scores for result in self]
        leading = sorted({int(i) for result in self for i in result.ranked()[:n]})
        samples = self[0].samples if self else None
        return [
            RankedSample(
                samples.sample_ids[i],
                [name for name, of in zip(names, ranks, strict=True) if of[i] <= n],
                {name: float(of[i]) for name, of in zip(names, scores, strict=True)},
                {name: of[i] for name, of in zip(names, ranks, strict=True)},
                samples.metadata_of(i),
            )
            for i in leading
            if samples is not None
        ]


def cosines_of(features: Tensor) -> Tensor:
    """Cosines [Q, Q] of gradients [M, Q, k], mean over the M checkpoints."""
    unit = F.normalize(features.double(), dim=2)
    return (unit @ unit.transpose(1, 2)).mean(0).float().clamp(-1, 1)


def warn_of_alike(concepts: Sequence[Concept], seeds: Sequence[int], cosines: Tensor) -> None:
    """Warns of different concepts of one image (or of none) whose gradients nearly coincide."""
    alike = []
    for i, j in (cosines.triu(1) > ALIKE).nonzero().tolist():
        one, other = concepts[i], concepts[j]
        if _are_of_one_image(one, other, seeds[i], seeds[j]) and _ask_otherwise(one, other):
            alike.append(f"{one.name!r} and {other.name!r} ({float(cosines[i, j]):.2f})")
    if alike:
        warnings.warn(
            f"The gradients of these concepts nearly coincide (cosine above {ALIKE}): "
            f"{', '.join(alike)}. Their rankings do not tell them apart. HINT: look at what each "
            "absent side leaves (print(concept)); the model may not know them as two.",
            CoincidingConceptsWarning,
            stacklevel=3,
        )


def _are_of_one_image(one: Concept, other: Concept, seed: int, other_seed: int) -> bool:
    if isinstance(one.image, Tensor) and isinstance(other.image, Tensor):
        return torch.equal(one.image, other.image)
    if one.image is None and other.image is None:
        return True
    return (
        one.image == "generated" == other.image
        and one.present == other.present
        and seed == other_seed
    )


def _ask_otherwise(one: Concept, other: Concept) -> bool:
    if one.image is None and other.image is None:
        return one.isolated().present != other.isolated().present
    return one.absent != other.absent
