"""Trains a small UNet from nothing to draw emoji by artist, traces it, and asks for every artist who taught it.

python -m recipes.class_conditional.evaluate --out runs/class_conditional_emoji      # about half an hour on one core

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
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from ctrak_lightning import Attribution, Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from recipes import emoji_folder
from recipes.benchmarks.tables import RETRIEVAL
from recipes.class_conditional.module import ClassConditional
from recipes.emoji_artists.data import Emoji
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


class AfterOneStep(ConceptTracer):
    """Traces when nothing has been learnt yet, for comparison."""

    def should_trace(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx == 1


def train(out: Path, data: ImageFolder, classes: list[str], epochs: int, seed: int) -> ClassConditional:
    """The trained module; its traces are in ``out / "traces"``, at three checkpoints, and those of its start in ``out / "start"``."""
    L.seed_everything(seed, verbose=False)
    module = ClassConditional(classes, unet=UNET, class_dropout=0.1, learning_rate=2e-3, warmup_steps=50)
    method = methods.concept_trak(timesteps=3)
    tracers = [
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


def retrieval(scores: Sequence[Tensor], labels: list[str], asked: Sequence[str]) -> dict[str, float]:
    """Means of the retrieval metrics over questions: of scores [n] each, relevant are the samples of the class asked for."""
    figures = {}
    for name, metric in RETRIEVAL.items():
        values = [
            metric(each, torch.tensor([label == wanted for label in labels]))
            for each, wanted in zip(scores, asked, strict=True)
        ]
        figures[name] = round(float(torch.stack(values).double().mean()), 4)
    return figures


def rows(
    results: Sequence[Attribution], start: Sequence[Attribution], labels: list[str]
) -> dict[str, dict[str, float]]:
    """Our figures beside those of the untrained network, of search by label, and of a random order."""
    asked = [result.concept.name for result in results]
    by_label = [torch.tensor([float(label == wanted) for label in labels]) for wanted in asked]
    generator = torch.Generator().manual_seed(0)
    random = [torch.rand(len(labels), generator=generator) for _ in asked for _ in range(100)]
    return {
        "concept_trak()": retrieval([result.scores for result in results], labels, asked),
        "concept_trak(), traced after one step": retrieval(
            [result.scores for result in start], labels, asked
        ),
        "label search": retrieval(by_label, labels, asked),
        "random order": retrieval(random, labels, [name for name in asked for _ in range(100)]),
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
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=4, help="generated images of each artist")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    emoji_folder.write(args.out / "images", args.objects)
    data = ImageFolder(str(args.out / "images"), batch_size=16, caption_column=None, class_column="artist")
    classes = sorted(Emoji.load().artists)
    module = train(args.out, data, classes, args.epochs, args.seed)
    results = ask(args.out / "traces", module, classes, args.seeds)
    start = ask(args.out / "start", module, classes, args.seeds)
    labels = results[0].samples.metadata["class"]
    facts: dict[str, Any] = {
        "command": f"python -m recipes.class_conditional.evaluate --objects {args.objects} --epochs {args.epochs} --seeds {args.seeds} "
        f"--seed {args.seed}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "images": len(labels),
        "classes": classes,
        "parameters": sum(p.numel() for p in module.task.denoiser.parameters()),
        "steps": results[0].steps,
        "loss of the first and of the last 50 steps": [loss_of(args.out, True), loss_of(args.out, False)],
        "questions": len(results),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "rows": rows(results, start, labels),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=1)
    (args.results / "emoji.json").write_text(text + "\n", encoding="utf-8")
    draw(args.results / "emoji.png", results[: len(classes)])
    print(text)


if __name__ == "__main__":
    main()
