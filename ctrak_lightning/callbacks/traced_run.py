"""One run of a Trainer while it is traced: what lives from ``on_train_start`` to ``teardown``."""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ctrak_lightning.callbacks import averaging
from ctrak_lightning.callbacks.loaders import TrainingLoader
from ctrak_lightning.callbacks.steps import ExposureCounter, StepCounter
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.capture.inline import InlineCapture
from ctrak_lightning.capture.trial import Trial
from ctrak_lightning.errors import StoreLockedError, StoreMismatchError, TrialError
from ctrak_lightning.gradients import GradientTracer
from ctrak_lightning.model.weights import trained_parameters
from ctrak_lightning.store.lock import WriterLock, hold_folder
from ctrak_lightning.tasks import DiffusionTask
from ctrak_lightning.utilities.processes import Processes, processes_of

if TYPE_CHECKING:
    from ctrak_lightning.callbacks.concept_tracer import ConceptTracer

WATCHED = 64
"""Parameters, and numbers of each, at most, by which it is noticed that something else than a step
has changed the weights."""


class ChangedWeightsWarning(UserWarning):
    """Weights are traced that are not those that the last optimizer step has left.

    Why: a callback has put an average or other weights into the module; they are traced as they
    are, and the store holds them.

    What to do: if training's own weights are meant, let that callback swap after the tracer's
    hook; of Lightning's averages, ``ConceptTracer(weights="ema")`` chooses.
    """


@dataclass
class Memory:
    """What is known of the run so far when it goes on: by a checkpoint of the Trainer's, or by the
    same Trainer."""

    run_id: str | None = None
    unseen_steps: int = 0
    exposures: dict[str, Any] | None = field(default=None, repr=False)
    sealed: dict[int, str] | None = field(default=None, repr=False)
    """Sha256 of the weights of each checkpoint that was sealed then."""
    weights: list[Tensor] | None = field(default=None, repr=False)
    """Some numbers of the weights then."""
    is_resumed: bool = False
    """Whether the Trainer's checkpoint has said so."""


class TracedRun:
    """Holds the folder from the start of a run, opens the store before its first step, and seals
    checkpoints.

    Args:
        tracer: the callback, for its arguments.
        trainer: of the run, whose training has started.
        pl_module: what trains.
        task: the module's DiffusionTask.
        memory: of the run before.

    Raises:
        MisconfigurationException: the training data, or the processes, cannot be traced, or another
            writer has the folder.
    """

    def __init__(
        self,
        tracer: ConceptTracer,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        task: DiffusionTask,
        memory: Memory,
    ) -> None:
        self._tracer, self.trainer, self._module, self._task, self._memory = (
            tracer,
            trainer,
            pl_module,
            task,
            memory,
        )
        self._where = f"`ConceptTracer(dirpath={tracer.dirpath!r})`"
        self.loader = TrainingLoader(trainer, tracer.loader)
        self._processes = self._all_processes()
        self._lock = self._hold()
        self._order = averaging.put_first(trainer, tracer)
        self.steps = StepCounter(trainer, pl_module, memory.unseen_steps)
        self._last_step = self.steps.now
        self.capture: Capture | None = None
        """The store's, once a batch is about to be trained on."""
        self.exposures: ExposureCounter | None = None
        self._watched: dict[str, Tensor] = {}
        self._left: list[Tensor] = []
        self._is_told_of_change = False

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
            raise MisconfigurationException(f"{self._where}: {error}") from error
        if self.capture.trial is not None:
            rank_zero_info(f"ConceptTracer(dirpath={self._tracer.dirpath!r}): {self.capture.trial}")
        self.exposures = ExposureCounter(self.trainer, self._module, self.capture, self.loader)
        return self.capture.trial

    def steps_taken(self) -> range:
        """The numbers of the optimizer steps since the last call, none under way: several, where
        optimizers step in one batch."""
        taken = range(self._last_step + 1, self.steps.now + 1)
        if taken:
            self.steps.look()
            self._last_step = self.steps.now
            if self._tracer.weights == "raw" and not self._is_told_of_change:
                self._left = self._sampled()
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
        self._tell_of_change(step)
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
            weights=[value.cpu() for value in self._sampled()],
        )

    def close(self) -> None:
        """Lets go of the Trainer and of the folder."""
        averaging.put_back(self.trainer, self._tracer, self._order)
        if isinstance(self.capture, InlineCapture):
            self.capture.detach()
        if self.exposures is not None:
            self.exposures.detach()
        self.steps.detach()
        self._lock.release()

    def _open(self) -> Capture:
        settings, processes = self._tracer, self._processes
        kind = InlineCapture if settings.mode == "inline" else Capture
        capture = kind(
            settings.dirpath,
            self._module,
            self._task,
            self._batches(),
            method=settings.method,
            tracer=GradientTracer(
                self._task.denoiser,
                settings.projection,
                layers=settings.layers,
                engine="hooks" if settings.mode == "inline" else "auto",
                trained=trained_parameters(self._task.denoiser, self.steps.optimizers),
            ),
            optimizers=self.steps.optimizers,
            weights=settings.weights,
            seed=settings.seed,
            dtype=settings.dtype,
            thumbnails=settings.thumbnails,
            device=self._module.device,
            rows_at_once=settings.batch_size or self._half_batch(),
            progress=self.trainer.progress_bar_callback is not None,
            processes=processes,
            questions=settings.questions,
            lock=self._lock,
        )
        trained = trained_parameters(self._module, self.steps.optimizers)
        self._watched = dict(
            itertools.islice(trained.items(), 0, None, len(trained) // WATCHED + 1)
        )
        self._resume(capture, self.steps.now)
        if isinstance(capture, InlineCapture):
            capture.attach()
        return capture

    def _resume(self, capture: Capture, step: int) -> None:
        """Makes the store describe the run that goes on from ``step``, and nothing else.

        Raises:
            MisconfigurationException: what the folder holds is not shown to be of this run; nothing
                was changed.
        """
        writer, sealed = capture.writer, capture.writer.sealed_steps
        is_same = self._memory.run_id == writer.run_id
        later = [one for one in sealed if one > step]
        if later and not (is_same and self._memory.is_resumed):
            raise MisconfigurationException(
                f"{self._where}: the folder holds traces of steps {later} of an earlier run, and "
                f"this run starts at step {step}. Nothing was changed. HINT: name a new folder, "
                "resume with `trainer.fit(ckpt_path=...)`, or delete the folder."
            )
        if sealed and not is_same and step not in sealed:
            raise MisconfigurationException(
                f"{self._where}: the folder holds traces of steps {sealed} of run "
                f"{writer.run_id!r}, and this run goes on from step {step} of {self._described()}: "
                "nothing shows that they are one run. Nothing was changed. HINT: name a new "
                "folder; resume from a checkpoint that was saved while this folder was written, "
                f"by the same `dirpath`; or from one of step {sealed[-1]}, whose weights can be "
                "compared."
            )
        if not sealed and step and not is_same and self._memory.run_id is not None:
            rank_zero_warn(
                f"ConceptTracer(dirpath={self._tracer.dirpath!r}): the checkpoint was made with "
                f"store {self._memory.run_id!r}, the folder holds store {writer.run_id!r}. Traces "
                f"of steps before {step} may be missing."
            )
        self._require_one_course(capture, step, is_same)
        state = self._memory.exposures
        with self._weights() if step in sealed else nullcontext():
            try:
                if not is_same or self._memory.weights is None:
                    capture.require_weights_of(step)
                capture.resume(step, state if state and state["step"] == step else None)
            except StoreMismatchError as error:
                raise MisconfigurationException(f"{self._where}: {error}") from error
        if later:
            rank_zero_warn(
                f"ConceptTracer(dirpath={self._tracer.dirpath!r}): training resumes at step "
                f"{step}; the traces of steps {later}, made after that checkpoint, are removed and "
                "will be made again."
            )
            writer.discard_after(step)

    def _require_one_course(self, capture: Capture, step: int, is_same: bool) -> None:
        """Refuses a checkpoint of this run whose weights are not those it was saved with, or since
        which the store has been written by another course of the run: one that went on from an
        earlier checkpoint."""
        if not is_same or not self._memory.weights:
            return
        now = self._sampled()
        if len(now) != len(self._memory.weights) or not all(
            map(_is_same, self._memory.weights, now)
        ):
            raise MisconfigurationException(
                f"{self._where}: training goes on from step {step} with other weights than it had "
                "then. Nothing was changed. HINT: load all of the checkpoint's weights "
                "(`strict_loading=False` leaves out those of other names), or name a new folder."
            )
        known, stored = self._memory.sealed or {}, capture.writer.sealed_weights
        other = [one for one in stored if one < step and stored[one] != known.get(one)]
        other += [step] if step in known and stored.get(step) != known[step] else []
        if other:
            raise MisconfigurationException(
                f"{self._where}: the traces of steps {other} are not those of the run that this "
                f"checkpoint of step {step} is of: another run went on from an earlier checkpoint "
                "into the same folder. Nothing was changed. HINT: go on from a checkpoint of that "
                "one, or name a new folder."
            )

    def _described(self) -> str:
        return (
            "a checkpoint that was saved without this folder"
            if self._memory.run_id is None
            else f"a run whose store is {self._memory.run_id!r}"
        )

    def _tell_of_change(self, step: int) -> None:
        """Says once where weights are traced as those that train, and are not what the last step
        has left."""
        if not self._left:
            return
        pairs = zip(self._watched, self._left, self._sampled(), strict=True)
        changed = [name for name, before, now in pairs if not _is_same(before, now)]
        if changed:
            rank_zero_warn(
                f"ConceptTracer(dirpath={self._tracer.dirpath!r}): the weights that are traced at "
                f"step {step} are not those that its optimizer step has left: {changed[0]!r} has "
                f"changed since, as have {len(changed)} of {len(self._watched)} parameters that "
                "were looked at. They are traced and stored as they are now; it is not told "
                "again. HINT: a callback that puts an average in their place must do so after "
                "this one's hook and take it back before the next step; Lightning's "
                'EMAWeightAveraging is known here (`weights="ema"`).',
                category=ChangedWeightsWarning,
            )
            self._left, self._is_told_of_change = [], True

    def _sampled(self) -> list[Tensor]:
        """Some numbers of every watched parameter: an average moves them all. Nothing waits for the
        device."""
        flat = (value.detach().flatten() for value in self._watched.values())
        return [value[:: len(value) // WATCHED + 1].clone() for value in flat]

    def _weights(self) -> AbstractContextManager[None]:
        """The module has those whose traces are asked for."""
        if self._tracer.weights == "raw":
            return nullcontext()
        return averaging.averaged(
            self.trainer,
            self._module,
            list(trained_parameters(self._module, self.steps.optimizers)),
        )

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
            return hold_folder(Path(self._tracer.dirpath), self._processes)
        except StoreLockedError as error:
            raise MisconfigurationException(f"{self._where}: {error}") from error

    def _half_batch(self) -> int | None:
        """Half of the training loader's batch size, where it is known."""
        size = self.loader.batch_size
        return None if size is None else max(1, size // 2)

    def _batches(self) -> Any:
        owners: tuple[Any, ...] = (getattr(self.trainer, "datamodule", None), self._module)
        for owner in owners:
            if owner is not None and hasattr(owner, "trace_dataloader"):
                return self.loader.apart(owner.trace_dataloader())
        return self.loader.batches(self._tracer.batch_size)


def _is_same(before: Tensor, now: Tensor) -> bool:
    """Whether numbers of a weight are the same: to the bit, or as near as another format has
    them."""
    now = now.to(before.device)
    near = 0.0 if before.dtype == now.dtype else 1e-2
    return before.shape == now.shape and torch.allclose(
        before.double(), now.double(), rtol=near, atol=near, equal_nan=True
    )
