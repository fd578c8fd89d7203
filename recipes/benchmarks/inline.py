"""What ``ConceptTracer(mode="inline")`` adds to a training step: plain and traced steps in turn, in one process.

python -m recipes.benchmarks.inline    # prints the table and writes results/inline.json and results/inline.md
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from ctrak_lightning import GradientTracer, InlineCapture, Projection, methods
from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.module import EmojiDiffusion

RESULTS = Path(__file__).parent / "results"
TARGET = 1.10
CASES: dict[str, dict[str, Any]] = {
    "LoRA and tokens, all layers": {"adaptation": "lora"},
    "full fine-tune, all layers": {"adaptation": "full"},
    "full fine-tune, all layers, rank 8": {"adaptation": "full", "rank": 8},
    "full fine-tune, cross-attention": {"adaptation": "full", "layers": ["*attn2*"]},
}


def measure(pairs: int, adaptation: Any, rank: int = 16, layers: list[str] | None = None) -> dict[str, Any]:
    """Seconds of ``pairs`` plain and traced optimizer steps on batches of 32, and of sealing a checkpoint."""
    L.seed_everything(0, verbose=False)
    module = EmojiDiffusion(adaptation)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = module.configure_optimizers()["optimizer"]
    data = EmojiArtists("new")
    batches = list(data.trace_dataloader())
    with tempfile.TemporaryDirectory() as folder:
        capture = InlineCapture(
            folder,
            module,
            module,
            batches,
            method=methods.inline_trak(),
            tracer=GradientTracer(module.denoiser, Projection(rank=rank), layers=layers),
            thumbnails=False,
            progress=False,
        )
        taken = 0

        def step(batch: Any, traced: bool) -> float:
            nonlocal taken
            if traced:
                capture.attach()
            started = time.perf_counter()
            if traced:
                capture.begin_step(batch)
            optimizer.zero_grad()
            loss = module.training_step(batch, 0)
            if traced:
                capture.before_backward(loss)
            loss.backward()
            if traced:
                capture.after_backward(step=taken)
            optimizer.step()
            spent = time.perf_counter() - started
            capture.detach()
            taken += 1
            return spent

        plain: list[float] = []
        traced: list[float] = []
        for i in range(-len(batches), pairs):  # the first epoch warms up, and shows the tracer every sample
            batch = batches[i % len(batches)]
            order = (False, True) if i % 2 else (True, False)
            spent = {is_traced: step(batch, is_traced) for is_traced in order}
            if i >= 0:
                plain.append(spent[False])
                traced.append(spent[True])
        started = time.perf_counter()
        capture.run(taken, epoch=0)
        seal = time.perf_counter() - started
    ratios = [a / b for a, b in zip(traced, plain, strict=True)]
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    return {
        "layers": len(capture.tracer.block_names),
        "plain_seconds": statistics.median(plain),
        "traced_seconds": statistics.median(traced),
        "ratio": statistics.median(ratios),
        "ratio_interval_95": np.quantile(np.median(resampled, axis=1), [0.025, 0.975]).round(4).tolist(),
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).round(4).tolist(),
        "seal_seconds": seal,
        "samples": len(capture.sample_ids),
    }


def table(facts: dict[str, Any]) -> str:
    rows = [
        "| EmojiArtists, batch of 32 | layers | plain step, ms | traced step, ms | traced / plain, median of pairs (95 %) |",
        "|---|---|---|---|---|",
    ]
    for name, case in facts["cases"].items():
        low, high = case["ratio_interval_95"]
        rows.append(
            f"| {name} | {case['layers']} | {1e3 * case['plain_seconds']:.0f} | {1e3 * case['traced_seconds']:.0f} "
            f"| {case['ratio']:.3f} ({low:.3f} to {high:.3f}) |"
        )
    seal = facts["cases"][next(iter(facts["cases"]))]
    rows += [
        "",
        f"Sealing a checkpoint of {seal['samples']} samples: {seal['seal_seconds']:.2f} s. {facts['pairs']} pairs each, their "
        f"order turned about from pair to pair. `{facts['command']}` on {facts['machine']}, load average "
        f"{facts['load_average']:.1f}, torch {facts['torch']}. Target: at most {TARGET:.2f}.",
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    facts: dict[str, Any] = {
        "command": f"python -m recipes.benchmarks.inline --pairs {args.pairs} --threads {args.threads}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
        "load_average": load,
        "torch": torch.__version__,
        "pairs": args.pairs,
        "cases": {name: measure(args.pairs, **case) for name, case in CASES.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "inline.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "inline.md").write_text(table(facts), encoding="utf-8")
    print(table(facts))


if __name__ == "__main__":
    main()
