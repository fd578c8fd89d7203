"""Capture: the traces of a whole data set at one checkpoint. For callbacks and for raw training
loops."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ctrak_lightning.capture.dataset import TracedData
from ctrak_lightning.capture.exposures import Exposures
from ctrak_lightning.capture.trace import check_batch, trace_batch
from ctrak_lightning.capture.trial import (
    SAMPLES,
    Question,
    Trial,
    first_samples,
    naming_changed_buffers,
    try_questions,
    try_samples,
)
from ctrak_lightning.errors import StoreError, StoreMismatchError, TrainingChangedError
from ctrak_lightning.gradients import (
    GradientTracer,
    UntracedParameterWarning,
    parameters_unmoved,
    undisturbed,
)
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.numerics import KEY, Numerics
from ctrak_lightning.model.traced_model import TracedModel, Weights
from ctrak_lightning.store import (
    Checkpoint,
    CheckpointWriter,
    IncompleteStoreWarning,
    StoreHeader,
    TraceStore,
    TraceWriter,
)
from ctrak_lightning.store.formats import RowDtype
from ctrak_lightning.store.lock import WriterLock
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.schema import Manifest, seed_facts
from ctrak_lightning.tasks import (
    DiffusionTask,
    Encoded,
    Precision,
    task_modules,
    under_autocast,
    whole,
)
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.processes import ALONE, Processes
from ctrak_lightning.utilities.rng import isolated_rng


class Capture:
    """Traces every sample of a data set, as often as asked, into one store.

    Before anything is written, two samples are traced on trial
    (:mod:`ctrak_lightning.capture.trial`), unless the folder holds sealed traces already. Where
    memory is short, batches go through the network in smaller parts
    (:class:`~ctrak_lightning.utilities.memory.RowLimit`).

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
        precision: in which the network is run: ``"true"``, its own dtypes, or as training does,
            under autocast: ``"bf16-mixed"``, ``"16-mixed"``. The store says which, as it says the
            tracer's ``attention``; projections and sums are float32 in each.
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
        processes: those that trace, each the batches of its turn, into one folder that all of them
            see. All make their captures, and call :meth:`run`, at the same time.
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
        precision: Precision = "true",
        optimizers: Sequence[Optimizer] = (),
        weights: Weights = "raw",
        seed: int = 0,
        dtype: RowDtype = "float32",
        thumbnails: bool = True,
        device: torch.device | str = "cpu",
        rows_at_once: int | None = None,
        progress: bool = True,
        processes: Processes = ALONE,
        questions: Sequence[Question] = (),
        lock: WriterLock | None = None,
    ) -> None:
        task, stored = whole(task), _stored(path)
        numerics = Numerics(tracer.attention, precision)
        # A store from before this was recorded goes on as it began.
        knows_numerics = stored is None or KEY in stored.header.method
        self.task = under_autocast(task, precision) if knows_numerics else task
        """As the network is traced; what is said of the model is of its own dtypes."""
        self.owner, self.method, self.tracer = owner, method, tracer
        self.seed = seed
        self._progress = progress and processes.is_first
        self._row_limit, self._processes = RowLimit(rows_at_once), processes
        self._model = TracedModel(owner, task, optimizers, weights=weights, processes=processes)
        self._warn_of_parameters_outside()
        self._data = TracedData(
            batches, task, self._model, torch.device(device), processes, progress=self._progress
        )
        is_sealed = stored is not None and any(one.sealed for one in stored.checkpoints)
        is_due = not processes.from_first(is_sealed)
        self.trial = self._try(thumbnails, questions) if is_due else None
        """What the trial found; None where there was none."""
        self._is_partly_seen = self.trial is not None and self.trial.blocks < self.trial.all_blocks
        with self._data_pass(), torch.no_grad():
            own = self._data.survey(thumbnails)
        table, latent_shape = self._data.table(own)
        self.sample_ids = table.sample_ids
        self.exposures = Exposures(self.sample_ids, processes)
        """How often each sample has entered an optimizer step of the run."""
        with self._data_pass(), torch.no_grad():
            self._data.require_repeatable()
        with isolated_rng(seed), self._tracing(), torch.no_grad():
            model = self._model.observe(latent_shape, stored.header.model if stored else None)
        # A store from before seeds were recorded goes on without one.
        is_told = stored is None or "noise_seed" in stored.header.method
        beside = seed_facts(seed) if is_told else {}
        beside |= numerics.facts() if knows_numerics else {}
        header = StoreHeader(
            method=method.to_dict() | beside,
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
        """Lets others write to the store, and warns of the samples of :meth:`note_step` that are
        not in it; idempotent."""
        self.exposures.warn_of_untraced()
        self.writer.close()

    def note_step(self, *batches: Any) -> None:
        """After an optimizer step of a raw loop: counts the samples of the batches whose gradients
        it took (several, where they were accumulated). All processes call it at the same steps.
        Without it a store does not know how often samples were trained on.

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
            is_sealed = step in self.writer.sealed_steps
            counts = self._sealed(step).exposures() if is_sealed else None
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
        return self._data.batch_ids.of(batch)

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
            with self._data_pass():
                self._trace(checkpoint)
            checkpoint.seal()

    def _trace(self, checkpoint: CheckpointWriter) -> None:
        """Traces the samples that are this process's and not in ``checkpoint`` yet."""
        taken = 0
        bar = tqdm(
            total=len(self.sample_ids),
            desc=f"trace step {checkpoint.step}",
            unit="img",
            disable=not self._progress,
        )
        with bar:
            for position, encoded in self._data.encoded():
                rows = len(encoded.sample_ids)
                done = min(max(checkpoint.rows_done - taken, 0), rows)
                if done < rows:
                    self._check_unseen(encoded)
                    # The whole batch, also where a part of it is stored: a forward pass of other
                    # rows rounds otherwise.
                    trace = trace_batch(
                        self.task, self.tracer, self.method, encoded, self.seed, self._row_limit
                    )
                    indices = torch.arange(position, position + rows)  # [B], in the sample table
                    checkpoint.append(indices[done:], trace.features[done:], trace.loss[done:])
                taken += rows
                bar.update(rows * self._processes.count)

    def _check_unseen(self, encoded: Encoded) -> None:
        """Compares two samples with a pass for each once more, where layers had no gradient at the
        trial: those behind a last layer of zeros, or LoRA's first matrices.

        Raises:
            GradientError: they differ; names the layers.
        """
        if self._is_partly_seen:
            self._trial_limit().run(
                min(SAMPLES, len(encoded.latents)),
                lambda start, stop: check_batch(
                    self.task, self.tracer, self.method, encoded.rows(start, stop), self.seed
                ),
            )
            self._is_partly_seen = False

    def _try(self, thumbnails: bool, questions: Sequence[Question]) -> Trial | None:
        """Traces two samples, this process's first ones, in every way in which captures and
        questions will."""
        started = time.monotonic()
        trial = None
        with self._data_pass() as changed_buffers:
            samples = first_samples(self._data.tried(thumbnails))
            if samples is not None:
                what = (self.task, self.tracer, self.method, samples)
                with naming_changed_buffers(changed_buffers):
                    trial = try_samples(*what, self.seed, self._trial_limit())
                try_questions(*what, questions, self.seed)
        return None if trial is None else replace(trial, seconds=time.monotonic() - started)

    def _trial_limit(self) -> RowLimit:
        return RowLimit(min(SAMPLES, self._row_limit.rows or SAMPLES))

    @contextmanager
    def _tracing(self) -> Iterator[Callable[[], list[str]]]:
        """The module is afterwards what it was; gives what names the buffers that have changed."""
        with (
            undisturbed(self.owner, *task_modules(self.task)) as changed_buffers,
            parameters_unmoved(self.owner),
        ):
            yield changed_buffers

    @contextmanager
    def _data_pass(self) -> Iterator[Callable[[], list[str]]]:
        """As :meth:`_tracing`, for a pass over the data by all processes: random numbers are the
        same in every pass, and one process's error is raised in all."""
        with (
            self._processes.sharing_errors(),
            isolated_rng(self.seed),
            self._tracing() as changed_buffers,
        ):
            yield changed_buffers

    def _sealed(self, step: int) -> Checkpoint:
        with warnings.catch_warnings():
            # Another step's, which goes on later.
            warnings.simplefilter("ignore", IncompleteStoreWarning)
            store = TraceStore(self.writer.path)
        return next(one for one in store.checkpoints if one.step == step)

    def _warn_of_parameters_outside(self) -> None:
        inside = {id(parameter) for parameter in self.tracer.module.parameters()}
        outside = sorted(
            name for name, value in self._model.trained.now().items() if id(value) not in inside
        )
        if outside:
            warnings.warn(
                "These trained parameters are outside the denoiser and are not traced: "
                f"{', '.join(outside)}. What samples changed in them alone is missed. HINT: that "
                "is usual for token embeddings; freeze them, or make them part of `denoiser`, if "
                "it matters.",
                UntracedParameterWarning,
                stacklevel=3,
            )


def _stored(path: str | Path) -> Manifest | None:
    """The manifest of the folder's store, if there is one."""
    try:
        return read_manifest(Path(path))
    except StoreError:  # there is none, or a damaged one: its writer says so
        return None
