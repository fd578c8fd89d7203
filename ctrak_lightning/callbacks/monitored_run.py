"""One run of a Trainer while it is monitored: what a ConceptMonitor asks and writes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ctrak_lightning.attribution import Concept
from ctrak_lightning.attribution.concept import check_known
from ctrak_lightning.callbacks.concept_tracer import ConceptTracer
from ctrak_lightning.callbacks.settings import OnError, in_precision_of
from ctrak_lightning.capture.trial import Question, conditions_of
from ctrak_lightning.errors import TaskError, TrialError, listed, visible
from ctrak_lightning.gradients import undisturbed
from ctrak_lightning.methods.trajectories import Generated, Sampler
from ctrak_lightning.panels import Answer, Board, Watch
from ctrak_lightning.panels.tags import method_hparams, write_hparams
from ctrak_lightning.schedules import Schedule
from ctrak_lightning.store import TraceStore
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.samples import column_names
from ctrak_lightning.tasks import resolve_task, task_modules
from ctrak_lightning.utilities.rng import isolated_rng

DEFAULT_GROUP = "owner"


class MonitoredRun:
    """Asks about concepts at every checkpoint that a tracer seals, and writes the answers to the
    Trainer's TensorBoardLogger; nothing, where it has none."""

    def __init__(
        self,
        trainer: L.Trainer,
        tracer: ConceptTracer,
        concepts: Sequence[Concept],
        *,
        group: str | None,
        seed: int,
        top: int,
        bottom: int,
        sampler: Sampler | None,
        on_error: OnError,
    ) -> None:
        self.tracer = tracer
        self._trainer, self._concepts = trainer, concepts
        self._group, self._seed, self._top, self._bottom = group, seed, top, bottom
        self._sampler, self._on_error = sampler or Sampler(), on_error
        self._watch = Watch(concepts, seed=seed, sampler=sampler)
        self._logger: TensorBoardLogger | None = None
        self._board: Board | None = None
        self._store: TraceStore | None = None
        self._answers: list[Answer] = []
        self._failed: list[int] = []
        self._is_group_checked = False
        self._started, self._axis = 0.0, 0
        self._spent = {"tracer": 0.0, "monitor": 0.0}

    def prepare(self, pl_module: L.LightningModule) -> None:
        """Refuses what cannot be asked, has the tracer try the questions, and writes the
        hyperparameters.

        Raises:
            MisconfigurationException: the module is no DiffusionTask, a concept is not known, or a
                generation has too few states.
        """
        try:
            task = resolve_task(pl_module, self.tracer.task)
            for concept in self._concepts:
                check_known(concept, task)
            self._check_sampler(task.noise_schedule)
        except (TaskError, ValueError) as error:
            raise MisconfigurationException(f"`ConceptMonitor`: {error}") from error
        self.tracer.add_to_trial(self._questions())
        loggers = self._trainer.loggers
        self._logger = next((one for one in loggers if isinstance(one, TensorBoardLogger)), None)
        if self._logger is None:
            _warn_of_no_logger(self._trainer)
        # Lightning's own hyperparameters, which it logs next, come with a metric that would be the
        # only one; see write_hparams.
        elif _logs_a_metric_itself(self._logger):
            self._write_hparams(self._logger)

    def begin(self, pl_module: L.LightningModule) -> None:
        """Makes the conditions of all questions once: also where the tracer has no trial, for the
        concepts may be others than those of the run that is resumed.

        Raises:
            MisconfigurationException: a condition cannot be made.
        """
        self._started = time.monotonic()
        self._axis = max(0, self._steps_logged() - 1)
        task = in_precision_of(self._trainer, resolve_task(pl_module, self.tracer.task))
        try:
            with isolated_rng(self._seed), undisturbed(pl_module, *task_modules(task)):
                for question in self._questions():
                    conditions_of(task, question)
        except TrialError as error:
            raise MisconfigurationException(f"`ConceptMonitor`: {error}") from error

    def begin_batch(self) -> None:
        """Notes where on the x axis the step is; looks once for the group's column.

        Raises:
            MisconfigurationException: the samples have other columns.
        """
        self._axis = self._steps_logged()
        if not self._is_group_checked:
            self._is_group_checked = True
            self._check_group()

    def end(self) -> None:
        """What is written of the whole run; warns of the steps without panels."""
        if self._board is not None and self._store is not None:
            with self._guarded(self._store.checkpoints[-1].step):
                self._board.write_projector(self._answers, self._store, self._axis)
        if self._logger is not None and not _logs_a_metric_itself(self._logger):
            self._write_hparams(self._logger)
        self.warn_of_failures()

    def warn_of_failures(self) -> None:
        """Warns of the steps without panels, if there are several: the first had its own."""
        if len(self._failed) > 1:
            rank_zero_warn(
                f"ConceptMonitor: the panels of steps {self._failed} are missing or incomplete."
            )
        self._failed = []

    def ask(self) -> None:
        """Asks about all concepts, with the weights of the checkpoint that has just been sealed,
        and writes their panels; all processes call it, and the first one does so."""
        trainer = self._trainer
        if self._logger is None or not trainer.is_global_zero:
            return
        begun = time.monotonic()
        self._spent["tracer"] += self.tracer.last_seconds
        with self._guarded(trainer.global_step):
            if self._board is None:
                limits = {"top": self._top, "bottom": self._bottom}
                writer = self._logger.experiment
                self._board = Board(writer, self._concepts, group=self._group, **limits)
                self._board.write_layout()
            self._store, self._answers = self._watch.ask(
                self.tracer.dirpath,
                trainer.lightning_module,
                self.tracer.task,
                self.tracer.method,
            )
            self._board.write(self._answers, self._store.checkpoints[-1], self._axis)
            seconds = {"tracer": self.tracer.last_seconds, "monitor": time.monotonic() - begun}
            self._spent["monitor"] += seconds["monitor"]
            whole = time.monotonic() - self._started
            shares = {name: spent / whole for name, spent in self._spent.items()}
            self._board.write_cost(seconds, shares, self._axis)

    def _questions(self) -> list[Question]:
        is_guided = self._sampler.guidance != 1.0
        asked = [one.isolated() if one.image is None else one for one in self._concepts]
        return [Question(one.name, one.present, one.absent, is_guided) for one in asked]

    def _check_sampler(self, schedule: Schedule) -> None:
        trajectory, sampler = self.tracer.method.query_trajectory, self._sampler
        usable = sum(schedule.level(t)[0] > 0 for t in schedule.sampling_timesteps(sampler.steps))
        if isinstance(trajectory, Generated) and usable < (trajectory.timesteps or 1):
            raise ValueError(
                f"{sampler}: the method looks at {trajectory.timesteps} states of a generation, "
                f"which has {usable}. HINT: "
                f"sampler=Sampler(steps={(trajectory.timesteps or 1) + 1}) or more."
            )

    def _check_group(self) -> None:
        root, group = Path(self.tracer.dirpath), self._group
        if group is None:
            return
        known = column_names(root / read_manifest(root).samples)
        if group in known:
            return
        self._group = None
        problem = (
            f"ConceptMonitor(group={group!r}): the samples have no such metadata column. They "
            f"have: {listed(known, len(known), visible) or 'none'}."
        )
        if known and group != DEFAULT_GROUP:
            raise MisconfigurationException(f"{problem} HINT: name one of these, or group=None.")
        rank_zero_warn(
            f"{problem} No shares are shown. HINT: `encode(batch)` gives columns with "
            "Encoded(..., metadata={...}); group=None for none."
        )

    def _write_hparams(self, logger: TensorBoardLogger) -> None:
        if not self._trainer.is_global_zero:
            return
        with self._guarded(self._trainer.global_step):
            tracer = self.tracer
            own = method_hparams(tracer.method, tracer.projection, tracer.layers)
            modules = _logged_hparams(self._trainer)
            metrics = Board(logger.experiment, self._concepts, group=None).metrics
            if modules and _logs_a_metric_itself(logger):
                metrics = ["hp_metric", *metrics]
            write_hparams(logger.experiment, modules | own, metrics)

    @contextmanager
    def _guarded(self, step: int) -> Iterator[None]:
        """What fails inside costs the panels of ``step``, and not the training."""
        try:
            yield
        except Exception as error:
            if self._on_error == "raise":
                raise
            if not self._failed:
                rank_zero_warn(
                    f"ConceptMonitor: the panels of step {step} are missing or incomplete: "
                    f"{type(error).__name__}: {error} Training and tracing go on, and the next "
                    'checkpoint is tried again. HINT: `on_error="raise"` stops with the error.'
                )
            self._failed.append(step)

    def _steps_logged(self) -> int:
        # What Lightning puts on the x axis of `self.log`; its own monitors (LearningRateMonitor)
        # read it so.
        return int(self._trainer.fit_loop.epoch_loop._batches_that_stepped)


def _logged_hparams(trainer: L.Trainer) -> dict[str, Any]:
    """What the module and the DataModule saved with ``save_hyperparameters()``, flat, as
    Lightning's loggers write it."""
    found: dict[str, Any] = {}
    if not getattr(trainer, "enable_autolog_hparams", True):
        return found
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        if owner is not None and getattr(owner, "_log_hyperparams", False):
            found |= dict(owner.hparams_initial)
    for name in ("_class_path", "_instantiator"):
        found.pop(name, None)
    return _sanitize_params(_flatten_dict(found))


def _logs_a_metric_itself(logger: TensorBoardLogger) -> bool:
    """Whether the logger writes a summary of hyperparameters when training starts, after which
    TensorBoard takes no other."""
    return bool(getattr(logger, "_default_hp_metric", True))


def _warn_of_no_logger(trainer: L.Trainer) -> None:
    found = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
    hint = "Trainer(logger=TensorBoardLogger(save_dir))."
    if find_spec("tensorboard") is None:
        hint = "the package tensorboard is not installed: `pip install tensorboard`, then " + hint
    rank_zero_warn(
        f"ConceptMonitor: no TensorBoardLogger to write to; the Trainer's loggers: {found}. "
        f"Training and tracing go on without the monitor. HINT: {hint}"
    )
