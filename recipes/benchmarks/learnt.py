"""Which signals tell, without a label, that a model has learnt the concept it is asked about?

python -m recipes.benchmarks.learnt --subjects emoji --seeds 0 --out runs/learnt      # resumable, one file a run
python -m recipes.benchmarks.learnt_table --out runs/learnt                           # writes results/learnt.json and .md

The same training at several lengths, down to none at all (two steps at a learning rate of zero), two checkpoints each. Of
every question the signals that an answer has at hand, and two truths that use labels: *worth*, by how much the concept's
name lowers the denoising loss of real images that carry it, and the ranking's R-precision.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ctrak_lightning import Attribution, Attributor, Concept, Sampler, methods
from ctrak_lightning.attribution.diagnostics import LOOKED_AT, beside, self_check, stability
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.survey import thumbnails_of
from ctrak_lightning.methods.trajectories import Noised, State
from ctrak_lightning.metrics.functional import r_precision, spearman
from recipes.emoji_artists.data import KINDS, EmojiArtists
from recipes.emoji_artists.demo import ARTISTS
from recipes.emoji_artists.module import EmojiDiffusion
from recipes.synthetic.data import Synthetic
from recipes.synthetic.module import SyntheticDiffusion

TIMESTEPS, LOSS_TIMESTEPS, DRAWS = 2, 6, 2
CHECKPOINTS = 2
CARRIERS = 8
"""Real images of a concept that its worth is measured on, at most."""
TOP = 10
METHOD = methods.concept_trak(timesteps=TIMESTEPS)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A training that can be cut short.

    Args:
        lengths: in optimizer steps; 0 is the model before training.
        factors: the metadata columns that are asked about.
        combinations: of factor values that are generated and asked about, one question per factor each.
        sampler: how images are generated.
    """

    lengths: tuple[int, ...]
    factors: tuple[str, ...]
    combinations: list[dict[str, str]]
    sampler: Sampler
    module: Any
    data: Any
    images: Dataset[dict[str, Any]]

    def concepts(self) -> list[tuple[str, Concept]]:
        """Every factor of every combination, with the factor asked about."""
        return [
            (factor, Concept(f"{factor} {spec[factor]}", spec, without(spec, factor)))
            for spec in self.combinations
            for factor in self.factors
        ]


def without(spec: Mapping[str, str], factor: str) -> dict[str, str]:
    return {name: value for name, value in spec.items() if name != factor}


def _emoji(seed: int, untrained: bool, artists: Sequence[str], batch_size: int, asked: int) -> Subject:
    data = EmojiArtists("new", list(artists), batch_size=batch_size)
    pairs = [dict(zip(KINDS, pair, strict=True)) for pair in data.held_out]
    return Subject(
        lengths=(0, 10, 30, 100, 200),
        factors=KINDS,
        combinations=pairs[asked * seed : asked * (seed + 1)],
        sampler=Sampler(steps=20, guidance=2.5),
        module=EmojiDiffusion("lora", 0.0, 0.0) if untrained else EmojiDiffusion("lora"),
        data=data,
        images=data.train_set,
    )


def emoji(seed: int, untrained: bool) -> Subject:
    """The fine-tune of the demo, but of two artists in small batches: new objects and a new artist by LoRA and tokens, and an artist
    that the base knows."""
    return _emoji(seed, untrained, ["noto", "openmoji"], batch_size=16, asked=6)


def emoji_demo(seed: int, untrained: bool) -> Subject:
    """The fine-tune of the demo: two artists that the base knows, and two new ones."""
    return _emoji(seed, untrained, ARTISTS, batch_size=32, asked=8)


def _synthetic(seed: int, untrained: bool, size: int, traced: int, lengths: tuple[int, ...]) -> Subject:
    data = Synthetic("paper", seed=seed, size=size, traced=traced)
    return Subject(
        lengths=lengths,
        factors=tuple(data.variant.factors),
        combinations=[dict(combo) for combo in data.variant.combos()],
        sampler=Sampler(steps=20, guidance=3.0),
        module=SyntheticDiffusion("paper", size=size, learning_rate=1e-12 if untrained else 2e-3),
        data=data,
        images=data.train_set,
    )


def synthetic(seed: int, untrained: bool) -> Subject:
    """A model from scratch."""
    return _synthetic(seed, untrained, 16, 120, (0, 30, 200, 800))


def synthetic_small(seed: int, untrained: bool) -> Subject:
    """The same with images of a quarter of the pixels."""
    return _synthetic(seed, untrained, 8, 60, (0, 10, 60, 300))


SUBJECTS = {
    "emoji": emoji,
    "emoji_demo": emoji_demo,
    "synthetic": synthetic,
    "synthetic_small": synthetic_small,
}


def trained(subject: Subject, length: int, store: Path) -> None:
    """Trains for so many steps and traces half way and at the end."""
    steps = length or CHECKPOINTS
    tracer = ConceptTracer(
        str(store), METHOD, every_n_train_steps=steps // CHECKPOINTS, batch_size=32, thumbnails=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[tracer],
    )
    trainer.fit(subject.module, datamodule=subject.data)
    subject.module.eval()


def measured(subject: Subject, store: Path, seed: int) -> list[dict[str, Any]]:
    """A row of signals and truths for every question, asked twice with two seeds of the image."""
    asked = subject.concepts()
    concepts = [concept for _, concept in asked]
    attributor = Attributor(store, subject.module, sampler=subject.sampler, record=False)
    answers = []
    for draw in range(2):
        generation = attributor.generate(
            [concept.present for concept in concepts], [1000 * seed + draw] * len(concepts)
        )
        found = attributor.attribute_many(
            concepts, [1000 * seed + draw] * len(concepts), generation=generation
        )
        answers.append((found, generation.latents))
    smooth = smoothness(subject, answers[0][1])
    checkpoints = attributor.store.checkpoints
    losses = torch.stack([checkpoint.losses() for checkpoint in checkpoints])  # [M, N]
    check = cache(lambda damping: self_check(checkpoints, damping))
    worth_of = cache(lambda factor, value: worth(subject, factor, value))
    rows = []
    for i, (factor, concept) in enumerate(asked):
        first, second = (found[i] for found, _ in answers)
        own = check(first.damping)
        value = concept.present[factor]  # type: ignore[index]
        labels = torch.tensor([name == value for name in first.samples.metadata[factor]])
        rows.append(
            {
                "factor": factor,
                "value": value,
                "strength": first.strength,
                "self_check": own.first / own.asked,
                "stability": stability(first.checkpoint_scores, first.weights),
                "seeds_agree": float(spearman(first.scores.double(), second.scores.double())),
                "top_z": float(first.timeline().mean(0).max()),
                "contributors": first.effective_contributors() / len(labels),
                "loss": float(losses[-1].mean()),
                "moved": float(((losses[-1] - losses[0]).abs() / losses[0]).median()),
                "top_gain": top_gain(first, losses),
                **at_the_image(subject.module, concept, answers[0][1][i]),
                "image_loss_rank": image_loss_rank(subject.module, concept, answers[0][1][i], losses[-1]),
                "r_precision": float(r_precision(first.scores, labels)),
                "chance": float(labels.float().mean()),
                **smooth[i],
                **worth_of(factor, value),
            }
        )
    return rows


@torch.no_grad()
def smoothness(subject: Subject, latents: Tensor) -> list[dict[str, float]]:
    """How much neighbouring pixels correlate, in each of the generated images [B, ...] and in nearly all of the training images."""
    count = len(subject.images)  # type: ignore[arg-type]
    some = default_collate([subject.images[i] for i in range(0, count, count // LOOKED_AT + 1)])
    thumbnails = thumbnails_of(subject.module.decode(subject.module.encode(some).latents))
    found = [beside(image, thumbnails) for image in subject.module.decode(latents)]
    return [{"neighbours": own, "neighbours_of_training": lowest} for own, lowest in found]


def top_gain(answer: Attribution, losses: Tensor) -> float:
    """How much the best-ranked samples' loss fell from the first checkpoint to the last, beyond what all samples' did, as a
    share."""
    gain = 1 - losses[-1] / losses[0]
    return float(gain[answer.order()[:TOP]].mean() - gain.mean())


def condition(module: Any, specs: Sequence[Any]) -> dict[str, Tensor]:
    rows = [module.condition(spec, 1) for spec in specs]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def errors(module: Any, state: State, latents: Tensor, specs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """``mean((e - eps)^2)`` [B], and the noise prediction."""
    schedule = module.noise_schedule
    output = module.predict(state.x_t, state.t, condition(module, specs))
    e = schedule.epsilon(output, state.x_t, state.t)
    a, s = schedule.levels(state.t, latents)
    return (e - (state.x_t - a * latents) / s).square().flatten(1).mean(1), e


def at_the_image(module: Any, concept: Concept, latents: Tensor) -> dict[str, float]:
    """Of the generated image, noised anew: how much lower its loss is with the concept than without (``gain``, a share), and the
    same in units of ``||e(c) - e(c_minus)||^2`` (``calibration``), 1 where the direction points where the image lies."""
    draws = latents.expand(DRAWS, *latents.shape)
    with_it = without_it = apart = 0.0
    states = Noised(timesteps=LOSS_TIMESTEPS, shared_noise=False)
    for state in states.states(module, draws, {}, [f"draw-{i}" for i in range(DRAWS)], 0):
        present, e = errors(module, state, draws, [concept.present] * DRAWS)
        absent, e_minus = errors(module, state, draws, [concept.absent] * DRAWS)
        with_it += float(present.mean())
        without_it += float(absent.mean())
        apart += float((e - e_minus).square().mean())
    return {"gain": 1 - with_it / without_it, "calibration": (without_it - with_it) / apart}


def image_loss_rank(module: Any, concept: Concept, latents: Tensor, losses: Tensor) -> float:
    """The share of the traced samples whose loss, at the states they were traced at, is below the generated image's."""
    one = latents.unsqueeze(0)
    states = list(METHOD.training_trajectory.states(module, one, {}, ["query"], 0))
    own = sum(float(errors(module, state, one, [concept.present])[0]) for state in states) / len(states)
    return float((losses < own).float().mean())


def worth(subject: Subject, factor: str, value: str) -> dict[str, float | None]:
    """By how much the name lowers the loss of real images that carry it, told beside their other names: a share of the loss, and
    that in standard errors over images, None of a single one."""
    pairs = [
        {name: item[name] for name in subject.factors}
        for item in (subject.images[i] for i in range(len(subject.images)))  # type: ignore[arg-type]
    ]
    carriers = [i for i, spec in enumerate(pairs) if spec[factor] == value][:: max(1, len(pairs) // 400)]
    carriers = carriers[:CARRIERS]
    batch = default_collate([subject.images[i] for i in carriers])
    latents, specs = subject.module.encode(batch).latents.detach(), [pairs[i] for i in carriers]
    present, absent = torch.zeros(len(carriers)), torch.zeros(len(carriers))
    states = Noised(timesteps=LOSS_TIMESTEPS, shared_noise=False)
    for state in states.states(subject.module, latents, {}, [str(i) for i in carriers], 1):
        present += errors(subject.module, state, latents, specs)[0]
        absent += errors(subject.module, state, latents, [without(spec, factor) for spec in specs])[0]
    share = (absent - present) / absent
    mean = float(share.mean())
    if len(carriers) < 2:
        return {"worth": mean, "worth_z": None}
    return {"worth": mean, "worth_z": mean / max(float(share.std()) / len(carriers) ** 0.5, 1e-12)}


def run(name: str, seed: int, length: int, out: Path) -> dict[str, Any]:
    """One length of one training: all its rows, in a file that is not made twice."""
    path = out / f"{name}-{seed}-{length}.json"
    if not path.exists():
        L.seed_everything(seed, verbose=False)
        subject = SUBJECTS[name](seed, length == 0)
        store = out / path.stem
        trained(subject, length, store)
        rows = measured(subject, store, seed)
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        packages = {package: version(package) for package in ("torch", "lightning", "diffusers")}
        facts = {"subject": name, "seed": seed, "steps": length, "machine": machine, "packages": packages}
        path.write_text(json.dumps(facts | {"rows": rows}) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="in optimizer steps, instead of the subject's own"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/learnt"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.subjects:
        for seed in args.seeds:
            for length in args.lengths or SUBJECTS[name](seed, True).lengths:
                rows = run(name, seed, length, args.out)["rows"]
                print(f"{name}, seed {seed}, {length} steps: {len(rows)} questions", flush=True)


if __name__ == "__main__":
    main()
