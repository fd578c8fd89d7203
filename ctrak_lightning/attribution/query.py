"""Query: what was asked, and its gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.capture.trace import FeatureParts
from ctrak_lightning.errors import ConceptError, TaskError
from ctrak_lightning.methods.trajectories import Trajectory
from ctrak_lightning.tasks import DiffusionTask, Spec, name_of


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


def spec_key(spec: Spec) -> str:
    """Equal for equal conditions, whatever the order of their attributes."""
    return repr(sorted(spec.items()) if isinstance(spec, Mapping) else spec)
