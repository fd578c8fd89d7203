"""Which signals tell, without a label, that a model has learnt the concept it is asked about?

python -m recipes.benchmarks.learnt --seeds 0 1 --runs runs/learnt      # resumable, one file a run

The same training at several lengths, down to none at all (two steps at a learning rate of zero),
two checkpoints each. Of every question the signals that an answer has at hand, and two truths that
use labels: *worth*, by how much the concept's name lowers the denoising loss of real images that
carry it, and the ranking's R-precision. The page also counts what the library's checks get wrong.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ctrak_lightning import Attributor, Concept, Sampler, methods
from ctrak_lightning.attribution.diagnostics import (
    BLIND,
    INDISTINCT,
    LOOKED_AT,
    STILL,
    beside,
    is_noise,
    self_check,
    stability,
)
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.survey import thumbnails_of
from ctrak_lightning.capture.trace import FAINT
from ctrak_lightning.methods.trajectories import Noised, State
from ctrak_lightning.metrics.functional import auroc, r_precision

from ..emoji_artists.data import KINDS, EmojiArtists
from ..emoji_artists.demo import ARTISTS
from ..emoji_artists.module import EmojiDiffusion
from ..pixels import conditions
from .replay import fitted
from .synthetic.figures import Synthetic
from .synthetic.model import SyntheticDiffusion
from .tables import command_of, grid, machine, parser_of, publish

LOSS_TIMESTEPS, DRAWS = 6, 2
CHECKPOINTS = 2
CARRIERS = 8
"""Real images of a concept that its worth is measured on, at most."""
METHOD = methods.influence()  # the default
WORTH, SURE = 0.01, 2.0
"""A concept counts as learnt where its name lowers the loss of real images by this share, and by
this many standard errors over images, where there are several."""
SIGNALS = ("strength", "self_check", "stability", "loss", "moved", "gain")
Row = Mapping[str, Any]
CHECKS: dict[str, Callable[[Row], bool]] = {
    f"strength < {FAINT:g}": lambda row: row["strength"] < FAINT,
    f"loss > {BLIND:g}": lambda row: row["loss"] > BLIND,
    f"losses moved by < {STILL:g}": lambda row: row["moved"] < STILL,
    f"self-check < {INDISTINCT:g}": lambda row: row["self_check"] < INDISTINCT,
    "the image is noise": lambda row: is_noise(row["neighbours"], row["neighbours_of_training"]),
}
"""What the library doubts an answer for."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A training that can be cut short: its lengths in optimizer steps (0 is the model before
    training), the metadata columns asked about, and the combinations of their values that are
    generated and asked about, one question per factor."""

    lengths: tuple[int, ...]
    factors: tuple[str, ...]
    combinations: list[dict[str, str]]
    sampler: Sampler
    module: Any
    data: Any

    def concepts(self) -> list[tuple[str, Concept]]:
        """Every factor of every combination, with the factor asked about."""
        return [
            (factor, Concept(f"{factor} {spec[factor]}", spec, without(spec, factor)))
            for spec in self.combinations
            for factor in self.factors
        ]

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Some of the training images."""
        found: dict[str, Any] = default_collate([self.data.train_set[i] for i in rows])
        return found


def without(spec: Mapping[str, str], factor: str) -> dict[str, str]:
    return {name: value for name, value in spec.items() if name != factor}


def emoji(
    seed: int, untrained: bool, *, artists: Sequence[str], batch_size: int, asked: int
) -> Subject:
    """The fine-tune of the demo."""
    data = EmojiArtists("new", list(artists), batch_size=batch_size)
    pairs = [dict(zip(KINDS, pair, strict=True)) for pair in data.held_out]
    return Subject(
        lengths=(0, 10, 30, 100, 200),
        factors=KINDS,
        combinations=pairs[asked * seed : asked * (seed + 1)],
        sampler=Sampler(steps=20, guidance=2.5),
        module=EmojiDiffusion("lora", 0.0, 0.0) if untrained else EmojiDiffusion("lora"),
        data=data,
    )


def synthetic(
    seed: int, untrained: bool, *, size: int, traced: int, lengths: tuple[int, ...]
) -> Subject:
    """A model from scratch."""
    data = Synthetic("paper", seed=seed, size=size, traced=traced)
    rate = 1e-12 if untrained else 2e-3
    return Subject(
        lengths=lengths,
        factors=tuple(data.variant.factors),
        combinations=[dict(combo) for combo in data.variant.combos()],
        sampler=Sampler(steps=20, guidance=3.0),
        module=SyntheticDiffusion("paper", size=size, learning_rate=rate),
        data=data,
    )


SUBJECTS: dict[str, Callable[[int, bool], Subject]] = {
    # Two artists in small batches: one new, by LoRA and tokens, and one that the base knows.
    "emoji": partial(emoji, artists=["noto", "openmoji"], batch_size=16, asked=6),
    "emoji_demo": partial(emoji, artists=ARTISTS, batch_size=32, asked=8),
    "synthetic": partial(synthetic, size=16, traced=120, lengths=(0, 30, 200, 800)),
    "synthetic_small": partial(synthetic, size=8, traced=60, lengths=(0, 10, 60, 300)),
}


def trained(subject: Subject, length: int, store: Path) -> None:
    """Trains for so many steps and traces half way and at the end."""
    steps = length or CHECKPOINTS
    options: dict[str, Any] = {
        "every_n_train_steps": steps // CHECKPOINTS,
        "batch_size": 32,
        "thumbnails": False,
    }
    fitted(subject.module, subject.data, steps, ConceptTracer(str(store), METHOD, **options))
    subject.module.eval()


def measured(subject: Subject, store: Path, seed: int) -> list[dict[str, Any]]:
    """A row of signals and truths for every question, each of an image of its own."""
    asked = subject.concepts()
    concepts = [concept for _, concept in asked]
    attributor = Attributor(store, subject.module, sampler=subject.sampler, record=False)
    seeds = [1000 * seed] * len(concepts)
    generation = attributor.generate([concept.present for concept in concepts], seeds)
    found = attributor.attribute_many(concepts, seeds, generation=generation)
    smooth = smoothness(subject, generation.latents)
    checkpoints = attributor.store.checkpoints
    losses = torch.stack([checkpoint.losses() for checkpoint in checkpoints])  # [M, N]
    check = cache(lambda damping: self_check(checkpoints, damping))
    worth_of = cache(lambda factor, value: worth(subject, factor, value))
    rows = []
    for i, (factor, concept) in enumerate(asked):
        answer, own = found[i], check(found[i].damping)
        value = concept.present[factor]  # type: ignore[index]
        labels = torch.tensor([name == value for name in answer.samples.metadata[factor]])
        rows.append(
            {
                "factor": factor,
                "value": value,
                "strength": answer.strength,
                "self_check": own.first / own.asked,
                "stability": stability(answer.checkpoint_scores, answer.weights),
                "loss": float(losses[-1].mean()),
                "moved": float(((losses[-1] - losses[0]).abs() / losses[0]).median()),
                "gain": gain(subject.module, concept, generation.latents[i]),
                "r_precision": float(r_precision(answer.scores, labels)),
                **smooth[i],
                **worth_of(factor, value),
            }
        )
    return rows


@torch.no_grad()
def smoothness(subject: Subject, latents: Tensor) -> list[dict[str, float]]:
    """How much neighbouring pixels correlate, in each of the generated images [B, ...] and in
    nearly all of the training images."""
    count = len(subject.data.train_set)
    some = subject.batch(range(0, count, count // LOOKED_AT + 1))
    thumbnails = thumbnails_of(subject.module.decode(subject.module.encode(some).latents))
    found = [beside(image, thumbnails) for image in subject.module.decode(latents)]
    return [{"neighbours": own, "neighbours_of_training": lowest} for own, lowest in found]


@torch.no_grad()
def errors(module: Any, state: State, latents: Tensor, specs: Sequence[Any]) -> Tensor:
    """``mean((e - eps)^2)`` [B]."""
    schedule = module.noise_schedule
    output = module.predict(state.x_t, state.t, conditions(module, specs))
    e = schedule.epsilon(output, state.x_t, state.t)
    a, s = schedule.levels(state.t, latents)
    error: Tensor = (e - (state.x_t - a * latents) / s).square().flatten(1).mean(1)
    return error


def gain(module: Any, concept: Concept, latents: Tensor) -> float:
    """Of the generated image, noised anew: how much lower its loss is with the concept than
    without, a share."""
    draws = latents.expand(DRAWS, *latents.shape)
    with_it = without_it = 0.0
    noised = Noised(timesteps=LOSS_TIMESTEPS, shared_noise=False)
    for state in noised.states(module, draws, {}, [f"draw-{i}" for i in range(DRAWS)], 0):
        with_it += float(errors(module, state, draws, [concept.present] * DRAWS).mean())
        without_it += float(errors(module, state, draws, [concept.absent] * DRAWS).mean())
    return 1 - with_it / without_it


def worth(subject: Subject, factor: str, value: str) -> dict[str, float | None]:
    """By how much the name lowers the loss of real images that carry it, told beside their other
    names: a share of the loss, and that in standard errors over images, None of a single one."""
    shown = [
        {name: subject.data.train_set[i][name] for name in subject.factors}
        for i in range(len(subject.data.train_set))
    ]
    carriers = [i for i, spec in enumerate(shown) if spec[factor] == value]
    carriers = carriers[:: max(1, len(shown) // 400)][:CARRIERS]
    specs = [shown[i] for i in carriers]
    latents = subject.module.encode(subject.batch(carriers)).latents.detach()
    present, absent = torch.zeros(len(carriers)), torch.zeros(len(carriers))
    noised = Noised(timesteps=LOSS_TIMESTEPS, shared_noise=False)
    for state in noised.states(subject.module, latents, {}, [str(i) for i in carriers], 1):
        others = [without(spec, factor) for spec in specs]
        present += errors(subject.module, state, latents, specs)
        absent += errors(subject.module, state, latents, others)
    share = (absent - present) / absent
    mean = float(share.mean())
    if len(carriers) < 2:
        return {"worth": mean, "worth_z": None}
    error = max(float(share.std()) / len(carriers) ** 0.5, 1e-12)
    return {"worth": mean, "worth_z": mean / error}


def run(name: str, seed: int, length: int, out: Path) -> dict[str, Any]:
    """One length of one training: all its rows, in a file that is not made twice."""
    path = out / f"{name}-{seed}-{length}.json"
    if not path.exists():
        L.seed_everything(seed, verbose=False)
        subject = SUBJECTS[name](seed, length == 0)
        store = out / path.stem
        trained(subject, length, store)
        rows = [{"steps": length, **row} for row in measured(subject, store, seed)]
        facts = {"subject": name, "seed": seed, "steps": length, "rows": rows}
        path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def learnt(row: Row) -> bool:
    """Without a training step nothing is, even where random weights happen to lower a loss."""
    sure = row["worth_z"] is None or row["worth_z"] >= SURE
    return bool(row["steps"] > 0 and row["worth"] >= WORTH and sure)


GROUPS: dict[str, Callable[[Row], bool]] = {
    "untrained": lambda row: row["steps"] == 0,
    "trained, not learnt": lambda row: row["steps"] > 0 and not learnt(row),
    "learnt": learnt,
}


def doubted(row: Row) -> bool:
    return any(check(row) for check in CHECKS.values())


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each length of each training: how many concepts are learnt, the signals' medians,
    how many answers are doubted."""
    lines = []
    for each in runs:
        rows = each["rows"]
        truth = [learnt(row) for row in rows]
        doubts = [
            [doubted(row) for row in rows if learnt(row) is wanted] for wanted in (False, True)
        ]
        lines.append(
            [
                f"{each['subject']}, seed {each['seed']}",
                each["steps"],
                f"{sum(truth)} of {len(rows)}",
                *(f"{sum(part)} of {len(part)}" for part in doubts),
                *(median(rows, name) for name in (*SIGNALS, "worth", "r_precision")),
            ]
        )
    heads = ("training", "steps", "learnt", "doubted: not learnt", "doubted: learnt")
    return grid([*heads, *SIGNALS, "worth", "R-precision"], lines)


def median(rows: Sequence[Row], name: str) -> str:
    return f"{statistics.median(row[name] for row in rows if row[name] is not None):.3g}"


def separations(rows: Sequence[Row]) -> dict[str, float]:
    """AUROC of every signal, larger taken for learnt; 0.5 is chance."""
    truth = torch.tensor([learnt(row) for row in rows])

    def column(name: str) -> Tensor:
        return torch.tensor([row[name] or 0.0 for row in rows], dtype=torch.float64)

    return {name: float(auroc(column(name), truth)) for name in SIGNALS}


def page(runs: Sequence[dict[str, Any]], head: str) -> str:
    rows = [row for run in runs for row in run["rows"]]
    taught = [row for row in rows if row["steps"] > 0]
    every, those = separations(rows), separations(taught)
    seeds = sorted({run["seed"] for run in runs})
    counts = []
    for name, check in (*CHECKS.items(), ("any", doubted)):
        cells = [name]
        for seed in seeds:
            own = [row for run in runs if run["seed"] == seed for row in run["rows"]]
            for belongs in GROUPS.values():
                asked = [row for row in own if belongs(row)]
                cells.append(f"{sum(map(check, asked))} of {len(asked)}")
        counts.append(cells)
    lines = [
        f"{head}. Medians over the questions of a training; *learnt*: the name lowers the loss of "
        f"real images that carry it by at least {WORTH:.0%}, and by {SURE:g} standard errors over "
        "images where there are several; *doubted*: any of the library's checks fails.",
        "",
        *table(runs),
        "",
        f"What separates learnt from not, over all {len(rows)} questions, and over those "
        f"{len(taught)} about models that had taken a step (AUROC, larger taken for learnt; 0.5 is "
        "chance):",
        "",
        *grid(
            ("signal", "all", "trained"),
            [(name, f"{every[name]:.2f}", f"{those[name]:.2f}") for name in SIGNALS],
        ),
        "",
        "How many answers each check doubts. The thresholds were set on trainings of seed 0 and "
        "of at most 30 steps (and one untrained of seed 1); all others were looked at "
        "afterwards. Seed 1 has other data (synthetic) or other questions (emoji).",
        "",
        *grid(["check", *(f"seed {seed}, {name}" for seed in seeds for name in GROUPS)], counts),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.learnt", __doc__)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="in steps, for the subjects' own")
    parser.add_argument("--runs", type=Path, default=Path("runs/learnt"))
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    found = []
    for name in sorted(args.subjects):
        for seed in args.seeds:
            for length in args.lengths or SUBJECTS[name](seed, True).lengths:
                found.append(run(name, seed, length, args.runs))
                print(f"{name}, seed {seed}, {length} steps", flush=True)
    text = page(found, f"`{command_of(parser, args)}`; {machine()}")
    publish(args.results / "learnt.md", text)


if __name__ == "__main__":
    main()
