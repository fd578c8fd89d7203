"""What training leaves as it is: the frozen weights and constant buffers that a task computes with,
and their hashes."""

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from ctrak_lightning.errors import TrainingChangedError
from ctrak_lightning.utilities.naming import bytes_of, inside, modules_of, parameters_of
from ctrak_lightning.utilities.rng import seeded_noise

BUFFER_LIMIT = 2**16
"""Buffers of at most so many numbers are taken for ones that training may change, such as running
means, and are stored with every checkpoint; larger ones, such as tables of positions and quantised
weights, are constants."""
ROUNDING = {"float64": 1e-10, "float32": 1e-5}
"""Largest relative difference ``||a - b|| / ||a||`` of frozen weights that is taken for rounding,
by their format, as after LoRA was merged into them and unmerged. In 16 bits rounding is as large as
a short fine-tune of the base weights, so nothing is taken for it."""
_SAMPLED = 64
_SKETCH, _PERIOD = 64, 2**16


class RoundedWeightsWarning(UserWarning):
    """Frozen weights are what they were but for rounding, as after LoRA has been merged into them
    and unmerged.

    Why: traces go on, since the difference is far below what training moves; but it is one.

    What to do: nothing, if a preview merges the adapter. To be rid of it, preview with the adapter
    as it is, or with a copy of the model.
    """


def changing_buffers(owner: nn.Module, parts: Collection[str]) -> dict[str, Tensor]:
    """Buffers of these parts that training may change, by qualified name (no copies): those of a
    state dict that are floating point and small, or one integer, such as a counter."""
    return {
        name: value for name, value in _buffers(owner) if _may_change(value) and _is_in(name, parts)
    }


class Frozen:
    """The frozen weights and constant buffers of some parts of a module, each hashed once in a
    process while it stays the same."""

    def __init__(self, owner: nn.Module, parts: Collection[str], trained: Collection[str]) -> None:
        self._owner, self._parts, self._trained = owner, parts, trained
        self._seen = self._looked_at()
        self._is_rounding_told = False

    @property
    def digest(self) -> str:
        """One sha256 (hex) of all of them, their names included."""
        return _sha256({name: seen.digest for name, seen in self._seen.items()})

    @property
    def sketch(self) -> str:
        """What separates rounding from change (:func:`is_rounded`), as JSON: the coarsest format, a
        digest of what must be equal, and random projections of the weights, each relative to its
        norm."""
        total = torch.zeros(_SKETCH + 1, dtype=torch.float64)
        for name, seen in self._seen.items():
            if seen.sketch is not None:
                # Signs of its own, so that two weights that change places are noticed.
                total += seen.sketch * seeded_noise((_SKETCH + 1,), 0, 0, name).sign()
        formats = {seen.format for seen in self._seen.values() if seen.sketch is not None}
        coarsest = max(formats, key=list(ROUNDING).index, default="float64")
        fixed = _sha256(
            {
                name: seen.digest if seen.sketch is None else [seen.format, *seen.shape]
                for name, seen in self._seen.items()
            }
        )
        return json.dumps([coarsest, fixed, total.tolist()])

    def require_unchanged(self) -> None:
        """Raises a TrainingChangedError that names what has changed, by more than rounding, since
        this was made.

        Warns:
            RoundedWeightsWarning: something has been rounded; once.
        """
        now, before = self._looked_at(), self._seen
        gone = sorted(now.keys() ^ before.keys())
        moved = sorted(
            name for name in now.keys() & before if now[name].digest != before[name].digest
        )
        changed = gone + [name for name in moved if not before[name].is_near(now[name])]
        if moved and not changed and not self._is_rounding_told:
            self._is_rounding_told = True
            warn_of_rounding(f"{len(moved)} of them, such as {moved[0]!r}")
        if changed:
            raise TrainingChangedError(
                f"{len(changed)} weights or buffers that no optimizer has are not what they were "
                f"when the traces began, for example {changed[:5]}. HINT: frozen weights must stay "
                "as they are during a traced run, and adapters apart from them (merged for a "
                "preview, say, they must be unmerged before the next trace; in 16 bits this moves "
                "weights for good: preview with the adapter as it is, or with a copy); buffers of "
                f"more than {BUFFER_LIMIT} numbers must be constant."
            )

    def _looked_at(self) -> dict[str, "_Seen"]:
        values = _constants(self._owner, self._trained)
        return {name: _look(value) for name, value in values.items() if _is_in(name, self._parts)}


class Used:
    """Notices which tensors a computation uses, also those that are used functionally, without a
    call of their module."""

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
    """The parts of a module that were used, in as few names as possible: a submodule's where all of
    it was used or trains, else those of its parts, down to single parameters and buffers. ``[""]``
    is the whole module.

    An average of the weights, a teacher, or a discriminator that a module has beside its network is
    so no part of it.
    """
    tensors = _constants(owner, trained)
    unused = {name for name, value in tensors.items() if value not in used}
    touched = (set(tensors) - unused) | {name for name in parameters_of(owner) if name in trained}
    return sorted(_covered(owner, "", touched, unused))


def _covered(module: nn.Module, prefix: str, touched: set[str], unused: set[str]) -> Iterator[str]:
    module, dot = inside(module), f"{prefix}." if prefix else ""
    within = {name for name in touched if name.startswith(dot)}
    if not within:
        return
    # The owner itself is never taken as a whole: what it gets beside its network in another run is
    # no part of that.
    if prefix and not any(name.startswith(dot) for name in unused):
        yield prefix
        return
    children = {f"{dot}{name}": child for name, child in module.named_children()}
    for name, child in children.items():
        yield from _covered(child, name, touched, unused)
    yield from (
        name for name in within if not any(name.startswith(f"{child}.") for child in children)
    )


class _Watch(TorchDispatchMode):
    """Notes the storages of all tensors that reach an operation."""

    def __init__(self, seen: set[int]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._seen.update(
            _storage(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)
        )
        return func(*args, **(kwargs or {}))


def _storage(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # of a tensor that only wraps others
        return id(value)


def _buffers(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has; others are made again from the configuration."""
    for prefix, module in modules_of(owner):
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), value


def _constants(owner: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """What training leaves as it is: the parameters that are not trained, and constant buffers."""
    frozen = {name: value for name, value in parameters_of(owner).items() if name not in trained}
    return frozen | {name: value for name, value in _buffers(owner) if not _may_change(value)}


def _may_change(value: Tensor) -> bool:
    return value.numel() <= (BUFFER_LIMIT if value.is_floating_point() else 1)


def _is_in(name: str, parts: Collection[str]) -> bool:
    return any(name == part or part == "" or name.startswith(f"{part}.") for part in parts)


def is_rounded(stored: str, mine: str) -> bool:
    """Whether two :attr:`Frozen.sketch` are of the same weights, but for rounding."""
    try:
        *facts, before = json.loads(stored)
        *facts_now, now = json.loads(mine)
        a, b = torch.tensor(before, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
        return facts == facts_now and bool((a - b).norm() <= ROUNDING[facts[0]])
    except (ValueError, TypeError, KeyError, RuntimeError):  # the stored one is damaged
        return False


def warn_of_rounding(what: str) -> None:
    """Says that frozen weights have been rounded."""
    warnings.warn(
        f"Frozen weights are not, to the bit, what they were when the traces began: {what}. They "
        "differ by rounding alone, and are taken for the same. HINT: that is usual where LoRA is "
        "merged into them for a preview and unmerged; a preview without merging, or with a copy "
        "of the model, leaves them as they are.",
        RoundedWeightsWarning,
        stacklevel=3,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """What is kept of a tensor: its digest, and for formats in which it may be rounded random
    projections relative to its norm, and its norm's logarithm."""

    digest: str
    format: str
    shape: tuple[int, ...]
    sketch: Tensor | None

    def is_near(self, other: "_Seen") -> bool:
        """Whether two that are not equal differ by rounding alone."""
        if self.sketch is None or other.sketch is None:
            return False
        is_alike = (self.format, self.shape) == (other.format, other.shape)
        return is_alike and bool((self.sketch - other.sketch).norm() <= ROUNDING[self.format])


_known: Any = WeakIdKeyDictionary()
"""What was seen of every tensor that was hashed, with a mark that changes when it does."""


def _look(value: Tensor) -> _Seen:
    mark = _mark(value)
    found = _known.get(value)
    if found is None or found[0] != mark:
        form, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        digest = hashlib.sha256(f"{value.dtype}:{shape};".encode())
        digest.update(bytes_of(value))
        sketch = _sketch(value) if form in ROUNDING else None
        found = _known[value] = (mark, _Seen(digest.hexdigest(), form, shape, sketch))
    seen: _Seen = found[1]
    return seen


def _sketch(value: Tensor) -> Tensor:
    """A tensor's count-sketch relative to its norm, and the logarithm of that, float64. The norm of
    a difference of two is the tensors' relative difference, to about a tenth, and where it is in
    one element alone, exactly."""
    total, square = torch.zeros(_SKETCH, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    wide = torch.promote_types(value.dtype, torch.float32)
    for part in value.detach().flatten().split(_PERIOD):  # no copy of the whole
        numbers = part.cpu().to(wide)
        square += numbers.dot(numbers)
        signed = numbers * _signs()[: len(numbers)]
        total += (
            torch.nn.functional.pad(signed, (0, -len(signed) % _SKETCH)).view(-1, _SKETCH).sum(0)
        )
    norm = square.sqrt().clamp(min=1e-30)
    return torch.cat([total / norm, norm.log()[None]])


@lru_cache(maxsize=1)
def _signs() -> Tensor:
    return seeded_noise((_PERIOD,), 0, 0, "signs").sign()


def _sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _mark(value: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor does: its place, its version, and, for changes that bypass the
    version, some of its numbers."""
    flat = value.detach().flatten()
    some = flat[:: max(1, len(flat) // _SAMPLED)]
    version = None if value.is_inference() else value._version
    return value.data_ptr(), version, value.dtype, tuple(value.shape), bytes(bytes_of(some))
