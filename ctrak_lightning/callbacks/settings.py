"""What a Trainer must be like for traces to be right."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from ctrak_lightning.gradients.modes import is_compiled
from ctrak_lightning.tasks import DiffusionTask, InPrecision


def in_precision_of(trainer: L.Trainer, task: DiffusionTask) -> InPrecision:
    """A task in the precision that a training step has: its batches are converted, and its new
    tensors are of the default dtype there.

    Autocast is none of it: under mixed precision traces are float32
    (:func:`~ctrak_lightning.gradients.tracing_mode`).
    """
    plugin = trainer.precision_plugin
    with plugin.train_step_context():
        dtype = torch.get_default_dtype()
    return InPrecision(task, dtype, plugin.convert_input)


_HINT = 'HINT: mode="capture" traces any training loop.'


def refuse_what_inline_cannot_trace(
    trainer: L.Trainer, pl_module: L.LightningModule, denoiser: nn.Module
) -> None:
    """Raises a MisconfigurationException for runs whose training steps cannot be followed
    exactly."""
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            '`ConceptTracer(mode="inline")`: manual optimization may scale the loss, or go '
            "backward several times, in ways that a callback cannot see. Expected automatic "
            f"optimization. {_HINT}"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            '`ConceptTracer(mode="inline")`: training_step(dataloader_iter) draws the batches '
            "itself, and no callback sees which one a step has. Expected training_step(batch, "
            f"batch_idx). {_HINT}"
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f'`ConceptTracer(mode="inline")`: {trainer.world_size} processes, expected one: rows '
            f"are gathered in one process. {_HINT}"
        )
    compiled = [
        name or type(module).__name__
        for root in (pl_module, denoiser)
        for name, module in root.named_modules()
        if is_compiled(module)
    ]
    if compiled:
        raise MisconfigurationException(
            f'`ConceptTracer(mode="inline")`: {compiled[0]!r} is compiled, and a compiled graph '
            f"does not call the hooks of its layers. Expected eager training. {_HINT}"
        )


def loss_scale(trainer: L.Trainer) -> float:
    """What Lightning multiplied the loss of a training step with: for accumulation, and by a
    GradScaler."""
    scaler = grad_scaler(trainer)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches


def grad_scaler(trainer: L.Trainer) -> Any:
    """The GradScaler of 16-bit mixed precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)
