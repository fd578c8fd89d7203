"""Trains the Synthetic model from scratch, keeps weights along the way, draws samples and counts
those that show what they should.

python -m recipes.benchmarks.synthetic.train --variant paper --seed 0
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from ctrak_lightning import Sampler

from ...pictures import image_grid
from ...pixels import generate
from ..replay import SaveTrained, evenly, finished, fitted, load_trained, record
from ..tables import command_of, machine, parser_of, publish
from .figures import VARIANTS, Combo, Synthetic, caption
from .model import SyntheticDiffusion
from .verifier import Verifier

STEPS = {"paper": 800, "hard": 6000}
BATCH_SIZE = 32
QUERIES = 16
# The red triangle needs strong guidance: else the model follows "red" to the circles it knows.
SAMPLERS = {"paper": Sampler(steps=20, guidance=3.0), "hard": Sampler(steps=20, guidance=2.0)}
DRAWN = {"paper": 16, "hard": 4}
COLUMNS = {"paper": 16, "hard": 24}
SHOWN_FRAME, HELD_OUT_FRAME = (0.8, 0.8, 0.8), (1.0, 0.55, 0.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its data, its model at one checkpoint, and what was recorded."""

    data: Synthetic
    module: Any
    """A SyntheticDiffusion, or a PromptedSynthetic."""
    facts: dict[str, Any]

    @cached_property
    def verifier(self) -> Verifier:
        """Of the variant; read when it is asked for, so that training draws the same without it."""
        return Verifier.load(self.data.variant.name)

    def images(self, combos: Sequence[Combo], seeds: Sequence[int]) -> Tensor:
        """One generated image per (combination, seed) [n, 3, H, W] in [0, 1]."""
        sampler = SAMPLERS[self.data.variant.name]
        return generate(self.module, sampler, combos, seeds, self.module.latent_shape)


def load_run(out: str | Path, step: int | None = None) -> Run:
    """A run that ``train`` has finished, at checkpoint ``step`` (the last if None).

    Raises:
        ValueError: the folder holds no finished run, or none of that step.
    """
    out = Path(out)
    if not (out / "facts.json").exists():
        raise ValueError(
            f"load_run({str(out)!r}): no facts.json, so no finished run. "
            "HINT: python -m recipes.benchmarks.synthetic.train"
        )
    facts: dict[str, Any] = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    step = facts["checkpoints"][-1] if step is None else step
    if step not in facts["checkpoints"]:
        known = facts["checkpoints"]
        raise ValueError(f"load_run({str(out)!r}, step={step}): expected one of {known}.")
    run = _new(facts)
    load_trained(run.module, out, step)
    run.module.eval()
    return run


def train(
    out: str | Path,
    variant: str = "paper",
    seed: int = 0,
    steps: int | None = None,
    images: int | None = None,
    checkpoints: int = 3,
    callbacks: Sequence[L.Callback] = (),
    condition: Literal["tokens", "prompt"] = "tokens",
) -> Run:
    """Trains a model unless ``out`` already holds this very run.

    Args:
        out: folder for weights, ``samples.png`` and ``facts.json`` (written last: a run without it
            is not finished).
        variant: ``"paper"`` or ``"hard"``.
        seed: of weights, order, noise, images, and the hard variant's held-out combinations.
        steps: optimiser steps; the variant's default if None.
        images: training images; the variant's default if None.
        checkpoints: how many, evenly spaced; the last is the final model.
        callbacks: more of them, such as a ConceptTracer.
        condition: what the network is told: one token per factor, or a prompt.

    Raises:
        ValueError: ``out`` holds a finished run with other arguments.
    """
    out = Path(out)
    steps = STEPS[variant] if steps is None else steps
    arguments = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "images": VARIANTS[variant].images if images is None else images,
        "batch_size": BATCH_SIZE,
        "checkpoints": checkpoints,
    }
    if condition != "tokens":  # a run with tokens is as it was before there were prompts
        arguments["condition"] = condition
    if finished(out, arguments):
        return load_run(out)
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    run = _new({"arguments": arguments})
    saver = SaveTrained(out, evenly(steps, checkpoints))
    started, busy = time.monotonic(), time.process_time()
    trainer = fitted(run.module, run.data, steps, saver, *callbacks)
    seconds = {"train": time.monotonic() - started, "processor": time.process_time() - busy}
    run.module.eval()
    combos = run.data.variant.combos()
    asked = [combo for combo in combos for _ in range(QUERIES)]
    made = run.images(asked, list(range(QUERIES)) * len(combos)).unflatten(0, (-1, QUERIES))
    draw(out / "samples.png", made, run.data)
    accepted = {
        caption(combo): int(run.verifier.verify(group, [combo] * QUERIES).sum())
        for combo, group in zip(combos, made, strict=True)
    }
    facts = {
        "arguments": arguments,
        "parameters": sum(p.numel() for p in run.module.parameters() if p.requires_grad),
        "checkpoints": saver.steps,
        "held_out": run.data.held_out,
        "accepted": accepted,
        "sampler": asdict(SAMPLERS[variant]),
        "loss": float(trainer.callback_metrics["loss"]),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    record(out, facts)
    return load_run(out)


def _new(facts: dict[str, Any]) -> Run:
    """The data and the model of some arguments, with its first weights."""
    arguments = facts["arguments"]
    variant = arguments["variant"]
    if arguments.get("condition") == "prompt":
        from .prompts import PromptedSynthetic  # needs MiniLM, which tokens do not

        module: Any = PromptedSynthetic(variant)
    else:
        module = SyntheticDiffusion(variant)
    names = ("variant", "images", "batch_size", "seed")
    data = Synthetic(**{name: arguments[name] for name in names})
    return Run(data=data, module=module, facts=facts)


def draw(path: Path, images: Tensor, data: Synthetic) -> None:
    """Writes the first of the images [combos, n, 3, H, W] of every combination as one PNG, row by
    row; held-out combinations have an orange frame."""
    name, cells = data.variant.name, []
    for combo, group in zip(data.variant.combos(), images, strict=True):
        frame = torch.tensor(HELD_OUT_FRAME if combo in data.held_out else SHOWN_FRAME)
        for image in group[: DRAWN[name]]:
            cell = frame.view(3, 1, 1).repeat(1, image.shape[1] + 2, image.shape[2] + 2)
            cell[:, 1:-1, 1:-1] = image
            cells.append(cell)
    image_grid(path, torch.stack(cells), COLUMNS[name], scale=2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.synthetic.train", __doc__)
    parser.add_argument("--variant", choices=list(VARIANTS), default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--condition", choices=("tokens", "prompt"), default="tokens")
    args = parser.parse_args(argv)
    out = folder_of(args.runs, args.variant, args.seed, args.condition)
    options = {"steps": args.steps, "images": args.images, "condition": args.condition}
    facts = train(out, args.variant, args.seed, **options).facts
    held_out = {caption(combo) for combo in facts["held_out"]}
    counts = []
    for title, names in (("shown", facts["accepted"].keys() - held_out), ("held out", held_out)):
        accepted = sum(facts["accepted"][name] for name in names)
        counts.append(f"{title} {accepted:,} of {QUERIES * len(names):,}")
    text = (
        f"`{command_of(parser, args)}`; {machine()}. Queries that the verifier accepts: "
        f"{', '.join(counts)}. {facts['arguments']['steps']:,} steps in "
        f"{facts['seconds']['train']:,.0f} s ({facts['seconds']['processor']:,.0f} s of processor "
        f"time), {facts['parameters']:,} parameters.\n"
    )
    publish(args.results / "synthetic_runs.md", text)


def folder_of(runs: Path, variant: str, seed: int, condition: str) -> Path:
    """Where the benchmark looks for a run."""
    return runs / f"{variant}{'-prompt' if condition == 'prompt' else ''}-{seed}"


if __name__ == "__main__":
    main()
