"""A trial before the first step: two samples traced as a capture will, and held against a pass for
each sample alone."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ctrak_lightning.capture.trace import (
    Trace,
    check_batch,
    has_cotangents,
    predicted,
    reached_blocks,
    trace_query,
)
from ctrak_lightning.errors import ExtensionError, GradientError, MethodError, TrialError, listed
from ctrak_lightning.gradients import GradientTracer
from ctrak_lightning.gradients.checks import TYPED
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import InTraining, Noised
from ctrak_lightning.model.function import specs_of
from ctrak_lightning.tasks import (
    Condition,
    DiffusionTask,
    Encoded,
    Spec,
    Wrapped,
    condition_of,
    name_of,
    unwrapped,
)
from ctrak_lightning.tasks.base import described
from ctrak_lightning.utilities.memory import RowLimit, is_out_of_memory
from ctrak_lightning.utilities.rng import seeded_noise

SAMPLES = 2


class ZeroGradientWarning(UserWarning):
    """Before the first training step all gradients of an objective are exactly zero, in every
    traced layer; or, of traces from training steps, those of some samples at a checkpoint.

    Why: rows of zeros say nothing of any sample. With a last layer or an adapter that begins as
    zero it is right for as long as that stays zero, so training goes on; a checkpoint that still
    has such rows only is refused. A sample whose loss has a weight of 0 taught nothing, and scores 0.

    What to do: see that the layer of zeros trains, that ``layers=`` does not choose what stands
    behind one that stays zero, and that the objective is what you mean.
    """


@dataclass(frozen=True, slots=True)
class Trial:
    """What was tried: so many ``samples``, and so many of the tracer's ``blocks`` that a gradient
    reached, of ``all_blocks``, in so many ``seconds``."""

    samples: int
    blocks: int
    all_blocks: int
    seconds: float = math.nan

    def __str__(self) -> str:
        return (
            f"the trial on {self.samples} sample{'s' * (self.samples > 1)} passed in "
            f"{self.seconds:.1f} s: data, task, network and method fit together, and the gradients "
            f"of {self.blocks} of {self.all_blocks} layers are those of a pass for each sample."
        )


@dataclass(frozen=True, slots=True)
class Question:
    """A question that will be asked: the specs of its two conditions, and whether its image is
    generated with guidance, which needs the null condition."""

    name: str
    present: Spec
    absent: Spec
    is_guided: bool


def first_samples(batches: Iterable[Encoded]) -> Encoded | None:
    """The first two samples, of the first batch or, where that has one, of the first two; None of
    no batches."""
    found: Encoded | None = None
    for batch in batches:
        found = batch.rows(0, SAMPLES) if found is None else _joined(found, batch.rows(0, 1))
        if len(found.latents) >= SAMPLES:
            break
    return found


def try_samples(
    task: DiffusionTask,
    tracer: GradientTracer,
    method: Method,
    samples: Encoded,
    seed: int,
    row_limit: RowLimit,
) -> Trial:
    """Traces samples at one of their states, as a capture will, and compares their rows with a pass
    for each sample alone.

    A single sample is taken twice, the second time negated: that a network mixes the samples of a
    batch shows in two that differ.

    Raises:
        TrialError: the method asks of conditions that the model does not have, a member of the task
            or the network raises, a gradient is not finite, an objective is zero whatever the
            network predicts, or the rows are not each sample's own; names the member or the layers.

    Warns:
        ZeroGradientWarning: all gradients are zero, with the present weights.
    """
    refuse_without_condition(task, method, samples)
    rows = samples
    if len(samples.latents) == 1:
        rows = _joined(samples, replace(samples, latents=-samples.latents))
    watched = Watched(task)
    if isinstance(method.training_trajectory, InTraining):
        method = replace(method, training_trajectory=Noised(timesteps=1))
    reached: set[str] = set()
    silent = set(range(len(method.training.parts)))

    def check(start: int, stop: int) -> Trace:
        trace, checked = check_batch(watched, tracer, method, rows.rows(start, stop), seed)
        reached.update(checked.reached)
        silent.difference_update(i for i, each in enumerate(checked.rows) if each.any())
        return trace

    with named(f"tracing {_described(samples)}"):
        # Where batches are of one sample, so is the comparison: nothing can be mixed there.
        traces = row_limit.run(len(rows.latents), check)
        if silent:
            tell_zeros(watched, tracer, method, samples, seed, row_limit)
    try_condition(task, tracer, samples, seed)
    features = torch.cat([trace.features for trace in traces])
    loss = torch.cat([trace.loss for trace in traces])
    for name, values in (("gradient", features), ("denoising loss", loss[:, None])):
        lost = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        if lost:
            raise TrialError(
                f"The {name} of {sorted({rows.sample_ids[i] for i in lost})} is not finite before "
                f"the first training step. Latents between {float(rows.latents.min()):.3g} and "
                f"{float(rows.latents.max()):.3g}. HINT: look at what `encode` makes of these "
                "samples, and at the precision of the weights."
            )
    return Trial(len(samples.latents), len(reached), len(tracer.block_names))


def tell_zeros(
    task: DiffusionTask,
    tracer: GradientTracer,
    method: Method,
    samples: Encoded,
    seed: int,
    row_limit: RowLimit,
) -> None:
    """Says of the objectives whose gradients are zero in every layer, at every state of the
    samples, whether they can be anything else.

    Zeros can be right before the first step: the squared norm of an output that begins as zero, the
    distance from a base model that an adapter of zeros leaves as it is, chosen layers that stand
    behind a last layer of zeros. None of these is zero for another output of the network, so it is
    tried with one.

    Raises:
        MethodError: an objective's cotangent is zero for whatever the network gives.

    Warns:
        ZeroGradientWarning: it is zero for what the network gives with its present weights, or no
            chosen layer has a gradient.
    """

    def over(work: Callable[[Encoded], Sequence[Any]]) -> list[bool]:
        count = len(samples.latents)
        found = row_limit.run(count, lambda start, stop: work(samples.rows(start, stop)))
        return [any(each) for each in zip(*found, strict=True)]

    reached = over(lambda part: reached_blocks(task, tracer, method, part, seed))
    if all(reached):
        return
    noisy = _OtherOutput(task, seed)
    can_be = over(lambda part: has_cotangents(noisy, tracer, method, part, seed))
    is_now = over(lambda part: has_cotangents(task, tracer, method, part, seed))
    for objective, has, can, now in zip(
        method.training.parts, reached, can_be, is_now, strict=True
    ):
        if has:
            continue
        if not can:
            raise MethodError(
                f"{objective}.cotangent(prediction) is zero everywhere, also where noise is added "
                "to the network's output: no sample would ever have a gradient. Expected the "
                "derivative of a scalar with respect to `prediction.e`. HINT: look at what it "
                "multiplies with zero or detaches before it differentiates; of a scalar s, the "
                "cotangent is ds/de."
            )
        why = (
            "the cotangent is not zero, and no traced layer has a gradient of it"
            if now
            else "the cotangent is zero for what the network predicts now, and not for another "
            "prediction"
        )
        warnings.warn(
            f"Before the first training step the gradients of {objective} are exactly zero in all "
            f"{len(tracer.block_names)} traced layers, for {samples.sample_ids}: {why}. Where a "
            "last layer or an adapter begins as zero that can be so until the first step; a "
            "checkpoint at which it is still so is refused. HINT: see that such a layer trains, "
            "that `layers=` is not behind one that stays zero, and that the objective is meant.",
            ZeroGradientWarning,
            stacklevel=3,
        )


def try_condition(task: DiffusionTask, tracer: GradientTracer, samples: Encoded, seed: int) -> None:
    """Makes the null condition, of which a checkpoint records what the network answers to it, or
    where there is none that of the first known attributes, and asks the network under it.

    A task that makes neither is passed over: what is lost without them is warned of later.

    Raises:
        TrialError: it has not as many rows as were asked for, or the network does not take it.
    """
    with torch.no_grad():
        for spec in ({}, *specs_of(task)[0][:1]):
            try:
                task.condition(spec, 1)
            except Exception:
                continue
            break
        else:
            return
        # Several, for a row that is not repeated.
        for n in (SAMPLES, 1):
            with named(f"the null condition, {name_of(task)}.condition({spec!r}, {n})"):
                condition = condition_of(task, spec, n)
        one = samples.rows(0, 1)
        state = next(iter(Noised(timesteps=1).states(task, one.latents, {}, one.sample_ids, seed)))
        with tracer.mode():
            try:
                predicted(task, state.x_t, state.t, condition)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise TrialError(
                    f"{name_of(task)}.predict() does not take what {name_of(task)}."
                    f"condition({spec!r}, 1) returned, {described(condition)}: "
                    f"{type(error).__name__}: {error}; `encode(batch).condition` of "
                    f"{len(samples.latents)} samples has {described(samples.condition)}. HINT: "
                    "condition(spec, n) returns the same names, of the same types and shapes, "
                    "with n rows."
                ) from error


def refuse_without_condition(task: DiffusionTask, method: Method, samples: Encoded) -> None:
    """Refuses a method whose questions compare two conditions, of a model that has none."""
    if samples.condition or not method.sees_absent:
        return
    instead = "methods.d_trak()"
    if isinstance(method.training_trajectory, InTraining):
        instead = f'mode="capture" and {instead}'
    raise TrialError(
        f"The method {method.name!r} asks what a concept adds: it compares the network under two "
        f"conditions, and {name_of(task)} has none (`encode(batch).condition` is empty), so that "
        f"nobody could be answered. HINT: trace with {instead}, which looks at the whole image."
    )


def conditions_of(task: DiffusionTask, question: Question) -> dict[str, Condition]:
    """The conditions of a question, one row each: ``present``, ``absent``, and ``null`` where its
    image is generated with guidance.

    Raises:
        TrialError: the task cannot make them, or they are not one row each with the same names;
            names the question.
    """
    specs: dict[str, Spec] = {"present": question.present, "absent": question.absent}
    if question.is_guided:
        specs["null"] = {}
    found: dict[str, Condition] = {}
    for side, spec in specs.items():
        shown = spec if isinstance(spec, str) else dict(spec)
        with named(
            f"Concept({question.name!r}, {side}={shown!r}): {name_of(task)}.condition({shown!r}, 1)"
        ):
            with torch.no_grad():
                found[side] = task.condition(spec, 1)
            wrong = {
                name: _shape(value)
                for name, value in found[side].items()
                if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != 1
            }
            if wrong or found[side].keys() != found["present"].keys():
                raise TrialError(
                    f"it gave {_shapes(found[side])}, expected one row [1, ...] of each of "
                    f"{sorted(found['present'])}."
                )
    return found


def try_questions(
    task: DiffusionTask,
    tracer: GradientTracer,
    method: Method,
    samples: Encoded,
    questions: Sequence[Question],
    seed: int,
) -> None:
    """Makes the conditions of all questions, and asks the first of them at one state of a training
    sample.

    Raises:
        TrialError: a question cannot be asked; names it.
    """
    conditions = [conditions_of(task, question) for question in questions]
    if not conditions:
        return
    one, first = samples.rows(0, 1), conditions[0]
    watched = Watched(task)
    with named(f"asking Concept({questions[0].name!r})"):
        states = list(
            Noised(timesteps=1).states(watched, one.latents, one.condition, one.sample_ids, seed)
        )
        sides = {"present": first["present"], "absent": first["absent"]}
        trace_query(watched, tracer, method, states, one.latents, sides)  # type: ignore[arg-type]
        with torch.no_grad():
            watched.decode(one.latents)


class _OtherOutput(Wrapped):
    """A task whose network gives something else: noise is added to its output."""

    members = ("predict",)

    def __init__(self, task: DiffusionTask, seed: int) -> None:
        super().__init__(task)
        self._seed = seed

    @override
    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = member(*args, **kwargs)
        noise = seeded_noise(output.shape[1:], self._seed, 0, "another output").to(output)
        return output + noise


class Watched(Wrapped):
    """A task whose members say, when they raise, which of them it was and what it was given."""

    members = ("predict", "condition", "decode", "pictures")

    @override
    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return member(*args, **kwargs)
        except Exception as error:
            # For RowLimit, or of what is called inside the network's pass and not of the member.
            if is_out_of_memory(error) or isinstance(error, (ExtensionError, GradientError)):
                raise
            given = ", ".join(map(_shape, args))
            told = f"{name_of(self)}.{name}({given})"
            own = getattr(type(unwrapped(self)), name, None)
            if isinstance(error, TypeError) and own is DiffusionTask.predict:
                raise TrialError(
                    f"{told}: TypeError: {error}. HINT: the default predict() calls the denoiser "
                    "as diffusers' models are called, `denoiser(x_t, t, return_dict=False, "
                    "**condition)[0]`; define predict(x_t, t, condition) for another."
                ) from error
            raise _failed(told, error) from error


@contextmanager
def named(what: str) -> Iterator[None]:
    """Says of an error what raised it.

    Raises:
        TrialError: something was raised inside, which is its cause.
    """
    try:
        yield
    except Exception as error:
        is_told = isinstance(error, (TrialError, ExtensionError)) and error.__cause__ is not None
        raise _failed(what, error) from (error.__cause__ if is_told else error)


@contextmanager
def naming_changed_buffers(changed: Callable[[], list[str]]) -> Iterator[None]:
    """Names, where rows are not each sample's own, the buffers that a pass changes: an output that
    depends on them is another one in every pass.

    Raises:
        TrialError: as was raised inside.
    """
    try:
        yield
    except TrialError as error:
        names = changed()
        if not names or not isinstance(error.__cause__, GradientError):
            raise
        raise TrialError(
            f"{error} A likely cause: a pass in evaluation mode changes the buffers "
            f"{listed(names)}, so that an output which depends on them, such as a running "
            "estimate, is another one in every pass. HINT: let `forward` update them only where "
            "`self.training` is set."
        ) from error.__cause__


def _failed(what: str, error: Exception) -> TrialError:
    if isinstance(error, TYPED):
        return TrialError(f"{what}: {error}")
    return TrialError(
        f"{what}: {type(error).__name__}: {error} HINT: so it would be called at every checkpoint, "
        "in evaluation mode; make the same call by hand."
    )


def _joined(a: Encoded, b: Encoded) -> Encoded:
    return Encoded(
        latents=torch.cat([a.latents, b.latents]),
        condition={
            name: torch.cat([value, b.condition[name]]) for name, value in a.condition.items()
        },
        sample_ids=[*a.sample_ids, *b.sample_ids],
    )


def _described(samples: Encoded) -> str:
    return (
        f"{samples.sample_ids} (latents {_shape(samples.latents)}, condition "
        f"{_shapes(samples.condition)})"
    )


def _shapes(condition: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shape(value)}" for name, value in condition.items()) or "none"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return described(value)
    if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
        return "{" + _shapes(value) + "}"
    text = repr(value)
    return text if len(text) < 80 else type(value).__name__
