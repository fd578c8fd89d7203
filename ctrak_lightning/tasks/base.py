"""How a model is addressed: the seam between this library and a user's LightningModule."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

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


class Wrapped:
    """Calls ``members`` of a task by :meth:`call`; whatever else the task has is its own.

    Args:
        task: a DiffusionTask.
    """

    members: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Any) -> None:
        self.wrapped = task

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "wrapped"), name)
        return (
            partial(self.call, name, value) if name in self.members and callable(value) else value
        )

    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the member of this name gives."""
        raise NotImplementedError


def unwrapped(task: Any) -> Any:
    """The task itself, where it is wrapped."""
    while isinstance(task, Wrapped):
        task = task.wrapped
    return task


def name_of(task: Any) -> str:
    """The name of a task's own class, for messages."""
    return type(unwrapped(task)).__name__


Condition = dict[str, Tensor]
Spec = Mapping[str, str] | str
MEMBERS = ("denoiser", "noise_schedule", "encode", "condition")


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
        BatchError: the parts have different lengths, or an id is neither text nor a whole number.
    """

    latents: Tensor
    condition: Condition
    sample_ids: list[str]
    metadata: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
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


class DiffusionTask:
    """What a LightningModule must offer to be traced. Inherit from it (before ``LightningModule``)
    for the defaults.

    A task has these members:

    - ``denoiser``: the ``nn.Module`` whose trainable parameters are traced;
    - ``noise_schedule``: a :class:`~ctrak_lightning.NoiseSchedule` or ``FlowSchedule``, from
      ``NoiseSchedule.from_scheduler``;
    - ``encode(batch) -> Encoded``: clean latents, condition and sample ids of a batch;
    - ``condition(spec, n) -> dict[str, Tensor]``: the condition of a concept's ``present`` or
      ``absent`` (a mapping of attributes, or a prompt), repeated ``n`` times; what the spec does
      not name is dropped, so ``{}`` is the null condition;
    - ``predict(x_t, t, condition)``: the network's output; the default calls ``denoiser`` as
      diffusers' models are called;
    - ``sample_ids(batch) -> list[str]``: the ids that ``encode(batch)`` gives, optional, for tasks
      whose ``encode`` is dear (a VAE): tracing inside training steps asks for the ids of every
      batch;
    - ``id_column``: the key of the ids in a batch, optional: samples of a data set whose batches
      lack it are then numbered;
    - ``check_concept(name, present, absent)``: raises an error for a concept that cannot be asked,
      optional;
    - ``decode(latents)``: images [B, 3, H, W] in [0, 1], optional, for thumbnails and reports;
    - ``pictures(batch)``: the batch's own images [B, 3, H, W] in [0, 1], or None if it has none,
      optional, for thumbnails of training images without ``decode``;
    - ``latents(images)``: clean latents [B, ...] of images [B, 3, H, W] in [-1, 1], optional, for
      questions about images that were not generated here;
    - ``latent_mask(mask)``: a mask [H, W] of an image as weights of its latents, optional, for
      questions about a part of an image where latents are not [C, h, w] with the image's
      proportions;
    - ``known_attributes()``: the values each attribute of a spec may take, optional, for error
      messages, and by their conditions a question notices another label map or tokenizer.
    """

    denoiser: nn.Module
    noise_schedule: Schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output [B, ...] for states ``x_t`` [B, ...] at timesteps ``t`` [B]."""
        output: Tensor = self.denoiser(x_t, t, return_dict=False, **condition)[0]
        return output


def resolve_task(candidate: Any, description: Any = None) -> Any:
    """The DiffusionTask of a module.

    Args:
        candidate: a module that is a DiffusionTask, or carries one as its attribute ``task``.
        description: what says how another module is addressed: a
            :class:`~ctrak_lightning.DiffusersTask`, bound to ``candidate`` here, or a
            DiffusionTask.

    Raises:
        TaskError: there is none, and the message names the missing members; or the description does
            not fit.
    """
    carried: Any = getattr(candidate, "task", None) if description is None else description
    if hasattr(carried, "bind"):
        carried = carried.bind(candidate)
    task = candidate if carried is None else carried
    missing = [name for name in (*MEMBERS, "predict") if not hasattr(task, name)]
    if missing:
        raise TaskError(
            f"{type(task).__name__} is no DiffusionTask: it lacks {', '.join(missing)}. HINT: let "
            "the module inherit from ctrak_lightning.DiffusionTask and define denoiser, "
            "noise_schedule, encode(batch) and condition(spec, n); predict has a default. A "
            "module that holds the parts of a diffusers model needs none of that: "
            "task=DiffusersTask(unet='unet', vae='vae', ...) names them."
        )
    if not isinstance(task.denoiser, nn.Module):
        raise TaskError(
            f"{type(task).__name__}.denoiser is {type(task.denoiser).__name__}, expected an "
            "nn.Module."
        )
    if not isinstance(task.noise_schedule, Schedule):
        raise TaskError(
            f"{type(task).__name__}.noise_schedule is {type(task.noise_schedule).__name__}, "
            "expected a NoiseSchedule. HINT: NoiseSchedule.from_scheduler(scheduler)."
        )
    return task


def task_modules(task: Any) -> list[nn.Module]:
    """The modules that a task computes with: itself, if it is one, or those that it holds, which
    need not be part of the module that trains."""
    task = unwrapped(task)
    if isinstance(task, nn.Module):
        return [task]
    return [
        value for value in getattr(task, "__dict__", {}).values() if isinstance(value, nn.Module)
    ]


def encode(task: Any, batch: Any) -> Encoded:
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


def named_samples(task: Any, batch: Any) -> list[str]:
    """``task.sample_ids(batch)``, with a batch that lacks fields reported as such.

    Raises:
        BatchError: a field is missing.
    """
    try:
        return plain_ids(task.sample_ids(batch))
    except KeyError as error:
        raise _missing_field(task, "sample_ids", batch, error) from error


def _missing_field(task: Any, call: str, batch: Any, error: KeyError) -> BatchError:
    fields = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    return BatchError(
        f"{name_of(task)}.{call}(batch) asked for {error}, and the batch has {fields}. "
        f"HINT: let the dataset return that field, or change {call}()."
    )


def select(condition: Condition, rows: Tensor) -> Condition:
    """The rows [b] of a condition."""
    return {name: value[rows] for name, value in condition.items()}
