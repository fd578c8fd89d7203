"""The AbC benchmark: are the exemplars that a token was learnt from found among a pool of other images?

python -m recipes.abc.benchmark --root DATA/abc --tasks all_tasks.json --model FOLDER_OF_STABLE_DIFFUSION

For every customised model of the tasks: tunes it on its exemplars, generates the queries' images, traces exemplars and pool,
asks every method, and writes `results/benchmark.json` and `.md`. Resumable. Neither data nor model are in this repository;
README.md says where they come from.
"""

import argparse
import json
import platform
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution.baselines import image_similarity
from ctrak_lightning.metrics import functional
from recipes.abc.components import load_components
from recipes.abc.data import AbC, Customisation, read_captions, read_pool, read_tasks, without_token
from recipes.abc.module import CustomDiffusion
from recipes.benchmarks.compare import Case, Variant, answers_folder, compare
from recipes.benchmarks.replay import SaveTrained, load_trained
from recipes.benchmarks.tables import RETRIEVAL, Table
from recipes.benchmarks.variants import table_variants
from recipes.pictures import image_grid

TIMESTEPS = 5
CHECKPOINTS = 2
K = 10
RESULTS = Path(__file__).parent / "results"


def customise(
    folder: Path, module: CustomDiffusion, data: AbC, seed: int, arguments: dict[str, object]
) -> list[int]:
    """Tunes the model on its exemplars unless ``folder`` holds that very run; loads the last weights and returns the steps kept.

    Raises:
        ValueError: the folder holds a run with other arguments.
    """
    done = folder / "facts.json"
    steps = [data.steps * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]
    if done.exists():
        held = json.loads(done.read_text(encoding="utf-8"))
        if held != arguments:
            raise ValueError(
                f"customise({str(folder)!r}): the folder holds a run with {held}, asked for was {arguments}. HINT: name a new "
                "folder (--runs)."
            )
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu" if module.device.type == "cpu" else "gpu",
            devices=1,
            max_steps=data.steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[SaveTrained(folder, steps)],
        )
        device = module.device
        trainer.fit(module, datamodule=data)
        module.to(device)
        done.write_text(json.dumps(arguments) + "\n", encoding="utf-8")
    load_trained(module, folder, steps[-1])
    return steps


def concepts(customisation: Customisation) -> list[Concept]:
    """Each query's prompt against the same without the token."""
    return [
        Concept(customisation.entry.name, prompt, without_token(prompt), alone=customisation.train_prompt)
        for prompt in customisation.prompts
    ]


def rows(steps: Sequence[int], only: Sequence[str] | None) -> list[Variant]:
    """The gradient methods of the table, without those that trace other layers than the trained ones (here keys, values and
    the token) and those that ask of given images (all images asked about are generated).

    Raises:
        ValueError: a name of ``only`` is unknown, or of a row that is left out.
    """
    table = table_variants(TIMESTEPS, tuple(steps), only)
    chosen = [v for v in table if v.layers is None and v.scope != "given"]
    if missing := sorted(set(only or []) - {variant.name for variant in chosen}):
        raise ValueError(
            f"rows(only={only}): {missing} trace no layer that is trained here, or ask of given images. HINT: leave them out."
        )
    return chosen


def figures(scores: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """The figures of one customised model, one value per query [Q].

    ``recall@10`` is hits over min(10, exemplars), so that 1 can be reached; the published evaluation divides by all exemplars,
    which is the figure ``recall@10 of all``.

    Args:
        scores: [Q, N].
        relevant: which of the images are exemplars, bool [N].
    """
    expanded = relevant.expand(scores.shape)
    recall = functional.recall_at_k(scores, expanded, K)
    exemplars = int(relevant.sum())
    return {
        "recall@10": recall,
        "recall@10 of all": recall * min(K, exemplars) / exemplars,
        **{name: metric(scores, expanded) for name, metric in RETRIEVAL.items() if name != "P@10"},
    }


def references(data: AbC, images: Tensor) -> dict[str, Tensor]:
    """Rankings without gradients [Q, N]: caption search for the token, likeness in pixels, and a constant, which is chance."""
    told = data.relevant().float().expand(len(images), -1)
    rows = [image_similarity(images, (batch["image"] + 1) / 2) for batch in data.trace_dataloader()]
    return {
        "caption_search": told,
        "pixel_similarity": torch.cat(rows, 1),
        "chance": torch.zeros(told.shape),
    }


def joined(parts: Sequence[tuple[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The figures of several models as one: over all queries, and per test case where it has two queries or more.

    Args:
        parts: the test case and the figures of each model.
    """
    total = Counter()  # type: Counter[str]
    for case, part in parts:
        total[case] += len(part["recall@10"])
    found = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
    for case, queries in total.items():
        if queries > 1:
            for name in parts[0][1]:
                found[f"{name}, {case}"] = torch.cat([part[name] for c, part in parts if c == case])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of json/, exemplar/ and laion_subset/"
    )
    parser.add_argument("--tasks", type=Path, required=True, help="file of the queries' prompts")
    parser.add_argument(
        "--model", required=True, help="folder, or hub name, of a Stable-Diffusion-like model"
    )
    parser.add_argument(
        "--captions", type=Path, default=None, help="JSON of the pool's captions; else all empty"
    )
    parser.add_argument("--pool", type=int, default=1000, help="pool images; 0 for all")
    parser.add_argument("--models", type=int, default=None, help="customised models; all by default")
    parser.add_argument("--queries", type=int, default=None, help="queries of each; all by default")
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, default=250, help="optimiser steps of each model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=None, help="rows of the table; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/abc"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.steps < CHECKPOINTS:
        parser.error(f"--steps {args.steps}: expected at least {CHECKPOINTS}, one for each checkpoint.")
    tasks = read_tasks(args.root, args.tasks, args.models, args.queries)
    if sum(len(task.prompts) for task in tasks) < 2:
        parser.error("fewer than 2 queries in all: an interval needs two values.")
    pool = read_pool(args.root, args.pool or None, args.seed)
    captions = read_captions(args.captions, pool) if args.captions else dict.fromkeys(pool, "")
    found: dict[str, list[tuple[str, dict[str, dict[str, Tensor]]]]] = {}
    honest: dict[str, str] = {}
    exemplars = {}
    for task in tasks:
        folder = args.runs / task.entry.folder
        data = AbC(args.root, task, pool, captions, args.size, args.batch_size, args.steps)
        module = CustomDiffusion(load_components(args.model), task.train_prompt).eval().to(args.device)
        arguments = {
            "exemplars": list(task.entry.exemplars),
            "train_prompt": task.train_prompt,
            **{name: getattr(args, name) for name in ("model", "size", "steps", "batch_size", "seed")},
        }
        variants = rows(customise(folder, module, data, args.seed, arguments), args.methods)
        case = Case(
            folder=folder,
            module=module,
            batches=data.trace_dataloader(),
            concepts=concepts(task),
            seeds=list(range(len(task.prompts))),
            sampler=Sampler(steps=args.sampling_steps, guidance=args.guidance),
            batch_size=args.batch_size,
        )
        sampled = (task.prompts, args.sampling_steps, args.guidance)
        out = answers_folder(folder, data.traced_set.paths, captions, *sampled)
        scores, images = compare(case, variants, out)
        image_grid(folder / "queries.png", images, min(8, len(images)), 1)
        relevant = data.relevant()
        exemplars[task.entry.folder] = int(relevant.sum())
        grids = {name: {d: figures(s, relevant) for d, s in grid.items()} for name, grid in scores.items()}
        for variant in variants:
            honest[variant.name] = str(variant.method.damping)
        for name, ranking in references(data, images).items():
            grids[name], honest[name] = {"None": figures(ranking, relevant)}, "None"
        for name, grid in grids.items():
            found.setdefault(name, []).append((task.entry.test_case, grid))
    table = Table(["recall@10", "recall@10 of all", "mAP", "R-precision"])
    for name, parts in found.items():
        grid = {d: joined([(case, by_damping[d]) for case, by_damping in parts]) for d in parts[0][1]}
        table.add(name, grid, honest[name])
    facts = {
        "command": f"python -m recipes.abc.benchmark --steps {args.steps} --pool {args.pool} --size {args.size} --seed {args.seed}",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "model": args.model,
        "pool": len(pool),
        "captions": args.captions is not None,
        "exemplars": exemplars,
        "queries": sum(len(task.prompts) for task in tasks),
    }
    head = (
        f"`{facts['command']}`; {facts['machine']}. {len(tasks)} customised models, {facts['queries']} queries, {len(pool)} pool "
        f"images, {'captioned' if args.captions else 'all with the empty prompt'}. Whether a generated image shows its concept is "
        "judged by nobody: look at queries.png of each run.\n"
    )
    print(table.write(args.results / "benchmark", facts, head))


if __name__ == "__main__":
    main()
