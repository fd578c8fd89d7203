"""What a traced fine-tune of the published models needs in memory and on disk: counted.

python -m recipes.benchmarks.costs                  # --rank 16 for another LoRA than of rank 8

The networks are built from their configurations on the meta device, without weights: nothing is
downloaded and nothing is timed. Activations, which depend on the batch, are not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ctrak_lightning import Projection
from ctrak_lightning.gradients.plan import plan_blocks

from ..flow_matching_lora.module import TEXT
from ..lora import ATTENTION, add_lora
from .tables import command_of, grid, machine, parser_of, publish

PROJECTION = Projection()  # the callback's default
DIM = PROJECTION.dim or 0
IMAGES = 1000
FROZEN, TRAINED = 2, 4 * 4
"""Bytes per parameter: bfloat16; and float32 with its gradient and AdamW's two moments."""
FACTS = 8 + 3 * 4
"""Bytes per trace beside its row: the sample's index, norm, scale and loss."""
GB, MB = 1e9, 1e6
Build = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published model.

    Args:
        name: as it is published.
        denoiser: builds the network that is fine-tuned.
        frozen: build the VAE and the text encoders, those that stay in memory.
        targets: of the recipe's LoRA; None where the recipe trains all.
    """

    name: str
    denoiser: Build
    frozen: tuple[Build, ...] = ()
    targets: tuple[str, ...] | None = ATTENTION


def on_meta(build: Build) -> Any:
    """A network without weights: its parameters have shapes alone."""
    with torch.device("meta"):
        return build()


sd15 = partial(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
sd21 = partial(
    diffusers.UNet2DConditionModel,
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
)
sdxl = partial(
    diffusers.UNet2DConditionModel,
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
sd3 = partial(
    diffusers.SD3Transformer2DModel,
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
flux = partial(diffusers.FluxTransformer2DModel, guidance_embeds=True)
_xl: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
dit = partial(diffusers.DiTTransformer2DModel, sample_size=32, **_xl)
pixart = partial(
    diffusers.PixArtTransformer2DModel,
    sample_size=128,
    cross_attention_dim=1152,
    caption_channels=4096,
    **_xl,
)
ddpm = partial(
    diffusers.UNet2DModel,
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


def clip(kind: Any, width: int, layers: int, heads: int) -> Any:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return kind(config)


clip_l = partial(clip, CLIPTextModel, 768, 12, 12)
clip_l_projected = partial(clip, CLIPTextModelWithProjection, 768, 12, 12)
openclip_h = partial(clip, CLIPTextModel, 1024, 23, 16)
openclip_g = partial(clip, CLIPTextModelWithProjection, 1280, 32, 20)


def t5_xxl() -> Any:
    size: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = transformers.T5Config(**size, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(config)


vae16 = partial(vae, 16)
JOINT = ATTENTION + TEXT
ARCHITECTURES = (
    Architecture(name="Stable Diffusion 1.5", denoiser=sd15, frozen=(vae, clip_l)),
    Architecture(name="Stable Diffusion 2.1", denoiser=sd21, frozen=(vae, openclip_h)),
    Architecture(name="Stable Diffusion XL", denoiser=sdxl, frozen=(vae, clip_l, openclip_g)),
    Architecture(
        name="Stable Diffusion 3 medium",
        denoiser=sd3,
        frozen=(vae16, clip_l_projected, openclip_g, t5_xxl),
        targets=JOINT,
    ),
    Architecture(name="FLUX.1-dev", denoiser=flux, frozen=(vae16, clip_l, t5_xxl), targets=JOINT),
    Architecture(name="PixArt-alpha XL/2", denoiser=pixart, frozen=(vae, t5_xxl)),
    Architecture(name="DiT-XL/2", denoiser=dit, frozen=(vae,), targets=None),
    Architecture(name="DDPM, 256 pixels", denoiser=ddpm, targets=None),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, bytes and counts of one architecture under its recipe.

    Args:
        name: of the architecture.
        rank: of the LoRA; None where all of the denoiser is trained.
        denoiser, frozen, trained: parameters: of the denoiser without LoRA; of all that is frozen,
            the VAE and the text encoders included; of what is trained.
        layers: how many are traced (two for each layer with LoRA).
        width: numbers of one trace before they are sketched.
        memory: bytes of weights, gradients and AdamW's moments.
        checkpoint: bytes of a stored checkpoint without traces: the trained weights and the kernel.
    """

    name: str
    rank: int | None
    denoiser: int
    frozen: int
    trained: int
    layers: int
    width: int
    memory: int
    checkpoint: int


def cost_of(architecture: Architecture, rank: int) -> Cost:
    """Counts the parameters and layers of one architecture."""
    denoiser = on_meta(architecture.denoiser)
    whole = _parameters(denoiser)
    beside = sum(_parameters(on_meta(build)) for build in architecture.frozen)
    if architecture.targets is not None:
        with torch.device("meta"):
            add_lora(denoiser, rank, architecture.targets)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    plan = plan_blocks(denoiser, None)
    blocks = [*plan.layers, *(block for block, _ in plan.bare)]
    side_of = PROJECTION.rank
    width = sum(min(block.rows, side_of) * min(block.cols, side_of) for block in blocks)
    side = min(DIM, IMAGES)
    frozen = beside if architecture.targets is None else whole + beside
    return Cost(
        name=architecture.name,
        rank=None if architecture.targets is None else rank,
        denoiser=whole,
        frozen=frozen,
        trained=trained,
        layers=len(plan.layers),
        width=width,
        memory=FROZEN * frozen + TRAINED * trained,
        checkpoint=4 * trained + 4 * side**2 + 8 * (side + DIM),
    )


def table(costs: Sequence[Cost]) -> list[str]:
    """The costs as Markdown."""
    heads = (
        "model",
        "denoiser / all parameters, M",
        "trained, M",
        "traced layers",
        "weights, gradients, AdamW, GB",
        "a trace before the sketch, KB",
        "store, per checkpoint, MB",
        f"traces of {IMAGES:,} images, MB: float32 / int8",
    )
    rows = []
    for cost in costs:
        everything = cost.frozen + (cost.trained if cost.rank is None else 0)
        how = "all" if cost.rank is None else f"LoRA {cost.rank}"
        rows.append(
            (
                cost.name,
                f"{cost.denoiser / 1e6:,.0f} / {everything / 1e6:,.0f}",
                f"{cost.trained / 1e6:,.1f} ({how})",
                f"{cost.layers}",
                f"{cost.memory / GB:.1f}",
                f"{4 * cost.width / 1e3:,.0f}",
                f"{cost.checkpoint / MB:,.1f}",
                f"{IMAGES * (4 * DIM + FACTS) / MB:.1f} / {IMAGES * (DIM + FACTS) / MB:.1f}",
            )
        )
    return grid(heads, rows)


NOTE = f"""Counted, not measured: what is frozen in bfloat16, what is trained in float32 with its
gradient and AdamW's two moments. **Activations come on top**, and so does a second copy of all
weights under weight averaging. *A trace before the sketch*: an image's projected gradients of all
traced layers, for one probe at one timestep (projection {PROJECTION.rank} x {PROJECTION.rank}); as
many of them as the batch has images are in memory at once. *Store, per checkpoint*: the trained
weights and the kernel of {IMAGES:,} images; traces are {PROJECTION.dim} numbers each. Thumbnails
and metadata are stored once.
"""


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.costs", __doc__)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    args = parser.parse_args(argv)
    costs = [cost_of(architecture, args.rank) for architecture in ARCHITECTURES]
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    head = f"`{command_of(parser, args)}`; {machine()}, {versions}."
    publish(args.results / "costs.md", "\n".join([head, "", NOTE, *table(costs)]) + "\n")


if __name__ == "__main__":
    main()
