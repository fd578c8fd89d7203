"""ProvenanceRecorder: keeps the ledger of a traced run."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ctrak_lightning.callbacks.concept_tracer import ConceptTracer
from ctrak_lightning.callbacks.settings import callbacks_of, is_dry_run
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.model.weights import trained_parameters
from ctrak_lightning.provenance import environment
from ctrak_lightning.provenance.environment import json_value
from ctrak_lightning.provenance.ledger import Kind, Ledger
from ctrak_lightning.provenance.parents import parent_facts
from ctrak_lightning.provenance.recording import record_run, sync
from ctrak_lightning.provenance.run_facts import header_facts
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.schema import MANIFEST
from ctrak_lightning.tasks import resolve_task
from ctrak_lightning.utilities.naming import parameters_of


class ProvenanceRecorder(Callback):
    """Keeps the ledger of the store that a :class:`~ctrak_lightning.callbacks.ConceptTracer`
    writes: what the run was made with and of, and what was sealed, as a chain of entries that
    ``ctrak verify`` holds against every file of the store.

    It only reads: weights, random states and files of the store are left as they are. Its place
    among the callbacks does not matter. Of several processes the first one records. Settings are
    recorded as they are: keep secrets out of hyperparameters and configuration files. Once training
    goes on, a ledger that cannot be written (a full disk, say) brings a warning, and is made up for
    at the next checkpoint; it does not stop training.

    Args:
        dirpath: the store's folder, where several ConceptTracers are attached; by default that of
            the one that is.
        base_model: name of the model that is fine-tuned; by default what the denoiser's
            configuration says.
        revision: of the base model.
        parent: the store of the run whose result is fine-tuned here, where that was traced too. Its
            run and the head of its ledger are recorded, and whether the weights are those of its
            last checkpoint.

    Raises:
        MisconfigurationException: there is no ConceptTracer, or several and no ``dirpath`` that
            names one.
        StoreError: ``parent`` is no store with a ledger.
        CorruptStoreError: the store that training resumes with is not what its ledger says.

    Warns:
        UserWarning: the weights are not those of the parent's last checkpoint; something could not
            be recorded.

    Example::

        tracer = ConceptTracer("runs/x/traces", every_n_epochs=10)
        trainer = L.Trainer(max_epochs=30, callbacks=[tracer, ProvenanceRecorder()])
        trainer.fit(module, datamodule=data)
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        base_model: str | None = None,
        revision: str | None = None,
        parent: str | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.base_model = base_model
        self.revision = revision
        self.parent = parent
        self._root: Path | None = None
        self._is_due = False
        self._seen: tuple[int, ...] = ()
        self._has_warned = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks for the tracer whose store is recorded, before anything is loaded."""
        if stage == "fit":
            self._root = Path(self._tracer(trainer).dirpath)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes an entry of the run due in the first process; the store it describes is opened by
        the first batch."""
        self._seen, self._has_warned = (), False
        self._is_due = trainer.is_global_zero and not is_dry_run(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records the run, at its first batch: the tracer, which is called first, has opened its
        store, and no step has changed the weights yet."""
        self._begin(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Records the checkpoint that the tracer may have sealed after this step."""
        self._follow()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the checkpoint that the tracer may have sealed after this epoch."""
        self._follow()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records a run that had no batch and yet has a store: it was traced as it ended."""
        if self._root is not None and (self._root / MANIFEST).exists():
            self._begin(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Records that the run failed, by the kind of error: a message may say anything."""
        self._end("run_failed", trainer, {"error": type(exception).__name__})

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Records the end of the run with the weights that it leaves, after all other callbacks
        have changed them."""
        if stage == "fit" and self._seen:
            weights = weights_digest(trained_parameters(pl_module, trainer.optimizers))
            self._end("run_ended", trainer, {"weights": weights})

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_due or self._root is None:
            return
        self._is_due = False
        facts = self._facts(trainer, pl_module)
        manifest = read_manifest(self._root)
        facts |= {"run_id": manifest.run_id, "header": header_facts(manifest.header)}
        resumed = Ledger(self._root).exists or trainer.ckpt_path is not None
        record_run(self._root, facts, resumed=resumed)
        self._seen = _state_of(self._root / MANIFEST)

    def _follow(self) -> None:
        """Records what was sealed since the last call; one look at the manifest's date where
        nothing was."""
        if not self._seen or self._root is None:
            return
        state = _state_of(self._root / MANIFEST)
        if state == self._seen:
            return
        try:
            sync(self._root)
            self._seen = state
        except Exception as error:  # whatever it is, it must not end the training that it records
            self._warn(error)

    def _end(self, kind: Kind, trainer: L.Trainer, facts: dict[str, Any]) -> None:
        if not self._seen or self._root is None:
            return
        self._follow()
        self._seen = ()
        if untraced := self._tracer(trainer).untraced_steps:
            facts = {"untraced_steps": untraced, **facts}
        try:
            Ledger(self._root).append(
                kind, {"step": trainer.global_step, "epoch": trainer.current_epoch, **facts}
            )
        except Exception as error:  # whatever it is, it must not end the training that it records
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            rank_zero_warn(
                f"ProvenanceRecorder: the ledger of {self._root} could not be written: "
                f"{type(error).__name__}: {error} Training goes on; what is missing is recorded at "
                "the next checkpoint that can be."
            )
        self._has_warned = True

    def _tracer(self, trainer: L.Trainer) -> ConceptTracer:
        every = [one for one in callbacks_of(trainer) if isinstance(one, ConceptTracer)]
        matching = [
            tracer
            for tracer in every
            if self.dirpath is None
            or os.path.abspath(tracer.dirpath) == os.path.abspath(self.dirpath)
        ]
        if len(matching) == 1:
            return matching[0]
        folders = [tracer.dirpath for tracer in every]
        raise MisconfigurationException(
            f"`ProvenanceRecorder(dirpath={self.dirpath!r})`: the Trainer has {len(every)} "
            f"ConceptTracers (folders {folders}), expected one whose store it is to record. HINT: "
            "callbacks=[ConceptTracer('runs/x/traces'), ProvenanceRecorder()]; of several, name "
            "the folder of one as `dirpath`."
        )

    def _facts(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        assert self._root is not None
        parameters = parameters_of(pl_module)
        trained = trained_parameters(pl_module, trainer.optimizers)
        task = resolve_task(pl_module, self._tracer(trainer).task)
        config = getattr(task.denoiser, "config", None)
        facts: dict[str, Any] = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "base_model": {
                "name": self.base_model
                or json_value(getattr(config, "_name_or_path", None) or None),
                "revision": self.revision or json_value(getattr(config, "_commit_hash", None)),
                "frozen": weights_digest({n: v for n, v in parameters.items() if n not in trained}),
                "trained": weights_digest(trained),
            },
            "code": environment.code(),
            "configuration": environment.bounded(_configuration(trainer, pl_module)),
            "seeds": environment.seeds(),
            "hardware": environment.hardware(pl_module.device) | {"processes": trainer.world_size},
            "parent": None
            if self.parent is None
            else parent_facts(self.parent, self._root, parameters),
        }
        if facts["parent"] is not None and facts["parent"]["weights"] == "different":
            rank_zero_warn(
                f"ProvenanceRecorder(parent={self.parent!r}): the weights that training starts "
                "with are not those of the parent's last checkpoint. The ledger says so. HINT: "
                "load the parent's final weights, or name the store of the run that they are from."
            )
        return facts


def _configuration(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """What the Trainer, the module, the DataModule and LightningCLI know of their settings."""
    data = getattr(trainer, "datamodule", None)
    saver = next((c for c in callbacks_of(trainer) if isinstance(c, SaveConfigCallback)), None)
    return {
        "module": {"class": _name(pl_module), "hparams": dict(pl_module.hparams_initial)},
        "data": None
        if data is None
        else {"class": _name(data), "hparams": dict(data.hparams_initial)},
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": trainer.precision,
            "strategy": type(trainer.strategy).__name__,
            "callbacks": [_name(callback) for callback in callbacks_of(trainer)],
        },
        "optimizers": [
            {"class": _name(optimizer), "defaults": optimizer.defaults}
            for optimizer in trainer.optimizers
        ],
        "cli": None
        if saver is None
        else yaml.safe_load(saver.parser.dump(saver.config, skip_none=False)),
    }


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when the file at ``path`` is replaced; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)
