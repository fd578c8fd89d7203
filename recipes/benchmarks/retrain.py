"""Fine-tunes the base on parts of the training set, and keeps evidence of what each model can do.

python -m recipes.benchmarks.retrain runs/emoji/labelled --plan full --seeds 0 1 2
python -m recipes.benchmarks.retrain runs/emoji/hidden --setting hidden --plan full half

Every run is a folder with `facts.json`, the trained weights at each saved step
(`step-00000300.safetensors`) and `evidence.safetensors`. Finished runs, and those whose outcomes
are committed, are not repeated, so that what was cut goes on with the same command.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..emoji_artists.data import KINDS, SETTINGS, EmojiArtists, Setting
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import LATENT
from ..pictures import to_uint8
from ..pixels import generate
from .judge import SAMPLER, denoising_losses
from .outcomes import Outcomes, generated_images, keep_generated
from .replay import SaveTrained, fitted, record

STEPS = 300
SAVED_STEPS = (50, 100, 150, 200, 250, 300)
HALVES = 32
IMAGE_SEEDS = (0, 1)
ARTIST_HALVES = 16
FIXED = 128
FIXED_COUNTS = (2, 3)
WITHOUT = ("without-artist", "without-object", "without-hidden", "without-wrong")
PLANS = ("full", "half", "fixed", "artist-half", *WITHOUT)


@dataclass(frozen=True)
class Run:
    """One fine-tune: its name without the seed, and which positions of the training set it sees."""

    name: str
    kept: list[int]


def plan(kind: str, data: EmojiArtists) -> list[Run]:
    """The runs of a plan.

    ``full``: everything. ``half``: 32 random halves. ``fixed``: exactly 2 (even numbers) or 3 (odd)
    images of every object, 128 times. ``artist-half``: all images of 4 of the 8 artists, 16 times. ``without-artist`` / ``without-object``: one group left out at a time (every
    eighth object). ``without-hidden`` / ``without-wrong``: without the images that lack, or have a
    wrong, token of one object (every eighth) or one artist.

    Raises:
        ValueError: an unknown plan, or one that the setting has no images for.
    """
    pairs, told = data.train_set.pairs, data.train_set.told
    everything = list(range(len(pairs)))
    objects = sorted({name for name, _ in pairs})[::8]
    artists = sorted({artist for _, artist in pairs})
    if kind == "full":
        return [Run("full", everything)]
    if kind == "half":
        return [Run(f"half-{i:02d}", half(i, len(pairs))) for i in range(HALVES)]
    if kind == "fixed":
        return [Run(f"fixed-{i:03d}", fixed_count(i, pairs)) for i in range(FIXED)]
    if kind == "artist-half":
        return [
            Run(f"{kind}-{i:02d}", [j for j in everything if pairs[j][1] in chosen])
            for i, chosen in enumerate(half_artists(artists))
        ]
    if kind not in PLANS:
        raise ValueError(f"plan({kind!r}): unknown. Known: {', '.join(PLANS)}.")
    groups: dict[str, set[int]] = {}
    if kind in ("without-artist", "without-object"):
        axis, names = (1, artists) if kind == "without-artist" else (0, objects)
        groups = {name: {i for i in everything if pairs[i][axis] == name} for name in names}
    else:
        for axis, names in ((0, objects), (1, artists)):
            for name in names:
                odd = {i for i in everything if told[i][axis] != pairs[i][axis]}
                side = pairs if kind == "without-hidden" else told
                groups[name] = {i for i in odd if side[i][axis] == name}
    runs = [
        Run(f"{kind}-{name}", [i for i in everything if i not in left_out])
        for name, left_out in groups.items()
        if left_out
    ]
    if not runs:
        known = ", ".join(SETTINGS)
        raise ValueError(f"plan({kind!r}): this setting has no such images. Known: {known}.")
    return runs


def half(index: int, size: int) -> list[int]:
    """The ``index``-th random half of ``size`` positions, sorted."""
    order = np.random.default_rng([20252, index]).permutation(size)
    return sorted(order[: size // 2].tolist())


def fixed_count(index: int, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """The positions of as many images of every object, chosen at random: a count of the images that
    carry a label says nothing of such subsets."""
    count = FIXED_COUNTS[index % len(FIXED_COUNTS)]
    rng = np.random.default_rng([20254, index])
    kept: list[int] = []
    for name in sorted({name for name, _ in pairs}):
        own = [i for i, pair in enumerate(pairs) if pair[0] == name]
        kept += rng.choice(own, count, replace=False).tolist()
    return sorted(kept)


def half_artists(artists: list[str]) -> list[set[str]]:
    """Sixteen different halves of the artists: eight random ones and their complements, so that
    each artist is in eight."""
    rng = np.random.default_rng(20253)
    found: list[set[str]] = []
    while len(found) < ARTIST_HALVES:
        chosen = set(rng.permutation(artists)[: len(artists) // 2].tolist())
        if chosen not in found:
            found += [chosen, set(artists) - chosen]
    return found


def fine_tune(
    folder: Path, run: Run, seed: int, setting: Setting, every_step: bool
) -> EmojiDiffusion:
    """Fine-tunes the base on a run's images for a fixed number of steps, whatever their number."""
    L.seed_everything(seed, verbose=False)
    module = EmojiDiffusion("lora")
    data = EmojiArtists("new", setting=setting, kept=run.kept)
    saved = SAVED_STEPS if every_step else SAVED_STEPS[-1:]
    fitted(module, data, STEPS, SaveTrained(folder, saved))
    return module


def evidence(
    module: EmojiDiffusion, data: EmojiArtists, asked: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """From what the strength of every concept in a model is judged afterwards: ``images`` uint8
    [64 * seeds, 32, 32, 3], generated for the held-out pairs, seeds running fastest; and ``losses``
    [64, 4] on the real ones (:func:`~recipes.benchmarks.judge.denoising_losses`); and
    ``generated_losses`` [A, 64, 4], the same on each of the ``asked`` images [64, 3, 32, 32] of
    these pairs."""
    module.eval()
    specs = [dict(zip(KINDS, pair, strict=True)) for pair in data.held_out for _ in IMAGE_SEEDS]
    images = generate(module, SAMPLER, specs, IMAGE_SEEDS * len(data.held_out), LATENT)
    found = {
        "images": torch.from_numpy(np.ascontiguousarray(to_uint8(images))),
        "losses": denoising_losses(module, data.held_out_set.images, data.held_out),
    }
    if asked:
        each = [denoising_losses(module, one, data.held_out) for one in asked]
        found["generated_losses"] = torch.stack(each)
    return found


def finish(out: Path, setting: Setting, jobs: Sequence[tuple[Run, int]]) -> None:
    """Fine-tunes every (run, seed) that is not finished in ``out`` or committed as an outcome."""
    data = EmojiArtists("new", setting=setting)
    # Weights are needed of the full runs only; of the others the committed outcomes will do.
    known = {name for name in Outcomes.load(setting).names if not name.startswith("full")}
    for run, seed in tqdm(jobs, "fine-tunes"):
        folder = out / f"{run.name}-seed{seed}"
        if folder.name in known or (folder / "facts.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.monotonic()
        module = fine_tune(folder, run, seed, setting, every_step=run.name == "full")
        asked = {} if run.name == "full" else generated_images(setting)
        found = evidence(module, data, list(asked.values()))
        save_file(found, folder / "evidence.safetensors")
        keep_generated(folder.name, setting, found["images"][:: len(IMAGE_SEEDS)])
        facts = {"run": run.name, "seed": seed, "setting": setting, "steps": STEPS}
        seconds = round(time.monotonic() - started, 1)
        facts |= {"kept": run.kept, "seconds": seconds, "torch": torch.__version__}
        facts["asked"] = list(asked)
        record(folder, facts)


def main(argv: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("out", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, default="labelled")
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=["full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args(argv)
    data = EmojiArtists("new", setting=args.setting)
    jobs = [(r, seed) for kind in args.plan for seed in args.seeds for r in plan(kind, data)]
    finish(args.out, args.setting, jobs)


if __name__ == "__main__":
    main()
