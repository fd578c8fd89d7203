"""Fits whose disk is full after the first epoch: ``python -m tests.callbacks.disk_worker FOLDER
ON_ERROR...``."""

import resource
import sys
import warnings
from typing import Any

import lightning as L

from ctrak_lightning import methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.errors import StoreError

from ..toy import ToyData, ToyDiffusion

ROOM = 2**19


class FullDisk(L.Callback):
    """Allows no file larger than ROOM bytes after the first epoch, and any in the last one."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        limit = ROOM if trainer.current_epoch == 1 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def run(folder: str, on_error: Any) -> None:
    L.seed_everything(3, verbose=False)
    tracer = ConceptTracer(
        f"{folder}/{on_error}/traces",
        methods.d_trak(timesteps=1),
        dim=2**14,
        every_n_epochs=1,
        on_error=on_error,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FullDisk(), tracer],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(ToyDiffusion(), datamodule=ToyData())
        except StoreError as error:
            sys.stdout.write(f"{on_error}: stopped at step {trainer.global_step}: {error}\n")
    sys.stdout.writelines(
        f"{on_error}: {w.message}\n" for w in caught if "no trace" in str(w.message)
    )


if __name__ == "__main__":
    for choice in sys.argv[2:]:
        run(sys.argv[1], choice)
