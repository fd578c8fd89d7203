"""Query: what was asked, and its gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.task import Spec
from ctrak_lightning.tracing import FeatureParts
from ctrak_lightning.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Query:
    """What was asked, and its gradients.

    Args:
        concepts: the Q questions.
        seeds: of each.
        features: [M, Q, k], the gradients under the weights of each of the M checkpoints.
        strength: of each concept [Q] (see :func:`ctrak_lightning.tracing.trace_query`).
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
