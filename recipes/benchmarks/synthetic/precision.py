"""The Synthetic benchmark: precision@10 for each factor, on combinations that training showed and
on those it did not.

python -m recipes.benchmarks.synthetic.precision               # the paper's construction, one seed
python -m recipes.benchmarks.synthetic.precision --variant hard --seeds 0 1 2

Trains what is missing, asks every method, and writes `results/synthetic_<variant>.md`. Resumable.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning import Concept

from ..compare import Case, answers_folder, compare
from ..tables import Table, command_of, machine, parser_of, publish, retrieval
from ..variants import swapped, table_variants
from .figures import VARIANTS, Combo, prompt
from .train import SAMPLERS, Run, folder_of, train

TIMESTEPS = 5
QUERIES = {"paper": 16, "hard": 2}
MOST_TRIES = 4
METRICS = ("P@10", "R-precision")
WHERE = ("held out", "in distribution")
COUNTER_CONDITIONS = ("dropped", "swapped")


def verified_seeds(run: Any, combo: Combo, wanted: int) -> list[int]:
    """The seeds whose image shows the combination, among four times as many as are wanted.

    Raises:
        ValueError: too few show it; the message has the count.
    """
    seeds = list(range(MOST_TRIES * wanted))
    accepted = run.verifier.verify(run.images([combo] * len(seeds), seeds), [combo] * len(seeds))
    shown: list[int] = accepted.nonzero()[:, 0].tolist()
    if len(shown) < wanted:
        raise ValueError(
            f"verified_seeds({combo}): {len(shown)} of {len(seeds)} generated images "
            f"show it, expected {wanted}. HINT: train longer, or ask fewer queries."
        )
    return shown


def concept(run: Run, combo: Combo, factor: str, counter: str) -> Concept:
    """A combination against the same without the factor's token, or with its next value instead; of
    a model that reads prompts, one of the two concepts of its prompt."""
    values = run.data.variant.factors[factor]
    other = combo | {factor: values[(values.index(combo[factor]) + 1) % len(values)]}
    if run.facts["arguments"].get("condition") == "prompt":
        if counter == "swapped":
            return Concept(combo[factor], prompt(combo), prompt(other))
        parts = Concept.split(prompt(combo), list(combo.values()))
        return parts[list(combo).index(factor)]
    dropped = {name: value for name, value in combo.items() if name != factor}
    return Concept(combo[factor], dict(combo), other if counter == "swapped" else dropped)


def questions(run: Run, queries: int) -> list[tuple[Combo, str, int]]:
    """(combination, factor, image seed) of every question."""
    return [
        (combo, factor, seed)
        for combo in run.data.variant.combos()
        for seed in verified_seeds(run, combo, queries)[:queries]
        for factor in combo
    ]


def figures(run: Run, asked: list[tuple[Combo, str, int]], scores: Tensor) -> dict[str, Tensor]:
    """Every retrieval metric per factor and kind of combination, one value per question."""
    traced = run.data.train_set.combos[: run.data.traced]
    relevant = torch.tensor(
        [[shown[factor] == combo[factor] for shown in traced] for combo, factor, _ in asked]
    )
    kinds = [f"{WHERE[combo not in run.data.held_out]}, {factor}" for combo, factor, _ in asked]
    return retrieval(scores, relevant, kinds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.synthetic.precision", __doc__)
    counters = list(COUNTER_CONDITIONS)
    parser.add_argument("--variant", choices=list(VARIANTS), default="paper")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--condition", choices=("tokens", "prompt"), default="tokens")
    parser.add_argument("--methods", nargs="+", default=None, help="rows; all by default")
    parser.add_argument("--counters", nargs="+", choices=counters, default=counters)
    parser.add_argument("--runs", type=Path, default=Path("runs/synthetic"))
    args = parser.parse_args(argv)
    kinds = list(itertools.product(METRICS, WHERE, VARIANTS[args.variant].factors))
    table = Table([", ".join(each) for each in kinds])
    for seed in args.seeds:
        folder = folder_of(args.runs, args.variant, seed, args.condition)
        run = train(folder, args.variant, seed, condition=args.condition)
        asked = questions(run, QUERIES[args.variant])
        # Everything asked about is generated here.
        scopes, steps = ("local", "global"), run.facts["checkpoints"]
        rows = table_variants(TIMESTEPS, steps, args.methods, scopes=scopes)
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
        chosen = list(rows) if "dropped" in args.counters else []
        if "swapped" in args.counters:
            chosen += swapped(rows)
        found, _ = compare(case, chosen, answers_folder(folder, asked, run.data.traced))
        honest = {row.name: row.damping for row in chosen}
        table.fill(found, partial(figures, run, asked), honest)
    count = QUERIES[args.variant]
    head = f"`{command_of(parser, args)}`; {machine()}; {count} verified queries a combination."
    publish(args.results / f"synthetic_{args.variant}.md", table.page(head))


if __name__ == "__main__":
    main()
