"""One run of a Trainer while it is traced: what lives from ``on_train_start`` to ``teardown``."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ctrak_lightning.callbacks import averaging
from ctrak_lightning.callbacks.loaders import TrainingLoader
from ctrak_lightning.callbacks.resuming import Memory, WeightProbe, resume
from ctrak_lightning.callbacks.settings import (
    OnError,
    TraceSettings,
    grad_scaler,
    loss_scale,
    precision_of,
)
from ctrak_lightning.callbacks.steps import ExposureCounter, StepCounter
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.capture.inline import InlineCapture
from ctrak_lightning.capture.trial import Question, Trial
from ctrak_lightning.errors import StoreLockedError, TrialError
from ctrak_lightning.gradients import GradientTracer
from ctrak_lightning.model.weights import trained_parameters
from ctrak_lightning.store.lock import WriterLock, hold_folder
from ctrak_lightning.tasks import DiffusionTask
from ctrak_lightning.utilities.processes import Processes, processes_of


class ChangedWeightsWarning(UserWarning):
    """Weights are traced that are not those that the last optimizer step has left.

    Why: a callback has put an average or other weights into the module; they are traced as they
    are, and the store holds them.

    What to do: if training's own weights are meant, let that callback swap after the tracer's
    hook; of Lightning's averages, ``ConceptTracer(weights="ema")`` chooses.
    """


class TracedRun:
    """Holds the folder from the start of a run, opens the store before its first step, follows the
    training steps, and seals checkpoints.

    Args:
        settings: how to trace.
        trainer: of the run, whose training has started.
        pl_module: what trains.
        task: the module's DiffusionTask.
        memory: of the run before.
        callback: the one that traces, which is called before the Trainer's others from now on.
        questions: those that are tried before training.
        on_error: what becomes of training when a step cannot be followed.

    Raises:
        MisconfigurationException: the training data, or the processes, cannot be traced, or another
            writer has the folder.
    """

    def __init__(
        self,
        settings: TraceSettings,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        task: DiffusionTask,
        memory: Memory,
        *,
        callback: Callback,
        questions: Sequence[Question],
        on_error: OnError,
    ) -> None:
        self.trainer = trainer
        self._settings, self._module, self._task, self._memory = settings, pl_module, task, memory
        self._questions, self._on_error = questions, on_error
        self._name = f"ConceptTracer(dirpath={settings.dirpath!r})"
        self.loader = TrainingLoader(trainer, settings.loader)
        self._processes = self._all_processes()
        self._lock = self._hold()
        self._callback, self._order = callback, averaging.put_first(trainer, callback)
        self.steps = StepCounter(trainer, pl_module, memory.unseen_steps)
        self._last_step = self.steps.now
        self.capture: Capture | None = None
        """The store's, once a batch is about to be trained on."""
        self.exposures: ExposureCounter | None = None
        self._probe = WeightProbe({})
        self._left: list[Tensor] = []  # the probe after the last optimizer step
        self._has_warned_of_change = self._has_warned_of_dropped = False

    def begin(self) -> Trial | None:
        """Opens the store, unless it is open, and gives what was tried for that. Whatever a module
        or another callback freezes, unfreezes or loads as training starts has been done by the
        first batch.

        Raises:
            MisconfigurationException: what the trial found; the folder holds the traces of another
                run.
        """
        if self.capture is not None:
            return None
        self.steps.look()
        try:
            self.capture = self._open()
        except TrialError as error:
            raise MisconfigurationException(f"`{self._name}`: {error}") from error
        if self.capture.trial is not None:
            rank_zero_info(f"{self._name}: {self.capture.trial}")
        self.exposures = ExposureCounter(self.trainer, self._module, self.capture, self.loader)
        return self.capture.trial

    def begin_batch(self, batch: Any) -> None:
        """Before ``training_step``, which may take the ids out of the batch."""
        with self._following() as inline:
            if inline is not None:
                inline.begin_step(self.loader.part(batch))
        if self.exposures is not None:
            self.exposures.begin(batch)

    def before_backward(self, loss: Tensor) -> None:
        """Where Lightning goes backward from a loss of the batch."""
        with self._following() as inline:
            if inline is not None:
                inline.before_backward(loss)
        if self.exposures is not None:
            self.exposures.backward()

    def after_backward(self) -> None:
        """Where the gradients of a batch are there, and nothing has clipped or cleared them yet."""
        with self._following() as inline:
            if inline is not None:
                inline.after_backward(
                    step=self.trainer.global_step,
                    loss_scale=loss_scale(self.trainer),
                    skip_not_finite=grad_scaler(self.trainer) is not None,
                )

    def end_batch(self) -> range:
        """After a batch: the numbers of the optimizer steps since the last call; several, where
        optimizers step in one batch, none in the midst of an accumulation."""
        if self.exposures is not None:
            self.exposures.end()
        taken = range(self._last_step + 1, self.steps.now + 1)
        if taken:
            self.steps.look()
            self._last_step = self.steps.now
            if self._settings.weights == "raw" and not self._has_warned_of_change:
                self._left = self._probe.read()
        return taken

    def seal(self, step: int, epoch: int) -> float | None:
        """Traces all samples with the present weights; seconds of wall time, or None where the step
        has its traces already.

        Raises:
            TrainingChangedError: it has, and the weights are others by now.
            Exception: whatever else keeps a checkpoint from being traced.
        """
        assert self.capture is not None  # `begin` was called
        if step in self.capture.writer.sealed_steps:
            # Where Lightning counts the steps, there is nothing else between two calls.
            if self.steps.is_manual:
                self.capture.require_unchanged_since(step)
            return None
        self._warn_of_change(step)
        optimizers = self.trainer.optimizers
        rate = float(optimizers[0].param_groups[0]["lr"]) if optimizers else None
        started = time.monotonic()
        try:
            with self._weights():
                self.capture.run(step, epoch=epoch, learning_rate=rate)
        finally:
            if self.exposures is not None:
                self.exposures.explain_unknown()
        return time.monotonic() - started

    @property
    def memory(self) -> Memory:
        """What a run that goes on from here must know; the exposures with the step up to which they
        were counted."""
        if self.capture is None:
            return replace(self._memory, unseen_steps=self.steps.unseen)
        return Memory(
            run_id=self.capture.writer.run_id,
            unseen_steps=self.steps.unseen,
            exposures=self.capture.exposures.state_dict() | {"step": self._last_step},
            sealed=self.capture.writer.sealed_weights,
            weights=[value.cpu() for value in self._probe.read()],
        )

    def close(self) -> None:
        """Takes all hooks off, and lets others write to the folder."""
        averaging.put_back(self.trainer, self._callback, self._order)
        if isinstance(self.capture, InlineCapture):
            self.capture.detach()
        if self.exposures is not None:
            self.exposures.detach()
        self.steps.detach()
        self._lock.release()

    def _open(self) -> Capture:
        settings = self._settings
        is_inline, size = settings.mode == "inline", self.loader.batch_size
        capture = (InlineCapture if is_inline else Capture)(
            settings.dirpath,
            self._module,
            self._task,
            self._batches(),
            method=settings.method,
            tracer=GradientTracer(
                self._task.denoiser,
                settings.projection,
                layers=settings.layers,
                engine="hooks" if is_inline else "auto",
                trained=trained_parameters(self._task.denoiser, self.steps.optimizers),
                attention=settings.attention,
            ),
            precision=settings.precision or precision_of(self.trainer),
            optimizers=self.steps.optimizers,
            weights=settings.weights,
            seed=settings.seed,
            dtype=settings.dtype,
            thumbnails=settings.thumbnails,
            device=self._module.device,
            # As many as a training step has: with its kernels and precision they fit where it does.
            rows_at_once=settings.batch_size or size,
            progress=self.trainer.progress_bar_callback is not None,
            processes=self._processes,
            questions=self._questions,
            lock=self._lock,
        )
        self._probe = WeightProbe(trained_parameters(self._module, self.steps.optimizers))
        resume(capture, self.steps.now, self._memory, self._probe, self._weights())
        if isinstance(capture, InlineCapture):
            capture.attach()
        return capture

    @contextmanager
    def _following(self) -> Iterator[InlineCapture | None]:
        """The inline capture, where there is one. What fails inside costs the rows of one training
        step and not the run, but for the first one: that is the set-up."""
        capture = self.capture
        if not isinstance(capture, InlineCapture):
            yield None
            return
        try:
            yield capture
        except Exception as error:
            capture.drop_step()
            if not capture.steps_followed:
                raise MisconfigurationException(
                    f'`ConceptTracer(mode="inline")`: {error}'
                ) from error
            if self._on_error == "raise":
                raise
            if not self._has_warned_of_dropped:
                self._has_warned_of_dropped = True
                rank_zero_warn(
                    f"{self._name}: the training step after {self.trainer.global_step} optimizer "
                    "steps is in no trace, or not with all of its samples: "
                    f"{type(error).__name__}: {error} Training goes on; there is no warning of "
                    'later ones. HINT: `on_error="raise"` stops training instead.'
                )

    def _warn_of_change(self, step: int) -> None:
        """Says once where weights are traced as those that train, and are not what the last step
        has left."""
        changed = self._probe.changed_since(self._left) if self._left else []
        if changed:
            rank_zero_warn(
                f"{self._name}: the weights that are traced at step {step} are not those that its "
                f"optimizer step has left: {changed[0]!r} has changed since, as have "
                f"{len(changed)} of {len(self._probe.parameters)} parameters that were looked at. "
                "They are traced and stored as they are now; there is no second warning. HINT: a "
                "callback that puts an average in their place must do so after this one's hook "
                "and take it back before the next step; Lightning's EMAWeightAveraging is known "
                'here (`weights="ema"`).',
                category=ChangedWeightsWarning,
            )
            self._left, self._has_warned_of_change = [], True

    def _weights(self) -> AbstractContextManager[None]:
        """The module has those whose traces are asked for."""
        if self._settings.weights == "raw":
            return nullcontext()
        trained = trained_parameters(self._module, self.steps.optimizers)
        return averaging.averaged(self.trainer, self._module, list(trained))

    def _all_processes(self) -> Processes:
        count = self.trainer.world_size
        try:
            return processes_of(count)
        except RuntimeError as error:
            raise MisconfigurationException(
                f"`ConceptTracer`: {count} processes under {type(self.trainer.strategy).__name__}: "
                f'{error} HINT: use strategy="ddp", or a single device.'
            ) from error

    def _hold(self) -> WriterLock:
        """Before the data is gone through and anything of the folder is changed."""
        try:
            return hold_folder(Path(self._settings.dirpath), self._processes)
        except StoreLockedError as error:
            raise MisconfigurationException(f"`{self._name}`: {error}") from error

    def _batches(self) -> Any:
        owners: tuple[Any, ...] = (getattr(self.trainer, "datamodule", None), self._module)
        for owner in owners:
            if owner is not None and hasattr(owner, "trace_dataloader"):
                return self.loader.apart(owner.trace_dataloader())
        return self.loader.batches(self._settings.batch_size)
