"""Diffusers pipelines by name, and adapters on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from recipes.tiny import PIPELINES, build

TINY = "tiny-"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def load(pretrained: str, *, dtype: str = "float32", without: Sequence[str] = (), **tiny: Any) -> Any:
    """A pipeline.

    Args:
        pretrained: a folder or a name on the Hub, as ``from_pretrained`` takes it; or ``"tiny-"`` and a name among
            ``recipes.tiny.PIPELINES``, which needs no download and has learnt nothing.
        dtype: of the weights, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        without: parts to leave out, such as Stable Diffusion 3's ``text_encoder_3`` and ``tokenizer_3``.
        tiny: what a tiny pipeline's function takes beside.

    Raises:
        ValueError: an unknown dtype, or an unknown tiny pipeline.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load({pretrained!r}, dtype={dtype!r}): expected one of {', '.join(DTYPES)}.")
    left_out = dict.fromkeys(without)
    if not pretrained.startswith(TINY):
        return diffusers.DiffusionPipeline.from_pretrained(pretrained, dtype=DTYPES[dtype], **left_out)
    name = pretrained.removeprefix(TINY)
    if name not in PIPELINES:
        known = ", ".join(TINY + each for each in PIPELINES)
        raise ValueError(f"load({pretrained!r}): no such tiny pipeline. Expected one of {known}.")
    pipeline = build(name, **tiny)
    pipeline.register_modules(**left_out)
    return pipeline if dtype == "float32" else pipeline.to(dtype=DTYPES[dtype])


def load_or_build(pretrained: str | None, unet: Mapping[str, Any] | None, **tiny: Any) -> Any:
    """The pipeline ``pretrained``, as :func:`load` takes it; or a ``DDPMPipeline`` of a new ``UNet2DModel(**unet)`` that predicts v
    under a cosine schedule without signal at its end.

    Raises:
        ValueError: both are given, or neither.
    """
    if (pretrained is None) == (unet is None):
        raise ValueError(
            f"load_or_build(pretrained={pretrained!r}, unet={unet!r}): expected exactly one of the two. HINT: `pretrained` goes on "
            "from weights, `unet` holds the arguments of a UNet2DModel to start from nothing."
        )
    if pretrained is not None:
        return load(pretrained, **tiny)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return diffusers.DDPMPipeline(unet=diffusers.UNet2DModel(**(unet or {})), scheduler=scheduler)


def add_lora(denoiser: Any, rank: int, targets: Sequence[str]) -> None:
    """Freezes a denoiser and adds LoRA, in float32 whatever the frozen weights are, with ``alpha = rank``: a scale of 1, so that
    the file of the adapter says all that there is to say.

    Raises:
        ValueError: no layer has one of these names.
    """
    denoiser.requires_grad_(False)
    ends = tuple(f".{target}" for target in targets)
    if not any(f".{name}".endswith(ends) for name, _ in denoiser.named_modules()):
        raise ValueError(
            f"add_lora({type(denoiser).__name__}, targets={list(targets)}): no layer has a name that ends so. HINT: "
            f"{list(ATTENTION)} is the attention of diffusers' networks."
        )
    # Not every denoiser of diffusers has `add_adapter`, which does the same and then says that there is an adapter.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config)
    else:
        inject_adapter_in_model(config, denoiser)
    cast_training_params(denoiser)


def save_lora(pipeline: Any, part: str, folder: Path) -> None:
    """Writes the adapter on a pipeline's ``unet`` or ``transformer`` as safetensors, for ``pipeline.load_lora_weights(folder)``."""
    layers = get_peft_model_state_dict(getattr(pipeline, part))
    layers = {name: value.detach().cpu().contiguous() for name, value in layers.items()}
    type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": layers})
