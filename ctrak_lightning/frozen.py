"""What training leaves as it is: the frozen weights and constant buffers that a task computes with, and their hashes."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from ctrak_lightning.errors import TrainingChangedError

BUFFER_LIMIT = 2**16
"""Buffers of at most so many numbers are taken for ones that training may change, such as running means, and are stored with every
checkpoint; larger ones, such as tables of positions and quantised weights, are constants."""
_SAMPLED = 64


def changing_buffers(owner: nn.Module, parts: Collection[str]) -> dict[str, Tensor]:
    """Buffers of these parts that training may change, by qualified name (no copies): those of a state dict that are floating point
    and small, or one integer, such as a counter.

    Args:
        owner: the module whose names they are.
        parts: as :func:`parts_of` gives them.
    """
    return {name: value for name, value in _buffers(owner) if _may_change(value) and _is_in(name, parts)}


class Frozen:
    """The frozen weights and constant buffers of some parts of a module, each hashed once in a process while it stays the same.

    Args:
        owner: the module whose names they are.
        parts: names of submodules, parameters and buffers, as :func:`parts_of` gives them.
        trained: names of the parameters that are not frozen.
    """

    def __init__(self, owner: nn.Module, parts: Collection[str], trained: Collection[str]) -> None:
        self._owner, self._parts, self._trained = owner, parts, trained
        self._digests = self._hashed()

    @property
    def digest(self) -> str:
        """One sha256 (hex) of all of them, their names included."""
        return hashlib.sha256(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()

    def require_unchanged(self) -> None:
        """Raises a TrainingChangedError that names what has changed since this was made."""
        now = self._hashed()
        changed = sorted(
            name for name in now.keys() | self._digests if now.get(name) != self._digests.get(name)
        )
        if changed:
            raise TrainingChangedError(
                f"{len(changed)} weights or buffers that no optimizer has are not what they were when the traces began, for example "
                f"{changed[:5]}. HINT: frozen weights must stay as they are during a traced run, and adapters apart from them; "
                f"buffers of more than {BUFFER_LIMIT} numbers must be constant."
            )

    def _hashed(self) -> dict[str, str]:
        values: dict[str, Tensor] = dict(self._owner.named_parameters())
        values = {name: value for name, value in values.items() if name not in self._trained} | _constants(
            self._owner
        )
        return {name: _digest(value) for name, value in values.items() if _is_in(name, self._parts)}


class Used:
    """Notices which tensors a computation uses, also those that are used functionally, without a call of their module."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What is computed inside is noticed."""
        with _Watch(self._seen):
            yield

    def __contains__(self, value: Tensor) -> bool:
        return _storage(value) in self._seen


def parts_of(owner: nn.Module, used: Used, trained: Collection[str]) -> list[str]:
    """The parts of a module that were used, in as few names as possible: a submodule's where all of it was used or trains, else those
    of its parts, down to single parameters and buffers. ``[""]`` is the whole module.

    An average of the weights, a teacher, or a discriminator that a module has beside its network is so no part of it.
    """
    tensors: dict[str, Tensor] = dict(owner.named_parameters())
    tensors = {name: value for name, value in tensors.items() if name not in trained} | _constants(owner)
    unused = {name for name, value in tensors.items() if value not in used}
    touched = (set(tensors) - unused) | {name for name, _ in owner.named_parameters() if name in trained}
    return sorted(_covered(owner, "", touched, unused))


def _covered(module: nn.Module, prefix: str, touched: set[str], unused: set[str]) -> Iterator[str]:
    dot = f"{prefix}." if prefix else ""
    inside = {name for name in touched if name.startswith(dot)}
    if not inside:
        return
    # The owner itself is never taken as a whole: what it gets beside its network in another run is no part of that.
    if prefix and not any(name.startswith(dot) for name in unused):
        yield prefix
        return
    children = {f"{dot}{name}": child for name, child in module.named_children()}
    for name, child in children.items():
        yield from _covered(child, name, touched, unused)
    yield from (name for name in inside if not any(name.startswith(f"{child}.") for child in children))


class _Watch(TorchDispatchMode):
    """Notes the storages of all tensors that reach an operation."""

    def __init__(self, seen: set[int]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._seen.update(_storage(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def _storage(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # of a tensor that only wraps others
        return id(value)


def _buffers(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has; others are made again from the configuration."""
    for prefix, module in owner.named_modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), value


def _constants(owner: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in _buffers(owner) if not _may_change(value)}


def _may_change(value: Tensor) -> bool:
    return value.numel() <= (BUFFER_LIMIT if value.is_floating_point() else 1)


def _is_in(name: str, parts: Collection[str]) -> bool:
    return any(name == part or part == "" or name.startswith(f"{part}.") for part in parts)


_known: Any = WeakIdKeyDictionary()
"""Digest of every tensor that was hashed, with what tells whether it is still the same."""


def _digest(value: Tensor) -> str:
    mark = _mark(value)
    found = _known.get(value)
    if found is None or found[0] != mark:
        facts = f"{value.dtype}:{tuple(value.shape)};".encode()
        digest = hashlib.sha256(facts)
        digest.update(_bytes(value.detach()))
        found = _known[value] = (mark, digest.hexdigest())
    text: str = found[1]
    return text


def _mark(value: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor does: its place, its version, and, for changes that bypass the version, some of its numbers."""
    flat = value.detach().flatten()
    some = flat[:: max(1, len(flat) // _SAMPLED)]
    version = None if value.is_inference() else value._version
    return value.data_ptr(), version, value.dtype, tuple(value.shape), bytes(_bytes(some))


def _bytes(value: Tensor) -> memoryview:
    flat = value.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
