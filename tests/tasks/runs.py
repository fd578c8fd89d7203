"""Fine-tunes of tiny pipelines under the Trainer's options."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from ctrak_lightning import methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.methods.objectives import SquaredNorm, Term
from tests.tasks.test_fine_tune import FineTune, Samples, fine_tune

METHOD = replace(methods.concept_trak_norm(timesteps=2, damping=1.0), query=(Term(SquaredNorm()),))
"""Asks of the whole image, since a model without conditions is among those that are trained."""
FULL = ("ddpm", "ddpm-classes", "pixart", "pixart-sized", "pixart-sigma")
"""Trained whole here, the others by LoRA."""


def tracer(path: Path | str, **options: Any) -> ConceptTracer:
    arguments: dict[str, Any] = {"every_n_train_steps": 1, "rank": 4, "dim": 128}
    return ConceptTracer(str(path), METHOD, **(arguments | options))


def train(
    module: L.LightningModule,
    callbacks: list[L.Callback],
    ckpt_path: str | None = None,
    **options: Any,
) -> L.Trainer:
    """One run of the Trainer from a fixed seed: two batches of two samples an epoch."""
    L.seed_everything(0, verbose=False)
    arguments: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(arguments | options),
    )
    trainer.fit(
        module,
        DataLoader(Samples(), 2),
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    return trainer


def made(name: str, checkpointing: bool = False) -> FineTune:
    """The fine-tune of a pipeline, with gradient checkpointing if asked."""
    module = fine_tune(name, full=name in FULL)
    if checkpointing:
        module.task.denoiser.enable_gradient_checkpointing()
    return module


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )
