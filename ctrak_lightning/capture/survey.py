"""A pass over the data before it is traced: who the samples are. It must have an end, and give each
sample once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.errors import BatchError, DatasetChangedError, GradientError
from ctrak_lightning.store import SampleTable
from ctrak_lightning.tasks import Encoded

THUMBNAIL = 64

NO_AUGMENTATION = (
    "HINT: define `trace_dataloader()` on the DataModule or module: the same samples in a fixed "
    "order, without augmentation, and let `encode` draw nothing."
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
                f"The data to trace has a length of {count} batches and goes on after them: it may "
                "have no end. HINT: let trace_dataloader() give each sample once, then end."
            )
        yield batch


class Once:
    """Looks that no sample comes twice, which is how a stream without an end is noticed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def add(self, sample_ids: Sequence[str]) -> None:
        """Raises a BatchError that names samples which were there before."""
        others, again = len(self._seen), []
        for name in sample_ids:  # also twice in one batch
            again += [name] if name in self._seen else []
            self._seen.add(name)
        if again:
            raise BatchError(
                f"The data to trace gives {len(again)} samples a second time, for example "
                f"{again[:5]}, after {others} others. Expected each sample once, under an id of "
                "its own. HINT: let trace_dataloader() give each once, then end. A stream that "
                "repeats itself has no end; a data set that repeats its samples, or gives another "
                "in a broken one's place, gives it twice."
            )


def require_same(first: tuple[Any, Encoded] | None, again: tuple[Any, Encoded]) -> None:
    """Holds a batch, and what it was encoded to, against the same batch loaded and encoded a second
    time.

    What draws from a generator of its own, which cannot be put back afterwards, would make every
    capture's states others, and change what training draws from it.

    Raises:
        DatasetChangedError: they differ; names where.
    """
    if first is None:
        return
    (batch, encoded), (batch_again, encoded_again) = first, again
    pairs = {
        "batch": (batch, batch_again),
        "encode().latents": (encoded.latents, encoded_again.latents),
        "encode().condition": (encoded.condition, encoded_again.condition),
    }
    for where, (a, b) in pairs.items():
        found = _difference(a, b, where)
        if found is not None:
            raise DatasetChangedError(
                "Loaded and encoded twice, from the same random state of torch, numpy and Python, "
                f"the first samples are not the same: {found} differs. So a generator of its own "
                "is drawn from, which every capture would advance: training would not be what it "
                f"is without traces. {NO_AUGMENTATION}"
            )


def _difference(a: Any, b: Any, where: str) -> str | None:
    """Where two values of the same structure differ by more than rounding; None where they do not,
    or cannot be compared."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype.kind in "biufc":
        a, b = torch.as_tensor(a), torch.as_tensor(b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return None if _is_close(a, b) else where
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return where
        inside = (_difference(value, b[name], f"{where}[{name!r}]") for name, value in a.items())
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return where
        inside = (
            _difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
    else:
        plain = (str, bytes, int, float, bool, np.generic)
        is_known = isinstance(a, plain) and isinstance(b, plain)
        return where if is_known and a != b and not (a != a and b != b) else None
    return next((found for found in inside if found is not None), None)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach().float(), b.detach().float()
    size = float(a.abs().nan_to_num(posinf=0.0).mean()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Who the samples of one batch are."""

    number: int
    shape: torch.Size  # of a sample's latents
    sample_ids: list[str]
    hashes: list[str]  # of the samples' content
    metadata: dict[str, list[str]]
    thumbnails: Tensor | None  # uint8 [B, h, w, 3]


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
                f"Latents of shapes {tuple(first.shape)} and {tuple(batch.shape)} in one data set; "
                "expected one shape. HINT: trace buckets of different sizes into stores of their "
                "own."
            )
        if batch.metadata.keys() != first.metadata.keys():
            raise DatasetChangedError(
                f"Metadata columns {sorted(first.metadata)} and {sorted(batch.metadata)} in one "
                "data set; expected the same columns in every batch."
            )
    images = [batch.thumbnails for batch in batches if batch.thumbnails is not None]
    table = SampleTable(
        [sample_id for batch in batches for sample_id in batch.sample_ids],
        [digest for batch in batches for digest in batch.hashes],
        {
            name: [value for batch in batches for value in batch.metadata[name]]
            for name in first.metadata
        },
        torch.cat(images) if images else None,
    )
    return table, first.shape


def thumbnails_of(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as uint8 [B, h, w, 3], no side longer than THUMBNAIL."""
    images, longest = images.float(), max(images.shape[-2:])
    if longest > THUMBNAIL:
        scale = THUMBNAIL / longest
        resize = torch.nn.functional.interpolate
        images = resize(images, scale_factor=scale, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
