"""The parameters that a fine-tune trains, and other values for them for a while."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ctrak_lightning.errors import TrainingChangedError, listed
from ctrak_lightning.utilities.naming import buffers_of, parameters_of


class UntrainedParameterWarning(UserWarning):
    """Parameters require a gradient but are in no optimizer; the message names them.

    Why: they do not train, so they are not traced, which is rarely what was meant.

    What to do: give them to an optimizer, or set ``requires_grad_(False)``.
    """


def trained_parameters(
    module: nn.Module, optimizers: Sequence[Optimizer] = ()
) -> dict[str, Tensor]:
    """The parameters that training changes, by qualified name (no copies): those that require grad
    and are in an optimizer.

    Args:
        module: what trains.
        optimizers: of the run; where there are none, they are not known, and what requires grad is
            taken to train.
    """
    held = {
        id(value) for one in optimizers for group in one.param_groups for value in group["params"]
    }
    return {
        name: value
        for name, value in parameters_of(module).items()
        if value.requires_grad and (not optimizers or id(value) in held)
    }


class Trained:
    """The parameters that a run trains, which must be the same at every capture; the optimizers, a
    list that may grow, are read again each time.

    Warns:
        UntrainedParameterWarning: some parameters require grad and are in none of the optimizers.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        self._module, self._optimizers = module, optimizers
        self.names = frozenset(trained_parameters(module, optimizers))
        idle = sorted(trained_parameters(module).keys() - self.names)
        if idle:
            warnings.warn(
                "These parameters require a gradient but are in no optimizer, so they do not "
                f"train and are not traced: {listed(idle, 10, str)}. HINT: give them to an "
                "optimizer, or `requires_grad_(False)`.",
                UntrainedParameterWarning,
                stacklevel=4,
            )

    def now(self) -> dict[str, Tensor]:
        """The trained parameters by name (no copies).

        Raises:
            TrainingChangedError: they are not those of the start; names which joined and which
                left.
        """
        found = trained_parameters(self._module, self._optimizers)
        joined, left = sorted(found.keys() - self.names), sorted(self.names - found.keys())
        if joined or left:
            changes = [f"{len(joined)} joined ({listed(joined, 10, str)})"] if joined else []
            changes += [f"{len(left)} left ({listed(left, 10, str)})"] if left else []
            raise TrainingChangedError(
                "The parameters that train are not those that the traces began with: "
                f"{', '.join(changes)}. Traces of the two are not comparable, and the earlier ones "
                "stay as they are. HINT: unfreeze, or change adapters, before training starts; or "
                "trace the run from here on into a store of its own, as a run that starts with "
                "these weights."
            )
        return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, by qualified name (no copies)."""
    return parameters_of(module) | buffers_of(module)


def copy_into(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies ``values``, by qualified name, into a module's own tensors."""
    own = tensors_of(module)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


@contextmanager
def restored(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """On exit, also after an error, these parameters and buffers are what they were, to the bit."""
    kept = {
        name: value.detach().clone() for name, value in tensors_of(module).items() if name in names
    }
    try:
        yield
    finally:
        copy_into(module, kept)


@contextmanager
def loaded(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A module has these ``values``, by qualified name, and afterwards its own again."""
    with restored(module, values):
        copy_into(module, values)
        yield
