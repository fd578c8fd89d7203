"""Who taught the object, and who the artist, of every held-out pair: asked by prompt.

python -m recipes.emoji_text.benchmark                 # the demo's four artists, one seed
python -m recipes.emoji_text.benchmark --artists all --seeds 0 1 2

Fine-tunes what is missing, traces, generates, asks, and writes `results/benchmark.json`, `.md` and pictures. Resumable: what is
finished in `--runs` is not done again.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ctrak_lightning import Sampler
from ctrak_lightning.attribution import Attributions
from ctrak_lightning.attribution.baselines import image_similarity, text_search
from recipes.benchmarks.compare import Case, Variant, answers, answers_folder, compare
from recipes.benchmarks.replay import SaveTrained, load_trained
from recipes.benchmarks.tables import RETRIEVAL, Table
from recipes.benchmarks.variants import table_variants
from recipes.emoji_artists.data import KINDS
from recipes.emoji_artists.demo import ARTISTS
from recipes.emoji_artists.judge import EmojiJudge
from recipes.emoji_artists.network import patchify
from recipes.emoji_artists.sheets import contact_sheet
from recipes.emoji_text.data import EmojiCaptions
from recipes.emoji_text.module import EmojiText
from recipes.emoji_text.questions import (
    REWORDED,
    Question,
    exact_words,
    questions,
    relevant,
    reworded,
    sentence_vectors,
)
from recipes.pictures import image_grid

STEPS = (96, 192, 288)
TIMESTEPS = 3
SAMPLER = Sampler(steps=20, guidance=2.5)
DEFAULT = "concept_trak"
METHODS = ("concept_trak", "concept_trak_norm", "concept_trak_paper", "trak", "d_trak")
GROUPS = (*KINDS, REWORDED)
COLUMNS = tuple(f"{metric}, {group}" for metric in ("R-precision", "P@10") for group in GROUPS)
RESULTS = Path(__file__).parent / "results"
DEMO = Path(__file__).parent.parent / "emoji_artists" / "results" / "demo_results.json"
SHEET = ("christmas-tree", "twemoji")


def fine_tune(folder: Path, seed: int, data: EmojiCaptions, steps: Sequence[int] = STEPS) -> EmojiText:
    """The base fine-tuned on the captions for ``steps[-1]`` steps, with the weights of the last; a finished run is loaded.

    Args:
        folder: for the weights at each of ``steps``, and ``facts.json``, which is written last.
        seed: of the adapter, the order and the noise.
        data: the captioned drawings.
        steps: when weights are kept.
    """
    L.seed_everything(seed, verbose=False)
    module = EmojiText()
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps[-1],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[SaveTrained(folder, steps)],
        )
        trainer.fit(module, datamodule=data)
        facts = {"seed": seed, "steps": list(steps), "loss": float(trainer.callback_metrics["loss"])}
        (folder / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    load_trained(module, folder, steps[-1])
    return module.eval()


def rows_with_gradients(only: Sequence[str] | None = None) -> list[Variant]:
    """Every method about the generated image, and the default about the artist's own drawing, which no model has seen."""
    rows = table_variants(TIMESTEPS, STEPS, METHODS)
    given = [replace(row, name=f"{row.name}_given", scope="given") for row in rows if row.name == DEFAULT]
    return [row for row in [*rows, *given] if only is None or row.name in only]


def rows_without_gradients(
    asked: Sequence[Question], data: EmojiCaptions, images: Tensor
) -> dict[str, Tensor]:
    """Rankings [Q, N] by the captions' words, by their embeddings, and by what the generated image looks like."""
    names = [q.asked if q.kind == "object" else f"by {q.asked}" for q in asked]
    shown = (data.train_set.images + 1) / 2
    judge = EmojiJudge.trained()
    return {
        "label search: the concept's words in the caption": exact_words(asked, data.train_set.captions),
        "label search: MiniLM's similarity to the caption": text_search(
            names, data.train_set.captions, sentence_vectors
        ),
        "features of a supervised classifier": image_similarity(images, shown, judge.features),
    }


def measured(asked: Sequence[Question], scores: Tensor, data: EmojiCaptions) -> dict[str, Tensor]:
    """Every retrieval figure per kind of concept, one value per question."""
    truth = relevant(asked, data.train_set.pairs)
    return {
        f"{name}, {group}": values[torch.tensor([q.group == group for q in asked])]
        for name, metric in RETRIEVAL.items()
        for values in [metric(scores, truth)]
        for group in GROUPS
    }


def recognised(asked: Sequence[Question], images: Tensor) -> dict[str, int]:
    """In how many of the pairs' images the judge finds the object, and the artist (odds above 1)."""
    odds = EmojiJudge.trained().log_odds(images, [q.object for q in asked], [q.artist for q in asked])
    return {
        kind: sum(float(row[axis]) > 0 for row, q in zip(odds, asked, strict=True) if q.group == kind)
        for axis, kind in enumerate(KINDS)
    }


def case_of(folder: Path, module: EmojiText, data: EmojiCaptions, asked: Sequence[Question]) -> Case:
    """Both concepts of a pair are asked of the same image."""
    rows = [data.held_out.index((q.object, q.artist)) for q in asked]
    return Case(
        folder=folder,
        module=module,
        batches=data.trace_dataloader(),
        concepts=[q.concept() for q in asked],
        seeds=rows,
        sampler=SAMPLER,
        given=patchify(data.held_out_images)[rows],
    )


def together(case: Case, row: Variant, out: Path) -> tuple[Attributions, dict[str, float]]:
    """The default's answers, and how far the two concepts of a pair are the same question: the mean cosine of their gradients,
    and how many of the ten best images they share."""
    ((_, attributor, query),) = answers(case, [row], out)
    results = attributor.score(query)
    prompts = [concept.present for concept in query.concepts]
    pairs = [i for i in range(len(prompts) - 1) if prompts[i] == prompts[i + 1]]
    each = [Attributions(results[i : i + 2], results.cosines[i : i + 2, i : i + 2]) for i in pairs]
    figures = {
        "pairs": len(each),
        "mean cosine": sum(float(one.cosines[0, 1]) for one in each) / len(each),
        "shared among the ten best": sum(len(one.shared(10)) for one in each) / len(each),
    }
    return results, figures


def draw(
    out: Path, data: EmojiCaptions, pairs: list[tuple[str, str]], images: Tensor, results: Attributions
) -> None:
    """Every pair asked about, generated beside the artist's own drawing; and the contact sheet of one."""
    real = (data.held_out_images[[data.held_out.index(pair) for pair in pairs]] + 1) / 2
    i = pairs.index(SHEET) if SHEET in pairs else 0
    rows = range(len(KINDS) * i, len(KINDS) * (i + 1))
    shown = [replace(results[row], image=images[row]) for row in rows]
    contact_sheet(out / "contact_sheet.png", shown, real[i], KINDS)
    image_grid(
        out / "generated.png",
        torch.stack([images[: len(KINDS) * len(real) : len(KINDS)], real], 1).flatten(0, 1),
        columns=16,
    )


def asked_by_attributes(artists: str) -> str:
    """The demo's figures for the same pairs, where the network is told attributes instead of a prompt, as lines of Markdown."""
    if artists != ",".join(ARTISTS):
        return ""
    facts = json.loads(DEMO.read_text(encoding="utf-8"))["r_precision"]
    rows = [f"{name} {row['object']:.2f} / {row['artist']:.2f}" for name, row in facts.items()]
    return (
        "\nThe same pairs asked by attributes, R-precision of object / artist (`make demo`, another base model and fine-tune): "
        + "; ".join(rows)
        + ".\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--artists", default=",".join(ARTISTS), help="comma-separated, or 'all'")
    parser.add_argument(
        "--pairs", type=int, default=64, help="the first so many held-out pairs (artists take turns)"
    )
    parser.add_argument("--methods", nargs="+", default=None, help="rows of the table; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji_text"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    artists = None if args.artists == "all" else args.artists.split(",")
    data = EmojiCaptions(artists)
    pairs = data.held_out[: args.pairs]
    asked = [*questions(pairs), *reworded(pairs)]
    chosen = rows_with_gradients(args.methods)
    table = Table(COLUMNS)
    counts: dict[str, list[int]] = {kind: [] for kind in KINDS}
    figures: list[dict[str, float]] = []
    for seed in args.seeds:
        folder = args.runs / f"seed-{seed}"
        module = fine_tune(folder, seed, data)
        case = case_of(folder, module, data, asked)
        facts = [[concept.to_dict() for concept in case.concepts], case.seeds, data.train_set.captions]
        out = answers_folder(folder, *facts)
        found, images = compare(case, chosen, out)
        for kind, count in recognised(asked, images).items():
            counts[kind].append(count)
        for name, scores in rows_without_gradients(asked, data, images).items():
            table.add(name, {"None": measured(asked, scores, data)}, "None")
        for row in chosen:
            grid = {damping: measured(asked, scores, data) for damping, scores in found[row.name].items()}
            table.add(row.name, grid, str(row.method.damping))
        results, shared = together(case, next(row for row in chosen if row.name == DEFAULT), out)
        figures.append(shared)
        if seed == args.seeds[0]:
            draw(args.results, data, pairs, images, results)
    command = f"python -m recipes.emoji_text.benchmark --artists {args.artists} --seeds {' '.join(map(str, args.seeds))}"
    command += f" --pairs {args.pairs}" if args.pairs != len(data.held_out) else ""
    command += f" --methods {' '.join(args.methods)}" if args.methods else ""
    machine = f"{platform.machine()}, torch {torch.__version__}"
    chance = {
        kind: float(relevant([q for q in asked if q.group == kind], data.train_set.pairs).float().mean())
        for kind in KINDS
    }
    images_each = int(relevant(asked[:1], data.train_set.pairs).sum())
    head = (
        f"`{command}`; {machine}; {len(data.train_set)} training images, {len(pairs)} held-out pairs.\n"
        f"Chance: object {chance['object']:.3f}, artist {chance['artist']:.3f}. An object has {images_each} images, so its P@10 is at most {images_each / 10:.2f}.\n\n"
        f"Of the {len(pairs)} generated images an independent classifier recognises the object in "
        f"{', '.join(map(str, counts['object']))}, the artist in {', '.join(map(str, counts['artist']))}.\n"
    )
    described: dict[str, Any] = {
        "command": command,
        "machine": machine,
        "chance": chance,
        "recognised": counts,
        "two concepts of one prompt": figures,
        "concepts": [q.concept().to_dict() for q in asked[: 2 * len(KINDS)]],
    }
    print(table.write(args.results / "benchmark", described, head + asked_by_attributes(args.artists)))


if __name__ == "__main__":
    main()
