"""The user's model, lent to a query: under the weights of a checkpoint for a while, then as it
was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.gradients import undisturbed
from ctrak_lightning.model.weights import copy_into, restored, tensors_of
from ctrak_lightning.store.store import Checkpoint
from ctrak_lightning.tasks import DiffusionTask, task_modules
from ctrak_lightning.utilities.naming import parameters_of


class LentModel:
    """A model that queries run under the weights of a store's checkpoints.

    Args:
        module: the model.
        checkpoints: whose weights it takes on.
        task: its DiffusionTask.
    """

    def __init__(
        self, module: nn.Module, checkpoints: Sequence[Checkpoint], task: DiffusionTask
    ) -> None:
        self.module = module
        self.task = task
        self.checkpoints = checkpoints
        self.trained = sorted(checkpoints[0].weights())
        """Names of the parameters that a checkpoint holds."""
        self._taken = {*self.trained, *checkpoints[0].buffers()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts everything that the task computes with into the state in which it is traced, as a
        capture does."""
        with undisturbed(self.module, *task_modules(self.task)):
            yield

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Lends the module, in evaluation mode: afterwards its weights and flags are what they
        were."""
        parameters = parameters_of(self.module)
        flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in self.trained)
            with restored(self.module, self._taken), self.evaluating():
                yield
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(flags[name])

    def load(self, index: int) -> None:
        """Takes on the weights of a checkpoint; only while borrowed.

        Raises:
            StoreMismatchError: they are not those of the first checkpoint, or not of the model's
                shapes.
        """
        own, checkpoint = tensors_of(self.module), self.checkpoints[index]
        values = checkpoint.weights() | checkpoint.buffers()
        wrong = sorted(values.keys() ^ self._taken)
        if wrong:
            raise StoreMismatchError(
                f"What was trained at step {checkpoint.step} is not what was at step "
                f"{self.checkpoints[0].step}: {wrong[:5]} are in one checkpoint only. Traces of "
                "the two cannot be asked together. HINT: parameters were frozen or unfrozen in "
                "that run; trace each part of it into a store of its own."
            )
        wrong = [
            name
            for name, value in values.items()
            if name not in own or own[name].shape != value.shape
        ]
        if wrong:
            raise StoreMismatchError(
                f"The weights of step {checkpoint.step} do not fit the model: {wrong[:5]} are "
                "missing in it, or of another shape. HINT: build the module as in the traced run."
            )
        copy_into(self.module, values)
