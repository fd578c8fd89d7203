"""The Synthetic benchmark: precision@10 for each factor, on combinations that training showed and on those it did not.

python -m recipes.synthetic.benchmark                     # the paper's construction, one seed
python -m recipes.synthetic.benchmark --variant hard --seeds 0 1 2

Trains what is missing, asks every method, and writes `results/benchmark_<variant>.json` and `.md`. Resumable.
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning import Concept
from ctrak_lightning.metrics import functional
from recipes.benchmarks.compare import Case, answers_folder, compare
from recipes.benchmarks.plots import bars
from recipes.benchmarks.tables import NOTE, markdown, summarised
from recipes.benchmarks.variants import table_variants
from recipes.synthetic.sampling import SAMPLERS, generate
from recipes.synthetic.train import Run, train
from recipes.synthetic.variants import VARIANTS, Combo, caption, prompt

TIMESTEPS = 5
QUERIES = {"paper": 16, "hard": 2}
MOST_TRIES = 4
MEASURE = {"paper": "P@10", "hard": "R-precision"}
COUNTER_CONDITIONS = ("dropped", "swapped")
RESULTS = Path(__file__).parent / "results"


def verified_seeds(run: Run, combo: Combo, wanted: int) -> list[int]:
    """The first ``wanted`` seeds whose image shows the combination.

    Raises:
        ValueError: among four times as many seeds too few show it; the message has the count.
    """
    seeds = list(range(MOST_TRIES * wanted))
    images = generate(run.module, [combo] * len(seeds), seeds)
    accepted = run.verifier.verify(images, [combo] * len(seeds)).tolist()
    shown = [seed for seed, fine in zip(seeds, accepted, strict=True) if fine]
    if len(shown) < wanted:
        raise ValueError(
            f"verified_seeds({caption(combo)!r}): {len(shown)} of {len(seeds)} generated images show it, expected {wanted}. "
            "HINT: train longer, or ask fewer queries."
        )
    return shown[:wanted]


def concept(run: Run, combo: Combo, factor: str, counter: str) -> Concept:
    """A combination against the same without the factor's token, or with its next value instead; of a model that reads
    prompts, one of the two concepts of its prompt."""
    values = run.data.variant.factors[factor]
    other = values[(values.index(combo[factor]) + 1) % len(values)]
    if run.facts["arguments"].get("condition") == "prompt":
        if counter == "swapped":
            return Concept(combo[factor], prompt(combo), prompt(combo | {factor: other}))
        parts = Concept.split(prompt(combo), list(combo.values()))
        return parts[list(combo).index(factor)]
    absent = {name: value for name, value in combo.items() if name != factor}
    if counter == "swapped":
        absent[factor] = other
    return Concept(combo[factor], dict(combo), absent)


def questions(run: Run, queries: int) -> list[tuple[Combo, str, int]]:
    """(combination, factor, image seed) of every question."""
    return [
        (combo, factor, seed)
        for combo in run.data.variant.combos()
        for seed in verified_seeds(run, combo, queries)
        for factor in combo
    ]


def figures(run: Run, asked: list[tuple[Combo, str, int]], scores: Tensor) -> dict[str, Tensor]:
    """precision@10, and R-precision, per factor and kind of combination, one value per question."""
    traced = run.data.train_set.combos[: run.data.traced]
    relevant = torch.tensor(
        [[shown[factor] == combo[factor] for shown in traced] for combo, factor, _ in asked]
    )
    found = {}
    for title, values in (
        ("P@10", functional.precision_at_k(scores, relevant)),
        ("R-precision", functional.r_precision(scores, relevant)),
    ):
        for where in ("held out", "in distribution"):
            for factor in run.data.variant.factors:
                rows = [
                    (combo in run.data.held_out) == (where == "held out") and f == factor
                    for combo, f, _ in asked
                ]
                found[f"{title}, {where}, {factor}"] = values[torch.tensor(rows)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=list(VARIANTS), default="paper")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--condition", choices=("tokens", "prompt"), default="tokens")
    parser.add_argument("--methods", nargs="+", default=None, help="rows of the table; all by default")
    parser.add_argument("--timesteps", nargs="+", type=int, default=[TIMESTEPS], help="a row for each number")
    parser.add_argument("--counters", nargs="+", choices=COUNTER_CONDITIONS, default=list(COUNTER_CONDITIONS))
    parser.add_argument("--runs", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--suffix", default="", help="of the results' file names, for a table of its own")
    args = parser.parse_args()
    name = f"benchmark_{args.variant}{args.suffix}"
    honest: dict[str, list[dict[str, Tensor]]] = {}
    grids: dict[str, list[dict[str, dict[str, Tensor]]]] = {}
    for seed in args.seeds:
        by_prompt = "-prompt" if args.condition == "prompt" else ""
        folder = args.runs / f"{args.variant}{by_prompt}-{seed}"
        run = train(folder, args.variant, seed, condition=args.condition)
        asked = questions(run, QUERIES[args.variant])
        table = [
            replace(row, name=row.name if count == TIMESTEPS else f"{row.name}, {count} timesteps")
            for count in args.timesteps
            for row in table_variants(count, tuple(run.facts["checkpoints"]), args.methods)
        ]
        wordings = {
            counter: [concept(run, combo, factor, counter) for combo, factor, _ in asked]
            for counter in COUNTER_CONDITIONS
        }
        case = Case(
            folder=folder,
            module=run.module,
            batches=run.data.trace_dataloader(),
            concepts=wordings["dropped"],
            seeds=[seed for _, _, seed in asked],
            sampler=SAMPLERS[args.variant],
            counters=wordings,
        )
        for counter in args.counters:
            # A whole-image method does not see the counter-condition.
            chosen = [v for v in table if counter == "dropped" or v.method.sees_absent]
            chosen = [v for v in chosen if v.scope != "given"]  # everything asked about is generated here
            if counter != "dropped":
                chosen = [replace(v, name=f"{v.name}, {counter}", counters=(counter,)) for v in chosen]
            # Traces do not depend on the counter-condition: both share them.
            found, _ = compare(case, chosen, answers_folder(folder, asked, run.data.traced))
            for variant in chosen:
                grid = {
                    damping: figures(run, asked, scores) for damping, scores in found[variant.name].items()
                }
                honest.setdefault(variant.name, []).append(grid[str(variant.method.damping)])
                grids.setdefault(variant.name, []).append(grid)
    seeds = " ".join(map(str, args.seeds))
    facts = {
        "command": f"python -m recipes.synthetic.benchmark --variant {args.variant} --seeds {seeds}"
        + (f" --condition {args.condition}" if args.condition != "tokens" else "")
        + (f" --methods {' '.join(args.methods)}" if args.methods else "")
        + (f" --timesteps {' '.join(map(str, args.timesteps))}" if args.timesteps != [TIMESTEPS] else "")
        + (f" --counters {' '.join(args.counters)}" if len(args.counters) < len(COUNTER_CONDITIONS) else "")
        + (f" --suffix {args.suffix}" if args.suffix else ""),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "queries_per_combination": QUERIES[args.variant],
        "rows": {name: summarised(per_seed, grids[name]) for name, per_seed in honest.items()},
    }
    (args.results / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    rows = facts["rows"]
    assert isinstance(rows, dict)
    keys = [key for key in next(iter(rows.values())) if key.startswith(MEASURE[args.variant])]
    bars(
        args.results / f"{name}.png",
        rows,
        keys,
        f"Synthetic, {args.variant}: mean, 95 % interval; blue: best damping by the metric itself",
        ours=("concept_trak", "concept_trak_cross_attention"),
    )
    lines = [
        f"`{facts['command']}`; {facts['machine']}; {facts['queries_per_combination']} verified queries a combination."
    ]
    text = "\n".join([*lines, NOTE, "", *markdown(rows, list(next(iter(rows.values()))))]) + "\n"
    (args.results / f"{name}.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
