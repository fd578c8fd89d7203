"""The main job: fine-tune on new emoji, trace, and ask who taught pairs that were held out."""

import json
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from ctrak_lightning import Attribution, Attributor, Method, Sampler, methods
from ctrak_lightning.attribution.baselines import label_search
from ctrak_lightning.callbacks import ConceptTracer, ProvenanceRecorder
from ctrak_lightning.methods.trajectories import Generation
from ctrak_lightning.report import write_report

from ..pictures import image_grid
from .data import KINDS, EmojiArtists
from .evaluate import Question, chance, questions, r_precision
from .module import EmojiDiffusion
from .sheets import contact_sheet

ARTISTS = ["noto", "fluent-emoji-high-contrast", "twemoji", "openmoji"]
TIMESTEPS = 3
SAMPLER = Sampler(steps=20, guidance=2.5)
SHEETS = "influence"
PAGE = ("christmas-tree", "twemoji")
"""The pair of the page, where it was held out."""
LABELS = {
    "influence": "`influence()`, the default",
    "concept_trak": "`concept_trak()`",
    "concept_trak_paper": "Concept-TRAK, cheap setting",
    "trak": "denoising loss (TRAK), whole image",
    "label_search": "label search (no gradients)",
    "chance": "chance",
}


def traced_methods() -> dict[str, Method]:
    """The methods of the table. Their dampings are fixed without labels: the library's defaults, but
    for the published method, whose figures here are of a damping of 1."""
    return {
        "influence": methods.influence(timesteps=TIMESTEPS),
        "concept_trak": methods.concept_trak(timesteps=TIMESTEPS),
        "concept_trak_paper": methods.concept_trak_paper(
            timesteps=TIMESTEPS, inversion_steps=2 * TIMESTEPS, damping=1.0
        ),
        "trak": methods.trak(timesteps=TIMESTEPS),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="ctrak demo", description=__doc__)
    parser.add_argument(
        "--out",
        type=str,
        default="demo",
        help="folder for pictures, tables and traces; emptied first",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=48,
        help="of the fine-tune; a third of them between two traces",
    )
    parser.add_argument(
        "--adaptation", default="lora", choices=["lora", "full"], help="what is fine-tuned"
    )
    parser.add_argument(
        "--artists", type=str, default=",".join(ARTISTS), help="comma-separated, or 'all'"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(None if argv is None else list(argv))

    started = time.monotonic()
    out = Path(args.out)
    _empty(out)
    L.seed_everything(args.seed, verbose=False)
    module = EmojiDiffusion(args.adaptation)
    data = EmojiArtists("new", None if args.artists == "all" else args.artists.split(","))
    seconds = _fit(module, data, out, args.epochs)

    before = time.monotonic()
    asked = questions(data.held_out)
    results = _ask(module, out, asked, args.seed)
    seconds["generate and attribute"] = time.monotonic() - before

    samples = next(iter(results.values()))[0].samples
    scores: dict[str, list[Tensor]] = {
        name: [r.scores for r in found] for name, found in results.items()
    }
    scores["label_search"] = list(label_search([question.concept() for question in asked], samples))
    table = {name: r_precision(asked, found, samples) for name, found in scores.items()}
    table["chance"] = chance(asked, samples)

    before = time.monotonic()
    _draw(results[SHEETS], data, out)
    seconds["pictures"] = time.monotonic() - before
    seconds["all"] = time.monotonic() - started
    _report(table, args, seconds, out, len(data.train_set), len(data.held_out))


def _empty(out: Path) -> None:
    """Removes what an earlier demo left, and nothing else."""
    marker = out / ".ctrak-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"--out {out}: the folder holds other files. HINT: name a new folder.")
    shutil.rmtree(out, ignore_errors=True)
    (out / "sheets").mkdir(parents=True)
    marker.touch()


def _fit(module: EmojiDiffusion, data: EmojiArtists, out: Path, epochs: int) -> dict[str, float]:
    before = time.monotonic()
    tracers = [
        ConceptTracer(str(out / "traces" / name), method, every_n_epochs=max(1, epochs // 3))
        for name, method in traced_methods().items()
    ]
    recorder = ProvenanceRecorder(
        str(out / "traces" / SHEETS), base_model="recipes/emoji_artists/base.safetensors"
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*tracers, recorder, TQDMProgressBar(leave=False)],
    )
    trainer.fit(module, datamodule=data)
    trials = sum(tracer.trial_seconds for tracer in tracers)
    return {"fine-tune and traces": time.monotonic() - before, "trials, part of it": trials}


def _ask(
    module: EmojiDiffusion, out: Path, asked: list[Question], seed: int
) -> dict[str, list[Attribution]]:
    concepts = [question.concept() for question in asked]
    seeds = [seed + i // len(KINDS) for i in range(len(asked))]
    results: dict[str, list[Attribution]] = {}
    generation = None
    for name in traced_methods():
        attributor = Attributor(out / "traces" / name, module, sampler=SAMPLER, progress=True)
        if generation is None:
            generation = attributor.generate([concept.present for concept in concepts], seeds)
        results[name] = attributor.attribute_many(concepts, seeds, generation=generation)
        if name == SHEETS:
            _write_page(attributor, asked, seeds, generation, out / "report.html")
    return results


def _write_page(
    attributor: Attributor,
    asked: list[Question],
    seeds: list[int],
    generation: Generation,
    path: Path,
) -> None:
    pairs = [(question.object, question.artist) for question in asked]
    first = pairs.index(PAGE) if PAGE in pairs else 0
    rows = range(first, first + len(KINDS))
    results = attributor.attribute_many(
        [asked[i].concept() for i in rows],
        [seeds[i] for i in rows],
        generation=generation.rows(torch.tensor(rows)),
        parts=True,
    )
    write_report(path, results)


def _draw(results: list[Attribution], data: EmojiArtists, out: Path) -> None:
    pairs = [results[i : i + len(KINDS)] for i in range(0, len(results), len(KINDS))]
    real = (data.held_out_set.images + 1) / 2
    for (name, artist), pair, drawing in tqdm(
        zip(data.held_out, pairs, real, strict=True), "contact sheets", len(pairs)
    ):
        contact_sheet(out / "sheets" / f"{artist}--{name}.png", pair, drawing)
    generated = torch.stack([pair[0].image for pair in pairs if pair[0].image is not None])
    image_grid(out / "generated.png", torch.stack([generated, real], 1).flatten(0, 1), columns=16)


def _report(
    table: dict[str, dict[str, float]],
    args: Any,
    seconds: dict[str, float],
    out: Path,
    traced: int,
    held_out: int,
) -> None:
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    packages = {name: version(name) for name in ("torch", "lightning", "diffusers")}
    command = (
        f"ctrak demo --epochs {args.epochs} --adaptation {args.adaptation} --artists "
        f"{args.artists} --seed {args.seed}"
    )
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    rows = [
        f"| {LABELS[name]} | {row['object']:.3f} | {row['artist']:.3f} |"
        for name, row in table.items()
    ]
    lines = [
        f"R-precision over {held_out} held-out (object, artist) pairs, {traced} training images, "
        "three checkpoints, dampings set without labels:",
        "",
        "| method | object | artist |",
        "|---|---|---|",
        *rows,
        "",
        f"`{command}`; {machine}; "
        + ", ".join(f"{name} {number}" for name, number in packages.items())
        + f"; peak memory {gigabytes:.1f} GB; seconds: "
        + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items()),
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {
        "r_precision": table,
        "seconds": seconds,
        "peak_gigabytes": gigabytes,
        "packages": packages,
    }
    document = json.dumps(facts | {"command": command, "machine": machine}, indent=1)
    (out / "results.json").write_text(document + "\n", encoding="utf-8")
    print("\n".join(["", *lines, "", f"contact sheets   {out / 'sheets'}"]))
    print(f"generated | real {out / 'generated.png'}\nreport           {out / 'report.html'}")
    print(
        f"traces           {out / 'traces'}  (ctrak info; ctrak verify {out / 'traces' / SHEETS})"
    )


if __name__ == "__main__":
    main()
