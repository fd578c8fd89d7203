"""Rankings without a gradient: what a user would try first, and what every gradient method must
beat."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.result import Attribution
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.store import SampleTable

ImageEncoder = Callable[[Tensor], Tensor]
TextEncoder = Callable[[Sequence[str]], Tensor]


def image_similarity(
    images: Tensor, known: SampleTable | Tensor, encoder: ImageEncoder | None = None
) -> Tensor:
    """Scores [Q, N] by likeness of the training images to generated ones.

    Args:
        images: generated images [Q, 3, H, W] in [0, 1].
        known: the training images [N, 3, h, w] in [0, 1] or as bytes, or the samples of a store
            with thumbnails.
        encoder: images [B, 3, h, w] in [0, 1] to embeddings [B, d], compared by cosine; without it
            pixels are compared, by the negative root mean square difference.

    Raises:
        ValueError: the store has no thumbnails, or the encoder returns another shape.
    """
    if isinstance(known, SampleTable):
        if known.thumbnails is None:
            raise ValueError(
                "image_similarity: the store has no thumbnails. HINT: trace with thumbnails=True, "
                "and a task with decode()."
            )
        known = known.thumbnails.permute(0, 3, 1, 2)
    asked = F.interpolate(images.float(), known.shape[-2:], mode="bilinear", antialias=True)
    if encoder is not None:
        return _cosine(_embedded(encoder, asked), _embedded(encoder, _in_unit(known)))
    # Some at a time: as float32 they take four times the room of thumbnails.
    distances = [
        torch.cdist(asked.flatten(1), _in_unit(part).flatten(1)) for part in known.split(4096)
    ]
    return -torch.cat(distances, 1) / math.sqrt(known[0].numel())


def _in_unit(images: Tensor) -> Tensor:
    """Images in [0, 1], of thumbnails in bytes too."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def label_search(
    concepts: Sequence[Concept],
    known: SampleTable | Mapping[str, Sequence[str]],
    columns: Mapping[str, str] | None = None,
) -> Tensor:
    """Scores [Q, N]: 1 for samples labelled with all of the concept's own attributes, else 0.

    Args:
        concepts: asked by attributes.
        known: columns of labels, one label per sample; or the samples of a store whose metadata
            holds them.
        columns: the column of each attribute; by default the one of the attribute's name.

    Raises:
        ConceptError: a concept is asked by prompt, or its attribute has no column.
    """
    labels = known.metadata if isinstance(known, SampleTable) else known
    rows = []
    for concept in concepts:
        alone = concept.isolated().present
        if isinstance(alone, str):
            raise ConceptError(
                f"label_search(Concept({concept.name!r})): asked by prompt, expected attributes. "
                "HINT: use text_search."
            )
        match = torch.ones(len(next(iter(labels.values()), ())), dtype=torch.bool)
        for attribute, value in alone.items():
            column = (columns or {}).get(attribute, attribute)
            if column not in labels:
                raise ConceptError(
                    f"label_search(Concept({concept.name!r})): no metadata column {column!r} for "
                    f"attribute {attribute!r}. Known: {', '.join(sorted(labels)) or 'none'}. HINT: "
                    f"columns={{{attribute!r}: ...}}."
                )
            match &= torch.tensor([label == value for label in labels[column]])
        rows.append(match.float())
    return torch.stack(rows)


def text_search(
    texts: Sequence[str],
    known: SampleTable | Sequence[str],
    encoder: TextEncoder,
    column: str = "caption",
) -> Tensor:
    """Scores [Q, N] by the cosine of text embeddings: of the concept's words and of the samples'
    captions.

    Args:
        texts: one per question, such as ``"a cat"``.
        known: the captions, or the samples of a store with captions.
        encoder: texts to embeddings [B, d].
        column: a store's metadata column of the captions.

    Raises:
        ValueError: no such column, or the encoder returns another shape.
    """
    if isinstance(known, SampleTable):
        if column not in known.metadata:
            names = ", ".join(sorted(known.metadata)) or "none"
            raise ValueError(
                f"text_search(column={column!r}): no such metadata column. The store has: {names}."
            )
        known = known.metadata[column]
    return _cosine(_embedded(encoder, texts), _embedded(encoder, known))


def random_order(questions: int, samples: int, seed: int = 0) -> Tensor:
    """Scores [Q, N] that know nothing: what every other ranking has to be better than."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(samples, generator=generator) for _ in range(questions)])


def as_attributions(
    name: str,
    scores: Tensor,
    concepts: Sequence[Concept],
    samples: SampleTable,
    images: Tensor | None = None,
) -> list[Attribution]:
    """Scores [Q, N] of a baseline as :class:`Attribution`, for the same tables and reports."""
    return [
        Attribution(
            concept=concept,
            seed=0,
            checkpoint_scores=scores[i : i + 1],
            steps=[0],
            samples=samples,
            method={"name": name},
            strength=float("nan"),
            image=None if images is None else images[i],
        )
        for i, concept in enumerate(concepts)
    ]


def _embedded(encoder: Callable[..., Tensor], inputs: Tensor | Sequence[str]) -> Tensor:
    with torch.no_grad():
        embeddings = encoder(inputs)
    if embeddings.ndim != 2 or len(embeddings) != len(inputs):
        raise ValueError(
            f"The encoder returned shape {tuple(embeddings.shape)} for {len(inputs)} inputs, "
            f"expected [{len(inputs)}, d]."
        )
    rows: Tensor = embeddings.float()
    return rows


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
