"""The loss curve that a training run keeps of itself."""

from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

EVERY = 100


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

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self.means)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.means = [(step, mean) for step, mean in state_dict["means"]]
