"""What the small models share: they see pixel patches and predict the clean image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ctrak_lightning import Sampler
from ctrak_lightning.utilities.rng import seeded_noise


def cosine_scheduler() -> DDIMScheduler:
    """Cosine schedule with zero terminal SNR: the last step is pure noise, as sampling assumes."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def clean_image_loss(schedule: Any, predicted: Tensor, latents: Tensor, t: Tensor) -> Tensor:
    """The loss [] of a predicted clean image, with the weight of a v-prediction loss, SNR + 1, cut
    at 5 (min-SNR, arXiv 2303.09556)."""
    alpha_bar = schedule.levels(t, latents)[0].square()
    weight = (1 / (1 - alpha_bar)).clamp(max=5.0)
    loss: Tensor = (weight * (predicted - latents).square()).mean()
    return loss


def falling_rate(module: Any, step: int) -> float:
    """The share of a fine-tune's learning rate at a step: a linear warm-up over its
    ``warmup_steps``; in the last third it falls linearly to zero."""
    warm: float = min(1.0, (step + 1) / module.warmup_steps)
    if module._trainer is None:
        return warm
    total: float = module.trainer.estimated_stepping_batches
    return warm * min(1.0, 3 * max(0.0, 1 - step / total)) if total != float("inf") else warm


def conditions(task: Any, specs: Sequence[Any]) -> dict[str, Tensor]:
    """The task's condition of several images, one row for each spec."""
    rows = [task.condition(spec, 1) for spec in specs]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def generate(
    task: Any,
    sampler: Sampler,
    specs: Sequence[Mapping[str, str] | str],
    seeds: Sequence[int],
    shape: tuple[int, ...],
    batch_size: int = 64,
) -> Tensor:
    """One image per (spec, seed) [n, 3, H, W] in [0, 1], from the noise [*shape] that
    ``Attributor.generate`` gives that seed."""
    images = []
    for start in range(0, len(specs), batch_size):
        part = slice(start, start + batch_size)
        noise = torch.stack([seeded_noise(shape, seed, 0, "generation") for seed in seeds[part]])
        condition, null = conditions(task, specs[part]), task.condition({}, len(noise))
        device = next(iter(null.values())).device
        made = sampler.run(task, noise.to(device), condition, null)
        images.append(task.decode(made.latents).cpu())
    return torch.cat(images)
