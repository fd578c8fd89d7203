"""What a Trainer's precision does to the batches and new tensors of a training step."""

from typing import Any

import lightning as L
import torch

from ctrak_lightning.task import InPrecision


def in_precision_of(trainer: L.Trainer, task: Any) -> InPrecision:
    """A task in the precision that a training step has: its batches are converted, and its new
    tensors are of the default dtype there.

    Autocast is none of it: under mixed precision traces are float32
    (:func:`~ctrak_lightning.gradients.tracing_mode`).
    """
    plugin = trainer.precision_plugin
    with plugin.train_step_context():
        dtype = torch.get_default_dtype()
    return InPrecision(task, dtype, plugin.convert_input)
