"""A task that computes in the precision of a training step, where that is not float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override

from ctrak_lightning.tasks.base import DiffusionTask, Wrapped


class InPrecision(Wrapped):
    """A task that is given batches as a training step is, and whose new tensors are of the dtype
    that they have there.

    Only its own members see that dtype, and what is computed of their results does not: the default
    dtype is the process's.

    Args:
        task: a DiffusionTask.
        dtype: of floating-point tensors that its members make without naming one.
        convert: what is done to a batch before ``encode`` gets it.
    """

    members = ("encode", "condition", "predict", "decode", "latents")

    def __init__(
        self,
        task: DiffusionTask,
        dtype: torch.dtype,
        convert: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(task)
        self._dtype, self._convert = dtype, convert

    @override
    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "encode" and self._convert is not None:
            args = tuple(map(self._convert, args))
        with _default_dtype(self._dtype):
            return member(*args, **kwargs)


def in_own_precision(task: DiffusionTask) -> DiffusionTask:
    """A task that makes tensors of its denoiser's dtype, where that has one and it is another than
    float32: so they were when it was trained with ``Trainer(precision="bf16-true")``, say."""
    dtypes = {value.dtype for value in task.denoiser.parameters() if value.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float64}:
        return task
    return InPrecision(task, dtypes.pop())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
