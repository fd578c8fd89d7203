"""The counterfactual in units of a concept's own images: leave out the 2 of an object's 7 images that
a method blames most, of every object at once, and fine-tune again.

python -m recipes.benchmarks.own_images            # after `influence`, whose answers it takes
python -m recipes.benchmarks.own_images --count 1 --seeds 0 1

Only an object's own images matter to it, so that one fine-tune judges all 64 objects. Asked about the
real drawing. Resumable: what is committed in `results/retrained.safetensors` is not done again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..emoji_artists.data import EmojiArtists
from ..emoji_artists.evaluate import Question
from . import retrain
from .influence import crossed_objects, drawing_scores, object_questions
from .outcomes import Outcomes, judged
from .tables import command_of, grid, machine, parser_of, publish

GRADIENTS = ("influence", "concept_trak")
METHODS = (*GRADIENTS, "label and grey-level correlation", "random")
MEASURES = {"loss": 1000.0, "judge": 1.0, "likeness": 1.0}


def name_of(method: str, count: int, traced: int) -> str:
    """The name of a run, without its seed; what takes no gradients is the same for every traced
    one."""
    words = "".join(letter if letter.isalnum() else "_" for letter in method)
    return f"own-{count}-{words}" + (f"-traced{traced}" if method in GRADIENTS else "")


def left_out(
    scores: Tensor, asked: Sequence[Question], pairs: Sequence[tuple[str, str]], count: int
) -> set[int]:
    """The places of each object's best-ranked own images, by its question's scores [Q, N]."""
    found: set[int] = set()
    for row, question in zip(scores, asked, strict=True):
        own = torch.tensor([i for i, (name, _) in enumerate(pairs) if name == question.object])
        found |= set(own[row[own].topk(count).indices].tolist())
    return found


def drops(outcomes: Outcomes, method: str, count: int, traced: int, seed: int) -> dict[str, Tensor]:
    """By measure, what each object lost [64] to a fine-tune of everything with the same seed."""
    names = f"full-seed{seed}", f"{name_of(method, count, traced)}-seed{seed}"
    full, without = (outcomes.only([name]) for name in names)
    return {
        measure: (full.strength("object", measure) - without.strength("object", measure))[
            0
        ].double()
        for measure in MEASURES
    }


def table(found: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """A line per method: the mean drop of every measure, [F, 64] of F fine-tunes, with intervals over
    fine-tunes and objects, crossed; and less the best row without gradients by the loss."""
    plain = [name for name in found if name not in GRADIENTS]
    best = max(plain, key=lambda name: float(found[name]["loss"].mean()))

    def shown(values: Tensor, scale: float, sign: str = "") -> str:
        # The same draws for all, so that differences are paired.
        low, high = (scale * end for end in crossed_objects(values))
        mean = scale * float(values.mean())
        return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"

    cells = []
    for name, figures in found.items():
        row = [shown(figures[measure], scale) for measure, scale in MEASURES.items()]
        less = figures["loss"] - found[best]["loss"]
        cells.append([name, *row, "" if name == best else shown(less, 1000.0, "+")])
    return grid(["method", "loss x 1000", "odds", "likeness", f"loss less *{best}*"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.own_images", __doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="rows")
    parser.add_argument("--count", type=int, default=2, help="of an object's seven images")
    parser.add_argument(
        "--traced", nargs="+", type=int, default=[0, 1], help="seeds of traced runs"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the fine-tunes")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    folder, data = args.runs / "labelled", EmojiArtists("new")
    asked, pairs = object_questions(data), data.train_set.pairs
    known = judged(folder, Outcomes.load("labelled", args.results))
    jobs = []
    for traced in args.traced:
        wanted = [
            (method, seed)
            for method in args.methods
            for seed in args.seeds
            if f"{name_of(method, args.count, traced)}-seed{seed}" not in known.names
        ]
        if not wanted:
            continue
        scores = drawing_scores(folder, data, traced, args.methods)
        for method, seed in wanted:
            out = left_out(scores[method], asked, pairs, args.count)
            kept = sorted(set(range(len(pairs))) - out)
            run = retrain.Run(name_of(method, args.count, traced), kept)
            jobs += [(run, seed)] if (run, seed) not in jobs else []
    retrain.finish(folder, "labelled", jobs)
    known = judged(folder, known)
    known.save("labelled", args.results)
    found = {}
    for method in args.methods:
        each = [
            drops(known, method, args.count, traced, seed)
            for traced in args.traced
            for seed in args.seeds
        ]
        found[method] = {m: torch.stack([one[m] for one in each]) for m in MEASURES}
    lines = [
        f"`{command_of(parser, args)}`; {machine()}; {args.count} of every object's 7 images left "
        f"out, {len(args.traced) * len(args.seeds)} fine-tunes a method. What each object lost "
        "[95 % over objects and fine-tunes, crossed].",
        "",
        *table(found),
    ]
    publish(args.results / "own_images.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
