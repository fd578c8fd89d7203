"""Attributions made by hand, for the panels' tests."""

from typing import Any

import torch
from torch import Tensor

from ctrak_lightning import Attribution, Concept, methods
from ctrak_lightning.panels import Answer
from ctrak_lightning.store import SampleTable


def thumbnails(n: int, height: int = 16, width: int = 16) -> Tensor:
    """Noise, so that no two images and no two corners of an image are alike."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8)


def result_of(
    scores: list[float] | Tensor,
    metadata: dict[str, list[str]] | None = None,
    *,
    ids: list[str] | None = None,
    images: Tensor | None = None,
    name: str = "owl",
    **facts: Any,
) -> Attribution:
    values = torch.as_tensor(scores, dtype=torch.float32)
    n = len(values)
    table = SampleTable(ids or [f"s{i}" for i in range(n)], [""] * n, metadata or {}, images)
    arguments: dict[str, Any] = {"strength": 0.25, "seed": 3, "steps": [300], "damping": 10.0}
    return Attribution(
        concept=Concept(name, {"object": "owl", "artist": "noto"}, {"artist": "noto"}),
        checkpoint_scores=values[None],
        samples=table,
        method=methods.concept_trak().to_dict(),
        **(arguments | facts),
    )


def answer_of(*args: Any, **kwargs: Any) -> Answer:
    result = result_of(*args, **kwargs)
    return Answer(result.concept, result)
