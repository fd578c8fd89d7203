"""How often each sample has entered an optimizer step: what a run has trained on, which no gradient
shows afterwards."""

import contextlib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrak_lightning.errors import BatchError
from ctrak_lightning.gradients.hooks import tensors_in
from ctrak_lightning.tasks import DiffusionTask, named_samples, whole
from ctrak_lightning.tasks.base import plain_ids
from ctrak_lightning.utilities.processes import ALONE, Processes

_UNREAD = 256
"""Batches whose rows are read at once at the latest: a GPU is waited for each time."""


class UntracedSampleWarning(UserWarning):
    """Training batches have samples that are not in the store; the message says how many.

    Why: the model learns from them too, and no ranking can name them.

    What to do: let ``trace_dataloader()`` give all samples that are trained on, with the ids of
    the training batches.
    """


class UnknownExposuresWarning(UserWarning):
    """How often each sample was trained on is not known, and the method multiplies scores by it;
    the message says why.

    Why: a gradient does not show whether training ever saw a sample, so that one which it never did
    may get a score.

    What to do: let training batches have the samples' ids, or define ``sample_ids(batch)``; in a
    loop of your own, call ``capture.note_step(batch)``.
    """


class ReachedRows:
    """Which rows of a batch's predictions a loss depends on: a sample with a loss weight of 0, or
    one that is masked out, has been in the step and has taught nothing.

    It is a forward hook of the denoiser that looks at what goes backward through its output and
    changes nothing. Copies and pickles of the denoiser have a hook in its place that does nothing.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Starts on another batch; to what was found of the one before nothing is added."""
        self.found = Found()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A compiled graph is left as it is, and the batches that go through it count whole.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        first = next((one for one in tensors_in(output) if one.requires_grad), None)
        if first is not None:
            first.register_hook(self.found.add)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Found:
    """What has gone backward through the predictions for one batch."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, cotangent: Tensor) -> None:
        """Of the output of one call, [B, ...]."""
        try:
            rows = (cotangent.detach() != 0).flatten(1).any(1)
        except Exception:  # whatever kind of tensor it is, no reason to end a training
            rows = torch.empty(0)  # of no batch's size
        self._rows.append(rows)

    def clear(self) -> None:
        """Forgets what went backward so far: no gradient of a loss has come of it."""
        self._rows = []

    def of(self, size: int) -> list[bool]:
        """Whether anything reached each of ``size`` samples: all of them, where nothing went
        backward here, or the calls' rows are not one for each."""
        try:
            if self._rows and all(len(rows) == size for rows in self._rows):
                reached: list[bool] = torch.stack(self._rows).any(0).tolist()
                return reached
        except Exception:  # such as rows of a torch.func transform that has ended
            self.clear()
        return [True] * size


class Exposures:
    """Counts, for every sample of a table, the training batches that it was in and that entered an
    optimizer step.

    A batch is noted when its gradient is computed (:meth:`draw`) and counted when an optimizer
    steps (:meth:`step`), so the micro-batches of an accumulated step count with it, and what is
    dropped before a step (:meth:`drop`) does not count, nor does a sample whose prediction the loss
    did not depend on (:class:`ReachedRows`). A sample that a batch has twice counts twice. Samples
    of batches that are not in the table have no count; a warning says how many. All processes call
    :meth:`share` after the same steps.

    Warns:
        UntracedSampleWarning: steps had samples of the table and others; at the first, and by
            :meth:`warn_of_untraced`.
    """

    def __init__(self, sample_ids: Sequence[str], processes: Processes = ALONE) -> None:
        self._index = {sample_id: i for i, sample_id in enumerate(sample_ids)}
        self._counts = torch.zeros(len(sample_ids), dtype=torch.int64)
        self._digest = hashlib.sha256("\0".join(sample_ids).encode()).hexdigest()
        self._processes = processes
        self._drawn: list[tuple[Sequence[str], Found]] = []
        self._stepped: list[tuple[list[int | None], Found]] = []  # and not read yet
        self._stranger: str | None = None
        self._has_own = False  # a step had samples of the table, whatever its loss depended on
        self._outside = self._all_outside = 0
        self._has_warned = False
        self.unknown: str | None = None
        """Why the counts are not known, if they are not."""
        self._contradiction: str | None = None

    def draw(self, sample_ids: Sequence[str], found: Found | None = None) -> None:
        """Notes a batch whose gradient is computed for the next optimizer step, and what of it the
        loss depends on, which is read when it is asked for."""
        self._drawn.append((sample_ids, found or Found()))

    def drop(self) -> None:
        """Forgets the batches since the last step, whose gradients an optimizer will not see."""
        self._drawn = []

    def step(self) -> None:
        """Counts the batches since the last step: an optimizer has taken one."""
        for sample_ids, found in self._drawn:
            positions = [self._index.get(sample_id) for sample_id in sample_ids]
            for sample_id, position in zip(sample_ids, positions, strict=True):
                self._has_own = self._has_own or position is not None
                if position is None:
                    self._stranger = sample_id
                    self._outside += 1
            self._stepped.append((positions, found))
        self._drawn = []

    def share(self) -> None:
        """Adds up what the processes have counted; all call it, after the same steps."""
        had_warned = self._has_warned
        stepped: list[int] = []
        if self._processes.count > 1 or len(self._stepped) >= _UNREAD:
            stepped = self._read()
        for places, has_own, outside, stranger, unknown in self._processes.gather(
            (stepped, self._has_own, self._outside, self._stranger, self.unknown)
        ):
            self._add(places)
            self._has_own = self._has_own or has_own
            self._all_outside += outside
            self._stranger, self.unknown = self._stranger or stranger, self.unknown or unknown
        self._outside = 0
        # Where no sample at all is known, the ids are of another kind: `why_unknown`.
        if self._all_outside and not self._has_warned:
            self._settle()
            self._has_warned = self._knows_samples
        if self._has_warned and not had_warned:
            self._warn_of_untraced_samples(
                f"so far, such as {self._stranger!r}. The end of the run says how many in all"
            )

    def _read(self) -> list[int]:
        """The places of the samples of the batches that were counted and not read yet."""
        places: list[int] = []
        for positions, found in self._stepped:
            each = zip(positions, found.of(len(positions)), strict=True)
            places += [place for place, reached in each if reached and place is not None]
        self._stepped = []
        return places

    def _add(self, places: Sequence[int]) -> None:
        n = len(self._counts)
        self._counts += torch.bincount(torch.tensor(places, dtype=torch.int64), minlength=n)

    def _settle(self) -> None:
        """Reads what a process alone has counted; of several, :meth:`share` has."""
        if self._processes.count == 1:
            self._add(self._read())

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
    def _knows_samples(self) -> bool:
        """Whether the ids of steps are of the table's kind. Where not one ever was, they may as
        well be other names of the same samples."""
        return self._has_own or bool(self._counts.any())

    @property
    def has_strangers_alone(self) -> bool:
        """Whether steps had samples, and none of the table."""
        return self._stranger is not None and not self._knows_samples

    @property
    def why_unknown(self) -> str | None:
        """Why :meth:`counts` gives None, if it does."""
        if self.unknown is not None:
            return self.unknown
        self._settle()
        if self._knows_samples:
            return self._contradiction
        if self._stranger is None:
            return "no optimizer step of a training batch was seen"
        return (
            "no training batch has a sample that is traced; the ids of training batches are "
            f"like {self._stranger!r}"
        )

    def compare(self, traced: Tensor) -> None:
        """Looks whether samples that have a trace of training steps other than zero, bool [N], are
        in no optimizer step: as long as there are such, the counts are not known."""
        self._settle()
        odd = (traced & (self._counts == 0)).nonzero().flatten().tolist()
        self._contradiction = None
        if odd:
            self._contradiction = (
                f"{len(odd)} samples have a trace of a training step and are in no optimizer step, "
                f"for example {list(self._index)[odd[0]]!r}"
            )

    def counts(self) -> Tensor | None:
        """How often each sample was trained on in a step that all processes know of, int64 [N]; None
        where that is not known, or there was no such step."""
        return self._counts.clone() if self.why_unknown is None else None

    def state_dict(self) -> dict[str, Any]:
        """The counts so far, with a digest of the samples' ids."""
        self._settle()
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
