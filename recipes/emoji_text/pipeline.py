"""A small Stable Diffusion pipeline: MiniLM reads the prompt, the EmojiArtists trunk draws."""

from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from ctrak_lightning import PipelineTask

from ..emoji_artists.module import BASE as TRUNK
from ..emoji_artists.network import PATCH, build_unet
from ..pixels import cosine_scheduler
from ..text import TEXT_DIM, text_task

BASE = Path(__file__).parent / "base.safetensors"
MAX_TOKENS = 24
"""The longest caption ("an emoji of a magnifying glass tilted right, drawn by fluent emoji high
contrast") has 23."""


def build_text_unet() -> UNet2DConditionModel:
    """The EmojiArtists network with cross-attention to MiniLM's states [B, 24, 384] instead of
    tokens [B, 8, 128]."""
    return build_unet(cross_attention_dim=TEXT_DIM)


def reads_text(name: str) -> bool:
    """Whether a parameter of the network takes the text: the keys and values of the
    cross-attention."""
    return name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))


def load_base(unet: UNet2DConditionModel, text: Path | None = BASE) -> None:
    """Loads the EmojiArtists base's trunk and, if ``text`` is one, the matrices that read text.

    Raises:
        ValueError: the files do not fit the network.
    """
    prefix = "denoiser."
    state = {
        name.removeprefix(prefix): value.float()
        for name, value in load_file(TRUNK).items()
        if name.startswith(prefix) and not reads_text(name)
    }
    if text is not None:
        state |= {name: value.float() for name, value in load_file(text).items()}
    missing, unknown = unet.load_state_dict(state, strict=False)
    wrong = [name for name in missing if text is not None or not reads_text(name)] + unknown
    if wrong:
        raise ValueError(f"{TRUNK.name} and {text} do not fit the network: {wrong}.")


def build_task(unet: UNet2DConditionModel) -> PipelineTask:
    """The task of a Stable Diffusion pipeline of this network, MiniLM and 4x4 pixel patches."""
    return text_task(unet, cosine_scheduler(), PATCH, MAX_TOKENS)
