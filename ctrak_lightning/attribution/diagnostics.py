"""How far one answer can be trusted, and when it says nothing: what a page, the command line and a
monitor tell first.

No label is needed. The thresholds lie in the gaps between what ``recipes/benchmarks/learnt.py``
measured; what they miss stands in ``docs/report.md`` and ``recipes/benchmarks/results/learnt.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning.attribution.scoring import (
    SCORES_AT_ONCE,
    Factors,
    chosen_scores,
    compared,
    ensemble,
    exposed_at,
)
from ctrak_lightning.capture.trace import FAINT
from ctrak_lightning.methods.damping import Fixed
from ctrak_lightning.metrics.functional import spearman
from ctrak_lightning.store import Checkpoint, TraceStore

LOOKED_AT = 256
"""Training images, evenly spaced over the data set, at most."""


def neighbours(images: Tensor) -> Tensor:
    """Correlation of neighbouring pixels [B] of images [B, C, H, W]: near 0 of noise, 1 of a flat
    image."""
    centred = images.double() - images.double().mean((2, 3), keepdim=True)
    pairs = [(centred[..., :-1], centred[..., 1:]), (centred[..., :-1, :], centred[..., 1:, :])]
    products = torch.stack([(a * b).flatten(1).sum(1) for a, b in pairs]).sum(0)
    sizes = torch.stack([(a.square() + b.square()).flatten(1).sum(1) / 2 for a, b in pairs]).sum(0)
    return torch.where(sizes > 0, products / sizes.clamp(min=torch.finfo(sizes.dtype).tiny), 1.0)


def beside(image: Tensor, thumbnails: Tensor) -> tuple[float, float]:
    """The correlation of an image's neighbouring pixels at the size of the thumbnails, and the 1 %
    quantile of theirs.

    Args:
        image: [3, H, W].
        thumbnails: uint8 [N, h, w, 3].
    """
    total = len(thumbnails)
    count = min(LOOKED_AT, total)
    rows = torch.tensor([i * total // count for i in range(count)])
    training = thumbnails[rows].permute(0, 3, 1, 2).float()
    own = F.interpolate(image.detach().cpu().float().unsqueeze(0), training.shape[-2:], mode="area")
    return float(neighbours(own)), float(neighbours(training).quantile(0.01))


ASKED = 64
EQUAL = 1e-4
"""A relative difference of scores that rounding makes of equal traces."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How many of the ``asked`` training samples, taken as questions, rank themselves ``first``."""

    first: int
    asked: int


def self_check(
    checkpoints: Sequence[Checkpoint],
    damping: float | None,
    *,
    factors: Factors = (),
    weights: Sequence[float] | None = None,
    asked: int = ASKED,
) -> SelfCheck:
    """Does a training sample attribute to itself? Stored traces, taken as queries through the same
    kernel.

    Where few do, the traces hardly tell the samples apart (too few features, or too little
    damping), and no ranking of them says much. Where all do, that alone does not make a ranking
    right. How often samples were trained on is left out, for it says nothing of their traces; one
    that the data has several times comes first with its equals.

    Args:
        checkpoints: of one store.
        damping: of the kernel; None leaves it out.
        factors: as in :func:`~ctrak_lightning.attribution.scoring.chosen_scores`.
        weights: of the checkpoints, as in :func:`~ctrak_lightning.attribution.scoring.ensemble`.
        asked: how many samples to take, evenly spaced over those that were trained on.

    Raises:
        CorruptStoreError: The store is damaged.
    """
    total = checkpoints[0].rows
    told: Factors = tuple(factor for factor in factors if factor != "exposures")
    exposed = exposed_at(checkpoints)
    usable = torch.arange(total) if exposed is None else compared(exposed).nonzero().flatten()
    count = min(asked, len(usable))
    samples = usable[[i * len(usable) // count for i in range(count)]]
    first = 0
    for part in samples.split(max(1, SCORES_AT_ONCE // (len(checkpoints) * total))):
        queries = torch.stack([checkpoint.rows_of(part).features() for checkpoint in checkpoints])
        scores, _ = chosen_scores(queries, checkpoints, Fixed(damping), factors=told)  # [M, Q, N]
        joined = ensemble(scores, weights, exposed)  # [Q, N]
        own = joined[torch.arange(len(part)), part].unsqueeze(1)
        # Equal samples' traces differ by rounding.
        first += int((joined <= own + EQUAL * own.abs()).all(1).sum())
    return SelfCheck(first=first, asked=count)


def stability(
    scores: Tensor, weights: Sequence[float] | None = None, exposed: Tensor | None = None
) -> float | None:
    """Spearman's correlation between the rankings of two halves of the checkpoints: every other
    one, and the rest.

    Args:
        scores: of each checkpoint [M, N].
        weights: of the checkpoints, as in :func:`~ctrak_lightning.attribution.scoring.ensemble`.
        exposed: which samples had been trained on at each checkpoint, bool [M, N]: those that had
            at all of them are ranked. None ranks all.

    Returns:
        In [-1, 1]; None of fewer than two checkpoints or samples, or where all samples of a half
        score the same.
    """
    ranked = torch.ones(scores.shape[1], dtype=torch.bool) if exposed is None else exposed.all(0)
    if len(scores) < 2 or int(ranked.sum()) < 2:
        return None
    halves = [
        ensemble(
            scores[start::2].double(),
            None if weights is None else weights[start::2],
            None if exposed is None else exposed[start::2],
        )[ranked]
        for start in (0, 1)
    ]
    if any(bool((half == half[0]).all()) for half in halves):
        return None
    return float(spearman(halves[0], halves[1]))


UNSTABLE = 0.1
"""A correlation between the rankings of two halves of the checkpoints below this is none to speak
of. No reason to doubt that a concept is learnt: with :func:`~ctrak_lightning.methods.influence` a
model that has hardly been trained agrees with itself best."""
INDISTINCT = 0.5
"""A share of training images that rank themselves first below this says that the traces hardly tell
them apart."""
BLIND = 0.5
"""A mean denoising loss ``mean((e - eps)^2)`` of the training images above this: predicting nothing
at all has 1."""
STILL = 1e-3
"""Losses that changed by less than this share between the first checkpoint and the last: nothing
was learnt in between."""
SMOOTH, NOISY = 0.2, 0.5
"""Where neighbouring pixels of nearly all training images correlate by more than the first, an
image with less than this share of that correlation is noise."""
NOT_LEARNT = "This model has not learnt this concept; the ranking says nothing."
NOT_SHOWN = "Nothing here shows that this model has learnt this concept; the ranking says nothing."


@dataclass(frozen=True, slots=True)
class Confidence:
    """How far the ranking of one concept can be trusted.

    Args:
        strength: of the concept; None where the method looks at one condition only.
        checkpoints: their number.
        stability: rank correlation of two halves of the checkpoints; None of one checkpoint, or
            where all score the same.
        self_check: None where the store is not at hand.
        loss: mean denoising loss of the training images at the last checkpoint; None where the
            store is not at hand.
        moved: median share by which an image's loss changed since the first checkpoint; None of one
            checkpoint.
        unlearnt: what was found that says that the concept is not learnt, in sentences.
        unshown: what was found that leaves it open, so that the ranking says nothing either, in
            sentences.
        cautions: what else to bear in mind, in sentences.
    """

    strength: float | None
    checkpoints: int
    stability: float | None
    self_check: SelfCheck | None
    loss: float | None
    moved: float | None
    unlearnt: list[str]
    unshown: list[str]
    cautions: list[str]

    @property
    def says_nothing(self) -> bool:
        """Whether the ranking says nothing. That it is False proves nothing: look at the generated
        image first."""
        return bool(self.unlearnt or self.unshown)

    @property
    def verdict(self) -> str:
        """The sentence to say before all others; empty where the ranking may say something."""
        return NOT_LEARNT if self.unlearnt else NOT_SHOWN if self.unshown else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the verdict first."""
        return {"says_nothing": self.says_nothing, "verdict": self.verdict, **asdict(self)}

    @property
    def reasons(self) -> list[str]:
        """Why the ranking says nothing, in sentences; none where it may say something."""
        return [*self.unlearnt, *self.unshown]


def judged(
    *,
    strength: float | None,
    checkpoints: int,
    stability: float | None,
    self_check: SelfCheck | None,
    loss: float | None,
    moved: float | None,
    noise: tuple[float, float] | None,
    positive: bool,
) -> Confidence:
    """What these findings mean, most of which are in :class:`Confidence`.

    Args:
        noise: as :func:`beside` gives it; None where there is nothing to compare.
        positive: whether any sample has a positive score.
    """
    return Confidence(
        strength=strength,
        checkpoints=checkpoints,
        stability=stability,
        self_check=self_check,
        loss=loss,
        moved=moved,
        unlearnt=_unlearnt(strength, loss, noise),
        unshown=_unshown(moved, self_check),
        cautions=_cautions(checkpoints, positive, stability),
    )


def _unlearnt(
    strength: float | None, loss: float | None, noise: tuple[float, float] | None
) -> list[str]:
    found = []
    if strength is not None and strength < FAINT:
        found.append(
            "It hardly tells “with the concept” from “without it”: the concept's strength is "
            f"{strength:.1e}, below {FAINT:g}."
        )
    if loss is not None and loss > BLIND:
        found.append(
            f"It has hardly learnt to draw at all: its loss on the training images is {loss:.2f}, "
            f"above {BLIND:g}, where predicting nothing has 1."
        )
    if noise is not None and is_noise(*noise):
        found.append(
            f"The generated image is noise: its neighbouring pixels correlate by {noise[0]:.2f}, "
            f"those of the training images by at least {noise[1]:.2f} (in 99 % of them)."
        )
    return found


def is_noise(own: float, lowest: float) -> bool:
    """Whether an image whose neighbouring pixels correlate by ``own`` is noise, where nearly all
    training images have at least ``lowest``."""
    return lowest > SMOOTH and own < NOISY * lowest


def _unshown(moved: float | None, check: SelfCheck | None) -> list[str]:
    found = []
    if moved is not None and moved < STILL:
        found.append(
            "Between the first checkpoint and the last the loss of a training image changed by "
            f"{moved:.1e} of itself (median), below {STILL:g}: what the model knows of the "
            "concept, it did not learn in between."
        )
    if check is not None and check.first < INDISTINCT * check.asked:
        found.append(
            f"Only {check.first} of {check.asked} training images, taken as questions, rank "
            "themselves first: these traces hardly tell the images apart."
        )
    return found


def _cautions(checkpoints: int, positive: bool, halves: float | None) -> list[str]:
    found = []
    if not positive:
        found.append("No training image has a positive score for this concept.")
    if halves is not None and halves < UNSTABLE:
        found.append(
            "The rankings of the two halves of the checkpoints hardly agree (rank correlation "
            f"{halves:.2f}): look at when each image scored."
        )
    if checkpoints < 2:
        found.append(
            "The ranking rests on a single checkpoint, so nothing can be said of its stability or "
            "of when the concept was learnt."
        )
    return found


_Checks = dict[tuple[float | None, Factors, tuple[float, ...] | None], SelfCheck]
_CHECKS: WeakKeyDictionary[TraceStore, _Checks] = WeakKeyDictionary()


def self_check_of(
    store: TraceStore, damping: float | None, factors: Factors, weights: Sequence[float] | None
) -> SelfCheck:
    """:func:`self_check`, which reads the whole store: made once for all concepts that are asked of
    it."""
    known = _CHECKS.setdefault(store, {})
    key = (damping, factors, None if weights is None else tuple(weights))
    if key not in known:
        known[key] = self_check(store.checkpoints, damping, factors=factors, weights=weights)
    return known[key]


def losses_of(store: TraceStore) -> tuple[float | None, float | None]:
    """The mean loss of the training images at the last checkpoint, and the median share by which
    theirs changed since the first: of those that had been trained on at the last one. None where
    none had, or there is one checkpoint."""
    exposed = store.checkpoints[-1].exposed()
    trained = slice(None) if exposed is None else exposed
    last = store.checkpoints[-1].losses().double()[trained]
    if not len(last):
        return None, None
    if len(store.checkpoints) < 2:
        return float(last.mean()), None
    first = store.checkpoints[0].losses().double()[trained]
    change = (last - first).abs() / first.abs().clamp(min=torch.finfo(torch.float64).tiny)
    return float(last.mean()), float(change.median())
