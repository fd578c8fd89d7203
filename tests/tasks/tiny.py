"""Every supported pipeline, tiny, from its config classes with random weights: nothing is
downloaded."""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ctrak_lightning import DiffusersTask, PipelineTask
from recipes import tiny
from recipes.tiny import PIPELINES, conditional_unet, ddim

__all__ = ["PIPELINES", "conditional_unet", "ddim"]

TOKENS = 16
SIZE = 4  # of latents; images are twice as large
CAPTIONS = ("a cat by x", "a dog by y", "a cat by y", "a dog by x")


stable_diffusion = partial(tiny.stable_diffusion, side=SIZE, tokens=TOKENS)
stable_diffusion_xl = partial(tiny.stable_diffusion_xl, side=SIZE, tokens=TOKENS)


def build(name: str, seed: int = 0) -> Any:
    """A pipeline by name, with smaller images and shorter prompts than the recipes'."""
    return tiny.build(name, seed, side=SIZE, tokens=TOKENS)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = ["add_q_proj", "add_k_proj", "add_v_proj"]
"""The text's side of joint attention; SD3 and Flux fine-tunes train it too."""


def add_lora(denoiser: nn.Module, use_dora: bool = False) -> None:
    """LoRA on the attention, with weights off their initial zeros."""
    joint = JOINT if any(name.endswith(JOINT[0]) for name, _ in denoiser.named_modules()) else []
    denoiser.requires_grad_(False)
    # Not every denoiser of diffusers has `add_adapter`, which does the same.
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS + joint, use_dora=use_dora)
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        inject_adapter_in_model(config, denoiser)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def task_of(name: str, seed: int = 0, **options: Any) -> PipelineTask:
    """The task of :func:`build`, with few tokens."""
    pipeline = build(name, seed)
    if name.startswith(("sd3", "flux", "pixart")):
        options = {"max_sequence_length": TOKENS} | options
    if name.startswith(("flux", "pixart-sized")):
        options = {"resolution": 2 * SIZE} | options
    return DiffusersTask.from_pipeline(pipeline, **options)


def batch(samples: int = 4) -> dict[str, Any]:
    """A batch of captioned images."""
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(samples, 3, 2 * SIZE, 2 * SIZE, generator=generator) * 2 - 1,
        "caption": [CAPTIONS[i % 4] for i in range(samples)],
        "class": torch.arange(samples) % 3,
        "owner": [f"owner {i}" for i in range(samples)],
        "sample_id": [f"image-{i}" for i in range(samples)],
    }
