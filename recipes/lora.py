"""LoRA on a denoiser, by peft."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers.training_utils import cast_training_params

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Ends of the names of the attention's layers in diffusers' denoisers."""


def add_lora(
    denoiser: Any,
    rank: int,
    targets: Sequence[str] = ATTENTION,
    init: Literal["gaussian", False] = "gaussian",
) -> None:
    """Freezes a denoiser and adds LoRA, in float32 whatever the frozen weights are, with
    ``alpha = rank``: a scale of 1, so that the file of the adapter says all that there is to say.
    ``init=False`` starts it away from zero.

    Raises:
        ValueError: no layer has one of these names.
        ImportError: peft is not installed.
    """
    denoiser.requires_grad_(False)
    ends = tuple(f".{target}" for target in targets)
    if not any(f".{name}".endswith(ends) for name, _ in denoiser.named_modules()):
        raise ValueError(
            f"add_lora({type(denoiser).__name__}, targets={list(targets)}): no layer has a name "
            f"that ends so. HINT: {list(ATTENTION)} is the attention of diffusers' networks."
        )
    peft = _peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=init
    )
    # Not every denoiser of diffusers has `add_adapter`, which does the same and then says that
    # there is an adapter.
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config)
    else:
        peft.inject_adapter_in_model(config, denoiser)
    cast_training_params(denoiser)


def save_lora(pipeline: Any, part: str, folder: Path) -> None:
    """Writes the adapter on a pipeline's ``unet`` or ``transformer`` as safetensors, for
    ``pipeline.load_lora_weights(folder)``."""
    layers = _peft().get_peft_model_state_dict(getattr(pipeline, part))
    layers = {name: value.detach().cpu().contiguous() for name, value in layers.items()}
    type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": layers})


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "An adapter needs the package `peft`, which is not installed. "
            "HINT: pip install 'ctrak-lightning[lora]'"
        ) from error
    return peft
