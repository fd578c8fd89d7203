"""How many optimizer steps a run has taken, also where Lightning's ``global_step`` does not know of
them."""

import weakref
from typing import Any

import lightning as L
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepCounter:
    """Counts the optimizer steps of a run: those that Lightning counts, and, under manual
    optimization, those of optimizers that are stepped past it (``use_pl_optimizer=False``, or an
    optimizer of the module's own).

    Args:
        trainer: of the run.
        pl_module: whose parameters an optimizer must hold to be one of the run.
        unseen: steps that Lightning did not count before this run was resumed.
    """

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
        self.optimizers[:] = [
            *own,
            *(one for one in self._others if not any(one is known for known in own)),
        ]

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
