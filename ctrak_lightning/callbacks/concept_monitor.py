"""ConceptMonitor: shows in TensorBoard, while a model is fine-tuned, what it learns from whom."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ctrak_lightning.attribution import Concept
from ctrak_lightning.callbacks.concept_tracer import ConceptTracer
from ctrak_lightning.callbacks.monitored_run import DEFAULT_GROUP, MonitoredRun
from ctrak_lightning.callbacks.settings import OnError, callbacks_of, is_dry_run, require_one_of
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.methods.trajectories import Sampler


class ConceptMonitor(Callback):
    """Generates a few concepts at every checkpoint that a :class:`ConceptTracer` of the same
    Trainer seals, asks the traces so far which samples they were learnt from, and writes the
    answers to the run's TensorBoard, under ``ctrak/``.

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
        on_error: what becomes of training when a panel cannot be made: ``"warn"`` goes on, with a
            warning of the first failure at once and of all steps without panels at the end;
            ``"raise"`` stops.

    Raises:
        MisconfigurationException: an argument out of range; no ConceptTracer to follow, or several;
            at the start of training, a concept that the model does not know, or a group that is no
            column of the samples (the message lists them).

    Warns:
        UserWarning: there is no TensorBoardLogger, and so nothing to write to; the samples have no
            column of owners; the ranking of a concept says nothing; panels are missing. Each
            once.

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
        require_one_of(
            "ConceptMonitor",
            "on_error",
            on_error,
            get_args(OnError),
            "'warn' lets training go on without the panels.",
        )
        self.group, self.seed, self.top, self.bottom = group, seed, top, bottom
        self.sampler, self.dirpath, self.on_error = sampler, dirpath, on_error
        self._run: MonitoredRun | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks for the tracer to follow, before anything is loaded."""
        if stage == "fit" and not is_dry_run(trainer):
            self._run = MonitoredRun(
                trainer,
                self._followed(trainer),
                self.concepts,
                group=self.group,
                seed=self.seed,
                top=self.top,
                bottom=self.bottom,
                sampler=self.sampler,
                on_error=self.on_error,
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses concepts that the task does not know, and adds them to the tracer's trial, which
        comes with the first batch; writes the hyperparameters before Lightning logs its own."""
        if self._run is not None:
            self._run.prepare(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follows the tracer from here on, and makes the concepts' conditions once, with the text
        encoders where training has them."""
        if self._run is not None:
            self._run.tracer.when_sealed(self._on_sealed)
            self._run.begin(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the x axis of the step; at the first batch, when the tracer has written its sample
        table, looks for the column of owners in it."""
        if self._run is not None:
            self._run.begin_batch()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the traces as points for the Projector, and what failed: the last checkpoint is
        sealed by now."""
        if self._run is not None:
            self._run.end()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Says which panels are missing, also of a run that ends with an error."""
        if self._run is not None:
            self._run.warn_of_failures()
        self._run = None

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the run, its store and its logger."""
        self._run = None

    def _on_sealed(self, trainer: L.Trainer) -> None:
        if self._run is not None:
            self._run.ask()

    def _followed(self, trainer: L.Trainer) -> ConceptTracer:
        callbacks = callbacks_of(trainer)
        tracers = [one for one in callbacks if isinstance(one, ConceptTracer)]
        named = [tracer for tracer in tracers if self.dirpath in (None, tracer.dirpath)]
        if len(named) != 1:
            found = ", ".join(repr(tracer.dirpath) for tracer in tracers) or "none"
            raise MisconfigurationException(
                f"`ConceptMonitor(dirpath={self.dirpath!r})`: expected one ConceptTracer to "
                f"follow, the Trainer has: {found}. HINT: attach ConceptTracer(dirpath), or name "
                "one of several with `dirpath=`."
            )
        monitors = sum(isinstance(one, ConceptMonitor) for one in callbacks)
        if monitors > 1:
            raise MisconfigurationException(
                f"The Trainer has {monitors} ConceptMonitors, which would write over each other. "
                "HINT: one with all concepts."
            )
        return named[0]


def _concept(given: Concept | Mapping[str, Any]) -> Concept:
    if isinstance(given, Concept):
        return given
    try:
        return Concept(**given)
    except (TypeError, ConceptError) as error:
        raise MisconfigurationException(
            f"`ConceptMonitor(concepts=[{given!r}])`: {error}. Expected name, present and absent. "
            "HINT: {'name': 'owl', 'present': {'object': 'owl'}, 'absent': {}}."
        ) from error
