"""Names by which a store knows things again: of classes, of what is in a module, whether or not
``torch.compile`` has wrapped it, and of a moment."""

from collections.abc import Iterator
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

_COMPILED = "_orig_mod"
"""Where the wrapper of ``torch.compile(module)`` keeps the module."""


def place_of(cls: type) -> str:
    """Where a class is: of the library's own the name alone, of others ``package.module.Name``."""
    return cls.__name__ if is_own(cls) else f"{cls.__module__}.{cls.__qualname__}"


def is_own(cls: type) -> bool:
    """Whether a class is the library's own."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def same_place(one: str, other: str) -> bool:
    """Whether two places may be one class's: a script's own classes are in ``__main__`` there, and
    elsewhere when another script asks.

    Example:
        >>> same_place("__main__.Gain", "train.Gain"), same_place("a.Gain", "b.Gain")
        (True, False)
    """
    (module, _, name), (module_2, _, name_2) = one.rpartition("."), other.rpartition(".")
    return one == other or (name == name_2 and "__main__" in (module, module_2))


def bytes_of(value: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, in order, to be hashed."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def utc_now() -> str:
    """The present moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(name: str) -> str:
    """A qualified name without the wrappers of ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def inside(module: nn.Module) -> nn.Module:
    """The module itself, where ``torch.compile`` has wrapped it."""
    found: nn.Module = getattr(module, _COMPILED, module)
    return found


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules in a module, and their names; no wrappers."""
    for name, inner in module.named_modules():
        if inside(inner) is inner:
            yield plain(name), inner


def parameters_of(module: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Its parameters by name (no copies)."""
    named = module.named_parameters(remove_duplicate=remove_duplicate)
    return {plain(name): value for name, value in named}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Its buffers by name (no copies)."""
    return {plain(name): value for name, value in module.named_buffers()}
