"""Trains the Synthetic model from scratch, keeps weights along the way, draws samples and counts the recognisable ones.

python -m recipes.synthetic.train --variant paper --seed 0 --out runs/synthetic/paper-0
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from recipes.benchmarks.replay import SaveTrained, load_trained
from recipes.synthetic import sampling
from recipes.synthetic.data import Synthetic
from recipes.synthetic.module import SyntheticDiffusion
from recipes.synthetic.recording import LossCurve
from recipes.synthetic.variants import VARIANTS, caption
from recipes.synthetic.verifier import Verifier

STEPS = {"paper": 800, "hard": 6000}
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run: its data, its model with the weights of one checkpoint, its verifier, and what was recorded."""

    data: Synthetic
    module: Any
    """A SyntheticDiffusion, or a PromptedSynthetic."""
    verifier: Verifier
    facts: dict[str, Any]


def load_run(out: str | Path, step: int | None = None) -> Run:
    """A run that ``train`` has finished, with the weights of checkpoint ``step`` (the last if None).

    Raises:
        ValueError: the folder holds no finished run, or none of that step.
    """
    out = Path(out)
    facts = _finished(out)
    if facts is None:
        raise ValueError(
            f"load_run({str(out)!r}): no facts.json, so no finished run. HINT: python -m recipes.synthetic.train --out {out}"
        )
    step = facts["checkpoints"][-1] if step is None else step
    if step not in facts["checkpoints"]:
        raise ValueError(
            f"load_run({str(out)!r}, step={step}): expected one of {facts['checkpoints']}, the checkpoints kept."
        )
    arguments = facts["arguments"]
    module = _module(arguments)
    load_trained(module, out, step)
    return Run(
        data=_data(arguments),
        module=module.eval(),
        verifier=Verifier.load(arguments["variant"]),
        facts=facts,
    )


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
        out: folder for weights, ``samples.png`` and ``facts.json`` (written last: a run without it is not finished).
        variant: ``"paper"`` or ``"hard"``.
        seed: of weights, order and noise, of the images, and of the hard variant's held-out combinations.
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
    images = VARIANTS[variant].images if images is None else images
    arguments = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "images": images,
        "batch_size": BATCH_SIZE,
        "checkpoints": checkpoints,
    }
    if condition != "tokens":  # a run with tokens is as it was before there were prompts
        arguments["condition"] = condition
    facts = _finished(out)
    if facts is not None:
        if facts["arguments"] != arguments:
            raise ValueError(
                f"train({str(out)!r}): the folder holds a run with {facts['arguments']}, asked for was {arguments}. "
                "HINT: name a new folder."
            )
        return load_run(out)
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    module, data, curve = _module(arguments), _data(arguments), LossCurve()
    saver = SaveTrained(out, [steps * (i + 1) // checkpoints for i in range(checkpoints)])
    started, busy = time.monotonic(), time.process_time()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[saver, curve, *callbacks],
    )
    trainer.fit(module, datamodule=data)
    seconds = {"train": time.monotonic() - started, "train, processor": time.process_time() - busy}
    started = time.monotonic()
    queries = sampling.queries(module.eval())
    sampling.draw(out / "samples.png", queries, data)
    accepted = sampling.count_accepted(queries, data, Verifier.load(variant))
    seconds["sample and verify"] = time.monotonic() - started
    facts = {
        "arguments": arguments,
        "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "checkpoints": saver.steps,
        "held_out": data.held_out,
        "accepted": accepted,
        "queries_per_combo": sampling.QUERIES,
        "sampler": asdict(sampling.SAMPLERS[variant]),
        "loss": curve.means,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "lightning", "diffusers", "pillow", "numpy")},
    }
    draft = out / "facts.json.part"
    draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, out / "facts.json")
    return load_run(out)


def _module(arguments: dict[str, Any]) -> Any:
    if arguments.get("condition") == "prompt":
        from recipes.synthetic.prompts import PromptedSynthetic  # needs MiniLM, which tokens do not

        return PromptedSynthetic(arguments["variant"])
    return SyntheticDiffusion(arguments["variant"])


def _data(arguments: dict[str, Any]) -> Synthetic:
    names = ("variant", "images", "batch_size", "seed")
    return Synthetic(**{name: arguments[name] for name in names})


def _finished(out: Path) -> dict[str, Any] | None:
    path = out / "facts.json"
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=list(VARIANTS), default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder of the run; a finished run is not repeated")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--condition", choices=("tokens", "prompt"), default="tokens")
    args = parser.parse_args(argv)
    run = train(
        args.out,
        args.variant,
        args.seed,
        args.steps,
        args.images,
        args.checkpoints,
        condition=args.condition,
    )
    facts = run.facts
    held_out = {caption(combo) for combo in facts["held_out"]}
    for name, count in facts["accepted"].items():
        print(f"{name:24} {count:3} of {sampling.QUERIES}{'   held out' if name in held_out else ''}")
    for title, chosen in (("shown", set(facts["accepted"]) - held_out), ("held out", held_out)):
        total = sum(facts["accepted"][name] for name in chosen)
        print(f"{title:24} {total} of {sampling.QUERIES * len(chosen)}")
    print(f"seconds: {facts['seconds']}; last loss {facts['loss'][-1][1]:.4f}; {args.out}")


if __name__ == "__main__":
    main()
