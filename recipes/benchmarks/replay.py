"""Traces of a fine-tune that is over, from the weights it saved: one training serves every method
that is compared."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typing_extensions import override

from ctrak_lightning import Capture, GradientTracer, Method, Projection, TraceStore
from ctrak_lightning.model.weights import trained_parameters
from ctrak_lightning.store.schema import SCHEMA_VERSION
from ctrak_lightning.tasks import resolve_task

_SAVED = re.compile(r"step-(\d{8})\.safetensors")


def save_trained(module: nn.Module, folder: Path, step: int) -> None:
    """Saves what training changes, as ``step-00000100.safetensors``."""
    weights = {name: value.detach().clone() for name, value in trained_parameters(module).items()}
    save_file(weights, folder / f"step-{step:08d}.safetensors")


class SaveTrained(L.Callback):
    """Saves the trained weights after chosen optimizer steps."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder = folder
        self.steps = sorted(set(steps))

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step in self.steps:
            save_trained(pl_module, self.folder, trainer.global_step)


def fitted(
    module: Any, data: Any, max_steps: int, *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    """The trainer that has trained a module for so many steps, on the CPU unless told otherwise."""
    named = ("logger", "enable_model_summary", "enable_progress_bar", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(named, False) | {"accelerator": "cpu"}
    trainer = L.Trainer(max_steps=max_steps, callbacks=list(callbacks), **(quiet | options))
    trainer.fit(module, datamodule=data)
    return trainer


def finished(folder: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder says of this very run, if the run is over.

    Raises:
        ValueError: the folder holds a run with other arguments.
    """
    path = folder / "facts.json"
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts["arguments"] != arguments:
        raise ValueError(
            f"{folder} holds a run with {facts['arguments']}, asked for was {arguments}. "
            "HINT: name a new folder (--runs)."
        )
    return facts


def record(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes ``facts.json``, which comes last: a run without it is not over."""
    draft = folder / "facts.json.part"
    draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, folder / "facts.json")
    return facts


def evenly(steps: int, count: int) -> list[int]:
    """``count`` evenly spaced steps, of which ``steps`` is the last."""
    return [steps * (i + 1) // count for i in range(count)]


def saved_steps(folder: Path) -> list[int]:
    """The steps whose weights a folder holds, ascending."""
    return sorted(
        int(match[1]) for path in folder.iterdir() if (match := _SAVED.fullmatch(path.name))
    )


def load_trained(module: nn.Module, folder: Path, step: int) -> None:
    """Loads weights that :class:`SaveTrained` wrote."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in load_file(folder / f"step-{step:08d}.safetensors").items():
            parameters[name].copy_(value)


def replay(
    folder: Path,
    module: Any,
    batches: Iterable[Any],
    method: Method,
    store: Path,
    *,
    steps: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    projection: Projection | None = None,
    learning_rate: float = 1.0,
) -> TraceStore:
    """Traces ``batches`` at the saved steps of a fine-tune into ``store``; a finished store of this
    schema is opened as it is.

    Args:
        folder: of the saved weights.
        module: the model: a DiffusionTask, or a module that carries one.
        batches: the samples, in a fixed order.
        method: what to trace.
        store: the store's folder.
        steps: which of the saved steps; all by default.
        layers: name patterns of the layers to trace.
        projection: of the gradients; the library's default by default.
        learning_rate: what the checkpoints record (TracIn weighs them by it).
    """
    done = store / f"finished-{SCHEMA_VERSION}"
    if not done.exists():
        shutil.rmtree(store, ignore_errors=True)
        task = resolve_task(module)
        tracer = GradientTracer(task.denoiser, projection or Projection(), layers=layers)
        capture = Capture(
            str(store), module, task, batches, method=method, tracer=tracer, progress=False
        )
        for step in saved_steps(folder) if steps is None else steps:
            load_trained(module, folder, step)
            capture.run(step, epoch=0, learning_rate=learning_rate)
        done.touch()
    return TraceStore(store)
