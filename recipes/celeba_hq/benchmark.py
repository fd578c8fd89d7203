"""The CelebA-HQ benchmark: precision@10 for each attribute, on triples that training showed and on the one it did not.

python -m recipes.celeba_hq.benchmark --root DATA/CelebAMask-HQ
python -m recipes.celeba_hq.benchmark --root DATA/CelebAMask-HQ --attributes Male Young Wearing_Hat --seeds 0 1 2

Trains what is missing, generates images of every triple, traces and asks every method, and writes `results/benchmark.json` and
`.md`. Resumable. The data set is not in this repository; README.md says where to put it.
"""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution.baselines import image_similarity
from recipes.benchmarks.compare import Case, Variant, answers_folder, compare
from recipes.benchmarks.tables import RETRIEVAL, Table
from recipes.benchmarks.variants import table_variants
from recipes.celeba_hq.data import ATTRIBUTES, VALUES, CelebAHQ, Combo, caption
from recipes.celeba_hq.train import CHANNELS, PATCH, STEPS, Run, train
from recipes.celeba_hq.verifier import STEPS as VERIFIER_STEPS
from recipes.pictures import image_grid
from recipes.synthetic.sampling import generate_with

TIMESTEPS = 5
LEAST_POSITIVES = 10
MOST_TRIES = 4
SAMPLER = Sampler(steps=25, guidance=2.0)
COUNTER_CONDITIONS = ("dropped", "swapped")
WHERE = ("held out", "in distribution")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Question:
    """The image of a triple from one seed, and the attribute of it that is asked for."""

    combo: Combo
    attribute: str
    seed: int

    def concept(self, counter: str) -> Concept:
        """The triple against the same without the attribute's token, or with its other value instead."""
        value = self.combo[self.attribute]
        absent = {name: kept for name, kept in self.combo.items() if name != self.attribute}
        if counter == "swapped":
            absent[self.attribute] = VALUES[1 - VALUES.index(value)]
        return Concept(f"{self.attribute}={value}", dict(self.combo), absent)


@dataclass(frozen=True, slots=True)
class Queries:
    """The images that the verifier accepts: by caption their ``seeds``, and how many of ``tried`` images were ``accepted``."""

    seeds: dict[str, list[int]]
    accepted: dict[str, int]
    tried: int


def verified(run: Run, wanted: int, sampler: Sampler = SAMPLER) -> Queries:
    """The first ``wanted`` seeds of every triple whose image shows it, among four times as many.

    Raises:
        ValueError: too few images of a triple show it; the message has the count of every triple.
    """
    tried = MOST_TRIES * wanted
    seeds: dict[str, list[int]] = {}
    for combo in run.data.all_combos():
        images = generate_with(sampler, run.module, [combo] * tried, list(range(tried)))
        fine = run.verifier.verify(images, [combo] * tried)
        seeds[caption(combo)] = fine.nonzero()[:, 0].tolist()
    accepted = {name: len(found) for name, found in seeds.items()}
    if min(accepted.values()) < wanted:
        counts = "; ".join(f"{name}: {count} of {tried}" for name, count in accepted.items())
        raise ValueError(
            f"verified(queries={wanted}): too few generated images show what they should. Accepted: {counts}. HINT: train "
            "longer, ask fewer queries, or look at samples.png: a ranking for images that do not show the concept means "
            "nothing."
        )
    return Queries({name: found[:wanted] for name, found in seeds.items()}, accepted, tried)


def questions(data: CelebAHQ, queries: Queries) -> list[Question]:
    """For every image, the attributes in which it has the held-out triple's value.

    (Of a rare attribute almost all images have the other value: to find ten without glasses is no achievement.)
    """
    return [
        Question(combo, attribute, seed)
        for combo in data.all_combos()
        for seed in queries.seeds[caption(combo)]
        for attribute, value in data.held_out.items()
        if combo[attribute] == value
    ]


def relevance(data: CelebAHQ, asked: Sequence[Question]) -> Tensor:
    """Which traced images have the asked value of the asked attribute, bool [Q, N].

    Raises:
        ValueError: fewer than ten of them have it, so that precision@10 could not be 1.
    """
    shown = data.traced_combos()
    for name, value in data.held_out.items():
        count = sum(combo[name] == value for combo in shown)
        if count < LEAST_POSITIVES:
            raise ValueError(
                f"relevance: {count} of {len(shown)} traced images have {name}={value}, expected at least {LEAST_POSITIVES}. "
                "HINT: trace more images (--traced), or choose a commoner attribute."
            )
    return torch.tensor([[combo[q.attribute] == q.combo[q.attribute] for combo in shown] for q in asked])


def figures(data: CelebAHQ, asked: Sequence[Question], scores: Tensor) -> dict[str, Tensor]:
    """Every retrieval metric per attribute and kind of triple, one value per question; scores [Q, N]."""
    relevant = relevance(data, asked)
    found = {}
    for title, metric in RETRIEVAL.items():
        values = metric(scores, relevant)
        for where in WHERE:
            for name in data.factors:
                rows = [
                    (q.combo == data.held_out) == (where == "held out") and q.attribute == name for q in asked
                ]
                found[f"{title}, {where}, {name}"] = values[torch.tensor(rows)]
    return found


def rows(steps: Sequence[int], only: Sequence[str] | None) -> list[Variant]:
    """The gradient methods of the table, without those that ask of given images: all images asked about are generated.

    Raises:
        ValueError: a name of ``only`` is unknown, or of a row that is left out.
    """
    table = table_variants(TIMESTEPS, tuple(steps), only)
    chosen = [variant for variant in table if variant.scope != "given"]
    if missing := sorted(set(only or []) - {variant.name for variant in chosen}):
        raise ValueError(f"rows(only={only}): {missing} ask of given images. HINT: leave them out.")
    return chosen


def references(data: CelebAHQ, asked: Sequence[Question], images: Tensor) -> dict[str, Tensor]:
    """Rankings without gradients [Q, N]: by the labels, by pixels, and none at all (a constant, which is chance)."""
    relevant = relevance(data, asked)
    real = data.train_set.pixels[data.traced].float() / 255
    return {
        "label_search": relevant.float(),
        "pixel_similarity": image_similarity(images, real),
        "chance": torch.zeros(relevant.shape),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of the attribute list and CelebA-HQ-img/"
    )
    parser.add_argument("--images", type=Path, default=None, help="folder of the images, if another")
    parser.add_argument("--attributes", nargs=3, default=list(ATTRIBUTES))
    parser.add_argument("--held-out", nargs=3, choices=VALUES, default=["yes"] * 3)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--patch", type=int, default=PATCH)
    parser.add_argument("--channels", nargs=2, type=int, default=list(CHANNELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--verifier-steps", type=int, default=VERIFIER_STEPS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--traced", type=int, default=3000, help="training images to trace")
    parser.add_argument("--queries", type=int, default=16, help="verified images of each triple, at least 2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", default=None, help="rows of the table; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/celeba_hq"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.queries < 2:
        parser.error(f"--queries {args.queries}: expected at least 2, an interval needs two values.")
    columns = [f"P@10, {where}, {name}" for where in WHERE for name in args.attributes]
    table, accepted, verifiers = Table(columns), {}, {}
    for seed in args.seeds:
        folder = args.runs / f"seed-{seed}"
        data = CelebAHQ(
            args.root,
            args.attributes,
            args.held_out,
            args.size,
            args.images,
            args.batch_size,
            args.traced,
            seed,
            cache=args.runs / f"images-{args.size}.safetensors",
        )
        relevance(data, [])  # before hours of training
        run = train(
            folder,
            data,
            seed,
            steps=args.steps,
            patch=args.patch,
            channels=tuple(args.channels),
            verifier_steps=args.verifier_steps,
            device=args.device,
        )
        draw(folder / "samples.png", run)
        queries = verified(run, args.queries)
        accepted[str(seed)], verifiers[str(seed)] = queries.accepted, run.facts["verifier"]
        fill(table, run, questions(data, queries), folder, args.methods)
    facts = {
        "command": "python -m recipes.celeba_hq.benchmark "
        f"--attributes {' '.join(args.attributes)} --held-out {' '.join(args.held_out)} --size {args.size} "
        f"--steps {args.steps} --traced {args.traced} --queries {args.queries} --seeds {' '.join(map(str, args.seeds))}"
        + (f" --methods {' '.join(args.methods)}" if args.methods else ""),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "held_out": data.held_out,
        "training_images": len(data.train_set),
        "accepted": accepted,
        "tried": MOST_TRIES * args.queries,
        "verifier": verifiers,
    }
    counts = "; ".join(
        f"seed {seed}: {by_name[caption(data.held_out)]} of {facts['tried']}"
        for seed, by_name in accepted.items()
    )
    head = (
        f"`{facts['command']}`; {facts['machine']}. Held out: {caption(data.held_out)}. Generated images of it that the verifier "
        f"accepts: {counts}.\n"
    )
    print(table.write(args.results / "benchmark", facts, head))


def fill(table: Table, run: Run, asked: list[Question], folder: Path, methods: Sequence[str] | None) -> None:
    """Adds one training seed's rows: every method against both counter-conditions, and the references."""
    chosen = rows(run.facts["checkpoints"], methods)
    files = [run.data.train_set.files[i] for i in run.data.traced]
    out = answers_folder(folder, files, [(q.combo, q.attribute, q.seed) for q in asked], asdict(SAMPLER))
    for counter in COUNTER_CONDITIONS:
        case = Case(
            folder=folder,
            module=run.module,
            batches=run.data.trace_dataloader(),
            concepts=[question.concept(counter) for question in asked],
            seeds=[question.seed for question in asked],
            sampler=SAMPLER,
        )
        # A whole-image method does not see the counter-condition. Traces do not either: both share them.
        variants = chosen
        if counter == "swapped":
            variants = [replace(v, name=f"{v.name}_swapped") for v in chosen if v.method.sees_absent]
        found, images = compare(case, variants, out)
        for variant in variants:
            grid = {
                damping: figures(run.data, asked, scores) for damping, scores in found[variant.name].items()
            }
            table.add(variant.name, grid, str(variant.method.damping))
        if counter == "dropped":
            for name, scores in references(run.data, asked, images).items():
                table.add(name, {"None": figures(run.data, asked, scores)}, "None")


def draw(path: Path, run: Run, columns: int = 8) -> None:
    """Writes eight samples of every triple, a row each, to be looked at."""
    combos = [combo for combo in run.data.all_combos() for _ in range(columns)]
    images = generate_with(SAMPLER, run.module, combos, list(range(columns)) * (len(combos) // columns))
    image_grid(path, images, columns)


if __name__ == "__main__":
    main()
