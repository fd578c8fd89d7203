"""ConceptTracer: keeps a trace of every training sample while a diffusion model is fine-tuned."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import model_helpers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from ctrak_lightning import methods
from ctrak_lightning.callbacks import averaging
from ctrak_lightning.callbacks.resuming import Memory
from ctrak_lightning.callbacks.settings import (
    Mode,
    OnError,
    TraceSettings,
    in_precision_of,
    is_dry_run,
    refuse_untraceable_steps,
    require_at_least_one,
    require_one_of,
)
from ctrak_lightning.callbacks.traced_run import TracedRun
from ctrak_lightning.capture.trial import Question
from ctrak_lightning.errors import ProcessLostError, TaskError
from ctrak_lightning.gradients import Attention, Projection
from ctrak_lightning.methods.method import Method
from ctrak_lightning.model.traced_model import Weights
from ctrak_lightning.store.files import TEMPORARY_SUFFIX
from ctrak_lightning.store.formats import RowDtype
from ctrak_lightning.tasks import DiffusersTask, DiffusionTask, Precision, resolve_task


class ConceptTracer(Callback):
    """Traces the training samples at checkpoints of a run, into a store that
    :class:`~ctrak_lightning.Attributor` reads afterwards.

    The samples are those of ``trace_dataloader()`` of the DataModule or module where it exists
    (augmentation off), else those that the training loader can draw, in the data set's order. Under
    DDP every process traces a share of them, into one folder that all must see. Training is not
    changed: the callback draws from random generators of its own, never calls ``backward()``, and
    restores every module's training flag. What trains is what requires grad and is in an optimizer;
    where that changes during a run (unfreezing, another adapter), traces end there, and
    ``on_error`` says what becomes of training.

    The store is opened by the first training batch, when whatever freezes or unfreezes weights as
    training starts has done so. Two samples are then traced on trial, as a capture will
    (``docs/attach.md``): what does not fit raises before the first step, and not at the first
    checkpoint.

    Args:
        dirpath: the store's folder.
        method: a :class:`~ctrak_lightning.methods.method.Method`, or the name of a preset in
            ``ctrak_lightning.methods``; by default ``"influence"``, in mode ``"inline"``
            ``"inline_trak"``.
        task: how the module is addressed, if it is no DiffusionTask itself: a
            :class:`~ctrak_lightning.DiffusersTask` with the names of its attributes. Samples of
            batches without ids are then numbered as in the data set.
        mode: ``"capture"`` traces all samples at a checkpoint, with passes through the network of
            its own, by any method. ``"inline"`` keeps the per-sample gradients that the training
            steps compute anyway, at the timesteps that they happened to draw, and seals the means
            at a checkpoint; see ``docs/inline.md`` for what it can and cannot do.
        weights: whose traces: ``"raw"``, of the weights that train, also where a weight-averaging
            callback of Lightning's has put their average into the module when training ends; or
            ``"ema"``, of that callback's average, at every checkpoint. The store says which, and
            holds these weights.
        every_n_epochs: trace at the end of every n-th epoch.
        every_n_train_steps: trace after every n-th optimizer step.
        at_end: trace when training ends, if that step has no trace yet.
        layers: name patterns of the denoiser's layers to trace; None traces all that train.
            diffusers' cross-attention alone, ``["*attn2*"]``, costs less and was about as good
            wherever it was measured (``recipes/benchmarks/search_by_concept.md``).
        rank: of the two-sided projection of each layer.
        dim: length of a trace; None keeps all projected values.
        batch_size: samples per forward pass; None takes the training loader's. Where memory runs
            out, half of them are taken from there on.
        dtype: of stored rows, ``"float32"``, ``"float16"`` or ``"int8"`` (a quarter of the size;
            the ranking keeps).
        thumbnails: store small images for reports.
        seed: of the projection and of the trajectories' noise.
        on_error: what becomes of training when a checkpoint cannot be traced: the disk is full, an
            image is broken, ``encode`` or the network raises, a gradient is not finite, memory runs
            out. ``"warn"``, the default: days of training are worth more than one checkpoint's
            traces, so training goes on as if the callback were not there; a warning names the first
            failure at once and all steps without a trace when training ends, and the next
            checkpoint is tried again. ``"raise"`` stops training with the error, where a gap in the
            record is worse than a lost run. What was sealed before stays either way. What does not
            fit when training starts always raises, and so does the loss of another process.
        loader: where the Trainer has several training loaders (a dict or list of them, a
            CombinedLoader), the name or the position of the one whose samples are traced.
        precision: in which the network is run for traces: ``"true"``, its own dtypes;
            ``"bf16-mixed"`` or ``"16-mixed"``, autocast; None, as the Trainer runs it. Projections
            and sums are float32 in each.
        attention: ``"fused"``, the kernels that training takes, or ``"math"``, the plain one, which
            needs far more memory and rounds alike whatever the batch and the device.

    Raises:
        MisconfigurationException: an argument out of range; a module that is no DiffusionTask; a
            sharded strategy; a folder that cannot be written, or that holds the traces of another
            run; what the trial found.
        StoreMismatchError: the folder holds the traces of another method, projection, model or data
            set.
        StoreError: a trace cannot be stored, under ``on_error="raise"``. (Other errors come as they
            are raised.)

    Warns:
        UserWarning: steps have no trace, under ``on_error="warn"``.
        ChangedWeightsWarning: the weights that are traced are not those that the last optimizer
            step has left.
        UntracedSampleWarning: training batches have samples that are not in the store.
        SlowParameterWarning: parameters of no known layer, such as DoRA's magnitudes, are traced by
            a pass per sample; in mode ``"inline"`` they are not traced (UntracedParameterWarning).

    Example::

        tracer = ConceptTracer("runs/x/traces", every_n_epochs=10)
        trainer = L.Trainer(max_epochs=30, callbacks=[tracer])
        trainer.fit(module, datamodule=data)
    """

    def __init__(
        self,
        dirpath: str,
        method: Method | str | None = None,
        *,
        task: DiffusersTask | DiffusionTask | None = None,
        mode: Mode = "capture",
        weights: Weights = "raw",
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        at_end: bool = True,
        layers: Sequence[str] | None = None,
        rank: int = 16,
        dim: int | None = 2048,
        batch_size: int | None = None,
        dtype: RowDtype = "float32",
        thumbnails: bool = True,
        seed: int = 0,
        on_error: OnError = "warn",
        loader: str | int | None = None,
        precision: Precision | None = None,
        attention: Attention = "fused",
    ) -> None:
        super().__init__()
        require_at_least_one("every_n_epochs", every_n_epochs)
        require_at_least_one("every_n_train_steps", every_n_train_steps)
        own_rule = type(self).should_trace is not ConceptTracer.should_trace
        if every_n_epochs is None and every_n_train_steps is None and not at_end and not own_rule:
            raise MisconfigurationException(
                "`ConceptTracer(at_end=False)` without every_n_epochs and every_n_train_steps "
                "would never trace. HINT: set one of the three, or override should_trace."
            )
        require_one_of(
            "ConceptTracer",
            "on_error",
            on_error,
            get_args(OnError),
            "'warn' lets training go on when a trace cannot be stored.",
        )
        if method is None:
            method = "inline_trak" if mode == "inline" else "influence"
        try:
            self.method = methods.by_name(method) if isinstance(method, str) else method
            self.projection = Projection(rank=rank, dim=dim, seed=seed)
        except ValueError as error:
            raise MisconfigurationException(f"`ConceptTracer`: {error}") from error
        self.dirpath, self.mode, self.task, self.loader = str(dirpath), mode, task, loader
        self.layers = None if layers is None else list(layers)
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.at_end, self.on_error, self.weights = at_end, on_error, weights
        self.batch_size, self.dtype, self.thumbnails, self.seed = (
            batch_size,
            dtype,
            thumbnails,
            seed,
        )
        self.precision, self.attention = precision, attention
        self._settings()  # refuses what does not go together
        self.questions: tuple[Question, ...] = ()
        """Those that are taken into the trial, by :meth:`add_to_trial`."""
        self._listeners: list[Callable[[L.Trainer], None]] = []
        self._run: TracedRun | None = None
        self._memory = Memory()
        self._untraced: dict[int, int] = {}  # step: epoch
        self.untraced_steps: list[int] = []
        """Steps of this run that have no trace because it could not be stored, known when training
        ends."""
        self.last_seconds = 0.0
        """What the last capture took, in seconds of wall time; in mode ``"inline"`` sealing
        alone."""
        self.trial_seconds = 0.0
        """What the trial before training took."""

    def when_sealed(self, listener: Callable[[L.Trainer], None]) -> None:
        """Calls ``listener(trainer)`` in every process after each checkpoint that is sealed from
        now on, whatever the order of the callbacks; the same listener is called once."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def add_to_trial(self, questions: Sequence[Question]) -> None:
        """Takes questions into the trial when training starts, in place of those named before."""
        self.questions = tuple(questions)

    def should_trace(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to trace now. Called with ``step_idx`` after an optimizer step (the count of
        steps done), and with ``epoch_idx`` at the end of an epoch (0-based). Override it for other
        rules."""
        if step_idx is not None:
            return self.every_n_train_steps is not None and step_idx % self.every_n_train_steps == 0
        if epoch_idx is not None:
            return self.every_n_epochs is not None and (epoch_idx + 1) % self.every_n_epochs == 0
        return False

    @property
    @override
    def state_key(self) -> str:
        """Of this tracer's part of a checkpoint, by its folder: a Trainer may have several."""
        return self._generate_state_key(dirpath=self.dirpath)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses, before anything is loaded, a strategy that shards layers, a module that is no
        DiffusionTask, and a folder that cannot be written."""
        if stage != "fit" or is_dry_run(trainer):
            return
        _refuse_sharding(trainer)
        # The same Trainer, with another `fit`.
        goes_on = trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0
        self._memory = replace(self._memory, is_resumed=False) if goes_on else Memory()
        # A module may build its networks in its own `setup` or `configure_model`, which come after
        # this.
        if not any(
            model_helpers.is_overridden(hook, pl_module) for hook in ("setup", "configure_model")
        ):
            self._task_of(pl_module)
        _refuse_unwritable(self.dirpath)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what the weights or the mode that were asked for cannot be traced with: by now
        the module has built its networks, and the Trainer has all of its callbacks."""
        if is_dry_run(trainer):
            return
        task = self._task_of(pl_module)
        if self.weights == "ema" and averaging.averaging_of(trainer) is None:
            raise MisconfigurationException(
                '`ConceptTracer(weights="ema")`: the Trainer has no weight-averaging callback. '
                f"HINT: attach one of {[kind.__name__ for kind in averaging.KINDS]}; an average "
                "that the module keeps itself is not known here."
            )
        if self.mode == "inline":
            refuse_untraceable_steps(trainer, pl_module, task.denoiser)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the lock of the folder, so that no other run writes to it while this one loads its
        data, and begins to count steps."""
        if not is_dry_run(trainer):
            self._untraced, self.untraced_steps = {}, []
            self._run = TracedRun(
                self._settings(),
                trainer,
                pl_module,
                in_precision_of(trainer, self._task_of(pl_module)),
                self._memory,
                callback=self,
                questions=self.questions,
                on_error=self.on_error,
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the store at the first batch, when all that freezes or loads weights as training
        starts has done so; notes the samples of every batch before the step can change it."""
        if self._run is not None:
            self._begin(self._run)
            self._run.begin_batch(batch)

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Inline, connects what the forward pass recorded with the loss; counts the batch for the
        next step."""
        if self._run is not None:
            self._run.before_backward(loss)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Inline, takes every sample's part of the gradients, before they are clipped or
        cleared."""
        if self._run is not None:
            self._run.after_backward()

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Traces where :meth:`should_trace` says so of an optimizer step; a micro-batch of an
        accumulation has none."""
        if self._run is not None:
            taken = self._run.end_batch()
            if any(self.should_trace(step_idx=step) for step in taken):
                self._trace(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Traces where :meth:`should_trace` says so of the epoch, and the last time before a
        StochasticWeightAveraging puts its average in the weights' place."""
        if not is_dry_run(trainer):
            is_last = self.at_end and averaging.is_last_of_raw(trainer)
            if self.should_trace(epoch_idx=trainer.current_epoch) or is_last:
                self._trace(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Traces the weights that training ends with, and warns of the steps that have no trace."""
        if not is_dry_run(trainer) and self.at_end:
            self._trace(trainer)
        self._warn_of_untraced()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lets others write to the folder at once: `teardown` is not called after every error."""
        if self._is_run_of(trainer):
            self._warn_of_untraced()
            self._close()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets others write to the folder, and takes all hooks off."""
        if self._is_run_of(trainer):
            self._close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know that the folder's store is its own, and to go on
        counting exposures."""
        return (self._memory if self._run is None else self._run.memory).state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint says of the store until the first batch, where it is compared
        with the folder's."""
        self._memory = Memory.from_state(state_dict)

    def _settings(self) -> TraceSettings:
        """The attributes as they are now, by which the store of a run is written."""
        return TraceSettings(**{one.name: getattr(self, one.name) for one in fields(TraceSettings)})

    def _is_run_of(self, trainer: L.Trainer) -> bool:
        """Whether it is the traced run's Trainer: another one may validate with the same callbacks
        meanwhile."""
        return self._run is not None and self._run.trainer is trainer

    def _close(self) -> None:
        if self._run is not None:
            self._memory = self._run.memory
            self._run.close()
            self._run = None

    def _begin(self, run: TracedRun) -> None:
        trial = run.begin()
        if trial is not None:
            self.trial_seconds = trial.seconds

    def _trace(self, trainer: L.Trainer) -> None:
        if self._run is None or averaging.has_replaced(trainer):
            return
        self._begin(self._run)
        step = self._run.steps.now
        # When training ends the epoch counts one more; a second attempt at a step goes on with the
        # first one's rows.
        epoch = self._untraced.get(step, trainer.current_epoch)
        try:
            seconds = self._run.seal(step, epoch)
        except ProcessLostError:  # nothing can go on
            raise
        except Exception as error:  # in all processes: see Processes.sharing_errors
            if self.on_error == "raise":
                raise
            self._note_untraced(step, trainer.current_epoch, error)
            return
        if seconds is None:
            return
        self.last_seconds = seconds
        self._untraced.pop(step, None)
        for listener in self._listeners:
            listener(trainer)

    def _note_untraced(self, step: int, epoch: int, error: Exception) -> None:
        if not self._untraced:
            rank_zero_warn(
                f"ConceptTracer(dirpath={self.dirpath!r}): step {step} has no trace: "
                f"{type(error).__name__}: {error} Training goes on, the next checkpoint is tried "
                "again, and a warning names all steps without a trace when training ends. HINT: "
                '`on_error="raise"` stops training instead.'
            )
        self._untraced.setdefault(step, epoch)

    def _warn_of_untraced(self) -> None:
        if self._run is not None and self._run.capture is not None:
            self._run.capture.exposures.warn_of_untraced()
        if self._untraced:
            rank_zero_warn(
                f"ConceptTracer(dirpath={self.dirpath!r}): steps {list(self._untraced)} have no "
                "trace, because they could not be traced or stored. The traces of the other steps "
                "are intact. HINT: scores will not know of these steps; resume from a checkpoint "
                "before them to make up for it."
            )
            self.untraced_steps, self._untraced = list(self._untraced), {}

    def _task_of(self, pl_module: L.LightningModule) -> DiffusionTask:
        try:
            return resolve_task(pl_module, self.task)
        except TaskError as error:
            raise MisconfigurationException(f"`ConceptTracer`: {error}") from error


def _refuse_sharding(trainer: L.Trainer) -> None:
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"`ConceptTracer` cannot trace under {type(trainer.strategy).__name__}: no process "
            "holds the whole of a layer. HINT: use DDP or a single device; LoRA makes most "
            "models fit."
        )


def _refuse_unwritable(dirpath: str) -> None:
    try:
        Path(dirpath).mkdir(parents=True, exist_ok=True)
        # Without a name where the system can: another run that begins now would take it for a file
        # of somebody else's.
        with tempfile.TemporaryFile(dir=dirpath, suffix=TEMPORARY_SUFFIX):
            pass
    except OSError as error:
        raise MisconfigurationException(
            f"`ConceptTracer(dirpath={dirpath!r})`: the folder cannot be written ({error}). HINT: "
            "name another folder, or change its permissions."
        ) from error
