"""Queries: how questions become gradients under the weights of every checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ctrak_lightning.attribution.checkpoint_model import CheckpointModel
from ctrak_lightning.attribution.concept import Concept, check_known
from ctrak_lightning.attribution.generation import Generator, spec_key
from ctrak_lightning.attribution.parts import concatenated, mean_parts
from ctrak_lightning.capture.trace import FeatureParts, QueryTrace, trace_query, warn_if_faint
from ctrak_lightning.errors import ConceptError, GradientError, TaskError
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.objectives import Side
from ctrak_lightning.methods.trajectories import Generated, Generation, Noised, State, Trajectory
from ctrak_lightning.tasks import Condition, DiffusionTask, name_of
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.rng import isolated_rng

Given = Literal["inverted", "noised"]


@dataclass(frozen=True, kw_only=True)
class Query:
    """What was asked, and its gradients.

    Args:
        concepts: the Q questions.
        seeds: of each.
        features: [M, Q, k], the gradients under the weights of each of the M checkpoints.
        strength: of each concept [Q] (see :func:`ctrak_lightning.capture.trace.trace_query`).
        images: [Q, 3, H, W] in [0, 1], where the task can decode.
        trajectories: of each question's states, None where it is the method's own.
        parts: of each question's features, at each checkpoint, where they were asked for.
    """

    concepts: list[Concept]
    seeds: list[int]
    features: Tensor
    strength: Tensor
    images: Tensor | None
    trajectories: list[Trajectory | None] | None = None
    parts: list[list[FeatureParts]] | None = None

    def trajectory(self, i: int) -> Trajectory | None:
        """That of question ``i``, or None where it is the method's own."""
        return None if self.trajectories is None else self.trajectories[i]


def assembled(queries: Sequence[Query], places: Sequence[Sequence[int]]) -> Query:
    """Several queries as one.

    Args:
        queries: one or more.
        places: of each query's questions in the whole.
    """
    if len(queries) == 1:
        return queries[0]
    order = torch.tensor([place for some in places for place in some]).argsort()
    images = [query.images for query in queries if query.images is not None]

    def ordered(values: list) -> list:  # type: ignore[type-arg]
        return [values[i] for i in order.tolist()]

    return Query(
        concepts=ordered([concept for query in queries for concept in query.concepts]),
        seeds=ordered([seed for query in queries for seed in query.seeds]),
        features=torch.cat([query.features for query in queries], 1)[:, order],
        strength=torch.cat([query.strength for query in queries])[order],
        images=torch.cat(images)[order] if len(images) == len(queries) else None,
        trajectories=ordered(
            [query.trajectory(i) for query in queries for i in range(len(query.concepts))]
        ),
        parts=None
        if any(query.parts is None for query in queries)
        else ordered([parts for query in queries for parts in query.parts or []]),
    )


class QueryGradients:
    """Takes the gradients of questions.

    Args:
        model: of the store that is asked.
        method: how to ask.
        generator: of images.
        given: which states of an existing image, where the method looks at those of a generation.
        row_limit: of rows per forward pass.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: CheckpointModel,
        method: Method,
        generator: Generator,
        given: Given,
        row_limit: RowLimit,
        progress: bool,
    ) -> None:
        self.model = model
        self.method = method
        self.generator = generator
        self.given = given
        self._row_limit = row_limit
        self._progress = progress

    def of_images(self, concepts: Sequence[Concept], parts: bool) -> Query:
        """Questions about images that exist, of the concepts' own."""
        with self.model.evaluating():
            shape, like = self.model.latent_shape, self.model.like
            each = [latents_of(self.model.task, concept, shape, like) for concept in concepts]
        return self.of_latents(concepts, torch.cat(each), parts)

    def of_latents(self, concepts: Sequence[Concept], latents: Tensor, parts: bool) -> Query:
        """Questions about images that exist, as clean latents [Q, ...]."""
        method, given, noised = self.method, Generation([], latents), None
        if isinstance(method.query_trajectory, Generated):
            if self.given == "inverted":
                given = self.generator.invert([one.present for one in concepts], latents, 1.0)
            else:
                steps = method.query_trajectory.timesteps or self.generator.sampler.steps
                noised = Noised(timesteps=steps)
                method = replace(method, query_trajectory=noised)
        found = self.of_generation(concepts, [0] * len(concepts), given, method, parts)
        return replace(found, trajectories=[noised] * len(concepts))

    def of_distribution(
        self, concepts: Sequence[Concept], seeds: Sequence[int], images: int, parts: bool
    ) -> Query:
        """Questions about no image: the mean over ``images`` generated of each concept alone; equal
        ones are asked once."""
        isolated = [concept.isolated() for concept in concepts]
        for concept in isolated:
            check_known(concept, self.model.task)
        keys = [
            (spec_key(concept.present), seed) for concept, seed in zip(isolated, seeds, strict=True)
        ]
        once = dict(zip(keys, isolated, strict=True))
        several = [concept for concept in once.values() for _ in range(images)]
        of_each = [seed + i for _, seed in once for i in range(images)]
        made = self.generator.generate([concept.present for concept in several], of_each)
        each = self.of_generation(several, of_each, made, self.method, parts)
        rows = torch.tensor([list(once).index(key) for key in keys])
        shape = (len(self.model.store.checkpoints), len(once), images, -1)
        split = None
        if each.parts is not None:
            means = [mean_parts(each.parts[i : i + images]) for i in range(0, len(several), images)]
            split = [means[i] for i in rows.tolist()]
        return Query(
            concepts=list(concepts),
            seeds=list(seeds),
            features=each.features.view(shape).mean(2)[:, rows],
            strength=each.strength.view(-1, images).mean(1)[rows],
            images=None if each.images is None else each.images[::images][rows],
            parts=split,
        )

    def of_generation(
        self,
        concepts: Sequence[Concept],
        seeds: Sequence[int],
        generation: Generation,
        method: Method,
        parts: bool,
    ) -> Query:
        """Questions about the images of a ``generation``, one each.

        Raises:
            GradientError: a gradient is zero or not finite.
        """
        checkpoints = self.model.store.checkpoints
        features, strength = [], torch.zeros(len(concepts))
        split: list[FeatureParts] = []
        with self.model.asked(), isolated_rng(0):
            for index in tqdm(
                range(len(checkpoints)), desc="attribute", disable=not self._progress
            ):
                self.model.load(index)
                traces = self._traces(concepts, generation, method, parts)
                rows = torch.cat([trace.features for trace in traces])
                _refuse_unusable(rows, concepts)
                features.append(rows)
                strength += torch.cat([trace.strength for trace in traces]) / len(checkpoints)
                if parts:
                    split.append(
                        concatenated([trace.parts for trace in traces if trace.parts is not None])
                    )
        warn_if_faint(strength, [concept.name for concept in concepts])
        each = range(len(concepts))
        return Query(
            concepts=list(concepts),
            seeds=list(seeds),
            features=torch.stack(features),
            strength=strength,
            images=self.model.decode(generation.latents),
            parts=[[at_one.query(i) for at_one in split] for i in each] if parts else None,
        )

    def _traces(
        self, concepts: Sequence[Concept], generation: Generation, method: Method, with_parts: bool
    ) -> list[QueryTrace]:
        task, tracer = self.model.task, self.model.tracer

        def traced(start: int, stop: int) -> QueryTrace:
            part, made = concepts[start:stop], generation.rows(torch.arange(start, stop))
            with torch.no_grad():
                conditions: dict[Side, Condition] = {
                    "present": self.model.condition([concept.present for concept in part]),
                    "absent": self.model.condition([concept.absent for concept in part]),
                }
            states = self._states(method.query_trajectory, made, start, conditions["present"])
            weights = weights_of(task, part, made.latents)
            return trace_query(
                *(task, tracer, method, states, made.latents, conditions),
                weights=weights,
                parts=with_parts,
            )

        return self._row_limit.run(len(concepts), traced)

    def _states(
        self, trajectory: Trajectory, made: Generation, start: int, condition: Condition
    ) -> list[State]:
        task = self.model.task
        if isinstance(trajectory, Generated):
            return trajectory.select(made, task.noise_schedule)
        ids = [f"query-{start + i}" for i in range(len(made.latents))]
        with torch.no_grad():
            seed = self.model.noise_seed
            return list(trajectory.states(task, made.latents, condition, ids, seed))


def _refuse_unusable(features: Tensor, concepts: Sequence[Concept]) -> None:
    bad = ~torch.isfinite(features).all(1) | (features == 0).all(1)
    if bad.any():
        names = [concepts[i].name for i in bad.nonzero().flatten().tolist()]
        raise GradientError(
            f"The gradients of these concepts are zero or not finite: {names}. Expected a "
            "model that tells `present` from `absent`. HINT: look at the generated images, "
            "and at the loss of the run."
        )


@torch.no_grad()
def latents_of(task: DiffusionTask, concept: Concept, shape: Sequence[int], like: Tensor) -> Tensor:
    """The clean latents [1, ...] of a concept's own image.

    Args:
        task: a DiffusionTask.
        concept: with an image.
        shape: of a traced sample's latents.
        like: whose device and dtype they get.

    Raises:
        TaskError: the task has no ``latents``.
        ConceptError: the image's latents have another shape.
    """
    assert isinstance(concept.image, Tensor)
    latents = task.latents(concept.image[None].to(like))
    if latents is None:
        raise TaskError(
            f"{name_of(task)} has no `latents`, which a question about an existing image needs: "
            "expected a method latents(images [B, 3, H, W] in [-1, 1]) that returns clean latents "
            "[B, ...], as encode(batch) makes them. HINT: move those lines of encode into it."
        )
    if list(latents.shape[1:]) != list(shape):
        raise ConceptError(
            f"Concept({concept.name!r}, image of {list(concept.image.shape)}): its latents are "
            f"{list(latents.shape[1:])}, expected {list(shape)}, as of the traced images. HINT: "
            "resize or crop the image to their size."
        )
    return latents.to(like)


def weights_of(task: DiffusionTask, concepts: Sequence[Concept], like: Tensor) -> Tensor | None:
    """The concepts' masks as weights of latents [B, ...] like ``like``, 1 where there is no mask;
    None if no concept has one.

    ``task.latent_mask(mask [H, W])`` gives the weights, where the task has it; else, of latents [C,
    h, w], the mean of the mask over what each latent position covers.

    Raises:
        TaskError: the latents have another form and the task no ``latent_mask``, or one that gives
            another shape.
        ConceptError: the mask has other proportions than the latents, or fewer pixels.
    """
    if all(concept.mask is None for concept in concepts):
        return None
    rows = [_weights(task, concept, concept.mask, like[i]) for i, concept in enumerate(concepts)]
    return torch.stack(rows)


def _weights(task: DiffusionTask, concept: Concept, mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(like)
    shape = list(like.shape)
    found = task.latent_mask(mask.to(like))
    if found is not None:
        try:
            return found.to(like).expand(shape)
        except RuntimeError as error:
            raise TaskError(
                f"{name_of(task)}.latent_mask(mask {list(mask.shape)}) returned "
                f"{list(found.shape)}, expected weights of a latent {shape}, or what broadcasts to "
                "it."
            ) from error
    if len(shape) != 3:
        raise TaskError(
            f"{name_of(task)} has latents {shape} and no `latent_mask`, which a question about a "
            "part of an image needs: expected a method latent_mask(mask [H, W]) that returns "
            "weights of that shape."
        )
    (height, width), (rows, columns) = mask.shape, shape[1:]
    if height * columns != width * rows or height < rows:
        raise ConceptError(
            f"Concept({concept.name!r}, mask {[height, width]}): expected as many pixels as the "
            f"image, whose latents are {[rows, columns]}. HINT: resize the mask to the image."
        )
    # The mean over the area that a latent covers: complementary masks add up to 1 everywhere.
    area: Tensor = F.interpolate(mask[None, None].to(like), (rows, columns), mode="area")[0]
    return area.expand(shape)
