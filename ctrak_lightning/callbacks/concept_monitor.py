"""ConceptMonitor: shows in TensorBoard, while a model is fine-tuned, what it learns from whom."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ctrak_lightning.attribution import Concept
from ctrak_lightning.attribution.concept import check_known
from ctrak_lightning.callbacks.concept_tracer import ConceptTracer
from ctrak_lightning.callbacks.settings import in_precision_of
from ctrak_lightning.capture.trial import Question, conditions_of
from ctrak_lightning.errors import ConceptError, TaskError, TrialError, visible
from ctrak_lightning.gradients import undisturbed
from ctrak_lightning.methods.trajectories import Generated, Sampler, Trajectory
from ctrak_lightning.panels import Answer, Board, Watch
from ctrak_lightning.panels.tags import method_hparams, write_hparams
from ctrak_lightning.schedules import Schedule
from ctrak_lightning.store import TraceStore
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.samples import column_names
from ctrak_lightning.tasks import resolve_task, task_modules
from ctrak_lightning.utilities.rng import isolated_rng


def logged_hparams(trainer: L.Trainer) -> dict[str, Any]:
    """What the module and the DataModule saved with ``save_hyperparameters()``, flat, as
    Lightning's loggers write it."""
    found: dict[str, Any] = {}
    if not getattr(trainer, "enable_autolog_hparams", True):
        return found
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        if owner is not None and getattr(owner, "_log_hyperparams", False):
            found |= dict(owner.hparams_initial)
    found = {
        name: value for name, value in found.items() if name not in ("_class_path", "_instantiator")
    }
    return _sanitize_params(_flatten_dict(found))


def logs_a_metric_itself(logger: TensorBoardLogger) -> bool:
    """Whether the logger writes a summary of hyperparameters when training starts, after which
    TensorBoard takes no other."""
    return bool(getattr(logger, "_default_hp_metric", True))


OnError = Literal["raise", "warn"]
DEFAULT_GROUP = "owner"


@dataclass
class _Run:
    """What the monitor knows of the run that it is attached to."""

    tracer: ConceptTracer
    group: str | None
    logger: TensorBoardLogger | None = None
    board: Board | None = None
    store: TraceStore | None = None
    answers: list[Answer] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    is_group_checked: bool = False
    started: float = 0.0
    axis: int = 0
    spent: dict[str, float] = field(default_factory=lambda: {"tracer": 0.0, "monitor": 0.0})


class ConceptMonitor(Callback):
    """Generates a few concepts at every checkpoint that a :class:`ConceptTracer` of the same
    Trainer seals, asks the traces so far who taught them, and writes the answers to the run's
    TensorBoard, under ``ctrak/``.

    Per concept an image (the generated picture, its proponents and opponents), a table, a histogram
    of the scores and curves (the owners' shares, the concept's strength, the effective number of
    contributors); of the run, the norms of the traces and what tracing and monitoring cost; a
    layout for the Custom Scalars dashboard; the method as hyperparameters; and at the end of
    training the traces as points in the Projector. See ``docs/tensorboard.md``.

    The tracer calls the monitor as soon as a checkpoint is sealed, so their order in the list of
    callbacks does not matter. The weights are the sealed ones, the x axis is that of what the
    module itself logs in that step. Training is not changed: random state, weights and the modules'
    flags are afterwards what they were. Under several processes the first one alone does the work,
    and the others wait for it at their next training step.

    Args:
        concepts: what to watch: :class:`~ctrak_lightning.Concept`, or dictionaries of its
            arguments.
        group: the metadata column whose values share a concept out; None for no shares.
        seed: of the generated images, the same at every checkpoint.
        top: proponents to show.
        bottom: opponents to show.
        sampler: how images are generated; by default 25 steps with a guidance of 2.
        dirpath: of the tracer to follow, where the Trainer has several.
        on_error: what becomes of training when a panel cannot be made: ``"warn"`` goes on and tells
            of the first failure at once and of all steps without panels at the end; ``"raise"``
            stops.

    Raises:
        MisconfigurationException: an argument out of range; no ConceptTracer to follow, or several;
            at the start of training, a concept that the model does not know, or a group that is no
            column of the samples (the message lists them).

    Warns:
        UserWarning: there is no TensorBoardLogger, and so nothing to write to; the samples have no
            column of owners; the ranking of a concept says nothing; panels are missing. Each is
            told once.

    Example::

        tracer = ConceptTracer("runs/x/traces", every_n_epochs=10)
        owl = Concept("owl", present={"object": "owl", "artist": "noto"}, absent={"artist": "noto"})
        logger = TensorBoardLogger("runs/x")
        callbacks = [tracer, ConceptMonitor([owl])]
        trainer = L.Trainer(max_epochs=30, logger=logger, callbacks=callbacks)
        trainer.fit(module, datamodule=data)
    """

    def __init__(
        self,
        concepts: Sequence[Concept | dict[str, Any]],
        group: str | None = DEFAULT_GROUP,
        *,
        seed: int = 0,
        top: int = 8,
        bottom: int = 4,
        sampler: Sampler | None = None,
        dirpath: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__()
        self.concepts = [_concept(given) for given in concepts]
        if not self.concepts:
            raise MisconfigurationException(
                "`ConceptMonitor(concepts=[])`: expected at least one concept. HINT: "
                "Concept(name, present=..., absent=...)."
            )
        for name, value, least in (("top", top, 1), ("bottom", bottom, 0)):
            if value < least:
                raise MisconfigurationException(
                    f"`ConceptMonitor({name}={value})`: expected an integer >= {least}. HINT: the "
                    "defaults are 8 and 4."
                )
        if on_error not in get_args(OnError):
            raise MisconfigurationException(
                f"`ConceptMonitor(on_error={on_error!r})`: expected one of {get_args(OnError)}. "
                "HINT: 'warn' lets training go on without the panels."
            )
        self.group, self.seed, self.top, self.bottom = group, seed, top, bottom
        self.sampler = sampler
        self.dirpath = dirpath
        self.on_error = on_error
        self._watch = Watch(self.concepts, seed=seed, sampler=sampler)
        self._run: _Run | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or _skipped(trainer):
            return
        self._run = _Run(self._followed(trainer), self.group)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run is None:
            return
        try:
            task = resolve_task(pl_module, self._run.tracer.task)
            for concept in self.concepts:
                check_known(concept, task)
            self._check_sampler(self._run.tracer.method.query_trajectory, task.noise_schedule)
        except (TaskError, ValueError) as error:
            raise MisconfigurationException(f"`ConceptMonitor`: {error}") from error
        self._run.tracer.add_to_trial(self._questions())
        self._run.logger = logger = _logger(trainer)
        if logger is None:
            _tell_nowhere_to_write(trainer)
        # Lightning's own hyperparameters, which it logs next, come with a metric that would be the
        # only one; see write_hparams.
        elif logs_a_metric_itself(logger):
            self._write_hparams(self._run, trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run is not None:
            self._run.started = time.monotonic()
            self._run.axis = max(0, _steps_logged(trainer) - 1)
            self._run.tracer.when_sealed(self._on_sealed)
            # Also where the tracer has no trial: the concepts may be others than those of the run
            # that is resumed.
            task = in_precision_of(trainer, resolve_task(pl_module, self._run.tracer.task))
            try:
                with isolated_rng(self.seed), undisturbed(pl_module, *task_modules(task)):
                    for question in self._questions():
                        conditions_of(task, question)
            except TrialError as error:
                raise MisconfigurationException(f"`ConceptMonitor`: {error}") from error

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._run is None:
            return
        self._run.axis = _steps_logged(trainer)
        if not self._run.is_group_checked:
            self._run.is_group_checked = True
            self._check_group(self._run)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run = self._run
        if run is None:
            return
        if run.board is not None and run.store is not None:
            with self._guarded(run, run.store.checkpoints[-1].step):
                run.board.write_projector(run.answers, run.store, run.axis)
        if run.logger is not None and not logs_a_metric_itself(run.logger):
            self._write_hparams(run, trainer)
        self._tell_failures(run)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._run is not None:
            self._tell_failures(self._run)
        self._run = None

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._run = None

    def _followed(self, trainer: L.Trainer) -> ConceptTracer:
        tracers = [c for c in _callbacks(trainer) if isinstance(c, ConceptTracer)]
        named = [tracer for tracer in tracers if self.dirpath in (None, tracer.dirpath)]
        monitors = [c for c in _callbacks(trainer) if isinstance(c, ConceptMonitor)]
        if len(named) != 1:
            found = ", ".join(repr(tracer.dirpath) for tracer in tracers) or "none"
            raise MisconfigurationException(
                f"`ConceptMonitor(dirpath={self.dirpath!r})`: expected one ConceptTracer to "
                f"follow, the Trainer has: {found}. HINT: attach ConceptTracer(dirpath), or name "
                "one of several with `dirpath=`."
            )
        if len(monitors) > 1:
            raise MisconfigurationException(
                f"The Trainer has {len(monitors)} ConceptMonitors, which would write over each "
                "other. HINT: one with all concepts."
            )
        return named[0]

    def _questions(self) -> list[Question]:
        is_guided = (self.sampler or Sampler()).guidance != 1.0
        asked = [
            concept.isolated() if concept.image is None else concept for concept in self.concepts
        ]
        return [
            Question(concept.name, concept.present, concept.absent, is_guided) for concept in asked
        ]

    def _check_sampler(self, trajectory: Trajectory, schedule: Schedule) -> None:
        sampler = self.sampler or Sampler()
        usable = sum(schedule.level(t)[0] > 0 for t in schedule.sampling_timesteps(sampler.steps))
        if isinstance(trajectory, Generated) and usable < (trajectory.timesteps or 1):
            raise ValueError(
                f"{sampler}: the method looks at {trajectory.timesteps} states of a generation, "
                f"which has {usable}. HINT: "
                f"sampler=Sampler(steps={(trajectory.timesteps or 1) + 1}) or more."
            )

    def _check_group(self, run: _Run) -> None:
        if self.group is None:
            return
        root = Path(run.tracer.dirpath)
        known = column_names(root / read_manifest(root).samples)
        if self.group in known:
            return
        run.group = None
        listed = ", ".join(map(visible, known)) or "none"
        told = (
            f"ConceptMonitor(group={self.group!r}): the samples have no such metadata column. "
            f"They have: {listed}."
        )
        if known and self.group != DEFAULT_GROUP:
            raise MisconfigurationException(f"{told} HINT: name one of these, or group=None.")
        rank_zero_warn(
            f"{told} No shares are shown. HINT: `encode(batch)` gives columns with Encoded(..., "
            f"metadata={{...}}); group=None for none."
        )

    def _on_sealed(self, trainer: L.Trainer) -> None:
        """What the tracer calls when a checkpoint is sealed, in every process."""
        run = self._run
        if run is None or run.logger is None or not trainer.is_global_zero:
            return
        begun = time.monotonic()
        run.spent["tracer"] += run.tracer.last_seconds
        with self._guarded(run, trainer.global_step):
            if run.board is None:
                writer = run.logger.experiment
                run.board = Board(
                    writer, self.concepts, group=run.group, top=self.top, bottom=self.bottom
                )
                run.board.write_layout()
            run.store, run.answers = self._watch.ask(
                run.tracer.dirpath, trainer.lightning_module, run.tracer.task, run.tracer.method
            )
            run.board.write(run.answers, run.store.checkpoints[-1], run.axis)
            seconds = {"tracer": run.tracer.last_seconds, "monitor": time.monotonic() - begun}
            run.spent["monitor"] += seconds["monitor"]
            whole = time.monotonic() - run.started
            run.board.write_cost(
                seconds, {name: spent / whole for name, spent in run.spent.items()}, run.axis
            )

    def _write_hparams(self, run: _Run, trainer: L.Trainer) -> None:
        if run.logger is None or not trainer.is_global_zero:
            return
        with self._guarded(run, trainer.global_step):
            own = method_hparams(run.tracer.method, run.tracer.projection, run.tracer.layers)
            modules = logged_hparams(trainer)
            metrics = Board(run.logger.experiment, self.concepts, group=None).metrics
            if modules and logs_a_metric_itself(run.logger):
                metrics = ["hp_metric", *metrics]
            write_hparams(run.logger.experiment, modules | own, metrics)

    @contextmanager
    def _guarded(self, run: _Run, step: int) -> Iterator[None]:
        """What fails inside costs the panels of ``step``, and not the training."""
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            if not run.failed:
                rank_zero_warn(
                    f"ConceptMonitor: the panels of step {step} are missing or incomplete: "
                    f"{type(error).__name__}: {error} Training and tracing go on, and the next "
                    'checkpoint is tried again. HINT: `on_error="raise"` stops with the error.'
                )
            run.failed.append(step)

    @staticmethod
    def _tell_failures(run: _Run) -> None:
        if len(run.failed) > 1:
            rank_zero_warn(
                f"ConceptMonitor: the panels of steps {run.failed} are missing or incomplete."
            )
        run.failed = []


def _concept(given: Concept | Mapping[str, Any]) -> Concept:
    if isinstance(given, Concept):
        return given
    try:
        return Concept(**given)
    except (TypeError, ConceptError) as error:
        raise MisconfigurationException(
            f"`ConceptMonitor(concepts=[{given!r}])`: {error}. Expected name, present and absent. "
            f"HINT: {{'name': 'owl', 'present': {{'object': 'owl'}}, 'absent': {{}}}}."
        ) from error


def _logger(trainer: L.Trainer) -> TensorBoardLogger | None:
    return next(
        (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None
    )


def _tell_nowhere_to_write(trainer: L.Trainer) -> None:
    found = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
    hint = "Trainer(logger=TensorBoardLogger(save_dir))."
    if find_spec("tensorboard") is None:
        hint = "the package tensorboard is not installed: `pip install tensorboard`, then " + hint
    rank_zero_warn(
        f"ConceptMonitor: no TensorBoardLogger to write to; the Trainer's loggers: {found}. "
        f"Training and tracing go on without the monitor. HINT: {hint}"
    )


def _steps_logged(trainer: L.Trainer) -> int:
    # What Lightning puts on the x axis of `self.log`; its own monitors (LearningRateMonitor) read
    # it so.
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _skipped(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
