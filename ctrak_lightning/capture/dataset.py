"""The data set of a capture: its batches, encoded, and where their samples stand in the sample
table."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm

from ctrak_lightning.capture.exposures import BatchIds
from ctrak_lightning.capture.identity import changed_samples, content_hashes, numbered, reloaded
from ctrak_lightning.capture.survey import (
    NO_AUGMENTATION,
    Once,
    Surveyed,
    bounded,
    require_same,
    table_of,
    thumbnails_of,
)
from ctrak_lightning.capture.trial import named
from ctrak_lightning.errors import DatasetChangedError, TaskError, TrialError
from ctrak_lightning.model.traced_model import TracedModel
from ctrak_lightning.store import SampleTable
from ctrak_lightning.tasks import DiffusionTask, Encoded, encode, name_of
from ctrak_lightning.tasks.base import described
from ctrak_lightning.utilities.processes import Processes

_LOADING = "loading the first samples (the data set, its `collate_fn`, or the DataLoader's workers)"


class TracedData:
    """The batches of a data set, which every pass must give alike."""

    def __init__(
        self,
        batches: Iterable[Any],
        task: DiffusionTask,
        model: TracedModel,
        device: torch.device,
        processes: Processes,
        *,
        progress: bool,
    ) -> None:
        self._batches = numbered(batches, task.id_column) if task.id_column is not None else batches
        self._task, self._model, self._device = task, model, device
        self._processes, self._progress = processes, progress
        self.batch_ids = BatchIds(task)
        """Reads the ids of training batches, once the data has been surveyed."""
        self._first_seen: tuple[Any, Encoded] | None = None
        self._starts: dict[int, int] = {}
        self._sample_ids: list[str] = []
        self._content: list[str] = []

    def encoded(self) -> Iterator[tuple[int, Encoded]]:
        """This process's batches, each with the position of its first sample in the sample table.

        Raises:
            DatasetChangedError: a batch is not what it was when the store began.
        """
        for number, batch in self._own():
            encoded = self._encode(batch)
            yield self._position(number, batch, encoded), encoded

    def tried(self, thumbnails: bool) -> Iterator[Encoded]:
        """The batches for the trial, with what else is made of them at every checkpoint.

        Raises:
            TrialError: loading, encoding or decoding raises; names which.
        """
        if isinstance(self._batches, Iterator):
            raise TrialError(
                f"The samples are {type(self._batches).__name__}, which can be gone through once; "
                "expected batches that can be gone through at every capture. HINT: a DataLoader, "
                "or a list of batches."
            )
        with named(_LOADING):
            own = self._own()
        while True:
            with named(_LOADING):
                item = next(own, None)
            if item is None:
                return
            _, batch = item
            # Noticed here as well: a task may keep what it has encoded once, and not compute it
            # again in the survey.
            encoding = named(f"{name_of(self._task)}.encode(batch of {_fields(batch)})")
            with encoding, torch.no_grad(), self._model.noticing():
                encoded = self._encode(batch)
            if thumbnails:
                decoding = named("thumbnails, by `pictures(batch)` or `decode(latents)`")
                with decoding, torch.no_grad():
                    self._thumbnails(batch, encoded)
            yield encoded

    def survey(self, thumbnails: bool) -> list[Surveyed]:
        """One pass over the data without the network: who this process's samples are, batch by
        batch.

        Raises:
            BatchError: a sample comes twice, or there is no end of batches.
        """
        own = []
        once = Once()
        for number, batch in tqdm(
            self._own(), desc="survey", unit="batch", leave=False, disable=not self._progress
        ):
            with self._model.noticing():
                encoded = self._encode(batch)
            self._model.notice(encoded)
            self._first_seen = self._first_seen or (batch, encoded)
            once.add(encoded.sample_ids)
            self.batch_ids.compare(batch, encoded.sample_ids)
            own.append(
                Surveyed(
                    number,
                    encoded.latents.shape[1:],
                    encoded.sample_ids,
                    content_hashes(batch, encoded),
                    {name: list(map(str, values)) for name, values in encoded.metadata.items()},
                    self._thumbnails(batch, encoded) if thumbnails else None,
                )
            )
        return own

    def table(self, own: Sequence[Surveyed]) -> tuple[SampleTable, torch.Size]:
        """The samples of all processes, and the shape of a sample's latents; all call it.

        Raises:
            GradientError, DatasetChangedError: as of :func:`table_of`.
        """
        every = [batch for batches in self._processes.gather(own) for batch in batches]
        every.sort(key=lambda batch: batch.number)
        self.batch_ids.share(self._processes)
        table, latent_shape = table_of(every)
        starts = itertools.accumulate((len(batch.sample_ids) for batch in every), initial=0)
        self._starts = {batch.number: start for batch, start in zip(every, starts, strict=False)}
        self._sample_ids, self._content = table.sample_ids, table.content_sha256
        return table, latent_shape

    def require_repeatable(self) -> None:
        """Loads and encodes the first batch once more: what draws from a generator of its own
        raises before anything has been traced.

        Raises:
            DatasetChangedError: the batch is another one.
        """
        for number, batch in self._own():
            encoded = self._encode(batch)
            self._position(number, batch, encoded)
            require_same(self._first_seen, (batch, encoded))
            break
        self._first_seen = None

    def _own(self) -> Iterator[tuple[int, Any]]:
        """The batches that are this process's, with their numbers. A batch that is None, all of
        whose samples a ``collate_fn`` has left out, is passed over."""
        rank, count = self._processes.rank, self._processes.count
        own: Iterator[tuple[int, Any]]
        if count > 1 and (part := _every(self._batches, rank, count)) is not None:
            own = zip(itertools.count(rank, count), part, strict=False)
        else:
            own = itertools.islice(enumerate(bounded(self._batches)), rank, None, count)
        return ((number, batch) for number, batch in own if batch is not None)

    def _encode(self, batch: Any) -> Encoded:
        return encode(self._task, _to(batch, self._device))

    def _thumbnails(self, batch: Any, encoded: Encoded) -> Tensor | None:
        """Of the batch's own images where the task has them, for decoding is expensive and inexact;
        uint8 [B, h, w, 3]."""
        images = self._task.pictures(batch)
        images = self._task.decode(encoded.latents) if images is None else images
        if images is None:
            return None
        if not (
            isinstance(images, Tensor)
            and images.is_floating_point()
            and images.ndim == 4
            and images.shape[:2] == (len(encoded.latents), 3)
        ):
            raise TaskError(
                f"{name_of(self._task)}: `pictures(batch)` or `decode(latents)` returned "
                f"{described(images)} for {len(encoded.latents)} samples, expected floating-point "
                f"images [{len(encoded.latents)}, 3, H, W] in [0, 1], or None. HINT: "
                "`images.expand(-1, 3, -1, -1)` of images with one channel; `images / 255` of "
                "bytes."
            )
        return thumbnails_of(images)

    def _position(self, number: int, batch: Any, encoded: Encoded) -> int:
        """Where in the sample table the ``number``-th batch begins, which must be the one that was
        surveyed."""
        position = self._starts.get(number, len(self._sample_ids))
        part = slice(position, position + len(encoded.sample_ids))
        expected = self._sample_ids[part]
        if expected != encoded.sample_ids:
            changed = sorted(set(encoded.sample_ids) - set(expected))[:5] or encoded.sample_ids[:5]
            raise DatasetChangedError(
                f"Samples from position {position} on differ from those the store began with, for "
                f"example {changed}. Expected the same samples in the same order at every capture. "
                "HINT: no shuffling in trace_dataloader()."
            )
        if altered := changed_samples(
            expected, self._content[part], content_hashes(batch, encoded)
        ):
            raise DatasetChangedError(
                f"{len(altered)} of {len(expected)} samples are not what they were when the store "
                f"began, for example {altered[:5]}. Expected the same content at every capture. "
                f"{NO_AUGMENTATION}"
            )
        return position


def _fields(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} {list(map(str, batch))}"
    return type(batch).__name__


def _every(batches: Iterable[Any], rank: int, count: int) -> DataLoader[Any] | None:
    """The ``rank``-th of every ``count`` batches of a DataLoader that goes through its data set in
    order, without loading the others; None for anything else, which must be gone through."""
    if not (isinstance(batches, DataLoader) and isinstance(batches.sampler, SequentialSampler)):
        return None
    if batches.batch_sampler is None:
        return None
    return reloaded(
        batches, batches.dataset, batch_sampler=list(batches.batch_sampler)[rank::count]
    )


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(_to(value, device) for value in batch)
    return batch
