"""A task that computes in the precision of a training step, where that is not float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from typing_extensions import override

from ctrak_lightning.tasks.base import DiffusionTask, Encoded, Wrapped

Precision = Literal["true", "bf16-mixed", "16-mixed"]
"""In what a network is run: its own dtypes, or autocast to bfloat16 or float16, as Lightning's
``Trainer(precision=...)`` names it."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
HALF = (torch.bfloat16, torch.float16)


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


class UnderAutocast(Wrapped):
    """A task whose network runs under autocast, and nothing else."""

    members = ("predict",)

    def __init__(self, task: DiffusionTask, dtype: torch.dtype) -> None:
        super().__init__(task)
        self._dtype = dtype

    @override
    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x_t = args[0] if args else kwargs["x_t"]
        # Without its cache of weights: it would outlive the weights of a checkpoint.
        with torch.autocast(x_t.device.type, dtype=self._dtype, cache_enabled=False):
            return member(*args, **kwargs)


class WideLatents(Wrapped):
    """A task whose latents are float32 to the outside, and of another dtype to its own members.

    In bfloat16 the noise that a state is said to have, ``(x_t - a x0) / s``, is wrong by 4 % where
    there is little of it.
    """

    members = ("predict", "decode", "latents")

    def __init__(self, task: DiffusionTask, dtype: torch.dtype) -> None:
        super().__init__(task)
        self._dtype = dtype

    @override
    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not args:
            first = "x_t" if name == "predict" else "images" if name == "latents" else "latents"
            args = (kwargs.pop(first),)
        return member(args[0].to(self._dtype), *args[1:], **kwargs)


def under_autocast(task: DiffusionTask, precision: Precision) -> DiffusionTask:
    """A task whose network runs in a precision of :data:`Precision`; encoding, conditions and
    decoding stay in the parameters' own dtypes."""
    return UnderAutocast(task, AUTOCAST[precision]) if precision in AUTOCAST else task


def with_wide_latents(task: DiffusionTask, dtype: torch.dtype) -> DiffusionTask:
    """A task that takes float32 latents where its own are of ``dtype``, if that is half of it."""
    return WideLatents(task, dtype) if dtype in HALF else task


def widened(task: DiffusionTask, encoded: Encoded) -> tuple[DiffusionTask, Encoded]:
    """A batch's latents in float32, and the task that takes them so."""
    dtype = encoded.latents.dtype
    if dtype not in HALF:
        return task, encoded
    return with_wide_latents(task, dtype), replace(encoded, latents=encoded.latents.float())


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
