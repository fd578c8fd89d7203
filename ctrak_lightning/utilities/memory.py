"""Smaller passes through the network where memory is short."""

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from ctrak_lightning.errors import GradientError

Part = TypeVar("Part")
_SYMPTOMS = (
    "not enough memory",
    "DefaultCPUAllocator",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class RowLimit:
    """How many samples go through the network at once: all of a batch, until memory runs out.

    A pass that runs out of memory is made again with half of its samples, down to one. The smaller
    number is kept for the following batches.

    Args:
        rows: where to start; None starts with the whole batch.

    Example:
        >>> RowLimit(2).run(5, lambda start, stop: list(range(start, stop)))
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self._has_warned = False

    def run(self, size: int, work: Callable[[int, int], Part]) -> list[Part]:
        """The results of ``work(start, stop)`` for consecutive parts of ``size`` samples, in order.

        Raises:
            GradientError: there is no memory for a single sample.

        Warns:
            UserWarning: passes were made smaller; once.
        """
        parts: list[Part] = []
        start, failed = 0, 0
        while start < size:
            stop = min(size, start + (self.rows or size))
            symptom = None
            try:
                parts.append(work(start, stop))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                symptom = str(error) or type(error).__name__
            # Outside of the handler, where the failed pass's tensors hang on the traceback no more.
            if symptom is not None:
                failed = max(failed, stop - start)
                self._halve(stop - start, symptom)
            else:
                start = stop
        if failed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Memory ran out in a pass over {failed} samples; from here on {self.rows} at a "
                "time are used. The results are the same. HINT: a smaller `batch_size` saves the "
                "failed attempts.",
                UserWarning,
                stacklevel=3,
            )
        return parts

    def _halve(self, rows: int, symptom: str) -> None:
        if rows == 1:
            raise GradientError(
                f"There is not enough memory to trace a single sample: {symptom} HINT: trace fewer "
                "layers with `layers=`, turn on gradient checkpointing with "
                "`use_reentrant=False`, or use a device with more memory."
            )
        self.rows = rows // 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(symptom in str(error) for symptom in _SYMPTOMS)
