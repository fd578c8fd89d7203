"""Trains a small UNet from nothing to draw emoji by artist, a fifth of them under a wrong artist's
name, traces it, and asks for every name who taught it.

python -m recipes.benchmarks.class_labels      # minutes

Writes results/class_labels.md and .png: for each artist a generated image, and the six training
images ranked highest.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import lightning as L
import numpy as np
import torch
from torch import Tensor

from ctrak_lightning import Attribution, Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.attribution.baselines import random_order
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.metrics import bootstrap_interval, functional

from .. import emoji_folder
from ..class_conditional.module import ClassConditional
from ..emoji_artists.data import Emoji
from ..images import FILE, ImageFolder
from ..pictures import image_grid
from .replay import fitted
from .tables import command_of, grid, interval, machine, parser_of, publish

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
Rows = dict[str, dict[str, dict[str, float]]]


class AfterOneStep(ConceptTracer):
    """Traces when nothing has been learnt yet, for comparison."""

    def should_trace(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx == 1


def train(
    out: Path, data: ImageFolder, classes: list[str], epochs: int, seed: int
) -> ClassConditional:
    """The trained module; its traces are in ``out / "traces"``, at three checkpoints, and those of
    its start in ``out / "start"``."""
    L.seed_everything(seed, verbose=False)
    module = ClassConditional(
        classes, unet=UNET, class_dropout=0.1, learning_rate=2e-3, warmup_steps=50
    )
    method, every = methods.concept_trak(timesteps=3), max(1, epochs // 3)
    tracers = (
        ConceptTracer(str(out / "traces"), method, every_n_epochs=every, at_end=False),
        AfterOneStep(str(out / "start"), method, at_end=False),
    )
    fitted(module, data, -1, *tracers, max_epochs=epochs, default_root_dir=out)
    return module.eval()


def ask(store: Path, module: ClassConditional, classes: list[str], seeds: int) -> list[Attribution]:
    """The attributions of every class in a generated image of it, for each seed in turn."""
    sampler = Sampler(steps=20, guidance=2.0)
    attributor = Attributor(TraceStore(store), module, sampler=sampler, progress=True)
    concepts = [Concept(name, present={"class": name}, absent={}) for name in classes]
    return [each for seed in range(seeds) for each in attributor.attribute_many(concepts, seed)]


def misname(folder: Path, share: float, seed: int) -> None:
    """Adds a column ``told`` to a folder's list: the artist, but a ``share`` under another."""
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
    """Means over names, with 95 % bootstrap intervals over them, of scores [n] for questions of one
    name each:

    - ``told``: R-precision for the images that were told to be by that artist;
    - ``drawn``: the same for those that are;
    - ``drawn, of those told``: among the images that were told so, the AUROC of those that are
      against those that are not.
    """
    values: dict[str, dict[str, list[Tensor]]] = {key: {} for key in KEYS}
    for each, name in zip(scores, asked, strict=True):
        named = torch.tensor([label == name for label in told])
        true = torch.tensor([label == name for label in drawn])
        found = [functional.r_precision(each, named), functional.r_precision(each, true)]
        if not true[named].all():
            found.append(functional.auroc(each[named], true[named]))
        for key, value in zip(KEYS, found, strict=False):
            values[key].setdefault(name, []).append(value.double())
    summary = {}
    for key, by_name in values.items():
        means = torch.stack([torch.stack(each).mean() for each in by_name.values()])
        low, high = bootstrap_interval(means)
        summary[key] = {"mean": float(means.mean()), "low": low, "high": high}
    return summary


def rows(results: Sequence[Attribution], start: Sequence[Attribution]) -> Rows:
    """Our figures beside those of the untrained network, of search by label (ties in random order),
    and of a random order."""
    asked = [result.concept.name for result in results]
    metadata = results[0].samples.metadata
    told, drawn = metadata["class"], metadata["artist"]
    repeated = [name for name in asked for _ in range(100)]
    random = random_order(len(repeated), len(told))
    by_label = [
        torch.tensor([float(label == name) for label in told]) + each / 2
        for name, each in zip(repeated, random, strict=True)
    ]
    ours, first = ([each.scores for each in found] for found in (results, start))
    return {
        "concept_trak()": figures(ours, asked, told, drawn),
        "concept_trak(), traced after one step": figures(first, asked, told, drawn),
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
        best = thumbnails[result.order()[:SHOWN]].permute(0, 3, 1, 2).float() / 255
        pictures += [result.image, *best]
    image_grid(path, torch.stack(pictures), columns=1 + SHOWN, scale=3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.class_labels", __doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/class_labels"))
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--wrong", type=float, default=0.2, help="share under a wrong name")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=4, help="generated images of each artist")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    args = parser.parse_args(argv)
    started, folder = time.perf_counter(), args.runs / "images"
    emoji_folder.write(folder, args.objects)
    misname(folder, args.wrong, args.seed)
    data = ImageFolder(str(folder), batch_size=16, caption_column=None, class_column="told")
    classes = sorted(Emoji.load().artists)
    module = train(args.runs, data, classes, args.epochs, args.seed)
    results, start = (
        ask(args.runs / name, module, classes, args.seeds) for name in ("traces", "start")
    )
    count = sum(p.numel() for p in module.task.denoiser.parameters())
    lines = [
        f"`{command_of(parser, args)}`; {machine()}, diffusers {diffusers.__version__}; "
        f"{(time.perf_counter() - started) / 60:.1f} minutes. {len(data.rows)} images, {count:,} "
        f"parameters, traced at steps {results[0].steps}, {len(results)} questions; means over "
        "names [95 % bootstrap intervals].",
        "",
        *grid(
            ["", *KEYS],
            [
                [name, *(interval(row[key]) for key in KEYS)]
                for name, row in rows(results, start).items()
            ],
        ),
    ]
    publish(args.results / "class_labels.md", "\n".join(lines) + "\n")
    draw(args.results / "class_labels.png", results[: len(classes)])


if __name__ == "__main__":
    main()
