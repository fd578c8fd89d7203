"""Where influence arises: scores split exactly, by the query's timesteps and by its groups of
layers.

A score is linear in the query's features, and these are a sum over states and over layers. So each
part of the features has a score of its own, and the parts add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import Factors, chosen_scores, exposed_at, spreads
from ctrak_lightning.capture.trace import FeatureParts
from ctrak_lightning.methods.damping import Fixed
from ctrak_lightning.store import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The scores of one concept, split in two ways; each adds up to :attr:`Attribution.scores`.

    Args:
        timesteps: of the S states at which the query was asked.
        by_timestep: the part of each state [S, N].
        by_layer_group: the part of each group of layers [N], such as ``"cross-attention"``.
    """

    timesteps: list[int]
    by_timestep: Tensor
    by_layer_group: dict[str, Tensor]


def score_parts(
    features: Sequence[FeatureParts],
    checkpoints: Sequence[Checkpoint],
    scores: Tensor,
    damping: float | None,
    *,
    factors: Factors,
    weights: Sequence[float] | None,
) -> Parts:
    """The parts of one query's scores.

    Args:
        features: of this query, for each of the M checkpoints.
        checkpoints: of the store.
        scores: the query's whole scores [M, N].
        damping: as it was used for them.
        factors: as in :func:`~ctrak_lightning.attribution.scoring.chosen_scores`.
        weights: of the checkpoints, as in :func:`~ctrak_lightning.attribution.scoring.ensemble`.
    """
    names = list(features[0].by_layer_group)
    timesteps = features[0].timesteps
    rows = torch.stack(
        [
            torch.cat([*part.by_timestep, *(part.by_layer_group[name] for name in names)])
            for part in features
        ]
    )  # [M, S + G, k]
    split, _ = chosen_scores(rows, checkpoints, Fixed(damping), factors=factors)  # [M, S + G, N]
    # The checkpoints' units are those of the whole: a part in units of its own would not add up.
    if weights is None:
        units = 1 / spreads(scores.double(), exposed_at(checkpoints)) / len(checkpoints)  # [M, 1]
    else:
        units = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    joined = (split * units.unsqueeze(1)).sum(0).float()
    return Parts(
        timesteps=timesteps,
        by_timestep=joined[: len(timesteps)],
        by_layer_group=dict(zip(names, joined[len(timesteps) :], strict=True)),
    )


def concatenated(parts: Sequence[FeatureParts]) -> FeatureParts:
    """The parts of several batches of queries as one."""
    return FeatureParts(
        parts[0].timesteps,
        torch.cat([part.by_timestep for part in parts], 1),
        {
            name: torch.cat([part.by_layer_group[name] for part in parts])
            for name in parts[0].by_layer_group
        },
    )


def mean_parts(several: Sequence[Sequence[FeatureParts]]) -> list[FeatureParts]:
    """The mean of several queries' parts, at each checkpoint."""
    means = []
    for at_one in zip(*several, strict=True):
        layers = {
            name: torch.stack([part.by_layer_group[name] for part in at_one]).mean(0)
            for name in at_one[0].by_layer_group
        }
        by_timestep = torch.stack([part.by_timestep for part in at_one]).mean(0)
        means.append(FeatureParts(at_one[0].timesteps, by_timestep, layers))
    return means
