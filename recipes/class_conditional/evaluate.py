"""Trains a small UNet from nothing to draw emoji by artist, a fifth of them under a wrong artist's name, traces it, and asks for
every name who taught it.

python -m recipes.class_conditional.evaluate --out runs/class_conditional_emoji      # about a quarter of an hour on one core

Writes results/emoji.json and results/emoji.png: for each artist a generated image, and the six training images ranked highest.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from ctrak_lightning import Attribution, Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.attribution.baselines import random_order
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.metrics import bootstrap_interval, functional
from recipes import emoji_folder
from recipes.class_conditional.module import ClassConditional
from recipes.emoji_artists.data import Emoji
from recipes.imagefolder import FILE
from recipes.images import ImageFolder
from recipes.pictures import image_grid

RESULTS = Path(__file__).parent / "results"
UNET = {
    "sample_size": 32,
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
SHOWN = 6
KEYS = ("told", "drawn", "drawn, of those told")


class AfterOneStep(ConceptTracer):
    """Traces when nothing has been learnt yet, for comparison."""

    def should_trace(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx == 1


def train(out: Path, data: ImageFolder, classes: list[str], epochs: int, seed: int) -> ClassConditional:
    """The trained module; its traces are in ``out / "traces"``, at three checkpoints, and those of its start in ``out / "start"``."""
    L.seed_everything(seed, verbose=False)
    module = ClassConditional(classes, unet=UNET, class_dropout=0.1, learning_rate=2e-3, warmup_steps=50)
    method = methods.concept_trak(timesteps=3)
    tracers: list[L.Callback] = [
        ConceptTracer(str(out / "traces"), method, every_n_epochs=max(1, epochs // 3), at_end=False),
        AfterOneStep(str(out / "start"), method, at_end=False),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=tracers,
        logger=CSVLogger(out / "log", name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    trainer.fit(module, datamodule=data)
    return module.eval()


def ask(store: Path, module: ClassConditional, classes: list[str], seeds: int) -> list[Attribution]:
    """The attributions of every class in a generated image of it, for each seed in turn."""
    attributor = Attributor(TraceStore(store), module, sampler=Sampler(steps=20, guidance=2.0), progress=True)
    concepts = [Concept(name, present={"class": name}, absent={}) for name in classes]
    return [result for seed in range(seeds) for result in attributor.attribute_many(concepts, seed)]


def misname(folder: Path, share: float, seed: int) -> None:
    """Adds a column ``told`` to a folder's list: the artist, but for a ``share`` of the images another one."""
    path = folder / FILE
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    artists = sorted({line["artist"] for line in lines})
    rng = np.random.default_rng(seed)
    wrong = set(rng.permutation(len(lines))[: int(share * len(lines))].tolist())
    for i, line in enumerate(lines):
        others = [artist for artist in artists if artist != line["artist"]]
        line["told"] = str(rng.choice(others)) if i in wrong else line["artist"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def figures(
    scores: Sequence[Tensor], asked: Sequence[str], told: Sequence[str], drawn: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Means over names, with 95 % bootstrap intervals over them, of scores [n] for questions of one name each:

    - ``told``: R-precision for the images that were told to be by that artist;
    - ``drawn``: the same for those that are;
    - ``drawn, of those told``: among the images that were told so, the AUROC of those that are against those that are not.
    """
    values: dict[str, dict[str, list[Tensor]]] = {key: {} for key in KEYS}
    for each, name in zip(scores, asked, strict=True):
        named = torch.tensor([label == name for label in told])
        true = torch.tensor([label == name for label in drawn])
        found = {"told": functional.r_precision(each, named), "drawn": functional.r_precision(each, true)}
        if not true[named].all():
            found["drawn, of those told"] = functional.auroc(each[named], true[named])
        for key, value in found.items():
            values[key].setdefault(name, []).append(value.double())
    summary = {}
    for key, by_name in values.items():
        means = torch.stack([torch.stack(each).mean() for each in by_name.values()])
        low, high = bootstrap_interval(means)
        ends: dict[str, float] = {"mean": float(means.mean()), "low": low, "high": high}
        summary[key] = {end: round(value, 4) for end, value in ends.items()}
    return summary


def rows(
    results: Sequence[Attribution], start: Sequence[Attribution]
) -> dict[str, dict[str, dict[str, float]]]:
    """Our figures beside those of the untrained network, of search by label (ties in random order), and of a random order."""
    asked = [result.concept.name for result in results]
    metadata = results[0].samples.metadata
    told, drawn = metadata["class"], metadata["artist"]
    repeated = [name for name in asked for _ in range(100)]
    random = random_order(len(repeated), len(told))
    by_label = [
        torch.tensor([float(label == name) for label in told]) + each / 2
        for name, each in zip(repeated, random, strict=True)
    ]
    return {
        "concept_trak()": figures([result.scores for result in results], asked, told, drawn),
        "concept_trak(), traced after one step": figures(
            [result.scores for result in start], asked, told, drawn
        ),
        "label search": figures(by_label, repeated, told, drawn),
        "random order": figures(list(random), repeated, told, drawn),
    }


def draw(path: Path, results: Sequence[Attribution]) -> None:
    """A row for each attribution: its image, and the training images ranked highest."""
    pictures = []
    for result in results:
        thumbnails = result.samples.thumbnails
        assert result.image is not None
        assert thumbnails is not None
        positions = {sample_id: i for i, sample_id in enumerate(result.samples.sample_ids)}
        best = [thumbnails[positions[record.sample_id]] for record in result.top(SHOWN)]
        pictures += [result.image, *(each.permute(2, 0, 1).float() / 255 for each in best)]
    image_grid(path, torch.stack(pictures), columns=1 + SHOWN, scale=3)


def loss_of(out: Path, first: bool) -> float:
    """The mean loss of the first or the last fifty steps."""
    lines = (out / "log" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss")
    losses = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    kept = losses[:50] if first else losses[-50:]
    return round(sum(kept) / len(kept), 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/class_conditional_emoji"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--wrong", type=float, default=0.2, help="share of the images under a wrong name")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=4, help="generated images of each artist")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    emoji_folder.write(args.out / "images", args.objects)
    misname(args.out / "images", args.wrong, args.seed)
    data = ImageFolder(str(args.out / "images"), batch_size=16, caption_column=None, class_column="told")
    classes = sorted(Emoji.load().artists)
    module = train(args.out, data, classes, args.epochs, args.seed)
    results = ask(args.out / "traces", module, classes, args.seeds)
    start = ask(args.out / "start", module, classes, args.seeds)
    facts: dict[str, Any] = {
        "command": f"python -m recipes.class_conditional.evaluate --objects {args.objects} --wrong {args.wrong} --epochs {args.epochs} "
        f"--seeds {args.seeds} --seed {args.seed}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "images": len(data.rows),
        "classes": classes,
        "parameters": sum(p.numel() for p in module.task.denoiser.parameters()),
        "steps": results[0].steps,
        "loss of the first and of the last 50 steps": [loss_of(args.out, True), loss_of(args.out, False)],
        "questions": len(results),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "rows": rows(results, start),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1)
    (args.results / "emoji.json").write_text(text + "\n", encoding="utf-8")
    draw(args.results / "emoji.png", results[: len(classes)])
    print(text)


if __name__ == "__main__":
    main()
