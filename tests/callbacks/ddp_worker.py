"""One fit of the toy, on one or two processes: ``python -m tests.callbacks.ddp_worker FOLDER DEVICES TRACED``."""

import sys
from pathlib import Path

import lightning as L
from safetensors.torch import save_file

from ctrak_lightning import methods
from ctrak_lightning.callbacks import ConceptTracer

from ..toy import ToyData, ToyDiffusion


def main(folder: str, devices: str, traced: str) -> None:
    L.seed_everything(3, verbose=False)
    module = ToyDiffusion()
    tracer = ConceptTracer(f"{folder}/traces", methods.d_trak(timesteps=2), rank=4, dim=64, every_n_epochs=1)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp" if devices != "1" else "auto",
        devices=int(devices),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tracer] if traced == "traced" else [],
    )
    trainer.fit(module, datamodule=ToyData())
    if trainer.is_global_zero:
        Path(folder).mkdir(exist_ok=True)
        save_file(dict(module.state_dict()), f"{folder}/weights.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
