"""A module with other values of some of its parameters and buffers for a while, then as it was."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ctrak_lightning.naming import buffers_of, parameters_of


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, by qualified name (no copies)."""
    return parameters_of(module) | buffers_of(module)


def take_on(module: nn.Module, values: Mapping[str, Tensor]) -> None:
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
        take_on(module, kept)


@contextmanager
def lent(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Lends a module ``values``, by qualified name, and then gives it back its own."""
    with restored(module, values):
        take_on(module, values)
        yield
