"""Names of what is in a module, which are the same whether or not ``torch.compile`` has wrapped some of it."""

from collections.abc import Iterator

from torch import Tensor, nn

_COMPILED = "_orig_mod"
"""Where the wrapper of ``torch.compile(module)`` keeps the module."""


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
