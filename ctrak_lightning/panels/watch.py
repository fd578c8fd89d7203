"""Watch: what the traces so far say of a few concepts, asked again at every checkpoint."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ctrak_lightning.attribution import (
    Attribution,
    Attributor,
    CoincidingConceptsWarning,
    Concept,
    Share,
)
from ctrak_lightning.errors import GradientError, visible
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import Sampler
from ctrak_lightning.store import IncompleteStoreWarning, TraceStore
from ctrak_lightning.tasks import DiffusersTask, DiffusionTask
from ctrak_lightning.utilities.dtypes import device_of
from ctrak_lightning.utilities.rng import isolated_rng


@dataclass(frozen=True, slots=True)
class Answer:
    """What the traces say of a concept: a ``result``, or the ``problem`` why there is none."""

    concept: Concept
    result: Attribution | None
    problem: str = ""

    @property
    def says_nothing(self) -> bool:
        """Whether there is a ranking, and it says nothing (:attr:`Attribution.confidence`)."""
        return self.result is not None and self.result.confidence.says_nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What a panel shows of an answer.

    Args:
        group: the metadata column that names the owner, or None.
        top: number of proponents.
        bottom: number of opponents.
        shares: of the groups, largest first; empty where there are none.
    """

    group: str | None
    top: int = 8
    bottom: int = 4
    shares: Sequence[Share] = ()


class Watch:
    """Generates and attributes the same concepts whenever asked, in the middle of training.

    Args:
        concepts: the questions.
        seed: of every generated image.
        sampler: how images are generated.
    """

    def __init__(
        self, concepts: Sequence[Concept], *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        self.concepts = list(concepts)
        self.seed = seed
        self.sampler = sampler
        self._warned: set[str] = set()

    def ask(
        self,
        path: str | Path,
        module: nn.Module,
        task: DiffusersTask | DiffusionTask | None = None,
        method: Method | None = None,
    ) -> tuple[TraceStore, list[Answer]]:
        """Generates the images under the weights of the store's last checkpoint, and asks all of
        its checkpoints.

        The module's weights, flags and the surrounding random state are afterwards what they were.

        Args:
            path: the store.
            module: the model that is being trained and traced.
            task: how it is addressed, if it is no DiffusionTask itself.
            method: how to ask; None takes the store's own.

        Warns:
            UserWarning: the ranking of a concept says nothing; once for each.
        """
        with _without_repetition():
            store = TraceStore(path)
            with isolated_rng(self.seed):
                # A look during training is no answer given to anyone, so it is not noted in the
                # ledger.
                attributor = Attributor(
                    store,
                    module,
                    task=task,
                    method=method,
                    sampler=self.sampler,
                    device=device_of(module),  # it trains there
                    record=False,
                )
                answers = self._answers(attributor)
        self._warn_of_unlearnt(answers)
        return store, answers

    def _answers(self, attributor: Attributor) -> list[Answer]:
        try:
            results = attributor.attribute_many(self.concepts, self.seed)
            return [Answer(result.concept, result) for result in results]
        except GradientError:
            # One concept that the model cannot tell apart yet is no reason to lose the others.
            return [self._answer(attributor, concept) for concept in self.concepts]

    def _answer(self, attributor: Attributor, concept: Concept) -> Answer:
        try:
            return Answer(concept, attributor.attribute(concept, self.seed))
        except GradientError as error:
            return Answer(concept, None, str(error))

    def _warn_of_unlearnt(self, answers: Sequence[Answer]) -> None:
        found = [
            a.concept.name for a in answers if a.says_nothing and a.concept.name not in self._warned
        ]
        self._warned.update(found)
        if found:
            warnings.warn(
                "The rankings of these concepts say nothing so far: "
                f"{', '.join(map(visible, found))}. Their panels say why. HINT: wait for later "
                "checkpoints, and look at the generated images. Warned once for each concept.",
                UserWarning,
                stacklevel=3,
            )


@contextmanager
def _without_repetition() -> Iterator[None]:
    """Leaves out warnings that would come at every checkpoint, and are shown in the panels or
    elsewhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "damping='agreement' compares checkpoints", UserWarning)
        warnings.filterwarnings("ignore", "The concept direction .* is below", UserWarning)
        warnings.filterwarnings("ignore", category=IncompleteStoreWarning)
        # Early in training all concepts look alike.
        warnings.filterwarnings("ignore", category=CoincidingConceptsWarning)
        yield
