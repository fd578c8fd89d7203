"""What traces cost beside a training step, on EmojiArtists, measured in turn in one process.

python -m recipes.benchmarks.step_cost              # a capture's trace of a batch
python -m recipes.benchmarks.step_cost --inline     # what tracing inside the steps adds to them
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch

from ctrak_lightning import GradientTracer, InlineCapture, Projection, methods
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.tasks import encode

from ..emoji_artists.data import EmojiArtists
from ..emoji_artists.module import EmojiDiffusion
from .tables import command_of, grid, machine, parser_of, publish

TIMESTEPS = 3
METHODS = {
    "trak": methods.trak(TIMESTEPS),
    "concept_trak_norm": methods.concept_trak_norm(TIMESTEPS),
    "influence": methods.influence("both", TIMESTEPS),
    "concept_trak": methods.concept_trak(TIMESTEPS),
    "concept_trak_paper": methods.concept_trak_paper(TIMESTEPS, 2 * TIMESTEPS),
}
INLINE: dict[str, dict[str, Any]] = {
    "LoRA and tokens, all layers": {"adaptation": "lora"},
    "full fine-tune, all layers": {"adaptation": "full"},
    "full fine-tune, all layers, rank 8": {"adaptation": "full", "rank": 8},
    "full fine-tune, cross-attention": {"adaptation": "full", "layers": ["*attn2*"]},
}
TARGET = 1.10


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def model(adaptation: Any) -> tuple[EmojiDiffusion, torch.optim.Optimizer]:
    """The model and its optimizer, without a Trainer."""
    L.seed_everything(0, verbose=False)
    module = EmojiDiffusion(adaptation)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module, module.configure_optimizers()["optimizer"]


def capture(repeats: int) -> list[str]:
    """A forward pass, a training step and the traces of a batch of 32, as a table."""
    module, optimizer = model("lora")
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
    for name, method in METHODS.items():
        trace = partial(trace_batch, module, tracer, method, encoded, 0)
        work[f"trace, {name}, {TIMESTEPS} timesteps"] = trace
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, one in work.items():
            spent = timed(one)
            if repeat:  # the first round warms up
                seconds[name].append(spent)

    def ratio(name: str, unit: str) -> str:
        pairs = zip(seconds[name], seconds[unit], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    units = ("training step", "forward pass")
    rows = [
        [name, f"{1e3 * statistics.median(spent):.0f}", *(ratio(name, unit) for unit in units)]
        for name, spent in seconds.items()
    ]
    count = len(encoded.latents)
    heads = [f"batch of {count}", "ms", *(f"/ {unit}" for unit in units)]
    return [f"Medians of {repeats} rounds.", "", *grid(heads, rows)]


def inline(pairs: int) -> list[str]:
    """What tracing inside the steps adds to them, as a table."""
    cases = {name: stepped(pairs, **case) for name, case in INLINE.items()}
    rows = []
    for name, case in cases.items():
        low, high = case["interval"]
        ratio = f"{case['ratio']:.3f} ({low:.3f} to {high:.3f})"
        spent = [f"{1e3 * case[key]:.0f}" for key in ("plain", "traced")]
        rows.append([name, case["layers"], *spent, ratio])
    first = next(iter(cases.values()))
    heads = ["EmojiArtists, batch of 32", "layers", "plain step, ms", "traced step, ms"]
    return [
        *grid([*heads, "traced / plain, median of pairs (95 %)"], rows),
        "",
        f"Sealing a checkpoint of {first['samples']} samples: {first['seal']:.2f} s. {pairs} pairs "
        f"each, their order turned about from pair to pair. Target: at most {TARGET:.2f}.",
    ]


def stepped(
    pairs: int, adaptation: Any, rank: int = 16, layers: list[str] | None = None
) -> dict[str, Any]:
    """Seconds of ``pairs`` plain and traced optimizer steps on batches of 32, and of sealing."""
    module, optimizer = model(adaptation)
    batches = list(EmojiArtists("new").trace_dataloader())
    with tempfile.TemporaryDirectory() as folder:
        tracing = InlineCapture(
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
                tracing.attach()
            started = time.perf_counter()
            if traced:
                tracing.begin_step(batch)
            optimizer.zero_grad()
            loss = module.training_step(batch, 0)
            if traced:
                tracing.before_backward(loss)
            loss.backward()
            if traced:
                tracing.after_backward(step=taken)
            optimizer.step()
            spent = time.perf_counter() - started
            tracing.detach()
            taken += 1
            return spent

        seconds: dict[bool, list[float]] = {False: [], True: []}
        # The first epoch warms up, and shows the tracer every sample.
        for i in range(-len(batches), pairs):
            for traced in (False, True) if i % 2 else (True, False):
                spent = step(batches[i % len(batches)], traced)
                if i >= 0:
                    seconds[traced].append(spent)
        seal = timed(lambda: tracing.run(taken, epoch=0))
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    return {
        "layers": len(tracing.tracer.block_names),
        "plain": statistics.median(seconds[False]),
        "traced": statistics.median(seconds[True]),
        "ratio": statistics.median(ratios),
        "interval": np.quantile(np.median(resampled, axis=1), [0.025, 0.975]).tolist(),
        "seal": seal,
        "samples": len(tracing.sample_ids),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.step_cost", __doc__)
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, or pairs of steps")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    lines = inline(args.repeats) if args.inline else capture(args.repeats)
    where = f"{machine()}, {args.threads} threads, load average {load:.1f}"
    text = "\n".join([f"`{command_of(parser, args)}`; {where}.", "", *lines])
    publish(args.results / "step_cost.md", text + "\n")


if __name__ == "__main__":
    main()
