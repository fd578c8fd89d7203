"""Every supported pipeline, tiny, from its config classes with random weights: nothing is downloaded."""

import string
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
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

from ctrak_lightning import DiffusersTask, PipelineTask

TOKENS = 16
SIZE = 4  # of latents; images are twice as large
CAPTIONS = ("a cat by x", "a dog by y", "a cat by y", "a dog by x")


@cache
def clip_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=TOKENS
    )


@cache
def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(letter, -2.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(width: int = 8, projection: int | None = None) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=2 * 26 + 2,
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection or width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def vae(channels: int = 4, shift: float | None = None, scaling: float = 0.4) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=2 * SIZE,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        mid_block_add_attention=False,
    )


def conditional_unet(**options: Any) -> nn.Module:
    arguments = {
        "sample_size": SIZE,
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


def stable_diffusion(**scheduler: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2() -> Any:
    return stable_diffusion(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )


def stable_diffusion_xl(**options: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(6, projection=10),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=conditional_unet(
            cross_attention_dim=8 + 6,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=10 + 6 * 4,
        ),
        scheduler=ddim(),
        add_watermarker=False,
        **options,
    )


def t5(width: int = 8) -> nn.Module:
    config = T5Config(
        vocab_size=30,
        d_model=width,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def stable_diffusion_3(**scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
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
        vae=vae(shift=0.3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        text_encoder=clip(8, projection=10),
        text_encoder_2=clip(8, projection=6),
        text_encoder_3=t5(20),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )


def stable_diffusion_35() -> Any:
    pipeline = stable_diffusion_3(use_dynamic_shifting=True)
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipeline


def flux(guidance: bool = True) -> Any:
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
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=vae(shift=0.3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        text_encoder=clip(8),
        text_encoder_2=t5(8),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )


def flux_schnell() -> Any:
    return flux(guidance=False)


def pixart(kind: Any = None, additional: bool = False) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128 if additional else SIZE,
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
        transformer=transformer, vae=vae(), scheduler=ddim(), text_encoder=t5(8), tokenizer=t5_tokenizer()
    )


def pixart_sigma() -> Any:
    return pixart(diffusers.PixArtSigmaPipeline)


def pixart_sized() -> Any:
    return pixart(additional=True)


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=SIZE,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        patch_size=2,
        norm_num_groups=2,
    )
    labels = {0: "tench, Tinca tinca", 207: "golden retriever"}
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim(), id2label=labels)


def ddpm(classes: int | None = None) -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=2 * SIZE,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=classes,
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=True))


def ddpm_classes() -> Any:
    return ddpm(classes=4)


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


def build(name: str, seed: int = 0) -> Any:
    """A pipeline by name, the same one every time, with weights off their initial zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = PIPELINES[name]()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
                with torch.no_grad():
                    for parameter in part.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.05)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
