"""Lightning's weight-averaging callbacks: where the average is, and when they put it in place of
the weights that train."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging

from ctrak_lightning.callbacks.settings import callbacks_of
from ctrak_lightning.errors import StoreError
from ctrak_lightning.model.frozen import changing_buffers
from ctrak_lightning.model.weights import loaded, tensors_of

# Lightning has the other two from 2.6 on.
KINDS: tuple[type[Callback], ...] = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")
    if hasattr(callbacks, name)
)


def averaging_of(trainer: L.Trainer) -> Callback | None:
    """The Trainer's weight-averaging callback, if it has one."""
    return next((one for one in callbacks_of(trainer) if isinstance(one, KINDS)), None)


@contextmanager
def averaged(
    trainer: L.Trainer, pl_module: L.LightningModule, trained: Sequence[str]
) -> Iterator[None]:
    """Puts the averaged weights into the module, also where the callback has put them into it
    already; on exit it has its own again. Of parameters that are not ``trained`` an average is only
    a rounding away.

    Raises:
        StoreError: nothing has been averaged yet.
    """
    averaging: Any = averaging_of(trainer)
    model = getattr(averaging, "_average_model", None)
    is_stochastic = isinstance(averaging, StochasticWeightAveraging)
    count = getattr(averaging if is_stochastic else model, "n_averaged", None)
    if model is None or count is None or int(count) == 0:
        raise StoreError(
            f"{type(averaging).__name__} has averaged no weights yet. HINT: trace from the step or "
            "epoch on at which it begins."
        )
    values = tensors_of(model if is_stochastic else model.module)
    names = [*trained, *([] if is_stochastic else changing_buffers(pl_module, [""]))]
    with loaded(pl_module, {name: values[name] for name in names}):
        yield


def put_first(trainer: L.Trainer, callback: Callback) -> list[Callback]:
    """Makes ``callback`` the first to be called from the next hook on: when training ends, others
    may put averaged weights into the module. Returns the order of before."""
    before = callbacks_of(trainer)
    others = [one for one in before if one is not callback]
    trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]
    return before


def put_back(trainer: L.Trainer, callback: Callback, before: list[Callback]) -> None:
    """Undoes :func:`put_first`, unless the callbacks are others by now."""
    now = callbacks_of(trainer)
    if len(now) == len(before) and now and now[0] is callback:
        trainer.callbacks = before  # type: ignore[attr-defined]


def is_last_of_raw(trainer: L.Trainer) -> bool:
    """Whether a StochasticWeightAveraging replaces the weights that train after this epoch, before
    training ends."""
    return any(trainer.current_epoch == end for end in _stochastic_ends(trainer))


def has_replaced(trainer: L.Trainer) -> bool:
    """Whether one has replaced them: it then only passes over the data once more, for the running
    means."""
    return any(trainer.current_epoch > end for end in _stochastic_ends(trainer))


def _stochastic_ends(trainer: L.Trainer) -> list[int]:
    found = [one for one in callbacks_of(trainer) if isinstance(one, StochasticWeightAveraging)]
    return [one.swa_end for one in found if one._model_contains_batch_norm and one.swa_end >= 0]
