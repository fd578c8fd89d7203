"""How often each sample has entered an optimizer step: what a run has trained on, which no gradient
shows afterwards."""

import contextlib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.errors import BatchError
from ctrak_lightning.tasks import DiffusionTask, named_samples, whole
from ctrak_lightning.tasks.base import plain_ids
from ctrak_lightning.utilities.processes import ALONE, Processes


class UntracedSampleWarning(UserWarning):
    """Training batches have samples that are not in the store; the message says how many.

    Why: the model learns from them too, and no ranking can name them.

    What to do: let ``trace_dataloader()`` give all samples that are trained on, with the ids of
    the training batches.
    """


class Exposures:
    """Counts, for every sample of a table, the training batches that it was in and that entered an
    optimizer step.

    A batch is noted when its gradient is computed (:meth:`draw`) and counted when an optimizer
    steps (:meth:`step`), so the micro-batches of an accumulated step count with it, and what is
    dropped before a step (:meth:`drop`) does not count. A sample that a batch has twice counts
    twice. Samples of batches that are not in the table have no count; a warning says how many. All
    processes call :meth:`share` after the same steps.

    Warns:
        UntracedSampleWarning: steps had samples of the table and others; at the first, and by
            :meth:`warn_of_untraced`.
    """

    def __init__(self, sample_ids: Sequence[str], processes: Processes = ALONE) -> None:
        self._index = {sample_id: i for i, sample_id in enumerate(sample_ids)}
        self._counts = torch.zeros(len(sample_ids), dtype=torch.int64)
        self._digest = hashlib.sha256("\0".join(sample_ids).encode()).hexdigest()
        self._processes = processes
        self._drawn: list[str] = []
        self._stepped: list[int] = []
        self._stranger: str | None = None
        self._outside = self._all_outside = 0
        self._has_warned = False
        self.unknown: str | None = None
        """Why the counts are not known, if they are not."""
        self._contradiction: str | None = None

    def draw(self, sample_ids: Sequence[str]) -> None:
        """Notes a batch whose gradient is computed for the next optimizer step."""
        self._drawn += sample_ids

    def drop(self) -> None:
        """Forgets the batches since the last step, whose gradients an optimizer will not see."""
        self._drawn = []

    def step(self) -> None:
        """Counts the batches since the last step: an optimizer has taken one."""
        for sample_id in self._drawn:
            position = self._index.get(sample_id)
            if position is None:
                self._stranger = sample_id
                self._outside += 1
            else:
                self._stepped.append(position)
        self._drawn = []

    def share(self) -> None:
        """Adds up what the processes have counted; all call it, after the same steps."""
        n = len(self._counts)
        for positions, outside, stranger, unknown in self._processes.gather(
            (self._stepped, self._outside, self._stranger, self.unknown)
        ):
            self._counts += torch.bincount(torch.tensor(positions, dtype=torch.int64), minlength=n)
            self._all_outside += outside
            self._stranger, self.unknown = self._stranger or stranger, self.unknown or unknown
        self._stepped, self._outside = [], 0
        # Where no sample at all is known, the ids are of another kind: `why_unknown`.
        if self._all_outside and not self._has_warned and bool(self._counts.any()):
            self._has_warned = True
            self._warn_of_untraced_samples(
                f"so far, such as {self._stranger!r}. The end of the run says how many in all"
            )

    def warn_of_untraced(self) -> None:
        """Warns at the end of a run how many of its samples are not in the table, if there were
        any; idempotent."""
        if self._has_warned and self._all_outside:
            self._warn_of_untraced_samples(f"in all, such as {self._stranger!r}")
            self._all_outside = 0

    def _warn_of_untraced_samples(self, how_many: str) -> None:
        if not self._processes.is_first:
            return
        warnings.warn(
            f"Optimizer steps had {self._all_outside} samples that are not in the store (one that "
            f"comes twice counts twice) {how_many}. What the model learnt from them has no trace: "
            "no score will name them, and shares are of the other samples alone. HINT: define "
            "`trace_dataloader()` that gives all samples which the run will ever train on; a "
            "sampler or data set that changes while it trains shows only its first ones.",
            UntracedSampleWarning,
            stacklevel=4,
        )

    @property
    def why_unknown(self) -> str | None:
        """Why :meth:`counts` gives None, if it does."""
        if self.unknown is not None:
            return self.unknown
        if bool(self._counts.any()):
            return self._contradiction
        if self._stranger is None:
            return "no optimizer step of a training batch was seen"
        return (
            "no training batch has a sample that is traced; the ids of training batches are "
            f"like {self._stranger!r}"
        )

    def compare(self, visits: Tensor) -> None:
        """Looks whether samples that training steps have visited so often [N] are in no optimizer
        step: as long as there are such, the counts are not known."""
        odd = ((visits > 0) & (self._counts == 0)).nonzero().flatten().tolist()
        self._contradiction = None
        if odd:
            self._contradiction = (
                f"{len(odd)} samples have a trace of a training step and are in no optimizer step, "
                f"for example {list(self._index)[odd[0]]!r}"
            )

    def counts(self) -> Tensor | None:
        """How often each sample was in a step that all processes know of, int64 [N]; None where
        that is not known, or there was no such step."""
        return self._counts.clone() if self.why_unknown is None else None

    def state_dict(self) -> dict[str, Any]:
        """The counts so far, with a digest of the samples' ids."""
        counts = None if self.unknown is not None else self._counts.clone()
        return {"samples": self._digest, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Goes on from the counts of an interrupted run; whether they are of these samples, and
        were known."""
        if state["samples"] != self._digest or state["counts"] is None:
            return False
        self.continue_from(state["counts"])
        return True

    def continue_from(self, counts: Tensor) -> None:
        """Goes on from these counts, int64 [N]."""
        self._counts, self.unknown = counts.clone(), None


class BatchIds:
    """Reads the ids of a training batch's samples without encoding it: by the task's
    ``sample_ids``, if it has them, else from a field.

    The field is the task's ``id_column``, or the only one; in either case it must hold the ids of
    every batch that was encoded. (In one batch, a class label may equal the ids by chance.)
    """

    def __init__(self, task: DiffusionTask) -> None:
        self._task = whole(task)
        self._fields: list[Any] | None = None

    def compare(self, batch: Any, sample_ids: Sequence[str]) -> None:
        """Looks which fields of an encoded batch are its samples' ids."""
        found = _fields_of(batch, sample_ids)
        before = found if self._fields is None else self._fields
        self._fields = [name for name in before if name in found]

    def share(self, processes: Processes) -> None:
        """Keeps the fields that were right in all processes; all call it."""
        each = [fields for fields in processes.gather(self._fields) if fields is not None]
        if each:
            self._fields = [name for name in each[0] if all(name in fields for fields in each)]

    def of(self, batch: Any) -> list[str]:
        """The ids of a training batch.

        Raises:
            BatchError: they cannot be read.
        """
        if batch is None:
            return []
        ids = named_samples(self._task, batch)
        if ids is not None:
            return ids
        field = self._field()
        try:
            return plain_ids(batch[field])
        except (KeyError, IndexError, TypeError) as error:
            raise BatchError(f"the batch has no field {field!r}") from error

    def _field(self) -> Any:
        """Its key or position in a batch."""
        fields, column = self._fields or [], self._task.id_column
        if column in fields:
            return column
        if column is not None or not fields:
            owner = "no field of a batch holds"
            if column is not None:
                owner = f"a batch's {column!r} does not hold"
            raise BatchError(f"{owner} the samples' ids as they are in the store")
        if len(fields) > 1:
            raise BatchError(
                f"the fields {fields} of a batch are all equal to the samples' ids; expected one"
            )
        return fields[0]


def _fields_of(batch: Any, sample_ids: Sequence[str]) -> list[Any]:
    """The keys or positions of the fields of a batch that are its samples' ids."""
    if isinstance(batch, Mapping):
        fields = list(batch.items())
    else:
        fields = list(enumerate(batch)) if isinstance(batch, (list, tuple)) else []
    found = []
    for name, values in fields:
        has_rows = isinstance(values, (list, tuple)) or (
            isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1
        )
        with contextlib.suppress(BatchError, TypeError):  # numpy has no bfloat16
            is_of_rows = has_rows and len(values) == len(sample_ids)
            if is_of_rows and plain_ids(values) == list(sample_ids):
                found.append(name)
    return found
