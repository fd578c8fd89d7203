"""What inline tracing asks of a Trainer, and reads from it."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from ctrak_lightning.gradients.modes import is_compiled

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
