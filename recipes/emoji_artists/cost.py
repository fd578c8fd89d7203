"""What a trace costs beside a training step, measured alternately in one process.

python -m recipes.emoji_artists.cost    # prints the table and writes results/cost.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ctrak_lightning import GradientTracer, Projection, methods
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.tasks import encode
from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.module import EmojiDiffusion

RESULTS = Path(__file__).parent / "results" / "cost.json"
TIMESTEPS = 3


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    module = EmojiDiffusion("lora")
    optimizer = module.configure_optimizers()["optimizer"]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = next(iter(EmojiArtists("new").trace_dataloader()))
    encoded = encode(module, batch)
    tracer = GradientTracer(module.denoiser, Projection())

    def train() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    @torch.no_grad()
    def forward() -> None:
        t = torch.full((len(encoded.latents),), 500)
        module.predict(encoded.latents, t, encoded.condition)

    work: dict[str, Callable[[], Any]] = {"forward pass": forward, "training step": train}
    for name, method in {
        "trak": methods.trak(timesteps=TIMESTEPS),
        "concept_trak_norm": methods.concept_trak_norm(timesteps=TIMESTEPS),
        "concept_trak": methods.concept_trak(timesteps=TIMESTEPS),
        "concept_trak_paper": methods.concept_trak_paper(timesteps=TIMESTEPS, inversion_steps=2 * TIMESTEPS),
    }.items():
        work[f"trace, {name}, {TIMESTEPS} timesteps"] = partial(
            trace_batch, module, tracer, method, encoded, 0
        )
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(args.repeats + 1):
        for name, one in work.items():
            spent = timed(one)
            if repeat:  # the first round warms up
                seconds[name].append(spent)
    ratios = {
        unit: {
            name: statistics.median(a / b for a, b in zip(spent, seconds[unit], strict=True))
            for name, spent in seconds.items()
        }
        for unit in ("training step", "forward pass")
    }
    facts = {
        "command": f"python -m recipes.emoji_artists.cost --repeats {args.repeats}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "batch": len(encoded.latents),
        "median_seconds": {name: statistics.median(spent) for name, spent in seconds.items()},
        "median_ratio_to": ratios,
    }
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("| batch of 32 | / training step | / forward pass |\n|---|---|---|")
    for name in work:
        print(f"| {name} | {ratios['training step'][name]:.2f} | {ratios['forward pass'][name]:.2f} |")


if __name__ == "__main__":
    main()
