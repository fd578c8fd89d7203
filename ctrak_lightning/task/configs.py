"""Networks of a known class that belong to another pipeline: told by their configuration, before
anything is traced."""

from collections.abc import Collection, Mapping
from typing import Any

from ctrak_lightning.errors import TaskError

UNET_EXPECTED: Mapping[str, Collection[Any]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
}
"""What a UNet2DConditionModel of a text-to-image pipeline has; a plain projection of the text is
the network's own matter."""
_MEANINGS = {
    "in_channels": (
        "inpainting, editing, depth, upscaling and control networks take an image beside the "
        "noised latents"
    ),
    "out_channels": "networks that predict variances or more than the noise need a loss of their own",
    "class_embed_type": "unCLIP, upscaling and variation networks take class labels or an image embedding",
    "num_class_embeds": "upscaling and class-conditional networks take class labels",
    "addition_embed_type": "XL, Kandinsky, DeepFloyd and image-conditioned networks take further embeddings",
    "encoder_hid_dim_type": "IP-Adapters and image-conditioned networks take an image embedding",
    "time_cond_proj_dim": (
        "distilled consistency models take the guidance scale as an input; trace the model it "
        "was distilled from"
    ),
    "attention_type": "GLIGEN networks take boxes and phrases",
    "projection_class_embeddings_input_dim": "refiners take an aesthetic score in place of the size",
    "cross_attention_dim": "the text encoders that are given do not belong to this network",
    "caption_channels": "the text encoder that is given does not belong to this network",
}


def require_config(task: str, network: Any, expected: Mapping[str, Collection[Any]]) -> None:
    """Refuses a network that takes other inputs than its task gives it.

    Args:
        task: the name of the family's class.
        network: a diffusers model.
        expected: the values that entries of its configuration may have; an entry that it lacks, or
            of which nothing is known (no values), is passed over.

    Raises:
        TaskError: an entry has another value; names it, what is supported, and what to do.
    """
    config = network.config
    for entry, allowed in expected.items():
        value = config.get(entry)
        each = value if isinstance(value, (list, tuple)) else [value]
        if value is None or not allowed or all(one in allowed for one in each):
            continue
        listed = " or ".join(repr(one) for one in allowed if one is not None) or "None"
        meaning = f" ({_MEANINGS[entry]})" if entry in _MEANINGS else ""
        raise TaskError(
            f"{task}: the {type(network).__name__} has {entry}={value!r} in its configuration, "
            f"expected {listed}{meaning}. HINT: write a DiffusionTask whose encode(batch) and "
            "condition(spec, n) make these inputs and whose predict(x_t, t, condition) gives them "
            "to the network."
        )


def require_vae(task: str, vae: Any) -> None:
    """Refuses a VAE whose latents are not those of a normal distribution, scaled.

    Raises:
        TaskError: it is one of diffusers' others, or its configuration lacks the scaling factor or
            has means.
    """
    kinds = {base.__name__ for base in type(vae).__mro__}
    name = type(vae).__name__
    theirs = type(vae).__module__.startswith("diffusers.")
    found = None
    if theirs and not kinds & {"AutoencoderKL", "AsymmetricAutoencoderKL"}:
        found = f"is a {name}"
    elif vae.config.get("latents_mean") is not None:
        found = "has `latents_mean`"
    elif vae.config.get("scaling_factor") is None:
        found = f"({name}) has no `scaling_factor`"
    if found is not None:
        raise TaskError(
            f"{task}: the VAE {found}, expected an AutoencoderKL with a scaling and a shift factor "
            "only. HINT: write a DiffusionTask with encode(batch) and decode(latents) of its own."
        )


def text_width(pipeline: Any, *names: str) -> Collection[int | None]:
    """What the hidden states of text encoders have side by side; nothing where one is missing or
    does not say."""
    configs = [getattr(getattr(pipeline, name, None), "config", None) for name in names]
    widths = [
        getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        for config in configs
    ]
    return () if None in widths else (sum(width for width in widths if width is not None),)
