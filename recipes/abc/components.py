"""The parts of a Stable-Diffusion-like model, from a local folder or a hub name that the user gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """A text-to-image model in parts.

    Args:
        unet: a UNet2DConditionModel.
        vae: an AutoencoderKL.
        text_encoder: maps token ids [B, T] to (vectors [B, T, d], ...), and lets its input embedding be exchanged
            (``get_input_embeddings``, ``set_input_embeddings``), as transformers' CLIPTextModel does.
        tokenizer: as transformers' CLIPTokenizer.
        scheduler: a DDIMScheduler.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: DDIMScheduler


def load_components(model: str) -> Components:
    """Loads the parts in diffusers' layout; weights as safetensors only, never as pickle.

    Args:
        model: a local folder, or a hub name, which diffusers and transformers may fetch from the network.

    Raises:
        FileNotFoundError: the local folder lacks a part.
        ImportError: transformers is not installed.
    """
    folder = Path(model)
    if folder.exists():
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: lacks {', '.join(missing)}; expected a folder for each of {', '.join(PARTS)}, as diffusers' "
                "`save_pretrained` writes a Stable Diffusion pipeline."
            )
    text_model, tokenizer = _transformers()
    return Components(
        unet=UNet2DConditionModel.from_pretrained(model, subfolder="unet", use_safetensors=True),
        vae=AutoencoderKL.from_pretrained(model, subfolder="vae", use_safetensors=True),
        text_encoder=text_model.from_pretrained(model, subfolder="text_encoder", use_safetensors=True),
        tokenizer=tokenizer.from_pretrained(model, subfolder="tokenizer"),
        # Latents have no fixed range, so nothing is clipped to one.
        scheduler=DDIMScheduler.from_pretrained(model, subfolder="scheduler", clip_sample=False),
    )


def _transformers() -> tuple[Any, Any]:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(
            "recipes.abc reads text encoders with transformers, which is not installed. HINT: pip install transformers"
        ) from error
    return CLIPTextModel, CLIPTokenizer
