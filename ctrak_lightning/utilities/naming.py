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
    is_own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__name__ if is_own else f"{cls.__module__}.{cls.__qualname__}"


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
