"""The hyperparameters that Lightning itself logs for a run."""

from typing import Any

import lightning as L
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import TensorBoardLogger


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
