"""Capture: the traces of a whole data set at one checkpoint. For callbacks and for raw training
loops."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm

from ctrak_lightning.capture.exposures import BatchIds, Exposures
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
from ctrak_lightning.capture.trace import check_batch, trace_batch
from ctrak_lightning.capture.trial import (
    SAMPLES,
    Question,
    Trial,
    first_samples,
    named,
    naming_changed_buffers,
    try_questions,
    try_samples,
)
from ctrak_lightning.errors import (
    DatasetChangedError,
    StoreError,
    StoreMismatchError,
    TrainingChangedError,
    TrialError,
)
from ctrak_lightning.gradients import (
    GradientTracer,
    UntracedParameterWarning,
    parameters_unmoved,
    undisturbed,
)
from ctrak_lightning.methods.method import Method
from ctrak_lightning.model.traced_model import TracedModel, Weights
from ctrak_lightning.store import (
    Checkpoint,
    CheckpointWriter,
    IncompleteStoreWarning,
    StoreHeader,
    TraceStore,
    TraceWriter,
)
from ctrak_lightning.store.lock import WriterLock
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.tasks import DiffusionTask, Encoded, encode, name_of, task_modules
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.processes import ALONE, Processes
from ctrak_lightning.utilities.rng import isolated_rng


class Capture:
    """Traces every sample of a data set, as often as asked, into one store.

    Before anything is written, two samples are traced on trial (:mod:`ctrak_lightning.capture.trial`),
    unless the folder holds sealed traces already. Where memory is short, batches go through the
    network in smaller parts (:class:`~ctrak_lightning.utilities.memory.RowLimit`).

    Args:
        path: the store's folder.
        owner: the module whose trained parameters are stored (a LightningModule, or the denoiser
            itself).
        task: its DiffusionTask.
        batches: the samples to trace: an iterable of batches that gives the same samples, each
            once, in the same order each time, and that ends. Where they have no ids, a DataLoader's
            samples are numbered as in its data set. A batch may be None.
        method: what to trace.
        tracer: the gradient tracer of ``task.denoiser``.
        optimizers: of the run, where they are known: what requires grad but is in none of them does
            not train.
        weights: for the record, what the owner's weights are at every :meth:`run`: ``"raw"``, those
            that train, or ``"ema"``, their average.
        seed: of the trajectories' noise and of whatever is random in ``batches``.
        dtype: of the stored rows, ``"float32"``, ``"float16"`` or ``"int8"`` (each row also has a
            float32 norm and scale).
        thumbnails: store small images for reports, where the task has ``pictures`` or can decode.
        device: where batches are moved to.
        rows_at_once: samples per forward pass at most; None takes whole batches.
        processes: those that trace together, each the batches of its turn, into one folder that all
            of them see. They make their captures, and call :meth:`run`, together.
        questions: those that will be asked while the model trains, which are tried as well.
        lock: as of :class:`~ctrak_lightning.store.TraceWriter`: to hold the folder before the data
            is gone through.

    Raises:
        StoreLockedError: another writer has the store.
        TrialError: data, task, network and method do not fit together; names the member or the
            layers, and says what to do.
        StoreMismatchError: the folder holds traces of another method, projection, model or data
            set.
        BatchError: a sample comes twice, or there is no end of batches.
        DatasetChangedError: the first batch is another one the second time.

    Warns:
        UntracedParameterWarning: the owner trains parameters outside the denoiser.
        UntrainedParameterWarning: parameters require a gradient but are in no optimizer.
    """

    def __init__(
        self,
        path: str,
        owner: nn.Module,
        task: DiffusionTask,
        batches: Iterable[Any],
        *,
        method: Method,
        tracer: GradientTracer,
        optimizers: Sequence[Optimizer] = (),
        weights: Weights = "raw",
        seed: int = 0,
        dtype: Literal["float32", "float16", "int8"] = "float32",
        thumbnails: bool = True,
        device: torch.device | str = "cpu",
        rows_at_once: int | None = None,
        progress: bool = True,
        processes: Processes = ALONE,
        questions: Sequence[Question] = (),
        lock: WriterLock | None = None,
    ) -> None:
        self.owner, self.task, self.method, self.tracer = owner, task, method, tracer
        self.batches = numbered(batches, task.id_column) if task.id_column is not None else batches
        self.seed, self.device, self.progress = seed, torch.device(device), progress
        self._row_limit = RowLimit(rows_at_once)
        self._processes = processes
        self._model = TracedModel(owner, task, optimizers, weights=weights, processes=processes)
        self._warn_of_parameters_outside()
        self.trial = (
            None
            if self._processes.from_first(has_sealed(path))
            else self._try(thumbnails, questions)
        )
        """What the trial found; None where there was none."""
        self._is_partly_seen = self.trial is not None and self.trial.blocks < self.trial.all_blocks
        self._batch_ids = BatchIds(task)
        self._first_seen: tuple[Any, Encoded] | None = None
        surveyed = self._survey(thumbnails)
        table, latent_shape = table_of(surveyed)
        starts = itertools.accumulate((len(batch.sample_ids) for batch in surveyed), initial=0)
        self._starts = {batch.number: start for batch, start in zip(surveyed, starts, strict=False)}
        self.sample_ids, self._content = table.sample_ids, table.content_sha256
        self.exposures = Exposures(self.sample_ids, processes)
        """How often each sample has entered an optimizer step of the run."""
        self._look_again()
        with isolated_rng(seed), self._tracing(), torch.no_grad():
            model = self._model.observe(latent_shape, _stored_model(path))
        header = StoreHeader(
            method=method.to_dict(),
            projection=tracer.describe(),
            model=model,
            dataset=table.facts() | {"latent_shape": list(latent_shape)},
            dim=tracer.dim,
            dtype=dtype,
        )
        self.writer = TraceWriter(path, header, processes=processes, lock=lock)
        try:
            self.writer.write_samples(table)
        except BaseException:
            self.writer.close()
            raise
        if self.writer.sealed_steps:
            self.exposures.unknown = (
                "the store was begun by an earlier run, and Capture.resume(step) was not called"
            )

    def close(self) -> None:
        """Lets others write to the store, and says how many samples of :meth:`note_step` are not in
        it; idempotent."""
        self.exposures.warn_of_untraced()
        self.writer.close()

    def note_step(self, *batches: Any) -> None:
        """After an optimizer step of a raw loop: counts the samples of the batches whose gradients
        it took (several, where they were accumulated). All processes call it together. Without it a
        store does not know how often samples were trained on.

        Raises:
            BatchError: the samples' ids cannot be read from a batch.
        """
        for batch in batches:
            self.exposures.draw(self.training_ids(batch))
        self.exposures.step()
        self.exposures.share()

    def resume(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Goes on counting exposures where a run is resumed.

        Args:
            step: optimizer steps taken before.
            state: what ``exposures.state_dict()`` was then; without it, the counts of the store's
                checkpoint of this step.

        Raises:
            StoreMismatchError: as of :meth:`require_weights_of`, which without a ``state`` must be
                the owner's.
        """
        if state is None:
            self.require_weights_of(step)
        if step == 0:
            self.exposures.unknown = None
        elif state is None or not self.exposures.load_state_dict(state):
            counts = self._exposures_at(step)
            if counts is None:
                self.exposures.unknown = (
                    f"the run goes on from step {step}, and what it saw before was not kept"
                )
            else:
                self.exposures.continue_from(counts)

    def training_ids(self, batch: Any) -> list[str]:
        """The ids of a training batch's samples.

        Raises:
            BatchError: they cannot be read.
        """
        return self._batch_ids.of(batch)

    def _exposures_at(self, step: int) -> Tensor | None:
        return self._sealed(step).exposures() if step in self.writer.sealed_steps else None

    def _sealed(self, step: int) -> Checkpoint:
        with warnings.catch_warnings():
            # Another step's, which goes on later.
            warnings.simplefilter("ignore", IncompleteStoreWarning)
            store = TraceStore(self.writer.path)
        return next(one for one in store.checkpoints if one.step == step)

    def require_weights_of(self, step: int) -> None:
        """Looks whether the run that goes on from ``step`` is the one that was traced; all
        processes call it.

        Raises:
            StoreMismatchError: the store has traces of this step, and they are of other weights
                than the owner's.
        """
        if step not in self.writer.sealed_steps:
            return
        with self._processes.sharing_errors():
            changed = self._model.changed_from(self._sealed(step).weights())
            if not changed:
                return
            raise StoreMismatchError(
                f"{self.writer.path}: its traces of step {step} are of other weights than those "
                f"that training goes on from: {len(changed)} parameters differ, such as "
                f"{changed[0]!r}. Nothing was changed. HINT: go on from the weights of the run "
                "that made the store, or name a new folder."
            )

    def run(self, step: int, *, epoch: int, learning_rate: float | None = None) -> None:
        """Traces all samples with the present weights and seals the checkpoint.

        Raises:
            DatasetChangedError: the batches no longer hold the samples of the store, or their
                content has changed.
            TrainingChangedError: other parameters train than when the capture was made.
            GradientError: a sample's gradient is zero or not finite; the message names the samples.
        """
        checkpoint = self.writer.begin_checkpoint(
            step,
            epoch=epoch,
            learning_rate=learning_rate,
            exposures=self.exposures.counts(),
            **self._model.state(),
        )
        with checkpoint, self._model.alike():
            self._model.write_function(checkpoint)
            with self._processes.sharing_errors(), isolated_rng(self.seed), self._tracing():
                self._trace(checkpoint)
            checkpoint.seal()

    def require_unchanged_since(self, step: int) -> None:
        """Raises a TrainingChangedError where the weights are not those that were sealed at
        ``step``, which is the present step."""
        changed = self._model.changed_from(self._sealed(step).weights())
        if changed:
            raise TrainingChangedError(
                f"Step {step} has traces already, and since then {len(changed)} parameters have "
                f"changed, such as {changed[0]!r}, without an optimizer step that could be "
                "counted. HINT: step a torch.optim.Optimizer."
            )

    def _trace(self, checkpoint: CheckpointWriter) -> None:
        """Traces the samples that are this process's and not in ``checkpoint`` yet."""
        taken = 0
        bar = tqdm(
            total=len(self.sample_ids),
            desc=f"trace step {checkpoint.step}",
            unit="img",
            disable=not self._shows_progress,
        )
        with bar:
            for number, batch in self._own_batches():
                encoded = self._encode(batch)
                rows = len(encoded.sample_ids)
                position = self._position(number, batch, encoded)
                done = min(max(checkpoint.rows_done - taken, 0), rows)
                if done < rows:
                    self._look_at_unseen(encoded)
                    # The whole batch, also where a part of it is stored: a forward pass of other
                    # rows rounds otherwise.
                    trace = trace_batch(
                        self.task, self.tracer, self.method, encoded, self.seed, self._row_limit
                    )
                    indices = torch.arange(position, position + rows)
                    checkpoint.append(indices[done:], trace.features[done:], trace.loss[done:])
                taken += rows
                bar.update(rows * self._processes.count)

    @contextmanager
    def _tracing(self) -> Iterator[Callable[[], list[str]]]:
        with (
            undisturbed(self.owner, *task_modules(self.task)) as changed_buffers,
            parameters_unmoved(self.owner),
        ):
            yield changed_buffers

    @property
    def _shows_progress(self) -> bool:
        return self.progress and self._processes.is_first

    def _own_batches(self) -> Iterator[tuple[int, Any]]:
        """The batches that are this process's, with their numbers. A batch that is None, all of
        whose samples a ``collate_fn`` has left out, is passed over."""
        rank, count = self._processes.rank, self._processes.count
        own: Iterator[tuple[int, Any]]
        if count > 1 and (part := _every(self.batches, rank, count)) is not None:
            own = zip(itertools.count(rank, count), part, strict=False)
        else:
            own = itertools.islice(enumerate(bounded(self.batches)), rank, None, count)
        return ((number, batch) for number, batch in own if batch is not None)

    def _warn_of_parameters_outside(self) -> None:
        inside = {id(parameter) for parameter in self.tracer.module.parameters()}
        outside = sorted(
            name for name, value in self._model.trained.now().items() if id(value) not in inside
        )
        if outside:
            warnings.warn(
                "These trained parameters are outside the denoiser and are not traced: "
                f"{', '.join(outside)}. What samples taught through them alone is missed. HINT: "
                "that is usual for token embeddings; freeze them, or make them part of "
                "`denoiser`, if it matters.",
                UntracedParameterWarning,
                stacklevel=3,
            )

    def _try(self, thumbnails: bool, questions: Sequence[Question]) -> Trial | None:
        """Traces two samples, this process's first ones, in every way in which captures and
        questions will."""
        started = time.monotonic()
        trial = None
        with (
            self._processes.sharing_errors(),
            isolated_rng(self.seed),
            self._tracing() as changed_buffers,
        ):
            samples = first_samples(self._tried_batches(thumbnails))
            if samples is not None:
                limit = RowLimit(min(SAMPLES, self._row_limit.rows or SAMPLES))
                with naming_changed_buffers(changed_buffers):
                    trial = try_samples(
                        self.task, self.tracer, self.method, samples, self.seed, limit
                    )
                try_questions(self.task, self.tracer, self.method, samples, questions, self.seed)
        return None if trial is None else replace(trial, seconds=time.monotonic() - started)

    def _look_at_unseen(self, encoded: Encoded) -> None:
        """Compares two samples with a pass for each once more, where layers had no gradient at the
        trial: those behind a last layer of zeros, or LoRA's first matrices.

        Raises:
            GradientError: they differ; names the layers.
        """
        if self._is_partly_seen:
            limit = RowLimit(min(SAMPLES, self._row_limit.rows or SAMPLES))
            limit.run(
                min(SAMPLES, len(encoded.latents)),
                lambda start, stop: check_batch(
                    self.task, self.tracer, self.method, encoded.rows(start, stop), self.seed
                ),
            )
            self._is_partly_seen = False

    def _tried_batches(self, thumbnails: bool) -> Iterator[Encoded]:
        if isinstance(self.batches, Iterator):
            raise TrialError(
                f"The samples are {type(self.batches).__name__}, which can be gone through once; "
                "expected batches that can be gone through at every capture. HINT: a DataLoader, "
                "or a list of batches."
            )
        loading = (
            "loading the first samples (the data set, its `collate_fn`, or the DataLoader's "
            "workers)"
        )
        with named(loading):
            own = self._own_batches()
        while True:
            with named(loading):
                item = next(own, None)
            if item is None:
                return
            _, batch = item
            encoding = named(f"{name_of(self.task)}.encode(batch of {_fields(batch)})")
            # Noticed here as well: a task may keep what it has encoded once, and not compute it
            # again in the survey.
            with encoding, torch.no_grad(), self._model.noticing():
                encoded = self._encode(batch)
            if thumbnails:
                with (
                    named("thumbnails, by `pictures(batch)` or `decode(latents)`"),
                    torch.no_grad(),
                ):
                    images = self._pictures(batch, encoded)
                    if images is not None:
                        thumbnails_of(images)
            yield encoded

    def _survey(self, thumbnails: bool) -> list[Surveyed]:
        """One pass over the data without the network: who the samples are, batch by batch."""
        own = []
        once = Once()
        with (
            self._processes.sharing_errors(),
            isolated_rng(self.seed),
            self._tracing(),
            torch.no_grad(),
        ):
            for number, batch in tqdm(
                self._own_batches(),
                desc="survey",
                unit="batch",
                leave=False,
                disable=not self._shows_progress,
            ):
                with self._model.noticing():
                    encoded = self._encode(batch)
                self._model.notice(encoded)
                self._first_seen = self._first_seen or (batch, encoded)
                once.add(encoded.sample_ids)
                self._batch_ids.compare(batch, encoded.sample_ids)
                images = self._pictures(batch, encoded) if thumbnails else None
                own.append(
                    Surveyed(
                        number,
                        encoded.latents.shape[1:],
                        encoded.sample_ids,
                        content_hashes(batch, encoded),
                        {name: list(map(str, values)) for name, values in encoded.metadata.items()},
                        None if images is None else thumbnails_of(images),
                    )
                )
        each = self._processes.gather(own)
        self._batch_ids.share(self._processes)
        return sorted(
            (batch for batches in each for batch in batches), key=lambda batch: batch.number
        )

    def _look_again(self) -> None:
        """Loads and encodes the first batch once more: what draws from a generator of its own is
        told before anything has been traced."""
        with (
            self._processes.sharing_errors(),
            isolated_rng(self.seed),
            self._tracing(),
            torch.no_grad(),
        ):
            for number, batch in self._own_batches():
                encoded = self._encode(batch)
                self._position(number, batch, encoded)
                require_same(self._first_seen, (batch, encoded))
                break
        self._first_seen = None

    def _pictures(self, batch: Any, encoded: Encoded) -> Tensor | None:
        """What a person may be shown of a batch: its own images where the task has them, for
        decoding is expensive and inexact."""
        own = self.task.pictures(batch)
        return self.task.decode(encoded.latents) if own is None else own

    def _encode(self, batch: Any) -> Encoded:
        return encode(self.task, _to(batch, self.device))

    def _position(self, number: int, batch: Any, encoded: Encoded) -> int:
        """Where in the sample table the ``number``-th batch begins, which must be the one that was
        surveyed."""
        position = self._starts.get(number, len(self.sample_ids))
        part = slice(position, position + len(encoded.sample_ids))
        expected = self.sample_ids[part]
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


def has_sealed(path: str | Path) -> bool:
    """Whether the folder holds a store with a sealed checkpoint."""
    try:
        return any(record.sealed for record in read_manifest(Path(path)).checkpoints)
    except StoreError:  # there is none, or a damaged one: its writer says so
        return False


def _stored_model(path: str | Path) -> Mapping[str, str] | None:
    """What the folder's store says of its model, if there is one."""
    try:
        return read_manifest(Path(path)).header.model
    except StoreError:  # there is none, or a damaged one: its writer says so
        return None


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
