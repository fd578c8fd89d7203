"""ConceptTracer: keeps a trace of every training sample while a diffusion model is fine-tuned."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from typing_extensions import override

from ctrak_lightning import methods
from ctrak_lightning.capture import Capture
from ctrak_lightning.errors import TaskError
from ctrak_lightning.gradients import GradientTracer, Projection
from ctrak_lightning.method import Method
from ctrak_lightning.task import resolve_task


class ConceptTracer(Callback):
    """Traces the training samples at checkpoints of a run, into a store that
    :class:`~ctrak_lightning.Attributor` reads afterwards.

    The samples are those of ``trace_dataloader()`` of the DataModule or module where it exists (augmentation off), else the
    training set in its own order. Training is not changed: the callback draws from random generators of its own, never
    calls ``backward()``, and restores every module's training flag. Weights are those being trained; at the end of
    training, after a weight-averaging callback that stands before this one, they are the averaged ones.

    Args:
        dirpath: the store's folder.
        method: a :class:`~ctrak_lightning.method.Method`, or the name of a preset in ``ctrak_lightning.methods``.
        every_n_epochs: trace at the end of every n-th epoch.
        every_n_train_steps: trace after every n-th optimizer step.
        at_end: trace when training ends, if that step has no trace yet.
        layers: name patterns (``"*attn2*"``) of the denoiser's layers to trace; None traces all that train.
        rank: of the two-sided projection of each layer.
        dim: length of a trace; None keeps all projected values.
        batch_size: samples per forward pass; None takes the training loader's.
        dtype: of stored rows, ``"float32"``, ``"float16"`` or ``"int8"`` (a quarter of the size; the ranking keeps).
        thumbnails: store small images for reports.
        seed: of the projection and of the trajectories' noise.

    Raises:
        MisconfigurationException: an argument out of range; a module that is no DiffusionTask; a sharded strategy; a folder
            that cannot be written, or that holds the traces of another run.

    Example::

        tracer = ConceptTracer("runs/x/traces", every_n_epochs=10)
        trainer = L.Trainer(max_epochs=30, callbacks=[tracer])
        trainer.fit(module, datamodule=data)
    """

    def __init__(
        self,
        dirpath: str,
        method: Method | str = "concept_trak",
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        at_end: bool = True,
        layers: Sequence[str] | None = None,
        rank: int = 16,
        dim: int | None = 2048,
        batch_size: int | None = None,
        dtype: Literal["float32", "float16", "int8"] = "float32",
        thumbnails: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "every_n_epochs": every_n_epochs,
            "every_n_train_steps": every_n_train_steps,
            "batch_size": batch_size,
        }.items():
            if value is not None and value < 1:
                raise MisconfigurationException(
                    f"`ConceptTracer({name}={value})`: expected an integer >= 1, or None. HINT: leave it out to switch it off."
                )
        own_rule = type(self).should_trace is not ConceptTracer.should_trace
        if every_n_epochs is None and every_n_train_steps is None and not at_end and not own_rule:
            raise MisconfigurationException(
                "`ConceptTracer(at_end=False)` without every_n_epochs and every_n_train_steps would never trace. "
                "HINT: set one of the three, or override should_trace."
            )
        try:
            self.method = methods.by_name(method) if isinstance(method, str) else method
            self.projection = Projection(rank=rank, dim=dim, seed=seed)
        except ValueError as error:
            raise MisconfigurationException(f"`ConceptTracer`: {error}") from error
        self.dirpath = str(dirpath)
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.at_end = at_end
        self.layers = None if layers is None else list(layers)
        self.batch_size = batch_size
        self.dtype = dtype
        self.thumbnails = thumbnails
        self.seed = seed
        self._capture: Capture | None = None
        self._last_step = 0
        self._run_id: str | None = None
        self._resumed = False

    def should_trace(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to trace now. Called with ``step_idx`` after an optimizer step (the count of steps done), and with
        ``epoch_idx`` at the end of an epoch (0-based). Override it for other rules."""
        if step_idx is not None:
            return self.every_n_train_steps is not None and step_idx % self.every_n_train_steps == 0
        if epoch_idx is not None:
            return self.every_n_epochs is not None and (epoch_idx + 1) % self.every_n_epochs == 0
        return False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(dirpath=self.dirpath)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or _skipped(trainer):
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"`ConceptTracer` cannot trace under {type(trainer.strategy).__name__}: no process holds the whole of a "
                "layer. HINT: use DDP or a single device; LoRA makes most models fit."
            )
        try:
            resolve_task(pl_module)
        except TaskError as error:
            raise MisconfigurationException(f"`ConceptTracer`: {error}") from error
        _check_writable(self.dirpath)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _skipped(trainer):
            return
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            self._capture = self._open(trainer, pl_module)
        trainer.strategy.barrier("ConceptTracer.on_train_start")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Under gradient accumulation this hook fires per micro-batch; only a finished optimizer step counts.
        if _skipped(trainer) or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.should_trace(step_idx=trainer.global_step):
            self._trace(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _skipped(trainer) and self.should_trace(epoch_idx=trainer.current_epoch):
            self._trace(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _skipped(trainer) and self.at_end:
            self._trace(trainer)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._capture = None

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._capture = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run_id}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run_id = state_dict["run_id"]
        self._resumed = True

    def _trace(self, trainer: L.Trainer) -> None:
        if self._capture is not None and trainer.global_step not in self._capture.writer.sealed_steps:
            optimizers = trainer.optimizers
            learning_rate = float(optimizers[0].param_groups[0]["lr"]) if optimizers else None
            self._capture.run(trainer.global_step, epoch=trainer.current_epoch, learning_rate=learning_rate)
        trainer.strategy.barrier("ConceptTracer.trace")

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Capture:
        task = resolve_task(pl_module)
        capture = Capture(
            self.dirpath,
            pl_module,
            task,
            self._trace_batches(trainer, pl_module),
            method=self.method,
            tracer=GradientTracer(task.denoiser, self.projection, layers=self.layers),
            seed=self.seed,
            dtype=self.dtype,
            thumbnails=self.thumbnails,
            device=pl_module.device,
            progress=trainer.progress_bar_callback is not None,
        )
        self._reconcile(capture, trainer.global_step)
        self._run_id = capture.writer.run_id
        return capture

    def _reconcile(self, capture: Capture, step: int) -> None:
        """Makes the store describe the run that goes on from ``step``, and nothing else."""
        writer = capture.writer
        if self._resumed and self._run_id not in (None, writer.run_id):
            rank_zero_warn(
                f"ConceptTracer(dirpath={self.dirpath!r}): the checkpoint was made with store {self._run_id}, the folder "
                f"holds store {writer.run_id}. Traces of steps before {step} may be missing."
            )
        later = [sealed for sealed in writer.sealed_steps if sealed > step]
        if later and not self._resumed:
            raise MisconfigurationException(
                f"`ConceptTracer(dirpath={self.dirpath!r})`: the folder holds traces of steps {later} of an earlier run, and "
                f"this run starts at step {step}. Nothing was changed. HINT: name a new folder, resume with "
                "`trainer.fit(ckpt_path=...)`, or delete the folder."
            )
        if later:
            rank_zero_warn(
                f"ConceptTracer(dirpath={self.dirpath!r}): training resumes at step {step}; the traces of steps {later}, made "
                "after that checkpoint, are removed and will be made again."
            )
            writer.discard_after(step)

    def _trace_batches(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        owners: tuple[Any, ...] = (getattr(trainer, "datamodule", None), pl_module)
        for owner in owners:
            if owner is not None and hasattr(owner, "trace_dataloader"):
                return owner.trace_dataloader()
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                f"`ConceptTracer`: the training data is {type(loader).__name__}, expected one DataLoader. HINT: define "
                "`trace_dataloader()` on the DataModule or module: the samples to trace, in a fixed order."
            )
        return DataLoader(
            loader.dataset, batch_size=self.batch_size or loader.batch_size or 1, collate_fn=loader.collate_fn
        )


def _skipped(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _check_writable(dirpath: str) -> None:
    folder = Path(dirpath)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MisconfigurationException(
            f"`ConceptTracer(dirpath={dirpath!r})`: the folder cannot be written ({error}). HINT: name another folder, or "
            "change its permissions."
        ) from error
