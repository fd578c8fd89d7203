"""Samples of a Synthetic model: the queries of every combination, their picture, and how many are recognisable."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning import Sampler
from ctrak_lightning.utilities.rng import seeded_noise
from recipes.pictures import image_grid
from recipes.synthetic.data import Synthetic
from recipes.synthetic.module import FactorDiffusion, SyntheticDiffusion
from recipes.synthetic.variants import Combo, caption
from recipes.synthetic.verifier import Verifier

QUERIES = 16
BATCH_SIZE = 64
# The red triangle needs strong guidance: without it the model follows "red" to the circles that it knows.
SAMPLERS = {"paper": Sampler(steps=20, guidance=3.0), "hard": Sampler(steps=20, guidance=2.0)}
DRAWN = {"paper": 16, "hard": 4}
COLUMNS = {"paper": 16, "hard": 24}
SCALE = {"paper": 3, "hard": 2}
SHOWN_FRAME, HELD_OUT_FRAME = (0.8, 0.8, 0.8), (1.0, 0.55, 0.0)


def generate(module: SyntheticDiffusion, combos: Sequence[Combo], seeds: Sequence[int]) -> Tensor:
    """:func:`generate_with` the variant's own sampler."""
    return generate_with(SAMPLERS[module.variant.name], module, combos, seeds)


@torch.no_grad()
def generate_with(
    sampler: Sampler, module: FactorDiffusion, combos: Sequence[Combo], seeds: Sequence[int]
) -> Tensor:
    """One image per (combination, seed) [n, 3, H, W] in [0, 1], from the noise that ``Attributor.generate`` gives that seed."""
    images = []
    for start in range(0, len(combos), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        noise = torch.stack(
            [seeded_noise(module.latent_shape, seed, 0, "generation") for seed in seeds[part]]
        )
        tokens = [module.condition(combo, 1)["encoder_hidden_states"] for combo in combos[part]]
        condition, null = {"encoder_hidden_states": torch.cat(tokens)}, module.condition({}, len(noise))
        made = sampler.run(module, noise.to(module.device), condition, null)
        images.append(module.decode(made.latents).cpu())
    return torch.cat(images)


def queries(module: SyntheticDiffusion) -> Tensor:
    """Images [combos, QUERIES, 3, H, W] in [0, 1] of every combination, with the seeds 0, 1, ..."""
    combos = module.variant.combos()
    asked = [combo for combo in combos for _ in range(QUERIES)]
    images = generate(module, asked, list(range(QUERIES)) * len(combos))
    return images.view(len(combos), QUERIES, *images.shape[1:])


def count_accepted(images: Tensor, data: Synthetic, verifier: Verifier) -> dict[str, int]:
    """How many of each combination's queries [combos, QUERIES, 3, H, W] show it, by caption."""
    combos = data.variant.combos()
    return {
        caption(combo): int(verifier.verify(group, [combo] * len(group)).sum())
        for combo, group in zip(combos, images, strict=True)
    }


def draw(path: Path, images: Tensor, data: Synthetic) -> None:
    """Writes the first queries of every combination as one PNG, row by row; held-out combinations have an orange frame."""
    name, cells = data.variant.name, []
    for combo, group in zip(data.variant.combos(), images, strict=True):
        frame = torch.tensor(HELD_OUT_FRAME if combo in data.held_out else SHOWN_FRAME).view(3, 1, 1)
        for image in group[: DRAWN[name]]:
            cell = frame.repeat(1, image.shape[1] + 2, image.shape[2] + 2)
            cell[:, 1:-1, 1:-1] = image
            cells.append(cell)
    image_grid(path, torch.stack(cells), COLUMNS[name], SCALE[name])
