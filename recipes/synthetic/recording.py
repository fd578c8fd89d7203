"""What a training run keeps of itself: weights at given steps, and its loss curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

EVERY = 100


class WeightSaver(L.Callback):
    """Saves the module's weights as ``step-XXXXXXXX.safetensors`` after each of ``steps``.

    Args:
        out: folder.
        steps: optimiser steps after which to save.
    """

    def __init__(self, out: Path, steps: Sequence[int]) -> None:
        self.out = out
        self.steps = sorted(set(steps))

    @staticmethod
    def path(out: Path, step: int) -> Path:
        return out / f"step-{step:08d}.safetensors"

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.steps:
            weights = {name: value.detach().contiguous() for name, value in pl_module.state_dict().items()}
            save_file(weights, self.path(self.out, trainer.global_step))


class LossCurve(L.Callback):
    """Keeps the mean loss of every hundred steps, and of the rest at the end, as ``means``: (step, loss) pairs."""

    def __init__(self) -> None:
        self.means: list[tuple[int, float]] = []
        self._losses: list[Tensor] = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        if len(self._losses) == EVERY or trainer.global_step == trainer.max_steps:
            mean = sum(float(loss) for loss in self._losses) / len(self._losses)
            self.means.append((trainer.global_step, round(mean, 5)))
            self._losses = []
