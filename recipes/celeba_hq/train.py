"""Trains the CelebA-HQ model from scratch, and its verifier; goes on where it was cut."""

import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from recipes.benchmarks.replay import SaveTrained, load_trained
from recipes.celeba_hq.data import CelebAHQ
from recipes.celeba_hq.verifier import STEPS as VERIFIER_STEPS
from recipes.celeba_hq.verifier import train_verifier
from recipes.synthetic.module import FactorDiffusion
from recipes.synthetic.recording import LossCurve
from recipes.synthetic.verifier import Verifier

STEPS = 60_000
PATCH = 2
CHANNELS = (96, 192)
CHECKPOINTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run: its data, its model with the last weights, its verifier, and what was recorded."""

    data: CelebAHQ
    module: FactorDiffusion
    verifier: Verifier
    facts: dict[str, Any]


def train(
    out: str | Path,
    data: CelebAHQ,
    seed: int = 0,
    *,
    steps: int = STEPS,
    patch: int = PATCH,
    channels: tuple[int, int] = CHANNELS,
    checkpoints: int = CHECKPOINTS,
    verifier_steps: int = VERIFIER_STEPS,
    device: str = "cpu",
    callbacks: Sequence[L.Callback] = (),
) -> Run:
    """Trains model and verifier unless ``out`` already holds them.

    The model's state is kept after every epoch, and a run that was cut goes on from there with the same call. It is then
    not bit-identical to one that was not: the order of the images and the noise are drawn anew.

    Args:
        out: folder of the weights, the verifier and ``facts.json`` (written last: a run without it is not finished).
        data: the images.
        seed: of weights, order and noise, and of the verifier.
        steps: optimiser steps.
        patch: side of the pixel patches that the network sees as channels.
        channels: the network's, at the resolution of its input and at half of it.
        checkpoints: how many to keep for traces, evenly spaced; the last is the final model.
        verifier_steps: optimiser steps of the verifier.
        device: ``"cpu"``, or ``"cuda"``.
        callbacks: more of them.

    Raises:
        ValueError: ``out`` holds a run with other arguments, or the verifier cannot be trusted.
    """
    out = Path(out)
    arguments = {
        "held_out": data.held_out,
        "images": len(data.combos),
        "size": data.size,
        "batch_size": data.batch_size,
        "seed": seed,
        "steps": steps,
        "patch": patch,
        "channels": list(channels),
        "checkpoints": checkpoints,
        "verifier_steps": verifier_steps,
    }
    _claim(out, arguments)
    L.seed_everything(seed, verbose=False)
    module = FactorDiffusion(data.factors, data.size, patch, channels, drop=0.1)
    facts = _finished(out)
    if facts is None:
        verifier, trust = _verifier(out, data, seed, verifier_steps)
        L.seed_everything(seed, verbose=False)
        facts = {
            "arguments": arguments,
            "verifier": trust,
            **_fit(out, module, data, arguments, device, callbacks),
        }
        draft = out / "facts.json.part"
        draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, out / "facts.json")
    else:
        verifier, _ = _verifier(out, data, seed, verifier_steps)
    load_trained(module, out, facts["checkpoints"][-1])
    return Run(data=data, module=module.eval().to(device), verifier=verifier, facts=facts)


def _fit(
    out: Path,
    module: FactorDiffusion,
    data: CelebAHQ,
    arguments: dict[str, Any],
    device: str,
    callbacks: Sequence[L.Callback],
) -> dict[str, Any]:
    steps, checkpoints = arguments["steps"], arguments["checkpoints"]
    saver = SaveTrained(out, [steps * (i + 1) // checkpoints for i in range(checkpoints)])
    curve = LossCurve()
    keeper = ModelCheckpoint(dirpath=out, filename="resume", every_n_epochs=1, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[saver, curve, keeper, *callbacks],
    )
    last = out / "resume.ckpt"
    started = time.monotonic()
    with warnings.catch_warnings():
        # The folder is this run's own, and a checkpoint in it is there to be replaced.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    module.to("cpu")
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "checkpoints": saver.steps,
        "loss": curve.means,
        "seconds_since_last_start": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in ("torch", "lightning", "diffusers", "pillow", "numpy")},
    }


def _verifier(out: Path, data: CelebAHQ, seed: int, steps: int) -> tuple[Verifier, dict[str, Any]]:
    path, facts = out / "verifier.safetensors", out / "verifier.json"
    if facts.exists():
        verifier = Verifier(data.factors, data.size)
        verifier.load_state_dict(load_file(path))
        trust: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        return verifier.eval().requires_grad_(False), trust
    verifier, measured = train_verifier(data, seed, steps)
    save_file({name: value.contiguous() for name, value in verifier.state_dict().items()}, path)
    trust = measured.to_dict()
    facts.write_text(json.dumps(trust, indent=1) + "\n", encoding="utf-8")
    return verifier, trust


def _claim(out: Path, arguments: dict[str, Any]) -> None:
    """Makes the folder this run's own, before the first step, so that a later call never mixes two runs."""
    path = out / "arguments.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
    held = json.loads(path.read_text(encoding="utf-8"))
    if held != arguments:
        names = sorted(set(held) | set(arguments))
        changed = {n: (held.get(n), arguments.get(n)) for n in names if held.get(n) != arguments.get(n)}
        raise ValueError(
            f"train({str(out)!r}): the folder holds a run with other arguments (there, asked): {changed}. HINT: name a new "
            "folder (--runs)."
        )


def _finished(out: Path) -> dict[str, Any] | None:
    path = out / "facts.json"
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts
