"""Damping rules: which damping of the kernel a question's scores are taken at."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ctrak_lightning.errors import MethodError, shorten
from ctrak_lightning.methods.moments import Moments
from ctrak_lightning.methods.numbers import MOST_PARTS, number, refuse
from ctrak_lightning.methods.recorded import Recorded

if TYPE_CHECKING:
    from ctrak_lightning.store import Checkpoint

AGREEMENT_GRID: tuple[float | None, ...] = (
    *(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    None,
)
"""Dampings among which ``damping="agreement"`` chooses."""
LONE_DAMPING = 10.0
"""What ``damping="agreement"`` uses where there is one checkpoint only, and so nothing to agree
with."""


class DampingRule(Recorded, ABC):
    """A rule that gives the damping of each question, without labels.

    A damping is relative to the mean eigenvalue of the traces' kernel; None leaves the kernel out.
    A rule of the whole run has a :meth:`grid` of one damping, found from the checkpoints; a rule of
    each question has several, and :meth:`choose`. Both are called whenever questions are scored. A
    rule of one's own is a frozen dataclass, and serves as ``Method(damping=MyRule())``.
    """

    @abstractmethod
    def grid(self, checkpoints: "Sequence[Checkpoint]") -> Sequence[float | None]:
        """The dampings [D] that the questions are scored at.

        Args:
            checkpoints: of the store, with their kernels, traces and losses
                (:class:`~ctrak_lightning.store.Checkpoint`).
        """

    def choose(self, moments: Moments) -> Tensor:
        """Which of several dampings each question uses, int64 [Q], from 0.

        Args:
            moments: sums over the samples of the scores at each damping, of each question, of each
                checkpoint [D, Q, M]; of the samples that had been trained on at all checkpoints.
        """
        raise MethodError(
            f"{self}: its grid has several dampings, and {type(self).__name__} has no choose(): "
            "expected one damping, or a choose(moments) that picks one for each question."
        )


def checked_damping(part: Any, damping: Any, field: str) -> float | None:
    """A damping as a plain number, or None.

    Raises:
        MethodError: it is no finite number above 0.
    """
    found = number(damping)
    if damping is not None and (found is None or found <= 0):
        refuse(part, field, "a finite number > 0, or None for no kernel, each")
    return found


@dataclass(frozen=True)
class Fixed(DampingRule):
    """The same damping for every question; ``Method(damping=1.0)``.

    Args:
        damping: more than 0; None leaves the kernel out.
    """

    damping: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", checked_damping(self, self.damping, "damping"))

    def grid(self, checkpoints: "Sequence[Checkpoint]") -> Sequence[float | None]:
        return (self.damping,)


@dataclass(frozen=True)
class Agreement(DampingRule):
    """The damping at which the checkpoints agree most: the mean Pearson correlation of their scores
    over pairs of them is largest; ``Method(damping="agreement")``.

    It needs no label. What a concept owes its samples is the same at every checkpoint of a run that
    has learnt it; the noise that a kernel's inverse amplifies is not.

    Args:
        dampings: to choose among, up to a thousand.
    """

    dampings: tuple[float | None, ...] = AGREEMENT_GRID

    def __post_init__(self) -> None:
        given: Any = self.dampings
        if hasattr(given, "tolist"):  # of numpy or torch
            given = given.tolist()
        if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= MOST_PARTS:
            refuse(self, "dampings", f"1 to {MOST_PARTS} dampings, (0.1, 1.0, None)")
        dampings = tuple(checked_damping(self, one, "dampings") for one in given)
        object.__setattr__(self, "dampings", dampings)  # JSON has lists

    def grid(self, checkpoints: "Sequence[Checkpoint]") -> Sequence[float | None]:
        if len(checkpoints) > 1:
            return self.dampings
        warnings.warn(
            f"damping='agreement' compares checkpoints and the store has one: {LONE_DAMPING} is "
            "used. HINT: trace at two or more steps, or give a damping.",
            UserWarning,
            stacklevel=5,  # of grid_of, of the scores, of the Attributor
        )
        return (LONE_DAMPING,)

    def choose(self, moments: Moments) -> Tensor:
        return moments.agreement().argmax(0)


@dataclass(frozen=True)
class SharedAgreement(Agreement):
    """One damping for all questions that are scored together: the one at which the checkpoints agree
    most in the mean over the questions.

    The choice for each question alone is noisy. This one depends on what else is asked: ask the
    same questions together to get the same scores.
    """

    def choose(self, moments: Moments) -> Tensor:
        best = moments.agreement().mean(1).argmax()  # [D, Q] -> []
        return best.expand(moments.mean().shape[1])


Damping = float | Literal["agreement"] | None | DampingRule


def rule_of(damping: Damping) -> DampingRule:
    """The rule that a number, ``"agreement"``, None or a rule itself stands for."""
    if isinstance(damping, DampingRule):
        return damping
    return Agreement() if isinstance(damping, str) else Fixed(damping)


def grid_of(rule: DampingRule, checkpoints: "Sequence[Checkpoint]") -> Sequence[float | None]:
    """A rule's dampings.

    Raises:
        MethodError: there is none, or more than a thousand, or one is no number above 0.
    """
    given = rule.grid(checkpoints)
    try:
        grid = tuple(None if d is None else float(d) for d in given)  # a tensor's are tensors
    except (TypeError, ValueError, OverflowError):
        grid = ()
    if not 1 <= len(grid) <= MOST_PARTS or any(
        d is not None and not 0 < d < math.inf for d in grid
    ):
        raise MethodError(
            f"{shorten(rule, 120)}: its dampings are {shorten(given, 120)}; expected a sequence of "
            f"at least one, up to {MOST_PARTS}, each a number > 0, or None for no kernel. HINT: a "
            "rule of the whole run gives (number,)."
        )
    return grid


def choice(rule: DampingRule, moments: Moments) -> Tensor:
    """Which damping each question uses, int64 [Q].

    Raises:
        MethodError: the rule gives no place in its grid for each question.
    """
    dampings, questions, _ = moments.mean().shape
    given = rule.choose(moments)
    found = torch.as_tensor(given)
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if (
        not integers
        or list(found.shape) != [questions]
        or not set(found.tolist()) <= {*range(dampings)}
    ):
        raise MethodError(
            f"{rule}: choose() gave {given!r} for {questions} questions and {dampings} "
            f"dampings; expected {questions} integers from 0 to {dampings - 1}. HINT: argmax(0) of "
            "what is [D, Q]."
        )
    return found.long()
