"""Checkpoint ensembles: how much each checkpoint's scores count in the score of a sample."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ctrak_lightning.errors import MethodError, StoreMismatchError, shorten
from ctrak_lightning.methods.recorded import Recorded

if TYPE_CHECKING:
    from ctrak_lightning.store import Checkpoint


class EnsembleRule(Recorded, ABC):
    """A rule that weighs checkpoints. One of one's own is a frozen dataclass, and serves as
    ``Method(ensemble=MyRule())``."""

    @abstractmethod
    def weights(self, checkpoints: "Sequence[Checkpoint]") -> list[float] | None:
        """The factor of each checkpoint's scores [M] in their sum; None averages them, each in
        units of its own standard deviation over the samples."""


@dataclass(frozen=True)
class Standardised(EnsembleRule):
    """The average, each checkpoint in units of its own standard deviation;
    ``Method(ensemble="standardised")``."""

    def weights(self, checkpoints: "Sequence[Checkpoint]") -> list[float] | None:
        return None


@dataclass(frozen=True)
class LearningRate(EnsembleRule):
    """The sum, each checkpoint times the learning rate it was made at (TracIn, arXiv 2002.08484);
    ``Method(ensemble="learning_rate")``."""

    def weights(self, checkpoints: "Sequence[Checkpoint]") -> list[float] | None:
        missing = [one.step for one in checkpoints if one.learning_rate is None]
        if missing:
            raise StoreMismatchError(
                "Method(ensemble='learning_rate'): the store has no learning rate for steps "
                f"{missing}. HINT: Capture.run(..., learning_rate=...), or ensemble='standardised'."
            )
        return [float(one.learning_rate) for one in checkpoints if one.learning_rate is not None]


def weights_of(rule: EnsembleRule, checkpoints: "Sequence[Checkpoint]") -> list[float] | None:
    """A rule's weights.

    Raises:
        MethodError: they are not one finite number for each checkpoint.
        StoreMismatchError: the store lacks what the rule goes by.
    """
    given: Any = rule.weights(checkpoints)
    if given is None:
        return None
    try:
        weights = [float(weight) for weight in given]
    except (TypeError, ValueError, OverflowError):
        weights = []
    if len(weights) != len(checkpoints) or not all(map(math.isfinite, weights)):
        raise MethodError(
            f"{shorten(rule, 120)}: its weights are {shorten(given, 120)}; expected a finite "
            f"number for each of {len(checkpoints)} checkpoints, or None for the average. HINT: "
            "[1.0] * len(checkpoints) is their sum."
        )
    return weights


Ensemble = Literal["standardised", "learning_rate"] | EnsembleRule


def ensemble_of(ensemble: Ensemble) -> EnsembleRule:
    """The rule that a name, or a rule itself, stands for."""
    if isinstance(ensemble, EnsembleRule):
        return ensemble
    return LearningRate() if ensemble == "learning_rate" else Standardised()
