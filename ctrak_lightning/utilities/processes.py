"""The processes of one run, and what they send each other: one alone, or those that a Trainer or
Fabric has launched."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ctrak_lightning import errors

LONGEST_MINUTES = 120.0
"""How long processes wait for one that does not answer; the environment's
``CTRAK_PROCESS_TIMEOUT`` (minutes) says otherwise."""

T = TypeVar("T")


class Processes:
    """One process, which has nobody to wait for."""

    rank: int = 0
    """Number of this process."""
    count: int = 1
    """How many there are."""

    def gather(self, value: T) -> list[T]:
        """What every process gave, by rank; all of them call it."""
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of tensors of equal shapes; all of them call it."""
        return values

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what there is one of."""
        return self.rank == 0

    def from_first(self, value: T) -> T:
        """What the process of rank 0 gave; all call it."""
        return self.gather(value)[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``count``-th of ``items``, from the ``rank``-th on: those that are this
        process's."""
        return items[self.rank :: self.count]

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Work that all processes do, or one for all: one's error is raised in all, once they have
        ended it.

        A process that raised alone would leave the others waiting for it for ever.

        Raises:
            Exception: its own; or, in the others, an error of the same kind if it is one of
                :mod:`ctrak_lightning.errors`, else a RuntimeError, that names the rank.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        every = self.gather(None if own is None else (type(own).__name__, str(own)))
        if own is not None:
            raise own
        for rank, other in enumerate(every):
            if other is not None:
                kind, message = other
                raise getattr(errors, kind, RuntimeError)(
                    f"The process of rank {rank}: {kind}: {message}"
                )


class DistributedProcesses(Processes):
    """The processes of ``torch.distributed``, as Lightning's DDP and Fabric start them; all of them
    make one of these.

    They talk over a group of their own, on the CPU, so that nothing comes between the messages of
    training, and so that a process may wait for an hour while another reads its traces, which NCCL
    would take for a failure.

    Raises:
        RuntimeError: ``torch.distributed`` has no processes yet.
        ProcessLostError: by :meth:`gather` and :meth:`sum`, where another process has died, or has
            not answered for two hours (:data:`LONGEST_MINUTES`).
        ValueError: ``CTRAK_PROCESS_TIMEOUT`` is no positive number.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DistributedProcesses(): torch.distributed is not initialised. HINT: make it "
                "after `fabric.launch()`, or in a hook of a Trainer that runs DDP."
            )
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_longest())

    def gather(self, value: T) -> list[T]:
        # Pickled, but only from one process of the run to another: no file is read so.
        found: list[Any] = [None] * self.count
        with self._heard():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().cpu().clone()
        with self._heard():
            dist.all_reduce(total, group=self._group)
        return total

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # PyTorch has no kind of its own for a connection that breaks
            raise errors.ProcessLostError(
                f"Process {self.rank} of {self.count}: another process of this run has gone "
                f"({error}). What was sealed stays. HINT: its own error, or a kill for lack of "
                "memory, stands before this one; then go on with `fit(ckpt_path=...)`, with any "
                "number of processes."
            ) from error


def _longest() -> timedelta:
    text = os.environ.get("CTRAK_PROCESS_TIMEOUT", str(LONGEST_MINUTES))
    try:
        minutes = float(text)
        if not 0 < minutes < math.inf:
            raise ValueError
    except ValueError as error:
        raise ValueError(
            f"CTRAK_PROCESS_TIMEOUT={text!r}: expected a positive number of minutes. HINT: "
            f"{LONGEST_MINUTES:g} is the default."
        ) from error
    return timedelta(minutes=minutes)


ALONE = Processes()


def processes_of(count: int) -> Processes:
    """The ``count`` processes that a Trainer or Fabric has launched.

    Raises:
        RuntimeError: there are several, and they do not talk through ``torch.distributed``.
    """
    return DistributedProcesses() if count > 1 else ALONE
