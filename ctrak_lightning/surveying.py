"""A pass over the data before it is traced: who the samples are. It must have an end, and give each sample once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.errors import BatchError, DatasetChangedError, GradientError
from ctrak_lightning.traces import SampleTable

THUMBNAIL = 64

NO_AUGMENTATION = (
    "HINT: define `trace_dataloader()` on the DataModule or module: the same samples in a fixed order, without augmentation, and "
    "let `encode` draw nothing."
)


def bounded(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, as many as they say they are.

    Raises:
        BatchError: there are more.
    """
    try:
        count: float = len(batches)  # type: ignore[arg-type]
    except TypeError:
        count = float("inf")
    for number, batch in enumerate(batches):
        if number >= count:
            raise BatchError(
                f"The data to trace has a length of {count} batches and goes on after them: it may have no end. HINT: let "
                "trace_dataloader() give each sample once, then end."
            )
        yield batch


class Once:
    """Looks that no sample comes twice, which is how a stream without an end is noticed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def add(self, sample_ids: Sequence[str]) -> None:
        """Raises a BatchError that names samples which were there before."""
        others, again = len(self._seen), []
        for name in sample_ids:
            if name in self._seen:
                again.append(name)
            self._seen.add(name)
        if again:
            raise BatchError(
                f"The data to trace gives {len(again)} samples a second time, for example {again[:5]}, after {others} others. "
                "Expected each sample once, under an id of its own. HINT: let trace_dataloader() give each once, then end. A stream "
                "that repeats itself has no end; a data set that repeats its samples, or gives another in a broken one's place, gives it twice."
            )


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Who the samples of one batch are.

    Args:
        number: of the batch.
        shape: of a sample's latents.
        sample_ids, hashes, metadata: of its samples; the hashes are those of their content.
        thumbnails: uint8 [B, h, w, 3].
    """

    number: int
    shape: torch.Size
    sample_ids: list[str]
    hashes: list[str]
    metadata: dict[str, list[str]]
    thumbnails: Tensor | None


def table_of(batches: Sequence[Surveyed]) -> tuple[SampleTable, torch.Size]:
    """The samples of all batches, and the shape of their latents.

    Raises:
        GradientError: there are none, or latents of several shapes.
        DatasetChangedError: the batches have different columns.
    """
    if not batches:
        raise GradientError("The data set to trace is empty; expected at least one batch.")
    first = batches[0]
    for batch in batches:
        if batch.shape != first.shape:
            raise GradientError(
                f"Latents of shapes {tuple(first.shape)} and {tuple(batch.shape)} in one data set; expected "
                "one shape. HINT: trace buckets of different sizes into stores of their own."
            )
        if batch.metadata.keys() != first.metadata.keys():
            raise DatasetChangedError(
                f"Metadata columns {sorted(first.metadata)} and {sorted(batch.metadata)} in one data set; expected the "
                "same columns in every batch."
            )
    images = [batch.thumbnails for batch in batches if batch.thumbnails is not None]
    table = SampleTable(
        [sample_id for batch in batches for sample_id in batch.sample_ids],
        [digest for batch in batches for digest in batch.hashes],
        {name: [value for batch in batches for value in batch.metadata[name]] for name in first.metadata},
        torch.cat(images) if images else None,
    )
    return table, first.shape


def thumbnails_of(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as uint8 [B, h, w, 3], no side longer than THUMBNAIL."""
    images, longest = images.float(), max(images.shape[-2:])
    if longest > THUMBNAIL:
        scale = THUMBNAIL / longest
        images = torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
