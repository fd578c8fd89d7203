"""The user's model, lent to a query: under the weights of a checkpoint for a while, then as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ctrak_lightning.errors import CorruptStoreError
from ctrak_lightning.gradients import tracing_mode
from ctrak_lightning.task import task_modules
from ctrak_lightning.traces.store import Checkpoint


class LentModel:
    """A model that queries run under the weights of a store's checkpoints.

    Args:
        module: the model.
        checkpoints: whose weights it takes on.
        task: its DiffusionTask.
    """

    def __init__(self, module: nn.Module, checkpoints: Sequence[Checkpoint], task: Any) -> None:
        self.module = module
        self.task = task
        self.checkpoints = checkpoints
        self.trained = sorted(checkpoints[0].weights())
        """Names of the parameters that a checkpoint holds."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts everything that the task computes with into the state in which it is traced, as a capture does."""
        with tracing_mode(self.module, *task_modules(self.task)):
            yield

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Lends the module, in evaluation mode: afterwards its weights and flags are what they were."""
        parameters = dict(self.module.named_parameters())
        flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        values = {name: parameters[name].detach().clone() for name in self.trained}
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in self.trained)
            with self.evaluating():
                yield
        finally:
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(value)
            for name, parameter in parameters.items():
                parameter.requires_grad_(flags[name])

    def load(self, index: int) -> None:
        """Takes on the weights of a checkpoint; only while borrowed.

        Raises:
            CorruptStoreError: they are not those of the other checkpoints, or not of the model's shapes.
        """
        parameters = dict(self.module.named_parameters())
        weights = self.checkpoints[index].weights()
        wrong = sorted(weights.keys() ^ set(self.trained))
        wrong += [
            name for name in self.trained if name in weights and weights[name].shape != parameters[name].shape
        ]
        if wrong:
            raise CorruptStoreError(
                f"The weights of step {self.checkpoints[index].step} do not fit the model: {wrong[:5]} are missing, too many, or of "
                "another shape. Expected those that the run trained. HINT: the file was altered; restore it from a copy."
            )
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
