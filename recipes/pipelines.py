"""Diffusers pipelines by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch

TINY = "tiny-"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    pretrained: str, *, dtype: str = "float32", without: Sequence[str] = (), **tiny: Any
) -> Any:
    """A pipeline.

    Args:
        pretrained: a folder or a name on the Hub, as ``from_pretrained`` takes it; or ``"tiny-"``
            and a name among ``recipes.tiny.PIPELINES``, with random weights.
        dtype: of the weights, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        without: parts to leave out, such as Stable Diffusion 3's ``text_encoder_3``.
        tiny: what a tiny pipeline's function takes beside.

    Raises:
        ValueError: an unknown dtype, or an unknown tiny pipeline.
        ImportError: a tiny pipeline, and transformers is not installed.
    """
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"load({pretrained!r}, dtype={dtype!r}): expected one of {known}.")
    left_out = dict.fromkeys(without)
    if not pretrained.startswith(TINY):
        options = {"dtype": DTYPES[dtype], **left_out}
        return diffusers.DiffusionPipeline.from_pretrained(pretrained, **options)
    try:
        from .tiny import PIPELINES, build
    except ImportError as error:
        raise ImportError(
            "Pipelines in miniature need the package `transformers`, which is not installed. "
            "HINT: pip install 'ctrak-lightning[pipelines]'"
        ) from error
    name = pretrained.removeprefix(TINY)
    if name not in PIPELINES:
        known = ", ".join(TINY + each for each in PIPELINES)
        raise ValueError(f"load({pretrained!r}): no such tiny pipeline. Expected one of {known}.")
    pipeline = build(name, **tiny)
    pipeline.register_modules(**left_out)
    return pipeline if dtype == "float32" else pipeline.to(dtype=DTYPES[dtype])


def load_or_build(pretrained: str | None, unet: Mapping[str, Any] | None, **tiny: Any) -> Any:
    """The pipeline ``pretrained``, as :func:`load` takes it; or a ``DDPMPipeline`` of a new
    ``UNet2DModel(**unet)`` that predicts v under a cosine schedule without signal at its end.

    Raises:
        ValueError: both are given, or neither.
    """
    if (pretrained is None) == (unet is None):
        raise ValueError(
            f"load_or_build(pretrained={pretrained!r}, unet={unet!r}): expected exactly one of the "
            "two. HINT: `pretrained` goes on from weights, `unet` holds the arguments of a "
            "UNet2DModel to start from nothing."
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
