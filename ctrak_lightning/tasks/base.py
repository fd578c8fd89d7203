"""How a model is addressed: the seam between this library and a user's LightningModule."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ctrak_lightning.errors import BatchError, TaskError
from ctrak_lightning.schedules import Schedule

_HINT = (
    "HINT: give every sample an id that is a str or an int, such as its file's name or its "
    "number in the data set."
)


def plain_ids(values: Iterable[Any]) -> list[str]:
    """The ids of a batch's samples as text: strings as they are, whole numbers of Python, numpy and
    torch in decimal.

    Args:
        values: B ids, or a tensor or array [B] of whole numbers, on any device.

    Raises:
        BatchError: an id is something else, or empty.

    Example:
        >>> plain_ids(["cat.png", 7]), plain_ids(np.array([1000, 1001]))
        (['cat.png', '7'], ['1000', '1001'])
    """
    if isinstance(values, str):
        raise BatchError(
            f"Sample ids: {values!r} is one str, expected one id for each sample. {_HINT}"
        )
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise BatchError(
                f"Sample ids: an array of shape {tuple(values.shape)}, expected [B]: one id for "
                f"each. {_HINT}"
            )
        values = list(values)
    return [plain_id(value) for value in values]


def plain_id(value: Any) -> str:
    """One id as text; see :func:`plain_ids`."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        # `str(tensor)` depends on the device and on torch's printing options.
        if not value or (value.startswith("tensor(") and value.endswith(")")):
            raise BatchError(f"Sample ids: {value!r} names no sample. {_HINT}")
        return str(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    raise BatchError(
        f"Sample ids: {value!r} is {type(value).__name__}, expected a str or a whole number. "
        f"{_HINT}"
    )


Condition = dict[str, Tensor]
Spec = Mapping[str, str] | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A batch as the network sees it.

    Args:
        latents: clean latents x0 [B, ...].
        condition: the network's keyword arguments, each [B, ...].
        sample_ids: the dataset's own ids, one per row; whole numbers, a tensor of them too, become
            text.
        metadata: columns of facts for reports (owner, licence, caption, ...), each of length B.

    Raises:
        BatchError: a part is of another kind, the parts have different lengths, or an id is neither
            text nor a whole number.
    """

    latents: Tensor
    condition: Condition
    sample_ids: list[str]
    metadata: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.latents, Tensor) and self.latents.is_floating_point()):
            raise BatchError(
                f"Encoded(latents={described(self.latents)}): expected a floating-point tensor "
                "[B, ...]. HINT: `encode(batch)` returns the clean latents, scaled as the network "
                "sees them."
            )
        if self.latents.ndim == 0:
            raise BatchError("Encoded(latents=a tensor []): expected [B, ...], one for each image.")
        if not _is_condition(self.condition):
            raise BatchError(
                f"Encoded(condition={described(self.condition)}): expected a dict of the network's "
                "keyword arguments, each a tensor [B, ...]; {} of a network without. HINT: "
                "`torch.tensor(...)` makes one of a list of numbers; texts are embedded before."
            )
        if self.sample_ids is None or not hasattr(self.sample_ids, "__iter__"):
            raise BatchError(
                f"Encoded(sample_ids={described(self.sample_ids)}): expected one id for each "
                f"sample. {_HINT}"
            )
        object.__setattr__(self, "sample_ids", plain_ids(self.sample_ids))
        rows = len(self.latents)
        lengths = {f"condition[{name!r}]": len(value) for name, value in self.condition.items()}
        lengths |= {f"metadata[{name!r}]": len(value) for name, value in self.metadata.items()}
        lengths["sample_ids"] = len(self.sample_ids)
        wrong = {name: length for name, length in lengths.items() if length != rows}
        if wrong:
            raise BatchError(
                f"Encoded(latents with {rows} rows): these parts have another length: {wrong}. "
                "HINT: `encode(batch)` must return one row of each per image."
            )

    def rows(self, start: int, stop: int | None = None) -> "Encoded":
        """The same of consecutive rows only."""
        part = slice(start, stop)
        return Encoded(
            latents=self.latents[part],
            condition={name: value[part] for name, value in self.condition.items()},
            sample_ids=self.sample_ids[part],
            metadata={name: values[part] for name, values in self.metadata.items()},
        )


def described(value: Any) -> str:
    """A value's type and shape, as a message names them.

    Example:
        >>> described({"words": torch.ones(2, 5), "size": [1, 2]}), described(None)
        ('{words: float32 [2, 5], size: list of 2}', 'None')
    """
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f"{value.device} "
        return f"{place}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{name}: {described(each)}" for name, each in value.items())
        return f"{{{inside}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return "None" if value is None else type(value).__name__


def _is_condition(given: Any) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(value, Tensor) and value.ndim > 0 for value in given.values()
    )


class OptionalMembers:
    """What a task may offer beside what it must, and what is taken where it does not: None says
    that the task cannot do it. Each says who asks for it."""

    id_column: str | None = None
    """The key of the ids in a batch. Where it is named, samples whose batches lack it are numbered
    by their place in the data set."""

    def sample_ids(self, batch: Any) -> list[str] | None:
        """The B ids that ``encode(batch)`` gives, without encoding: tracing inside training steps
        and counting exposures ask for those of every batch. None: they are read off ``encode``."""
        return None

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1] of latents [B, ...], for thumbnails and reports. None:
        there are none to show."""
        return None

    def pictures(self, batch: Any) -> Tensor | None:
        """A batch's own images [B, 3, H, W] in [0, 1], for thumbnails of training images, which
        need no :meth:`decode` then. None: the batch has none."""
        return None

    def latents(self, images: Tensor) -> Tensor | None:
        """Clean latents [B, ...] of images [B, 3, H, W] in [-1, 1], as ``encode`` makes them, for
        questions about images that were not generated here. None: such questions are refused."""
        return None

    def latent_mask(self, mask: Tensor) -> Tensor | None:
        """Weights, of a latent's shape or what broadcasts to it, for a mask [H, W] of its image,
        for questions about a part of an image. None: of latents [C, h, w] with the image's
        proportions, the mean of the mask over what each position covers."""
        return None

    def known_attributes(self) -> Mapping[str, Collection[str]] | None:
        """The values that each attribute of a spec may take, for messages; by their conditions a
        question notices another label map or tokenizer. None: specs are prompts, or anything."""
        return None

    def check_concept(self, name: str, present: Spec, absent: Spec) -> None:
        """Called before a concept is asked.

        Raises:
            ConceptError: it cannot be.
        """


# An editor completes these members, and a type checker knows them. While a program runs they stand
# in :class:`Wrapped` alone: a default in a module's class would hide a submodule, a parameter or a
# property of the user's own by that name.
if TYPE_CHECKING:
    _Base = OptionalMembers
else:
    _Base = object


class DiffusionTask(_Base):
    """What a LightningModule must offer to be traced: inherit from it, before ``LightningModule``.

    ``denoiser``, ``noise_schedule``, :meth:`encode` and :meth:`condition` are yours to define,
    :meth:`predict` has a default, and :class:`~ctrak_lightning.tasks.OptionalMembers` lists what
    else there can be.
    """

    denoiser: nn.Module
    """The network whose trainable parameters are traced."""
    noise_schedule: Schedule
    """Its noise levels: ``NoiseSchedule.from_scheduler(scheduler)``."""

    @abstractmethod
    def encode(self, batch: Any) -> Encoded:
        """Clean latents, condition and sample ids of a batch."""
        raise NotImplementedError(f"{type(self).__name__}.encode(batch) -> Encoded")

    @abstractmethod
    def condition(self, spec: Spec, n: int) -> Condition:
        """The network's keyword arguments, each [n, ...], for a concept's ``present`` or ``absent``
        (a mapping of attributes, or a prompt), ``n`` times. What the spec does not name is dropped,
        so ``{}`` is the null condition.

        Raises:
            ConceptError: the spec is none that the network knows.
        """
        raise NotImplementedError(f"{type(self).__name__}.condition(spec, n) -> dict[str, Tensor]")

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output [B, ...] for states ``x_t`` [B, ...] at timesteps ``t`` [B]. The
        default calls ``denoiser`` as diffusers' models are called."""
        output: Tensor = self.denoiser(x_t, t, return_dict=False, **condition)[0]
        return output


OPTIONAL = {name for name in vars(OptionalMembers) if not name.startswith("_")}
_REQUIRED = ("denoiser", "noise_schedule", "encode", "condition")
MEMBERS = {*OPTIONAL, *_REQUIRED, "predict"}
"""The names of a task's members."""


class Wrapped(DiffusionTask, OptionalMembers):
    """A task with all members: those that another one has, ``members`` of them called by
    :meth:`call`, and the defaults of those that it lacks.

    Args:
        task: a DiffusionTask, or what is used as one.
    """

    members: ClassVar[tuple[str, ...]] = ()
    encode: Any
    condition: Any

    def __init__(self, task: Any) -> None:
        self.wrapped = task

    def __getattribute__(self, name: str) -> Any:
        if name not in MEMBERS:
            return super().__getattribute__(name)
        if name in OPTIONAL:
            value = getattr(self.wrapped, name, None)
            # A task's own attribute may have such a name and be something else, such as a tensor.
            if value is None or not (callable(value) or name == "id_column"):
                return super().__getattribute__(name)
        else:
            value = getattr(self.wrapped, name)
        return (
            partial(self.call, name, value) if name in self.members and callable(value) else value
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "wrapped"), name)

    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the member of this name gives."""
        raise NotImplementedError


def whole(task: Any) -> DiffusionTask:
    """The task with the defaults of the optional members that it lacks."""
    return task if isinstance(task, Wrapped) else Wrapped(task)


def unwrapped(task: Any) -> Any:
    """The task itself, where it is wrapped."""
    while isinstance(task, Wrapped):
        task = task.wrapped
    return task


def name_of(task: DiffusionTask) -> str:
    """The name of a task's own class, for messages."""
    return type(unwrapped(task)).__name__


@runtime_checkable
class Description(Protocol):
    """What says how a module is addressed, as :class:`~ctrak_lightning.DiffusersTask` does."""

    def bind(self, module: Any) -> DiffusionTask:
        """The task of a module."""


def resolve_task(candidate: object, description: object = None) -> DiffusionTask:
    """The DiffusionTask of a module.

    Args:
        candidate: a module that is a DiffusionTask, or carries one as its attribute ``task``.
        description: what says how another module is addressed: a
            :class:`~ctrak_lightning.DiffusersTask`, bound to ``candidate`` here, or a
            DiffusionTask. A class that has the members need not inherit.

    Raises:
        TaskError: there is none, and the message names the missing members; or the description does
            not fit.
    """
    carried = getattr(candidate, "task", None) if description is None else description
    if isinstance(carried, Description):
        carried = carried.bind(candidate)
    found = candidate if carried is None else carried
    task = whole(found)
    missing = [name for name in (*_REQUIRED, "predict") if _lacks(found, name)]
    if missing:
        raise TaskError(
            f"{type(found).__name__} is no DiffusionTask: it lacks {', '.join(missing)}. HINT: let "
            "the module inherit from ctrak_lightning.DiffusionTask and define denoiser, "
            "noise_schedule, encode(batch) and condition(spec, n); predict has a default. A "
            "module that holds the parts of a diffusers model needs none of that: "
            "task=DiffusersTask(unet='unet', vae='vae', ...) names them."
        )
    if not isinstance(task.denoiser, nn.Module):
        raise TaskError(
            f"{name_of(task)}.denoiser is {type(task.denoiser).__name__}, expected an nn.Module."
        )
    if not isinstance(task.noise_schedule, Schedule):
        raise TaskError(
            f"{name_of(task)}.noise_schedule is {type(task.noise_schedule).__name__}, "
            "expected a NoiseSchedule. HINT: NoiseSchedule.from_scheduler(scheduler)."
        )
    return task


def _lacks(found: object, name: str) -> bool:
    return not hasattr(found, name) or getattr(getattr(found, name), "__isabstractmethod__", False)


def task_modules(task: DiffusionTask) -> list[nn.Module]:
    """The modules that a task computes with: itself, if it is one, or those that it holds, which
    need not be part of the module that trains."""
    own = unwrapped(task)
    if isinstance(own, nn.Module):
        return [own]
    held = getattr(own, "__dict__", {}).values()
    return [value for value in held if isinstance(value, nn.Module)]


def encode(task: DiffusionTask, batch: Any) -> Encoded:
    """``task.encode(batch)`` without gradient, with a batch that lacks fields reported as such.

    Raises:
        BatchError: a field is missing, or the result is no :class:`Encoded`.
    """
    try:
        with torch.no_grad():
            encoded = task.encode(batch)
    except KeyError as error:
        raise _missing_field(task, "encode", batch, error) from error
    if not isinstance(encoded, Encoded):
        raise BatchError(
            f"{name_of(task)}.encode(batch) returned {type(encoded).__name__}, expected "
            "ctrak_lightning.Encoded."
        )
    return encoded


def condition_of(task: DiffusionTask, spec: Spec, n: int) -> Condition:
    """``task.condition(spec, n)``, which must have ``n`` rows of everything.

    Raises:
        TaskError: it has not.
    """
    return require_rows(task, spec, n, task.condition(spec, n))


def require_rows(task: DiffusionTask, spec: Spec, n: int, given: Any) -> Condition:
    """What ``task.condition(spec, n)`` gave.

    Raises:
        TaskError: it is no dict of tensors, or has another number of rows.
    """
    if _is_condition(given) and all(len(value) == n for value in given.values()):
        found: Condition = given
        return found
    shown = spec if isinstance(spec, str) else dict(spec)
    raise TaskError(
        f"{name_of(task)}.condition({shown!r}, {n}) returned {described(given)}, expected a dict "
        f"of tensors, each [{n}, ...]. HINT: condition(spec, n) returns what "
        "`encode(batch).condition` has, n rows of it: the spec's value n times."
    )


def named_samples(task: DiffusionTask, batch: Any) -> list[str] | None:
    """``task.sample_ids(batch)`` as text, with a batch that lacks fields reported as such.

    Raises:
        BatchError: a field is missing.
    """
    try:
        ids = whole(task).sample_ids(batch)
    except KeyError as error:
        raise _missing_field(task, "sample_ids", batch, error) from error
    return None if ids is None else plain_ids(ids)


def _missing_field(task: DiffusionTask, call: str, batch: Any, error: KeyError) -> BatchError:
    fields = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    return BatchError(
        f"{name_of(task)}.{call}(batch) asked for {error}, and the batch has {fields}. "
        f"HINT: let the dataset return that field, or change `{call}`."
    )


def select(condition: Condition, rows: Tensor) -> Condition:
    """The rows [b] of a condition."""
    return {name: value[rows] for name, value in condition.items()}
