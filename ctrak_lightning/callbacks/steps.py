"""Which steps an optimizer has taken, and what had been drawn by then."""

import weakref
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ctrak_lightning.callbacks.loaders import TrainingLoader
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.capture.exposures import (
    ReachedRows,
    UnknownExposuresWarning,
    UntracedSampleWarning,
)
from ctrak_lightning.utilities.naming import parameters_of


class StepCounter:
    """Counts the optimizer steps of a run: those that Lightning counts, and, under manual
    optimization, those of optimizers that are stepped past it (``use_pl_optimizer=False``, or an
    optimizer of the module's own)."""

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule, unseen: int = 0) -> None:
        self.optimizers: list[Optimizer] = []
        """Those of the run that are known so far, as of the last :meth:`look`."""
        self._others: list[Optimizer] = []
        self.unseen = unseen
        """Steps that Lightning has not counted."""
        self.is_manual = not pl_module.automatic_optimization
        self._trainer, self._module = trainer, pl_module
        self._is_ours: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._handle = register_optimizer_step_post_hook(self._count) if self.is_manual else None
        self._between = self._begun()
        self.look()

    def look(self) -> None:
        """Reads the Trainer's optimizers, which may have been replaced by others."""
        own = list(self._trainer.optimizers)
        others = [one for one in self._others if not any(one is known for known in own)]
        self.optimizers[:] = [*own, *others]

    @property
    def now(self) -> int:
        """Steps taken so far."""
        return int(self._trainer.global_step) + self.unseen

    def detach(self) -> None:
        """Stops counting; idempotent."""
        if self._handle is not None:
            self._handle.remove()

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._is_ours:
            parameters = {id(parameter) for parameter in self._module.parameters()}
            held = (value for group in optimizer.param_groups for value in group["params"])
            self._is_ours[optimizer] = any(id(value) in parameters for value in held)
            if self._is_ours[optimizer]:
                self._others.append(optimizer)
                self.look()
        if self._is_ours[optimizer] and self._begun() == self._between:
            self.unseen += 1

    def _begun(self) -> int:
        """Steps that Lightning has begun and not ended: one more than between steps, while it takes
        one."""
        progress = self._trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        return int(progress.ready - progress.completed)


class ExposureCounter:
    """Counts in a capture's :class:`~ctrak_lightning.capture.exposures.Exposures` which batches
    enter which steps.

    A batch is counted once, in the step that follows its backward pass; not where ``training_step``
    returned None, where a GradScaler left the step out, or where no traced parameter has a gradient
    any more. A step is that of an optimizer which holds a traced parameter. (Under manual
    optimization without ``manual_backward`` every batch is taken to go backward that ends with a
    gradient or a step.) It reads the batch's ids, and looks which rows of the predictions the loss
    depends on, so training stays as it is.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        capture: Capture,
        loader: TrainingLoader,
    ) -> None:
        self._trainer, self._capture, self._loader = trainer, capture, loader
        named = parameters_of(capture.tracer.module)
        self._traced = {id(named[name]): named[name] for name in capture.tracer.parameter_names}
        self._is_manual = not pl_module.automatic_optimization
        self._handle = register_optimizer_step_post_hook(self._stepped)
        self._reached = ReachedRows()
        self._output = capture.tracer.module.register_forward_hook(self._reached)
        self._batch: Any = None
        self._first_ids: list[str] | Exception = []
        self._is_drawn = self._is_counted = self._has_stepped = False  # of the present batch
        self._sees_backward = self._is_explained = False
        self._last_step = int(trainer.global_step)
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            # Lightning then gives the hooks before a step the batch of the step before.
            capture.exposures.unknown = "training_step(dataloader_iter) draws the batches itself"

    def begin(self, batch: Any) -> None:
        """Before ``training_step``, which may take the ids out of the batch."""
        self._is_drawn, self._is_counted, self._has_stepped = False, False, False
        self._batch, self._first_ids = batch, self._read(batch)
        self._reached.begin()

    def backward(self) -> None:
        """Where Lightning goes backward from a loss of the batch."""
        self._sees_backward = True
        # What earlier batches of an accumulation had left there has been cleared.
        if not _has_gradient(self._traced.values()):
            self._drop()
        if not self._is_drawn:
            self._reached.found.clear()
        self._draw()

    def _draw(self) -> None:
        """Notes that the batch goes into the next step."""
        exposures = self._capture.exposures
        if self._is_drawn or exposures.unknown is not None:
            return
        self._is_drawn = True
        # As the step has left the batch, which may leave samples out in place.
        ids = self._read(self._batch)
        ids = self._first_ids if isinstance(ids, Exception) else ids
        if isinstance(ids, Exception):
            exposures.unknown = f"the ids of a training batch cannot be read: {ids}"
        else:
            exposures.draw(ids, self._reached.found)

    def _read(self, batch: Any) -> list[str] | Exception:
        try:
            return self._capture.training_ids(self._loader.part(batch))
        except Exception as error:  # of the user's `sample_ids`: no reason to end a training
            return error

    def _drop(self) -> None:
        """Forgets the batches whose gradients have been cleared; this one may go backward once
        more, if it has not been counted."""
        self._capture.exposures.drop()
        self._is_drawn = self._is_counted

    def end(self) -> None:
        """After a batch, in all processes."""
        step = int(self._trainer.global_step)
        if self._is_manual and not self._sees_backward and _has_gradient(self._traced.values()):
            self._draw()  # a loss's own `backward()` is not seen
        if step != self._last_step and not self._has_stepped:
            self._capture.exposures.drop()
        if step != self._last_step or self._has_stepped:
            self._capture.exposures.share()
        self._last_step, self._batch = step, None
        self._reached.begin()  # what captures and callbacks do between batches is no training

    def explain_unknown(self) -> None:
        """Says once, where a checkpoint is due, why exposures are not known."""
        why = self._capture.exposures.why_unknown
        if why is not None and not self._is_explained:
            self._is_explained = True
            text = (
                "`ConceptTracer`: how often each sample entered an optimizer step is not known, "
                f"and not stored: {why.rstrip('.')}. "
            )
            hint = "HINT: let every batch have the samples' ids, or define `sample_ids(batch)`."
            if self._capture.exposures.has_strangers_alone:
                rank_zero_warn(
                    f"{text}If these are other samples than the traced ones, no score says what "
                    "they taught. HINT: the traced samples' ids are like "
                    f"{self._capture.sample_ids[0]!r}; let both loaders name a sample alike, and "
                    "`trace_dataloader()` give those that are trained on.",
                    category=UntracedSampleWarning,
                )
            elif self._capture.method.per_exposure:
                rank_zero_warn(
                    f"{text}The method {self._capture.method.name!r} multiplies scores by it, "
                    "which then is left out: a sample that was never trained on may get a score. "
                    + hint,
                    category=UnknownExposuresWarning,
                )
            else:
                rank_zero_info(text + hint)

    def detach(self) -> None:
        """Stops counting; idempotent."""
        self._handle.remove()
        self._output.remove()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        every = (value for group in optimizer.param_groups for value in group["params"])
        held = [value for value in every if id(value) in self._traced]
        # Fused optimizers are called by a GradScaler also where they are to leave the step out.
        found_inf = getattr(optimizer, "found_inf", None)
        if not held or (found_inf is not None and float(found_inf) > 0):
            return
        if self._is_manual and not self._sees_backward and self._batch is not None:
            self._draw()
        self._has_stepped = True
        if _has_gradient(held):
            self._capture.exposures.step()
            self._is_counted = self._is_drawn
        else:
            self._drop()


def _has_gradient(parameters: Iterable[Tensor]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)
