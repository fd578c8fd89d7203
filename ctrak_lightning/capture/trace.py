"""One batch through trajectory, network, objective and gradient tracer, on the training and on the
query side."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.errors import ExtensionError, MethodError, TaskError, visible
from ctrak_lightning.gradients import GradientTracer
from ctrak_lightning.gradients.checks import Cotangent, Forward, naming_extension
from ctrak_lightning.gradients.tracer import Checked
from ctrak_lightning.methods.method import Method, Normalisation
from ctrak_lightning.methods.objectives import Objective, Prediction, Side, cotangent_of
from ctrak_lightning.methods.trajectories import State
from ctrak_lightning.tasks import Condition, DiffusionTask, Encoded, name_of, select, widened
from ctrak_lightning.tasks.base import condition_of, described
from ctrak_lightning.utilities.memory import RowLimit, is_out_of_memory
from ctrak_lightning.utilities.naming import is_own, place_of

FAINT = 1e-3
"""A concept direction ``||e(c) - e(c_minus)|| / ||e(c)||`` below this is within noise."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Projected gradients of a batch, summed over the states: ``features`` [B, k], and the mean
    denoising ``loss`` [B]."""

    features: Tensor
    loss: Tensor


@dataclass(frozen=True, slots=True)
class FeatureParts:
    """Where in a trajectory and in a network features arise: two ways to split them, each of which
    adds up to them.

    ``timesteps`` of the S states, ``by_timestep`` [S, B, k], and ``by_layer_group`` [B, k] of each
    group of layers."""

    timesteps: list[int]
    by_timestep: Tensor
    by_layer_group: dict[str, Tensor]

    def query(self, i: int) -> "FeatureParts":
        """Those of one query, B = 1."""
        layers = {name: features[i : i + 1] for name, features in self.by_layer_group.items()}
        return FeatureParts(self.timesteps, self.by_timestep[:, i : i + 1], layers)


@dataclass(frozen=True, slots=True)
class QueryTrace:
    """Projected gradients of queries: ``features`` [B, k], and ``strength`` [B], the mean over the
    states of ``||e(c) - e(c_minus)|| / ||e(c)||``, or NaN where the method looks at one condition
    only; the features' ``parts`` where they were asked for."""

    features: Tensor
    strength: Tensor
    parts: FeatureParts | None = None


def trace_batch(
    task: DiffusionTask,
    tracer: GradientTracer,
    method: Method,
    encoded: Encoded,
    seed: int,
    row_limit: RowLimit | None = None,
) -> Trace:
    """The training side: one forward pass per state, another one under the null condition where the
    objective is held against it, and a vector-Jacobian product for each of the objective's parts
    (``method.training``).

    Args:
        task: a DiffusionTask.
        tracer: the gradient tracer of ``task.denoiser``.
        method: what to trace.
        encoded: the batch.
        seed: of the trajectory's noise.
        row_limit: how many rows at once, which it lowers where memory runs out; None starts with
            all.

    Raises:
        GradientError: there is no memory for a single sample.
    """
    parts = (row_limit or RowLimit()).run(
        len(encoded.latents),
        lambda start, stop: _trace_rows(task, tracer, method, encoded.rows(start, stop), seed),
    )
    return Trace(
        torch.cat([part.features for part in parts]), torch.cat([part.loss for part in parts])
    )


def _trace_rows(
    task: DiffusionTask, tracer: GradientTracer, method: Method, encoded: Encoded, seed: int
) -> Trace:
    task, encoded = widened(task, encoded)
    states = _states(task, tracer, method, encoded, seed)
    device = encoded.latents.device
    features = torch.zeros(len(encoded.latents), tracer.dim, device=device)  # [B, k]
    loss = torch.zeros(len(encoded.latents), device=device)  # [B]
    for state in states:
        evaluation = _evaluation(task, tracer, method, encoded, state)
        rows = evaluation.vjps(tracer, method.training)  # [B, P] for each part of the objective
        # Normalised state by state: at low noise gradients are larger by orders of magnitude, and
        # one state would be all of the sum.
        features += joined(rows, tracer, method.normalisation)
        loss += evaluation.denoising_loss() / len(states)
    # One copy from the device for all states, and nothing that waits for it before.
    whole = torch.cat([features, loss[:, None]], 1).cpu()
    return Trace(whole[:, :-1], whole[:, -1])


def _states(
    task: DiffusionTask, tracer: GradientTracer, method: Method, encoded: Encoded, seed: int
) -> list[State]:
    # In the mode of tracing: an inversion asks the network itself, without dropout.
    trajectory = method.training_trajectory
    what = f"{place_of(type(trajectory))}.states(task, latents, ...)"
    is_ours = is_own(type(trajectory))
    # Of the library's own what raises is the task, which they ask for the network's output.
    naming = nullcontext() if is_ours else naming_extension(what)
    with tracer.mode(), torch.no_grad(), naming:
        given = trajectory.states(
            task, encoded.latents, encoded.condition, encoded.sample_ids, seed
        )
        states = list(given)
    odd = next((one for one in states if not isinstance(one, State)), None)
    if odd is not None or not states:
        shown = "no states" if odd is None else f"{type(odd).__name__} among its states"
        raise ExtensionError(
            f"{what} gave {shown}, expected one or more of trajectories.State(x_t, t). HINT: "
            "`yield State(x_t, t)` for each noise level."
        )
    return states


def _evaluation(
    task: DiffusionTask, tracer: GradientTracer, method: Method, encoded: Encoded, state: State
) -> "_Evaluation":
    """The network at a state of training samples, and under the null condition where the objective
    is held against it.

    Raises:
        MethodError: the model has no null condition.
    """
    reference = None
    if method.training.needs_reference:
        try:
            null = condition_of(task, {}, len(encoded.latents))
        except Exception as error:  # a task decides how it refuses a spec
            if isinstance(error, TaskError) or is_out_of_memory(error):
                raise
            raise MethodError(
                f"Method({method.name!r}, training={method.training}): the objective is held against "
                f"the network's prediction without any condition, and there is none "
                f"({type(error).__name__}: {error}). HINT: let `condition({{}}, n)` give it, or use "
                "an objective that needs none, such as methods.influence('condition')."
            ) from error
        reference = _predicted(task, tracer, state, null)
    return _Evaluation(task, state, encoded.latents, encoded.condition, reference)


def check_batch(
    task: DiffusionTask, tracer: GradientTracer, method: Method, encoded: Encoded, seed: int
) -> tuple[Trace, Checked]:
    """The traces of a batch at the middle one of its states, whose rows are held against a pass for
    each sample alone.

    Returns:
        the traces, and the rows that were found right, with the names of the blocks that a gradient
        reached; nothing was seen of the others.

    Raises:
        GradientError: the rows differ; names the layers.
    """
    task, encoded = widened(task, encoded)
    states = _states(task, tracer, method, encoded, seed)
    evaluation = _evaluation(task, tracer, method, encoded, states[len(states) // 2])
    forward, cotangents = evaluation.passes(method.training)
    checked = tracer.check(forward, cotangents, len(encoded.latents))
    features = joined(checked.rows, tracer, method.normalisation)
    return Trace(features.cpu(), evaluation.denoising_loss().cpu()), checked


def reached_blocks(
    task: DiffusionTask, tracer: GradientTracer, method: Method, encoded: Encoded, seed: int
) -> list[set[str]]:
    """For each part of the objective the blocks that a gradient other than zero reaches at any
    state of a batch."""
    task, encoded = widened(task, encoded)
    found: list[set[str]] = [set() for _ in method.training.parts]
    for state in _states(task, tracer, method, encoded, seed):
        evaluation = _evaluation(task, tracer, method, encoded, state)
        for blocks, rows in zip(found, evaluation.vjps(tracer, method.training), strict=True):
            blocks.update(tracer.reached(rows))
    return found


def has_cotangents(
    task: DiffusionTask, tracer: GradientTracer, method: Method, encoded: Encoded, seed: int
) -> list[bool]:
    """For each part of the objective whether its cotangent is other than zero at any state of a
    batch, if ``task`` gives the network's output."""
    task, encoded = widened(task, encoded)
    found = [False for _ in method.training.parts]
    rows = torch.arange(len(encoded.latents), device=encoded.latents.device)
    for state in _states(task, tracer, method, encoded, seed):
        evaluation = _evaluation(task, tracer, method, encoded, state)
        forward, cotangents = evaluation.passes(method.training)
        with tracer.mode():
            e = forward(rows)
            found = [
                is_other or bool(cotangent(e, rows).any())
                for is_other, cotangent in zip(found, cotangents, strict=True)
            ]
    return found


def trace_query(
    task: DiffusionTask,
    tracer: GradientTracer,
    method: Method,
    states: Sequence[State],
    x0: Tensor,
    conditions: Mapping[Side, Condition],
    *,
    weights: Tensor | None = None,
    parts: bool = False,
) -> QueryTrace:
    """The query side: at every state the weighted sum of the terms' vector-Jacobian products
    (``method.query``).

    Args:
        task: a DiffusionTask.
        tracer: the gradient tracer of ``task.denoiser``.
        method: what to ask.
        states: the states of the queries, each [B, ...].
        x0: the queries' clean latents [B, ...]; a state's own ``x0`` goes before it.
        conditions: the condition with and without the concept.
        weights: of the part of the image that is asked about [B, ...], 0 to 1; every cotangent is
            multiplied by them. (Scales are normalised afterwards.) None is all of it.
        parts: also split the features by state and by group of layers, for a sketch per group and
            state.
    """
    features = torch.zeros(len(x0), tracer.dim, device=x0.device)
    strength = torch.zeros(len(x0), device=x0.device)
    by_timestep: list[Tensor] = []
    groups = tracer.layer_groups() if parts else {}
    by_group = {name: torch.zeros_like(features) for name in groups}
    for state in states:
        # [B, P] for each part; P numbers, before the sketch to k, in which terms add up exactly.
        shape = len(x0), tracer.width
        gradients = [torch.zeros(*shape, device=x0.device) for _ in method.training.parts]
        predictions: dict[Side, Tensor] = {}  # e [B, ...] under each condition
        # A term that is held against a condition's prediction needs that one first.
        references: dict[Side | None, _Reference] = {}
        for side in (term.reference_side for term in method.query):
            if side is not None and side not in references:
                references[side] = _predicted(task, tracer, state, conditions[side])
                predictions[side] = references[side].e
        for term in method.query:
            reference = references.get(term.reference_side)
            clean = x0 if state.x0 is None else state.x0
            condition = conditions[term.side]
            evaluation = _Evaluation(task, state, clean, condition, reference, weights)
            rows = evaluation.vjps(tracer, term.objective)
            predictions[term.side] = evaluation.e
            for gradient, row in zip(gradients, rows, strict=True):
                gradient += term.weight * row
        row = joined(gradients, tracer, method.normalisation)  # [B, k]
        features += row
        strength += _relative_difference(predictions, weights) / len(states)
        if parts:
            by_timestep.append(row)
            for name, blocks in groups.items():
                by_group[name] += joined(gradients, tracer, method.normalisation, blocks)
    if not parts:
        return QueryTrace(features.cpu(), strength.cpu())
    timesteps = [int(state.t[0]) for state in states]
    groups_on_cpu = {name: group.cpu() for name, group in by_group.items()}
    found = FeatureParts(timesteps, torch.stack(by_timestep).cpu(), groups_on_cpu)
    return QueryTrace(features.cpu(), strength.cpu(), found)


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the network says of a state under the condition that an objective is held against: its
    ``output`` and the noise prediction ``e``, each [B, ...], without graph."""

    output: Tensor
    e: Tensor


def _predicted(
    task: DiffusionTask, tracer: GradientTracer, state: State, condition: Condition
) -> _Reference:
    with tracer.mode(), torch.no_grad():
        output = predicted(task, state.x_t, state.t, condition)
        return _Reference(output, task.noise_schedule.epsilon(output, state.x_t, state.t))


class _Evaluation:
    """The network at one state under one condition, and what is kept of it."""

    def __init__(
        self,
        task: DiffusionTask,
        state: State,
        x0: Tensor,
        condition: Condition,
        reference: _Reference | None,
        weights: Tensor | None = None,
    ) -> None:
        self.task, self.state, self.x0, self.condition = task, state, x0, condition
        self.reference, self.weights = reference, weights
        self.e = torch.empty_like(x0)  # filled row by row: a tracer may ask for parts of a batch
        self.prediction: Prediction | None = None

    def vjps(self, tracer: GradientTracer, objective: Objective) -> list[Tensor]:
        """``J^T v`` of the objective's parts, projected but not sketched, each [B, P]."""
        forward, cotangents = self.passes(objective)
        found = tracer.vjps(forward, cotangents, len(self.x0), sketch=False)
        self.prediction = None  # it holds the graph of the whole pass
        return found

    def passes(self, objective: Objective) -> tuple[Forward, list[Cotangent]]:
        """What a :class:`~ctrak_lightning.gradients.GradientTracer` is given: the network's noise
        prediction of some rows, or its output, and the cotangents of the objective's parts."""
        x_t = self.state.x_t.detach().requires_grad_(objective.needs_input_gradient)  # [B, ...]

        def forward(rows: Tensor) -> Tensor:  # positions [b] in the batch -> e, or output [b, ...]
            x, t = x_t[rows], self.state.t[rows]
            output = predicted(self.task, x, t, select(self.condition, rows))
            schedule = self.task.noise_schedule
            e: Tensor = schedule.epsilon(output, x, t)
            against = self.reference
            known = (None, None) if against is None else (against.e[rows], against.output[rows])
            self.prediction = Prediction(
                x, t, self.x0[rows], output, e, known[0], schedule, known[1]
            )
            return output if objective.of_output else e

        def cotangent(part: Objective, _: Tensor, rows: Tensor) -> Tensor:  # v [b, ...]
            assert self.prediction is not None
            self.e[rows] = self.prediction.e.detach().to(self.e)
            v = _cotangent(part, self.prediction)
            return v if self.weights is None else v * self.weights[rows].to(v)

        return forward, [partial(cotangent, part) for part in objective.parts]

    def denoising_loss(self) -> Tensor:
        """``mean((e - eps)^2)`` [B]."""
        a, s = self.task.noise_schedule.levels(self.state.t, self.state.x_t)  # [B, 1, ...]
        noise = (self.state.x_t - a * self.x0) / s
        loss: Tensor = (self.e - noise).square().flatten(1).mean(1).float()
        return loss


def _cotangent(objective: Objective, prediction: Prediction) -> Tensor:
    """The objective's cotangent, of the prediction's shape.

    Raises:
        ExtensionError: it raises something, or returns something else; names it.
    """
    what = f"{place_of(type(objective))}.cotangent(prediction)"
    with naming_extension(what):
        v: Any = cotangent_of(objective, prediction)
    e = prediction.e
    if not isinstance(v, Tensor) or v.shape != e.shape:
        shown = f"shape {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        raise ExtensionError(
            f"{what} returned {shown}, expected the shape {list(e.shape)} of prediction.e. HINT: "
            "return one number per element of e, the derivative of the scalar; the scalar itself "
            "is never needed."
        )
    return v


def predicted(task: DiffusionTask, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's output, of its input's shape, in float32 at least: an objective's cotangent of
    1/D would lose its digits in half of it.

    Raises:
        TaskError: it is something else.
    """
    output: Any = task.predict(x_t, t, condition)
    if isinstance(output, Tensor) and output.is_floating_point() and output.shape == x_t.shape:
        return output.to(torch.promote_types(output.dtype, torch.float32))
    hint = "return the network's output alone: with diffusers, `model(..., return_dict=False)[0]`"
    if isinstance(output, Tensor) and output.shape[2:] == x_t.shape[2:]:
        hint = (
            "a network that also learns its variance gives twice the channels, of which the "
            "first half is the prediction: `output.chunk(2, dim=1)[0]`"
        )
    raise TaskError(
        f"{name_of(task)}.predict(x_t {described(x_t)}, t {described(t)}, condition) returned "
        f"{described(output)}, expected the shape of x_t. HINT: {hint}."
    )


def _relative_difference(predictions: Mapping[Side, Tensor], weights: Tensor | None) -> Tensor:
    if len(predictions) < 2:
        device = next(iter(predictions.values())).device if predictions else "cpu"
        return torch.tensor(float("nan"), device=device)
    seen = (predictions[side] for side in ("present", "absent"))
    present, absent = (
        (e if weights is None else e * weights.to(e)).flatten(1).float() for e in seen
    )
    ratio: Tensor = (present - absent).norm(dim=1) / present.norm(dim=1).clamp(min=1e-12)
    return ratio


def joined(
    rows: Sequence[Tensor],
    tracer: GradientTracer,
    normalisation: Normalisation,
    blocks: Collection[str] | None = None,
) -> Tensor:
    """Features [B, k] of the parts' rows, each [B, P], with a sketch of its own for each part; of
    some ``blocks`` only, the part of the features that comes from them."""
    return torch.stack(
        [normalised(row, tracer, normalisation, salt, blocks) for salt, row in enumerate(rows)]
    ).sum(0)


def normalised(
    rows: Tensor,
    tracer: GradientTracer,
    normalisation: Normalisation,
    salt: int = 0,
    blocks: Collection[str] | None = None,
) -> Tensor:
    """Features [B, k] of rows [B, P]; what is all zero stays zero, so that a state without gradient
    counts for nothing.

    Of some ``blocks`` only, what they add to the features of the whole: they are scaled by the norm
    of the whole."""
    unit_layers = normalisation == "layer"
    features = part = tracer.sketch(rows, unit_layers=unit_layers, salt=salt)  # [B, P] -> [B, k]
    if blocks is not None:
        part = tracer.sketch(tracer.only(rows, blocks), unit_layers=unit_layers, salt=salt)
    if normalisation != "sample":
        return part
    norm = features.norm(dim=1, keepdim=True)  # [B, 1]
    return torch.where(norm > 0, part / norm.clamp(min=torch.finfo(features.dtype).tiny), part)


def warn_if_faint(strength: Tensor, names: Sequence[str], threshold: float = FAINT) -> None:
    """Warns of concepts whose direction is within noise: the model hardly distinguishes the two
    conditions."""
    faint = [
        f"{visible(name)} ({value:.1e})"
        for name, value in zip(names, strength.tolist(), strict=True)
        if value < threshold
    ]
    if faint:
        warnings.warn(
            f"The concept direction ||e(c) - e(c_minus)|| / ||e(c)|| is below {threshold} for: "
            f"{', '.join(faint)}. The model has hardly learnt these concepts and their scores say "
            "nothing. HINT: look at the generated images first, and train longer.",
            UserWarning,
            stacklevel=3,
        )
