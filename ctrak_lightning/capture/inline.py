"""Traces from the training steps themselves: no forward or backward pass of their own. For
callbacks and raw loops."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.capture.running_means import RunningTraces
from ctrak_lightning.capture.trace import normalised
from ctrak_lightning.capture.trial import ZeroGradientWarning
from ctrak_lightning.errors import GradientError, listed
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import InTraining
from ctrak_lightning.store import TraceStore
from ctrak_lightning.tasks import encode, named_samples
from ctrak_lightning.utilities.rng import isolated_rng

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma")
STEPS_AT_ONCE = 16
"""Training steps between two copies to the CPU, each of which waits for a GPU."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What one training step gave: features [B, k], loss [] and timesteps [B] on the network's
    device."""

    step: int
    positions: Tensor
    features: Tensor
    loss: Tensor
    timesteps: Tensor
    skip_not_finite: bool


class InlineCapture(Capture):
    """Keeps every sample's share of the training steps' own gradients, and seals them into a
    checkpoint when asked.

    A sample's row of one step is ``B * d loss / d theta`` over what the network did with that
    sample, for a loss that is a mean over a batch of B: the gradient of the sample's own loss,
    whatever B is. (Under a loss that is a sum it is B times too long, which normalised rows do not
    notice.) Rows are normalised as the method says and averaged over the steps since the last
    checkpoint that saw the sample; see
    :class:`~ctrak_lightning.capture.running_means.RunningTraces` for samples that none saw.
    Samples of a training batch that are not among ``batches`` are passed over.

    A raw loop calls, for every batch, :meth:`begin_step`, then its forward pass,
    :meth:`before_backward`, ``loss.backward()`` and :meth:`after_backward`; and :meth:`run` where a
    checkpoint is due.

    Raises:
        GradientError: the method's traces are not
            :class:`~ctrak_lightning.methods.trajectories.InTraining`; as :class:`Capture`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        method: Method = kwargs["method"]
        if not isinstance(method.training_trajectory, InTraining):
            raise GradientError(
                f"InlineCapture(method={method.name!r}): its traces are on "
                f"{method.training_trajectory}, expected InTraining(). HINT: methods.inline_trak()."
            )
        super().__init__(*args, **kwargs)
        self._recorder = self.tracer.step_recorder()
        self._running = RunningTraces(self.sample_ids, self.tracer.dim)
        self._index = {sample_id: i for i, sample_id in enumerate(self.sample_ids)}
        self._handle: RemovableHandle | None = None
        self._begun: tuple[Any, list[str]] = None, []
        self._positions = torch.empty(0, dtype=torch.int64)
        self._timesteps: list[Tensor] = []
        self._loss = torch.empty(0)
        self._pending: list[_Step] = []
        self._is_forward = False
        self._is_checked = False
        self._is_following = False
        self._problem: GradientError | None = None
        self.steps_followed = 0
        """Training steps that were followed to their end."""

    def attach(self) -> None:
        """Puts the hooks on the denoiser and goes on from the last sealed checkpoint, if there is
        one."""
        self._recorder.attach()
        if self._handle is None:
            self._handle = self.task.denoiser.register_forward_pre_hook(
                self._note_call, with_kwargs=True
            )
        if self.writer.sealed_steps:
            last = TraceStore(self.writer.path).checkpoints[-1]
            visits = last.visits()
            if visits is not None:
                self._running.continue_from(last.features(), last.losses(), visits)

    def detach(self) -> None:
        """Takes the hooks off; idempotent."""
        self._recorder.detach()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def begin_step(self, batch: Any) -> None:
        """Before the forward pass of a training batch, which is on its device.

        Raises:
            BatchError: the batch lacks a field that its sample ids need.
        """
        ids = self._sample_ids(batch)
        self._begun = batch, ids
        self._positions = torch.tensor([self._index.get(sample_id, -1) for sample_id in ids])
        self._timesteps = []
        self._problem = None
        self._is_forward = self._is_following = True
        self._recorder.begin(len(ids))

    def drop_step(self) -> None:
        """Forgets the training step that is under way; the next one is followed again."""
        self._is_forward = self._is_following = False
        self._recorder.drop()

    def before_backward(self, loss: Tensor) -> None:
        """Between the forward and the backward pass; ``loss`` is the scalar that the latter starts
        from.

        Raises:
            GradientError: the step cannot be traced: it called the denoiser not once, or a layer
                without a graph.
        """
        if not self._is_following:
            return
        self._is_forward = False
        if self._problem is not None:
            raise self._problem
        if len(self._timesteps) != 1:
            raise GradientError(
                f"The training step called the denoiser {len(self._timesteps)} times with "
                'gradients, expected once. HINT: mode="capture" traces any training step; calls '
                "under `torch.no_grad()` do not count."
            )
        # Walking the graph costs a few per cent of a step; a step's graph does not change from one
        # batch to the next.
        self._recorder.before_backward(loss, check=not self._is_checked)
        self._is_checked = True
        self._loss = loss.detach()

    def after_backward(
        self, *, step: int, loss_scale: float = 1.0, skip_not_finite: bool = False
    ) -> None:
        """After the backward pass of a batch.

        Args:
            step: optimizer steps taken before it.
            loss_scale: what the loss was multiplied with beyond the mean over its batch, by a
                GradScaler or for accumulation.
            skip_not_finite: pass over samples whose gradient is not finite, as a GradScaler passes
                over its steps.

        Raises:
            GradientError: no gradient came; or, within STEPS_AT_ONCE steps, a sample's is not
                finite: names the samples.
        """
        if not self._is_following:
            return
        self._is_following = False
        # [B, P]; the loss is a mean over the batch, a trace is of a sample's own loss.
        rows = self._recorder.rows() * (len(self._positions) / loss_scale)
        features = normalised(rows, self.tracer, self.method.normalisation)  # [B, k]
        self._pending.append(
            _Step(
                step,
                self._positions,
                features,
                self._loss / loss_scale,
                self._timesteps.pop(),
                skip_not_finite,
            )
        )
        self.steps_followed += 1
        if len(self._pending) >= STEPS_AT_ONCE:
            self._take_in()

    @override
    def run(self, step: int, *, epoch: int, learning_rate: float | None = None) -> None:
        """Seals what the training steps so far gave, beside the present weights.

        Raises:
            StoreError: some samples have been in no training step yet, and it is not known
                (:meth:`note_step`) that nothing was trained on them; names them.
            GradientError: all samples' gradients are zero.

        Warns:
            ZeroGradientWarning: those of some samples are.
        """
        self._take_in()
        self.exposures.compare(~self._running.zeros())
        exposures = self.exposures.counts()
        visits = self._running.visits()
        if exposures is not None and not exposures.any():
            raise GradientError(
                f"Step {step}: the gradients of all samples are zero, for no loss so far depended on "
                "one of them: expected training steps that teach something. HINT: look at the "
                "loss's weights and masks; `every_n_epochs` waits until they are there."
            )
        if exposures is not None:  # steps whose loss did not depend on a sample are no visit to it
            visits = visits.without(exposures == 0)
        self._running.require_all(exposures)
        zeros = self._has_zeros(step, exposures)
        checkpoint = self.writer.begin_checkpoint(
            step,
            epoch=epoch,
            learning_rate=learning_rate,
            exposures=exposures,
            **self._model.state(),
        )
        with checkpoint:
            self._model.write_function(checkpoint)
            checkpoint.write_visits(visits)
            for indices in torch.arange(len(self.sample_ids))[checkpoint.rows_done :].split(1024):
                checkpoint.append(indices, *self._running.means(indices), zeros=zeros)
            checkpoint.seal()
        self._running.begin_window()
        self._is_checked = False

    def _has_zeros(self, step: int, exposures: Tensor | None) -> bool:
        """Whether the gradients of some samples that were trained on, not of all, are zero."""
        is_zero = self._running.zeros()
        trained = torch.ones_like(is_zero) if exposures is None else exposures > 0
        zeros = (is_zero & trained).nonzero().flatten().tolist()
        if not zeros or len(zeros) == int(trained.sum()):
            return False
        warnings.warn(
            f"Checkpoint {step}: the gradients of {len(zeros)} samples that were trained on are zero "
            f"({listed(self.sample_ids[i] for i in zeros)}), so they score 0 there. It is so where "
            "the loss leaves samples out, such as by a weight of 0. HINT: if it should not, look at "
            "these samples and at the precision of the forward pass.",
            ZeroGradientWarning,
            stacklevel=3,
        )
        return True

    @override
    def training_ids(self, batch: Any) -> list[str]:
        """As of :class:`Capture`; of the batch of the present step, those that its rows go by."""
        begun, ids = self._begun
        return ids if batch is begun else self._sample_ids(batch)

    def _take_in(self) -> None:
        """Adds the steps that are still on the device; not after every step, since a GPU must be
        waited for."""
        pending, self._pending = self._pending, []
        first: tuple[int, list[int]] | None = None
        for one in pending:
            features = one.features.cpu()  # [B, k]
            # -1 stands for a sample of the training batch that is not traced.
            usable, finite = one.positions >= 0, features.isfinite().all(1)
            lost = one.positions[usable & ~finite].tolist()
            if lost and not one.skip_not_finite:
                first = first or (one.step, lost)
            usable &= finite
            self._running.add(
                one.positions[usable],
                features[usable],
                loss=float(one.loss),
                timesteps=one.timesteps.float().cpu()[usable],
                step=one.step,
            )
        if first is not None:
            step, lost = first
            raise GradientError(
                f"The training step after {step} optimizer steps gave {len(lost)} samples "
                "gradients that are not finite, for example "
                f"{[self.sample_ids[i] for i in lost[:5]]}. HINT: look at these samples and at the "
                "loss of the run."
            )

    def _sample_ids(self, batch: Any) -> list[str]:
        ids = named_samples(self.task, batch)
        if ids is not None:
            return ids
        # `encode` may sample, and may hold layers that training changes: neither must reach the
        # training step.
        with isolated_rng(self.seed), self._tracing():
            return encode(self.task, batch).sample_ids

    def _note_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if not self._is_forward or not torch.is_grad_enabled() or self._problem is not None:
            return
        try:
            self._timesteps.append(self._timesteps_of(module, args, kwargs))
        except GradientError as error:  # raised where the training step has left the network
            self._problem = error

    def _timesteps_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        batch_size = len(self._positions)
        x_t = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x_t, Tensor) or len(x_t) != batch_size:
            given = f"{len(x_t)} rows" if isinstance(x_t, Tensor) else type(x_t).__name__
            raise GradientError(
                f"The training step gave the denoiser {given} for a batch of {batch_size} samples, "
                'expected a row for each, in their order. HINT: mode="capture" traces any '
                "training step."
            )
        return _timesteps(module, args, kwargs, batch_size)


def _timesteps(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch_size: int
) -> Tensor:
    """The timesteps of a denoiser's call, as [B]: the argument with a timestep's name, else the
    second one."""
    try:
        named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        named = {}
    named = {**named, **kwargs}
    candidates = [named[name] for name in TIMESTEP_NAMES if name in named] + list(args[1:2])
    t = torch.as_tensor(candidates[0]).detach().flatten() if candidates else torch.empty(0)
    if len(t) not in (1, batch_size):
        raise GradientError(
            f"The denoiser's call has {len(t)} timesteps for {batch_size} samples, expected one, "
            f"or one for each. HINT: name the denoiser's argument one of {TIMESTEP_NAMES}, or make "
            "it the second."
        )
    return t.expand(batch_size).clone()
