"""One fit of the toy on two processes: ``python -m tests.callbacks.ddp_worker FOLDER
plain|traced|monitored|recorded|dies|resumes``.

``dies``: the process of rank 1 ends without a word while the second checkpoint is traced;
``resumes`` goes on from there.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file

from ctrak_lightning import Concept, Sampler, methods
from ctrak_lightning.callbacks import ConceptMonitor, ConceptTracer, ProvenanceRecorder
from ctrak_lightning.store import CheckpointWriter

from ..toy import ToyData, ToyDiffusion


def die_at_the_second_checkpoint() -> None:
    append = CheckpointWriter.append

    def dying(self: CheckpointWriter, *args: Any) -> None:
        if self.step > 3:
            os._exit(1)
        append(self, *args)

    CheckpointWriter.append = dying  # type: ignore[method-assign]


def main(folder: str, what: str) -> None:
    L.seed_everything(3, verbose=False)
    module = ToyDiffusion()
    tracer = ConceptTracer(
        f"{folder}/traces", methods.d_trak(timesteps=2), rank=4, dim=64, every_n_epochs=1
    )
    saver = ModelCheckpoint(f"{folder}/weights", filename="last", save_on_train_epoch_end=True)
    red = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})
    monitor = ConceptMonitor([red], sampler=Sampler(steps=4), on_error="raise")
    attached = {"monitored": [monitor], "recorded": [ProvenanceRecorder()]}.get(what, [])
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=2,
        logger=TensorBoardLogger(folder, name="board", version="")
        if what == "monitored"
        else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*attached, tracer, saver] if what != "plain" else [saver],
    )
    if what == "dies" and trainer.global_rank == 1:
        die_at_the_second_checkpoint()
    resumed = f"{folder}/weights/last.ckpt" if what == "resumes" else None
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resumed, weights_only=True)
    if trainer.is_global_zero:
        Path(folder).mkdir(exist_ok=True)
        save_file(dict(module.state_dict()), f"{folder}/weights.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
