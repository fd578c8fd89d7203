"""The function that a network computes, known by its outputs on a fixed input: same parameters
alone do not make the same model."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.gradients import exact_products, tracing_mode
from ctrak_lightning.methods.trajectories import repeated
from ctrak_lightning.store.sections import Function
from ctrak_lightning.tasks import (
    Condition,
    DiffusionTask,
    Spec,
    name_of,
    require_rows,
    task_modules,
    whole,
)
from ctrak_lightning.utilities.dtypes import device_of, input_like
from ctrak_lightning.utilities.rng import isolated_rng, seeded_noise

VALUES, SPECS = 8, 32
"""At most so many values of an attribute, and specs in all, are looked at: each may cost a pass of
a text encoder."""
PROMPTS = ("a red house beside the sea", "portrait of a cat, oil painting")
_NUMBERS = 4


def conditions_of(task: DiffusionTask) -> tuple[Tensor | None, int]:
    """Random projections of ``task.condition(spec, 1)`` for fixed specs, one row for each of the
    condition's T tensors, float32 [T, K] (None where the task takes no such specs), and how many
    specs they were chosen from.

    The specs are values of ``task.known_attributes()``, one by one, or else prompts. They are known
    by their place in the list and not by name, since a name may be that of someone whose samples
    are forgotten later.
    """
    with isolated_rng(0), torch.no_grad():
        try:
            specs, count = specs_of(task)
            conditions = [task.condition(spec, 1) for spec in specs]
            names = sorted({name for condition in conditions for name in condition})
            rows = [
                torch.cat([_projected(name, condition[name]) for condition in conditions])
                for name in names
            ]
        except Exception:  # a task decides what it takes for a spec: a question shows that
            return None, 0
    found = torch.stack(rows) if rows else None
    return (None, 0) if found is None or not found.isfinite().all() else (found, count)


def specs_of(task: DiffusionTask) -> tuple[list[Spec], int]:
    """Some specs that a task may take, which may be wrong of prompts, and how many they were chosen
    from."""
    attributes = whole(task).known_attributes()
    if attributes is None:
        return list(PROMPTS), len(PROMPTS)
    known = {name: sorted(values) for name, values in sorted(attributes.items())}
    some: list[Spec] = [
        {name: value}
        for name, values in known.items()
        for value in values[:: -(-len(values) // VALUES) or 1]
    ]
    return some[:SPECS], sum(map(len, known.values()))


def _projected(name: str, value: Tensor) -> Tensor:
    """Four numbers: of the order of the values, or, for whole numbers, others for every other
    value."""
    if not value.is_floating_point():
        return seeded_noise((_NUMBERS,), 0, 0, f"{name}/{value.tolist()}")
    flat = value.float().cpu().flatten()
    projected: Tensor = flat @ seeded_noise((len(flat), _NUMBERS), 0, 0, f"condition/{name}")
    return projected


TIMESTEPS = 3
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference ``||a - b|| / ||a||`` of two runs of the same network on CPUs, by the
coarser format of their parameters."""
ELSEWHERE = 10
"""How much more is allowed in float32 where one of the two ran on another kind of device, whose
kernels sum in other orders. (TF32, which has 10 bits, is off meanwhile.)"""
CONDITION_TOLERANCE = 5e-2
"""The same of conditions, which a text encoder in 16 bits may have made; those of two labels are
further apart."""
_COARSE = ("float64", "float32", "float16", "bfloat16")


class UnrecordedFunctionWarning(UserWarning):
    """A network's outputs cannot be recorded, so that a question does not notice another network
    with the same weights.

    Why: weights are compared by hash; the scale of an adapter or another label map is seen in the
    outputs alone.

    What to do: let ``condition({}, 1)`` give the null condition and ``predict`` take numbers of
    its shape, or define ``known_attributes()``. Answers are right without it, if the model is the
    one that was traced.
    """


class Fixed(NamedTuple):
    """A condition that is the same in every run: the null condition, or where a task has none, that
    of the first of some specs (:func:`specs_of`); and what the null condition raised."""

    condition: Condition | None
    error: Exception | None = None


def fixed_condition(task: DiffusionTask) -> Fixed:
    """Of one row. The spec is known by its place and not by name, as in :func:`conditions_of`."""
    with isolated_rng(0), torch.no_grad():
        spec, problem = cast(Spec, {}), cast(Exception | None, None)
        try:
            given = task.condition(spec, 1)
        except Exception as error:
            problem = error
            try:
                spec = specs_of(task)[0][0]
                given = task.condition(spec, 1)
            except Exception:  # a task decides what it takes for a spec
                return Fixed(None, error)
    return Fixed(require_rows(task, spec, 1, given), problem)


def function_of(task: DiffusionTask, latent_shape: Sequence[int]) -> Function | None:
    """What a task's network answers to fixed noise, in the state in which it is traced, and what
    its conditions are; None where there is no condition to ask it under.

    The network is asked under :func:`fixed_condition` and under noise of its shape, so that nothing
    of a training sample is recorded: where the null condition is zeros, as Stable Diffusion XL's,
    layers that take nothing else do nothing.
    """
    fixed = fixed_condition(task).condition
    if fixed is None:
        return None
    outputs = [outputs_under(task, latent_shape, fixed)]
    synthetic = _noise_like(fixed)
    if synthetic is not None:
        outputs += _if_possible(task, latent_shape, synthetic)
    conditions, specs = conditions_of(task)
    return Function(
        timesteps=torch.tensor(_timesteps(task) * len(outputs), dtype=torch.float64),
        outputs=torch.cat(outputs),
        dtype=_coarsest(task.denoiser),
        on_cpu=device_of(task.denoiser).type == "cpu",
        conditions=conditions,
        specs=specs,
    )


def outputs_under(
    task: DiffusionTask,
    latent_shape: Sequence[int],
    condition: Condition,
    timesteps: int = TIMESTEPS,
) -> Tensor:
    """The network's outputs for noise at timesteps spread over the schedule, float32 [S, M], under
    the condition of one sample."""
    schedule, like = task.noise_schedule, input_like(task.denoiser)
    outputs = []
    with (
        isolated_rng(0),
        tracing_mode(task.denoiser, *task_modules(task)),
        torch.no_grad(),
        exact_products(like.device),
    ):
        for timestep in _timesteps(task, timesteps):
            x0, noise = (
                seeded_noise(latent_shape, 0, timestep, key)[None].to(like)
                for key in ("x0", "noise")
            )
            t = repeated(timestep, x0)
            outputs.append(
                task.predict(schedule.add_noise(x0, noise, t), t, condition).float().cpu().flatten()
            )
    return torch.stack(outputs)


def refuse_another_function(
    stored: Function, task: DiffusionTask, latent_shape: Sequence[int], step: int
) -> None:
    """Raises a StoreMismatchError if the network, with a checkpoint's weights, is another function
    than when it was traced."""
    mine = function_of(task, latent_shape)
    if mine is not None and mine.specs != stored.specs and fixed_condition(task).error is not None:
        return  # the first of other specs is another condition, with other outputs
    worst = torch.inf if mine is None else float(stored.differences(mine).max())
    coarser = max(stored.dtype, _coarsest(task.denoiser), key=_COARSE.index)
    tolerance = TOLERANCE[coarser]
    if coarser in ("float32", "float64") and not (
        stored.on_cpu and device_of(task.denoiser).type == "cpu"
    ):
        tolerance *= ELSEWHERE
    if not worst <= tolerance:
        raise StoreMismatchError(
            f"With the weights of step {step}, this network's outputs differ from those recorded "
            f"when it was traced by {worst:.2g} of their size, expected at most {tolerance:g} "
            f"({coarser}): the parameters are the same and the model is not. HINT: build it as in "
            "the traced run: what may differ is an adapter's lora_alpha, scaling (use_rslora) or "
            "state (disabled, merged, another one active), a buffer that is no part of the state "
            "dict, quantisation or dtype, the null condition (of a task without one, the label "
            "map), or the code of the network or of predict()."
        )
    apart = 0.0 if mine is None else stored.condition_difference(mine)
    if apart > CONDITION_TOLERANCE:
        raise StoreMismatchError(
            f"With the weights of step {step}, {name_of(task)}.condition() gives other conditions "
            f"than when the network was traced: they differ by {apart:.2g} of their size, expected "
            f"at most {CONDITION_TOLERANCE:g}. HINT: use the label map, tokenizer and text encoder "
            "of the traced run."
        )


def _noise_like(condition: Condition) -> Condition | None:
    """The condition with standard normal noise in place of its numbers, but for masks and whole
    numbers; None if that is all."""
    replaced = {
        name: seeded_noise(value.shape, 0, 0, f"condition/{name}").to(value)
        for name, value in condition.items()
        if value.is_floating_point() and "mask" not in name
    }
    return condition | replaced if replaced else None


def _if_possible(
    task: DiffusionTask, latent_shape: Sequence[int], condition: Condition
) -> list[Tensor]:
    """The outputs, or nothing, with a warning, where they cannot be computed."""
    try:
        outputs = outputs_under(task, latent_shape, condition)
        problem = None if outputs.isfinite().all() else "the output is not finite"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return [outputs]
    warnings.warn(
        f"{name_of(task)}.predict() cannot be asked under noise of the null condition's shape "
        f"({problem}). A question will not notice another network that answers alike under the "
        "null condition. HINT: let predict() take any numbers of the shape of `condition({}, 1)`.",
        UnrecordedFunctionWarning,
        stacklevel=3,
    )
    return []


def _timesteps(task: DiffusionTask, count: int = TIMESTEPS) -> list[float]:
    schedule = task.noise_schedule
    timesteps: list[float] = schedule.even_timesteps(min(count, len(schedule)))
    return timesteps


def _coarsest(denoiser: nn.Module) -> str:
    names = [str(value.dtype).removeprefix("torch.") for value in denoiser.parameters()]
    # What is no floating-point format is a quantised weight.
    known = (name if name in _COARSE else "bfloat16" for name in names)
    return max(known, key=_COARSE.index, default="float32")
