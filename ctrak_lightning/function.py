"""The function that a network computes, told by its outputs on a fixed input: same parameters alone do not make the same model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.gradients import tracing_mode
from ctrak_lightning.rng import isolated_rng, seeded_noise
from ctrak_lightning.task import Condition, task_modules
from ctrak_lightning.traces.function import Function
from ctrak_lightning.trajectory import repeated

TIMESTEPS = 3
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference ``||a - b|| / ||a||`` of two runs of the same network on CPUs, by the coarser format of their
parameters."""
ELSEWHERE = 10
"""How much more is allowed in float32 where one of the two ran on another kind of device, whose kernels sum in other orders. (TF32,
which has 10 bits, is off meanwhile.)"""
_COARSE = ("float64", "float32", "float16", "bfloat16")


class UnrecordedFunctionWarning(UserWarning):
    """A network's outputs cannot be recorded, so that a question cannot tell another network with the same weights."""


def null_condition(task: Any) -> Condition | None:
    """``task.condition({}, 1)``, or None where a task has no such thing."""
    with isolated_rng(0), torch.no_grad():
        try:
            condition: Condition = task.condition({}, 1)
        except Exception:
            return None
    return condition


def function_of(task: Any, latent_shape: Sequence[int], condition: Condition) -> Function:
    """The network's outputs for noise, at timesteps spread over the schedule, in the state in which it is traced.

    Args:
        task: a DiffusionTask.
        latent_shape: of one sample.
        condition: of one sample; what is recorded is under :func:`null_condition`, so that nothing of a training sample is.
    """
    schedule, like = task.noise_schedule, _like(task.denoiser)
    timesteps = schedule.even_timesteps(min(TIMESTEPS, len(schedule)))
    outputs = []
    with (
        isolated_rng(0),
        tracing_mode(task.denoiser, *task_modules(task)),
        torch.no_grad(),
        _exact(like.device),
    ):
        for timestep in timesteps:
            x0, noise = (
                seeded_noise(latent_shape, 0, timestep, key)[None].to(like) for key in ("x0", "noise")
            )
            t = repeated(timestep, x0)
            outputs.append(
                task.predict(schedule.add_noise(x0, noise, t), t, condition).float().cpu().flatten()
            )
    return Function(
        timesteps=torch.tensor(timesteps, dtype=torch.float64),
        outputs=torch.stack(outputs),
        dtype=_coarsest(task.denoiser),
        on_cpu=like.device.type == "cpu",
    )


def refuse_another_function(stored: Function, task: Any, latent_shape: Sequence[int], step: int) -> None:
    """Raises a StoreMismatchError if the network, with a checkpoint's weights, is another function than when it was traced.

    Args:
        stored: what it answered then.
        task: the DiffusionTask that has it.
        latent_shape: of one sample.
        step: of the checkpoint.
    """
    condition = null_condition(task)
    mine = None if condition is None else function_of(task, latent_shape, condition)
    worst = torch.inf if mine is None else float(stored.differences(mine).max())
    coarser = max(stored.dtype, _coarsest(task.denoiser), key=_COARSE.index)
    tolerance = TOLERANCE[coarser]
    if coarser in ("float32", "float64") and not (
        stored.on_cpu and _like(task.denoiser).device.type == "cpu"
    ):
        tolerance *= ELSEWHERE
    if not worst <= tolerance:
        raise StoreMismatchError(
            f"With the weights of step {step}, this network's outputs differ from those recorded when it was traced by {worst:.2g} of "
            f"their size, expected at most {tolerance:g} ({coarser}): the parameters are the same and the model is not. HINT: "
            "build it as in the traced run: what may differ is an adapter's lora_alpha, scaling (use_rslora) or state (disabled, "
            "merged, another one active), a buffer that is no part of the state dict, quantisation or dtype, the null condition, or "
            "the code of the network."
        )


def _like(denoiser: nn.Module) -> Tensor:
    """A tensor of the network's device and floating-point format."""
    parameters = list(denoiser.parameters())
    return next((value for value in parameters if value.is_floating_point()), torch.empty(0)).detach()


def _coarsest(denoiser: nn.Module) -> str:
    names = [str(value.dtype).removeprefix("torch.") for value in denoiser.parameters()]
    # What is no floating-point format is a quantised weight.
    return max(
        (name if name in _COARSE else "bfloat16" for name in names), key=_COARSE.index, default="float32"
    )


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: by default convolutions on a GPU have 10 bits of them (TF32)."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    exact: Any = "ieee"
    places, name = [backends.cuda.matmul, getattr(backends.cudnn, "conv", None)], "fp32_precision"
    if not hasattr(places[0], name):  # before torch 2.9
        places, name, exact = [backends.cuda.matmul, backends.cudnn], "allow_tf32", False
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
