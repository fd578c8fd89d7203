"""Whether a store in a folder is of the run that goes on, and whether its weights are still the
same."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.errors import StoreMismatchError

PROBED = 64
"""Parameters, and numbers of each, at most, by which a change of the weights is noticed."""


@dataclass
class Memory:
    """What is known of the run so far when it goes on, from a checkpoint of the Trainer's or from
    the same Trainer."""

    run_id: str | None = None
    unseen_steps: int = 0
    exposures: dict[str, Any] | None = field(default=None, repr=False)
    sealed: dict[int, str] | None = field(default=None, repr=False)
    """Sha256 of the weights of each checkpoint that was sealed then."""
    weights: list[Tensor] | None = field(default=None, repr=False)
    """The :class:`WeightProbe` of the weights then."""
    is_resumed: bool = False
    """Whether the Trainer's checkpoint has said so."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer's keeps of it."""
        return {name: value for name, value in vars(self).items() if name != "is_resumed"}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Memory":
        """That of a run which is resumed from a checkpoint; earlier versions saved less."""
        known = {name: state[name] for name in cls().state_dict() if name in state}
        return cls(**known, is_resumed=True)


class WeightProbe:
    """Some numbers of some trained parameters; an average of the weights changes them all."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        names = list(parameters)[:: len(parameters) // PROBED + 1]
        self.parameters = {name: parameters[name] for name in names}

    def read(self) -> list[Tensor]:
        """At most PROBED numbers of each parameter, copied; nothing waits for the device."""
        flat = (value.detach().flatten() for value in self.parameters.values())
        return [value[:: len(value) // PROBED + 1].clone() for value in flat]

    def changed_since(self, before: Sequence[Tensor]) -> list[str]:
        """The names of the parameters that were others at an earlier :meth:`read`; all, where that
        was of another number of parameters."""
        if len(before) != len(self.parameters):
            return list(self.parameters)
        pairs = zip(self.parameters, before, self.read(), strict=True)
        return [name for name, then, now in pairs if not _is_same(then, now)]


def _is_same(before: Tensor, now: Tensor) -> bool:
    """Whether numbers of a weight are the same: to the bit, or as near as another format has
    them."""
    now = now.to(before.device)
    near = 0.0 if before.dtype == now.dtype else 1e-2
    return before.shape == now.shape and torch.allclose(
        before.double(), now.double(), rtol=near, atol=near, equal_nan=True
    )


def resume(
    capture: Capture,
    step: int,
    memory: Memory,
    probe: WeightProbe,
    averaged: AbstractContextManager[None],
) -> None:
    """Makes the store that ``capture`` has open describe the run that goes on from ``step``, and
    nothing else.

    ``memory`` is of the run before, ``probe`` of the weights as they are; ``averaged`` puts those
    whose traces are asked for into the module.

    Raises:
        MisconfigurationException: what the folder holds is not shown to be of this run; nothing was
            changed.
    """
    writer, sealed = capture.writer, capture.writer.sealed_steps
    where = f"`ConceptTracer(dirpath={str(writer.path)!r})`"
    is_same = memory.run_id == writer.run_id
    later = [one for one in sealed if one > step]
    if later and not (is_same and memory.is_resumed):
        raise MisconfigurationException(
            f"{where}: the folder holds traces of steps {later} of an earlier run, and this run "
            f"starts at step {step}. Nothing was changed. HINT: name a new folder, resume with "
            "`trainer.fit(ckpt_path=...)`, or delete the folder."
        )
    if sealed and not is_same and step not in sealed:
        before = (
            "a checkpoint that was saved without this folder"
            if memory.run_id is None
            else f"a run whose store is {memory.run_id!r}"
        )
        raise MisconfigurationException(
            f"{where}: the folder holds traces of steps {sealed} of run {writer.run_id!r}, and "
            f"this run goes on from step {step} of {before}: nothing shows that they are one run. "
            "Nothing was changed. HINT: name a new folder; resume from a checkpoint that was saved "
            "while this folder was written, by the same `dirpath`; or from one of step "
            f"{sealed[-1]}, whose weights can be compared."
        )
    if not sealed and step and not is_same and memory.run_id is not None:
        rank_zero_warn(
            f"{where}: the checkpoint was made with store {memory.run_id!r}, the folder holds "
            f"store {writer.run_id!r}. Traces of steps before {step} may be missing."
        )
    if is_same and memory.weights:
        _require_one_course(capture, step, memory, probe, where)
    state = memory.exposures
    with averaged if step in sealed else nullcontext():
        try:
            if not is_same or memory.weights is None:
                capture.require_weights_of(step)
            capture.resume(step, state if state and state["step"] == step else None)
        except StoreMismatchError as error:
            raise MisconfigurationException(f"{where}: {error}") from error
    if later:
        rank_zero_warn(
            f"{where}: training resumes at step {step}; the traces of steps {later}, made after "
            "that checkpoint, are removed and will be made again."
        )
        writer.discard_after(step)


def _require_one_course(
    capture: Capture, step: int, memory: Memory, probe: WeightProbe, where: str
) -> None:
    """Refuses a checkpoint of this run whose weights are not those it was saved with, or since
    which the store has been written by another course of the run: one that went on from an earlier
    checkpoint."""
    if probe.changed_since(memory.weights or []):
        raise MisconfigurationException(
            f"{where}: training goes on from step {step} with other weights than it had then. "
            "Nothing was changed. HINT: load all of the checkpoint's weights "
            "(`strict_loading=False` leaves out those of other names), or name a new folder."
        )
    known, stored = memory.sealed or {}, capture.writer.sealed_weights
    other = [one for one in stored if one < step and stored[one] != known.get(one)]
    other += [step] if step in known and stored.get(step) != known[step] else []
    if other:
        raise MisconfigurationException(
            f"{where}: the traces of steps {other} are not those of the run that this checkpoint "
            f"of step {step} is of: another run went on from an earlier checkpoint into the same "
            "folder. Nothing was changed. HINT: go on from a checkpoint of that one, or name a new "
            "folder."
        )
