"""Diffusers pipelines in miniature, from their config classes with random weights: nothing is
downloaded, and nothing has been learnt."""

import string
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 16  # of latents; images are twice as large
TOKENS = 77
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
WORDS = 2 * len(CHARACTERS)


def build(name: str, seed: int = 0, **tiny: Any) -> Any:
    """A tiny pipeline by name, the same every time, weights off their initial zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = PIPELINES[name](**tiny)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
                with torch.no_grad():
                    for parameter in part.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.05)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def clip_tokenizer(tokens: int = TOKENS) -> CLIPTokenizer:
    vocabulary = [
        *CHARACTERS,
        *(each + "</w>" for each in CHARACTERS),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=tokens
    )


@cache
def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(each, -2.0) for each in CHARACTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(width: int = 8, projection: int | None = None, *, tokens: int = TOKENS) -> Any:
    config = CLIPTextConfig(
        vocab_size=WORDS + 2,
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        projection_dim=projection or width,
        bos_token_id=WORDS,
        eos_token_id=WORDS + 1,
        pad_token_id=WORDS + 1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def vae(shift: float | None = None, *, side: int = SIDE) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=2 * side,
        scaling_factor=0.4,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        mid_block_add_attention=False,
    )


def conditional_unet(**options: Any) -> Any:
    arguments = {
        "sample_size": SIDE,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return diffusers.UNet2DConditionModel(**(arguments | options))


def ddim(**options: Any) -> Any:
    arguments = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**(arguments | options))


def stable_diffusion(*, side: int = SIDE, tokens: int = TOKENS, **scheduler: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(side=side),
        text_encoder=clip(tokens=tokens),
        tokenizer=clip_tokenizer(tokens),
        unet=conditional_unet(sample_size=side),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2(**size: int) -> Any:
    return stable_diffusion(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        **size,
    )


def stable_diffusion_xl(*, side: int = SIDE, tokens: int = TOKENS, **options: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(side=side),
        text_encoder=clip(tokens=tokens),
        text_encoder_2=clip(6, projection=10, tokens=tokens),
        tokenizer=clip_tokenizer(tokens),
        tokenizer_2=clip_tokenizer(tokens),
        unet=conditional_unet(
            sample_size=side,
            cross_attention_dim=8 + 6,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=10 + 6 * 4,
        ),
        scheduler=ddim(),
        add_watermarker=False,
        **options,
    )


def t5(width: int = 8) -> Any:
    config = T5Config(
        vocab_size=len(CHARACTERS) + 4,
        d_model=width,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def stable_diffusion_3(*, side: int = SIDE, tokens: int = TOKENS, **scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=8,
        pooled_projection_dim=10 + 6,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae(shift=0.3, side=side),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        text_encoder=clip(8, projection=10, tokens=tokens),
        text_encoder_2=clip(8, projection=6, tokens=tokens),
        text_encoder_3=t5(20),
        tokenizer=clip_tokenizer(tokens),
        tokenizer_2=clip_tokenizer(tokens),
        tokenizer_3=t5_tokenizer(),
    )


def stable_diffusion_35(**size: int) -> Any:
    pipeline = stable_diffusion_3(use_dynamic_shifting=True, **size)
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipeline


def flux(guidance: bool = True, *, side: int = SIDE, tokens: int = TOKENS) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        vae=vae(shift=0.3, side=side),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=guidance
        ),
        text_encoder=clip(8, tokens=tokens),
        text_encoder_2=t5(8),
        tokenizer=clip_tokenizer(tokens),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.default_sample_size = side  # its own is the published model's
    return pipeline


def flux_schnell(**size: int) -> Any:
    return flux(guidance=False, **size)


def pixart(
    kind: Any = None, additional: bool = False, *, side: int = SIDE, tokens: int = TOKENS
) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128 if additional else side,
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=12,
        caption_channels=8,
        patch_size=2,
        num_embeds_ada_norm=100,
        use_additional_conditions=additional,
    )
    return (kind or diffusers.PixArtAlphaPipeline)(
        transformer=transformer,
        vae=vae(side=side),
        scheduler=ddim(),
        text_encoder=t5(8),
        tokenizer=t5_tokenizer(),
    )


def pixart_sigma(**size: Any) -> Any:
    return pixart(diffusers.PixArtSigmaPipeline, **size)


def pixart_sized(**size: int) -> Any:
    return pixart(additional=True, **size)


def dit(*, side: int = SIDE, tokens: int = TOKENS) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=side,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        patch_size=2,
        norm_num_groups=2,
    )
    labels = {0: "tench, Tinca tinca", 207: "golden retriever"}
    return diffusers.DiTPipeline(
        transformer=transformer, vae=vae(side=side), scheduler=ddim(), id2label=labels
    )


def ddpm(classes: int | None = None, *, side: int = SIDE, tokens: int = TOKENS) -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=2 * side,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=classes,
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=True))


def ddpm_classes(classes: int = 4, **size: int) -> Any:
    return ddpm(classes=classes, **size)


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd1": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd35": stable_diffusion_35,
    "flux": flux,
    "flux-schnell": flux_schnell,
    "pixart": pixart,
    "pixart-sized": pixart_sized,
    "pixart-sigma": pixart_sigma,
    "dit": dit,
    "ddpm": ddpm,
    "ddpm-classes": ddpm_classes,
}
