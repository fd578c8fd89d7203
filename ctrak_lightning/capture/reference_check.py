"""Selfcheck: are traces right on this model? The numeric promises of the library, tried on the
user's own network and data."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ctrak_lightning import methods
from ctrak_lightning.capture.trace import reached_blocks, trace_batch
from ctrak_lightning.errors import BatchError, listed
from ctrak_lightning.gradients import (
    Engine,
    GradientTracer,
    Projection,
    exact_products,
    tracing_mode,
    undisturbed,
)
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import InTraining, Noised
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.model.weights import trained_parameters
from ctrak_lightning.tasks import (
    DiffusionTask,
    Encoded,
    encode,
    resolve_task,
    task_modules,
    unwrapped,
    widened,
)
from ctrak_lightning.utilities.dtypes import COMPUTED, device_of
from ctrak_lightning.utilities.naming import parameters_of
from ctrak_lightning.utilities.rng import isolated_rng

Outcome = Literal["pass", "note", "fail"]
DUPLICATE_TOLERANCE = 1e-6
TIMESTEPS = 5
_REACHED = "every layer has a gradient to compare"
_LOOPED = "gradients equal a plain loop over the samples"
_ALONE = "a sample alone equals it in a batch"
_REVERSED = "the order of samples does not matter"
NORM_RANGE = 1e4
"""Beyond this ratio of the largest to the smallest norm of a trace, one sample outweighs the
others."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried: its ``name``, the ``outcome``, what was ``found``, and what to do
    (``hint``) if it failed.

    A ``"note"`` is no failure: something to know of."""

    name: str
    outcome: Outcome
    found: str
    hint: str = ""


def selfcheck(
    module: Any,
    batch: Any,
    *,
    method: Method | None = None,
    projection: Projection | None = None,
    layers: Sequence[str] | None = None,
    engine: Engine = "auto",
    samples: int = 4,
    seed: int = 0,
) -> list[Check]:
    """Tries on ``samples`` images of a batch what traces promise.

    Relative differences are ``max over samples of ||a - b|| / ||b||`` of the features; they may be
    as large as the square root of the network's machine epsilon (3e-4 in float32), which is half of
    its digits.

    Args:
        module: a LightningModule that is, or carries as ``task``, a DiffusionTask; or a task.
        batch: of the loader that is traced.
        method: as of the tracer; its training side is tried. Training-step traces (``InTraining``)
            are tried at noised states.
        projection: as of the tracer.
        layers: as of the tracer.
        engine: the engine that is held against the per-sample loop.
        samples: how many images; the loop takes a forward and a backward pass for each.
        seed: of the noise.

    Raises:
        TaskError: the module is no DiffusionTask.
        BatchError: fewer than two samples.
        GradientError: the model cannot be traced at all.
    """
    task = resolve_task(module)
    owner: nn.Module = module if isinstance(module, nn.Module) else task.denoiser
    # As the default; it needs no null condition, which the other checks do not either.
    used = method or methods.influence("condition")
    if isinstance(used.training_trajectory, InTraining):
        used = replace(used, training_trajectory=Noised())
    with isolated_rng(seed), undisturbed(owner, *task_modules(task)), torch.no_grad():
        encoded = encode(task, batch).rows(0, samples)
    if len(encoded.sample_ids) < 2:
        raise BatchError(
            f"selfcheck(batch of {len(encoded.sample_ids)}, samples={samples}): expected at least "
            "two samples, to compare."
        )
    before = _Surroundings(owner)
    trial = _Trial(task, used, projection or Projection(), layers, engine, seed, encoded)
    with isolated_rng(seed), exact_products(device_of(task.denoiser)):
        features = trial.features(range(trial.count))
        checks = [
            _finite(features, encoded.sample_ids),
            trial.reached(),
            trial.compare(_LOOPED, features, trial.looped(), _LOOP_HINT),
            trial.compare(_ALONE, features, trial.alone(), _BATCH_HINT),
            trial.compare(_REVERSED, features, trial.reversed(), _BATCH_HINT),
            _duplicates(trial.features([0, *range(trial.count), 0])),
            _repeated(features, trial.features(range(trial.count))),
            trial.on_one_thread(features),
            _denoises(task, encoded),
            trial.on_a_gpu(features),
        ]
    return [*checks, before.compare(), *_coverage(owner, task, trial.tracer)]


class _Trial:
    """Some samples that are traced again and again, in different ways."""

    def __init__(
        self,
        task: DiffusionTask,
        method: Method,
        projection: Projection,
        layers: Sequence[str] | None,
        engine: Engine,
        seed: int,
        encoded: Encoded,
    ) -> None:
        self.task, self.method, self.seed, self.encoded = task, method, seed, encoded
        self._projection, self._layers = projection, layers
        self.count = len(encoded.sample_ids)
        self.tracer = self._tracer(engine)
        dtypes = {parameter.dtype for parameter in task.denoiser.parameters()} & {*COMPUTED}
        self.tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5

    def features(self, rows: Sequence[int], tracer: GradientTracer | None = None) -> Tensor:
        """Features [len(rows), k] of these samples, traced together."""
        chosen = _chosen(self.encoded, rows)
        return trace_batch(
            self.task, tracer or self.tracer, self.method, chosen, self.seed
        ).features

    def looped(self) -> Tensor:
        return self.features(range(self.count), self._tracer("loop"))

    def reached(self) -> Check:
        """How many layers there was something of to compare."""
        parts = reached_blocks(self.task, self.tracer, self.method, self.encoded, self.seed)
        names, found = self.tracer.block_names, set().union(*parts)
        silent = [name or "the network" for name in names if name not in found]
        text = f"{len(found)} of {len(names)} layers had gradients"
        if not silent:
            return Check(_REACHED, "pass", text)
        text += f"; nothing is known of those that had none: {listed(silent, show=str)}"
        return Check(_REACHED, "note" if found else "fail", text, _REACHED_HINT)

    def alone(self) -> Tensor:
        return torch.cat([self.features([row]) for row in range(self.count)])

    def reversed(self) -> Tensor:
        return self.features(range(self.count)[::-1]).flip(0)

    def on_one_thread(self, features: Tensor) -> Check:
        name = "the number of threads does not matter"
        present = torch.get_num_threads()
        if present == 1:
            return Check(name, "note", "not tried: there is one thread")
        torch.set_num_threads(1)
        try:
            return self.compare(name, features, self.features(range(self.count)), _THREAD_HINT)
        finally:
            torch.set_num_threads(present)

    def on_a_gpu(self, features: Tensor) -> Check:
        name = "CPU and GPU agree"
        device = device_of(self.task.denoiser)
        if device.type == "cpu":
            return Check(name, "note", "not tried: the model is on the CPU")
        back = {key: value.to("cpu") for key, value in self.encoded.condition.items()}
        on_cpu = replace(self.encoded, latents=self.encoded.latents.to("cpu"), condition=back)
        own = unwrapped(self.task)
        module = own if isinstance(own, nn.Module) else self.task.denoiser
        module.to("cpu")
        try:
            tracer = self._tracer(self.tracer.engine)
            theirs = trace_batch(self.task, tracer, self.method, on_cpu, self.seed).features
        finally:
            module.to(device)
        return self.compare(name, features, theirs, "")

    def compare(self, name: str, ours: Tensor, theirs: Tensor, hint: str) -> Check:
        difference = _difference(ours, theirs)
        found = f"relative difference {difference:.1e}, at most {self.tolerance:.1e}"
        return _judged(name, difference <= self.tolerance, found, hint)  # NaN fails

    def _tracer(self, engine: Engine) -> GradientTracer:
        # By the kernel whose rounding does not depend on the batch or the device.
        return GradientTracer(
            *(self.task.denoiser, self._projection),
            layers=self._layers,
            engine=engine,
            attention="math",
        )


class _Surroundings:
    """What tracing must leave as it was."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.facts = self._now()

    def compare(self) -> Check:
        name = "the model and the random generators are as before"
        changed = [key for key, value in self._now().items() if value != self.facts[key]]
        found = ", ".join(self.facts) if not changed else f"changed: {', '.join(changed)}"
        return _judged(name, not changed, found, "please report this as a bug.")

    def _now(self) -> dict[str, Any]:
        buffers = {f"buffer {name}": value for name, value in self.owner.named_buffers()}
        return {
            "weights": weights_digest(dict(self.owner.named_parameters()) | buffers),
            "gradients": weights_digest(
                {name: p.grad for name, p in self.owner.named_parameters() if p.grad is not None}
            ),
            "requires_grad": [parameter.requires_grad for parameter in self.owner.parameters()],
            "training flags": [submodule.training for submodule in self.owner.modules()],
            "random states": [
                torch.get_rng_state().tolist(),
                repr(np.random.get_state()),
                repr(random.getstate()),
            ],
        }


def _judged(name: str, is_right: bool, found: str, hint: str) -> Check:
    return Check(name, "pass", found) if is_right else Check(name, "fail", found, hint)


def _chosen(encoded: Encoded, rows: Sequence[int]) -> Encoded:
    index = torch.tensor(list(rows), device=encoded.latents.device)
    return Encoded(
        latents=encoded.latents[index],
        condition={
            name: value[index.to(value.device)] for name, value in encoded.condition.items()
        },
        sample_ids=[encoded.sample_ids[row] for row in rows],
    )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    norms = theirs.double().norm(dim=1).clamp(min=1e-30)
    return float(((ours.double() - theirs.double()).norm(dim=1) / norms).max())


def _finite(features: Tensor, sample_ids: Sequence[str]) -> Check:
    name = "every trace is finite and not zero"
    norms = features.norm(dim=1)
    refused = ~torch.isfinite(norms) | (norms == 0)
    bad = [sample_ids[i] for i in refused.nonzero().flatten().tolist()]
    if bad:
        hint = "look at these images, at the loss, and at the precision (float16 ends at 65504)."
        return Check(name, "fail", f"not so: {', '.join(bad)}", hint)
    low, high = float(norms.min()), float(norms.max())
    found = f"norms from {low:.2e} to {high:.2e}"
    if high > NORM_RANGE * low:
        found += ": one sample outweighs the others"
        return Check(name, "note", found, "methods normalise by sample or layer.")
    return Check(name, "pass", found)


def _duplicates(features: Tensor) -> Check:
    """Of a batch whose first and last row are the second once more."""
    name = "equal samples have equal traces"
    difference = max(_difference(features[[row]], features[[1]]) for row in (0, -1))
    found = f"relative difference {difference:.1e}, at most {DUPLICATE_TOLERANCE:.0e}"
    return _judged(name, difference <= DUPLICATE_TOLERANCE, found, _BATCH_HINT)


def _repeated(first: Tensor, second: Tensor) -> Check:
    name = "traced twice, the same to the bit"
    is_equal = torch.equal(first, second)
    found = "equal" if is_equal else f"relative difference {_difference(first, second):.1e}"
    return _judged(name, is_equal, found, _RANDOM_HINT)


@torch.no_grad()
def _denoises(task: DiffusionTask, encoded: Encoded) -> Check:
    """Whether the output, read as the scheduler says, separates noise from image: under a wrong
    ``prediction_type`` it does not."""
    name = "the network's output, read by the schedule, predicts the noise"
    task, encoded = widened(task, encoded)
    x0, schedule = encoded.latents, task.noise_schedule
    errors = {}
    with tracing_mode(task.denoiser), torch.no_grad():
        for state in Noised(timesteps=min(TIMESTEPS, len(schedule))).states(
            task, x0, encoded.condition, encoded.sample_ids, 0
        ):
            a, s = schedule.levels(state.t, x0)
            noise = (state.x_t - a * x0) / s
            e = schedule.epsilon(
                task.predict(state.x_t, state.t, encoded.condition), state.x_t, state.t
            )
            errors[float(state.t[0])] = float((e - noise).square().mean() / noise.square().mean())
    found = "error / noise " + ", ".join(
        f"{error:.2g} at timestep {t:g}" for t, error in errors.items()
    )
    if not all(map(math.isfinite, errors.values())):
        return Check(name, "fail", found, _SCHEDULE_HINT)
    # Near the image the best guess of the noise is bad; a network that has learnt nothing is no
    # better than zero anywhere.
    if min(errors.values()) < 1:
        return Check(name, "pass", found)
    return Check(name, "note", found, _SCHEDULE_HINT)


def _coverage(owner: nn.Module, task: DiffusionTask, tracer: GradientTracer) -> Iterator[Check]:
    inside = {id(parameter): name for name, parameter in parameters_of(task.denoiser).items()}
    trained = trained_parameters(owner)
    traced = set(tracer.parameter_names)
    outside = sorted(name for name, value in trained.items() if id(value) not in inside)
    left = sorted(
        inside[id(value)]
        for value in trained.values()
        if inside.get(id(value), next(iter(traced))) not in traced
    )
    numbers = sum(value.numel() for value in trained.values())
    found = f"{len(traced)} of {len(trained)} trained tensors ({numbers:,} numbers trained)"
    if outside:
        found += f"; outside of the denoiser: {listed(outside, show=str)}"
    if left:
        found += f"; not chosen: {listed(left, show=str)}"
    yield Check("all that trains is traced", "note" if outside or left else "pass", found)


_REACHED_HINT = (
    "behind a last layer of zeros, and in LoRA's first matrices, there is none before training: "
    "try again with trained weights. After training, such a layer learns nothing from the loss."
)
_LOOP_HINT = (
    "some layer is not traced as it computes; GradientTracer.check names the layers. Leave them "
    'out with `layers=`, or use engine="loop".'
)
_BATCH_HINT = (
    "samples are not independent: look for batch norm, losses over the batch, or layers that do "
    "not put the batch first."
)
_RANDOM_HINT = (
    "something in the network draws random numbers in evaluation mode, or an operation is not "
    "deterministic (torch.use_deterministic_algorithms)."
)
_THREAD_HINT = "the network's own results depend on the number of threads more than on rounding."
_SCHEDULE_HINT = (
    "the scheduler's prediction_type must be what the network was trained for; an untrained "
    "network is no better than this."
)
