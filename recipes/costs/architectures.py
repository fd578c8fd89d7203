"""The networks of the published models, from their configurations written down here; built on the meta device, without weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from recipes.flow_matching_lora.module import TEXT
from recipes.pipelines import ATTENTION

Build = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published model.

    Args:
        name: as it is published.
        denoiser: builds the network that is fine-tuned.
        frozen: build the VAE and the text encoders, those that stay in memory.
        targets: of the recipe's LoRA; None where the recipe trains all.
        latents: shape of what the network denoises.
    """

    name: str
    denoiser: Build
    frozen: tuple[Build, ...] = ()
    targets: tuple[str, ...] | None = ATTENTION
    latents: tuple[int, int, int]


def on_meta(build: Build) -> Any:
    """A network without weights: its parameters have shapes alone."""
    with torch.device("meta"):
        return build()


def sd15() -> Any:
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sd21() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    )


def sdxl() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        sample_size=32,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=128,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        patch_size=2,
        cross_attention_dim=1152,
        caption_channels=4096,
        num_embeds_ada_norm=1000,
    )


def ddpm() -> Any:
    return diffusers.UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        attention_head_dim=None,
    )


def vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def vae16() -> Any:
    return vae(16)


def clip_l() -> Any:
    return CLIPTextModel(_clip(768, 12, 12))


def clip_l_projected() -> Any:
    return CLIPTextModelWithProjection(_clip(768, 12, 12))


def openclip_h() -> Any:
    return CLIPTextModel(_clip(1024, 23, 16))


def openclip_g() -> Any:
    return CLIPTextModelWithProjection(_clip(1280, 32, 20))


def t5_xxl() -> Any:
    return T5EncoderModel(
        T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    )


def _clip(width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )


JOINT = ATTENTION + TEXT
ARCHITECTURES = (
    Architecture(name="Stable Diffusion 1.5", denoiser=sd15, frozen=(vae, clip_l), latents=(4, 64, 64)),
    Architecture(name="Stable Diffusion 2.1", denoiser=sd21, frozen=(vae, openclip_h), latents=(4, 96, 96)),
    Architecture(
        name="Stable Diffusion XL", denoiser=sdxl, frozen=(vae, clip_l, openclip_g), latents=(4, 128, 128)
    ),
    Architecture(
        name="Stable Diffusion 3 medium",
        denoiser=sd3,
        frozen=(vae16, clip_l_projected, openclip_g, t5_xxl),
        targets=JOINT,
        latents=(16, 128, 128),
    ),
    Architecture(
        name="FLUX.1-dev",
        denoiser=flux,
        frozen=(vae16, clip_l, t5_xxl),
        targets=JOINT,
        latents=(16, 128, 128),
    ),
    Architecture(name="PixArt-alpha XL/2", denoiser=pixart, frozen=(vae, t5_xxl), latents=(4, 128, 128)),
    Architecture(name="DiT-XL/2", denoiser=dit, frozen=(vae,), targets=None, latents=(4, 32, 32)),
    Architecture(name="DDPM, 256 pixels", denoiser=ddpm, targets=None, latents=(3, 256, 256)),
)
