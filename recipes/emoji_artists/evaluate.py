"""Whether a ranking finds the images that share a held-out pair's object, or its artist."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning import Concept
from ctrak_lightning.metrics import ConceptRPrecision
from ctrak_lightning.store import SampleTable

from .data import KINDS


@dataclass(frozen=True)
class Question:
    """A held-out pair and one of its two concepts."""

    object: str
    artist: str
    kind: str

    @property
    def value(self) -> str:
        return self.object if self.kind == "object" else self.artist

    @property
    def group(self) -> str:
        """The kind of question, as tables name it."""
        return self.kind

    def concept(self) -> Concept:
        """The pair against the pair without this concept."""
        present = {"object": self.object, "artist": self.artist}
        absent = {kind: value for kind, value in present.items() if kind != self.kind}
        return Concept(self.value, present, absent)


def questions(pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """Both concepts of every held-out pair."""
    return [Question(name, artist, kind) for name, artist in pairs for kind in KINDS]


def relevant(question: Question, samples: SampleTable) -> Tensor:
    """Which training samples carry the concept, bool [N]."""
    return torch.tensor([value == question.value for value in samples.metadata[question.kind]])


def r_precision(
    asked: Sequence[Question], scores: Sequence[Tensor], samples: SampleTable
) -> dict[str, float]:
    """Mean R-precision per kind of concept: of the R best-ranked samples, the share that is
    relevant, R = all relevant."""
    result = {}
    for kind in KINDS:
        metric = ConceptRPrecision()
        for question, found in zip(asked, scores, strict=True):
            if question.kind == kind:
                metric.update(found, relevant(question, samples))
        result[kind] = float(metric.compute())
    return result


def chance(asked: Sequence[Question], samples: SampleTable) -> dict[str, float]:
    """Expected R-precision of a random ranking: the mean share of relevant samples."""
    return {
        kind: float(
            torch.stack(
                [relevant(q, samples).float().mean() for q in asked if q.kind == kind]
            ).mean()
        )
        for kind in KINDS
    }
