"""Rankings of EmojiArtists by what images look like, without a gradient of the model that is asked
about: what a score has to beat."""

import torch
from torch import Tensor

from ctrak_lightning.attribution.baselines import image_similarity

from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from .judge import EmojiJudge


def likenesses(images: Tensor, shown: Tensor) -> dict[str, Tensor]:
    """How alike training images [N, 3, 32, 32] are to those asked about [Q, 3, 32, 32], all in
    [0, 1], as [Q, N]: by pixels, by grey levels, by what an independent classifier and what the base
    model makes of them, and by the sum of two of these, which did best on the models for choosing."""
    found = {
        "pixels": image_similarity(images, shown),
        "grey-level correlation": image_similarity(images, shown, _grey),
        "judge's features": image_similarity(images, shown, EmojiJudge.trained().features),
        "base denoiser's activations": image_similarity(images, shown, denoiser_features),
    }
    both = (found["grey-level correlation"], found["base denoiser's activations"])
    return found | {"grey levels and activations": sum(map(standardised, both), torch.zeros(()))}


def within(label: Tensor, alike: Tensor) -> Tensor:
    """Scores [Q, N] of images that carry a ``label`` [Q, N], each weighed by exp(z), z its likeness
    in standard deviations over all images; 0 of the others."""
    return label * standardised(alike).exp()


def standardised(alike: Tensor) -> Tensor:
    """Likenesses [Q, N] in standard deviations over all images."""
    return (alike - alike.mean(1, keepdim=True)) / alike.std(1, keepdim=True)


def _grey(images: Tensor) -> Tensor:
    grey = images.mean(1).flatten(1)
    return grey - grey.mean(1, keepdim=True)


def denoiser_features(images: Tensor) -> Tensor:
    """What the base model, before any fine-tune, makes of images [B, 3, 32, 32] in [0, 1] without a
    condition: the activations between its halves at a quarter of the noise [B, d]."""
    module = EmojiDiffusion("lora").eval()
    kept: list[Tensor] = []
    hook = module.denoiser.unet.mid_block.register_forward_hook(
        lambda _, __, output: kept.append(output)
    )
    latents = patchify(images * 2 - 1)
    t = torch.full((len(latents),), len(module.noise_schedule) // 4)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noised = module.noise_schedule.add_noise(latents, noise.expand_as(latents), t)
        module.predict(noised, t, module.condition({}, len(latents)))
    hook.remove()
    features = kept[0].flatten(1)
    return features - features.mean(0)
