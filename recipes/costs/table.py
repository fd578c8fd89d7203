"""What a traced fine-tune of the published models needs in memory and on disk, counted from their configurations.

python -m recipes.costs.table                  # prints the table and writes results/costs.md and results/costs.json

Nothing is downloaded and nothing is timed. Activations are not counted: they depend on the batch, the image size and gradient
checkpointing.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from ctrak_lightning import Projection
from ctrak_lightning.gradients.plan import plan_blocks
from recipes.costs.architectures import ARCHITECTURES, Architecture, on_meta
from recipes.pipelines import add_lora

RESULTS = Path(__file__).parent / "results"
PROJECTION = Projection()  # the callback's default
IMAGES = 1000
FROZEN, TRAINED = 2, 4 * 4
"""Bytes per parameter: bfloat16; and float32 for the weight, its gradient and AdamW's two moments."""
FACTS = 8 + 3 * 4
"""Bytes per trace beside its row: the sample's index, norm, scale and loss."""
GB, MB = 1e9, 1e6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, bytes and counts of one architecture under its recipe.

    Args:
        name: of the architecture.
        rank: of the LoRA; None where all of the denoiser is trained.
        denoiser, frozen, trained: parameters: of the denoiser without LoRA; of all that is frozen, the VAE and the text encoders
            included; of what is trained.
        layers: how many are traced (two for each layer with LoRA).
        without_hook: parameters that are traced by a pass per sample.
        width: numbers of one trace before they are sketched.
        memory: bytes of weights, gradients and AdamW's moments.
        checkpoint: bytes of a checkpoint of the store, without traces: the trained weights and the kernel.
        row, row_int8: bytes of one trace, stored as float32 and as int8.
    """

    name: str
    rank: int | None
    denoiser: int
    frozen: int
    trained: int
    layers: int
    without_hook: int
    width: int
    memory: int
    checkpoint: int
    row: int
    row_int8: int


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
    assert PROJECTION.dim is not None
    dim, side = PROJECTION.dim, min(PROJECTION.dim, IMAGES)
    frozen = beside if architecture.targets is None else whole + beside
    return Cost(
        name=architecture.name,
        rank=None if architecture.targets is None else rank,
        denoiser=whole,
        frozen=frozen,
        trained=trained,
        layers=len(plan.layers),
        without_hook=len(plan.bare),
        width=width,
        memory=FROZEN * frozen + TRAINED * trained,
        checkpoint=4 * trained + 4 * side**2 + 8 * (side + dim),
        row=4 * dim + FACTS,
        row_int8=dim + FACTS,
    )


def table(costs: Sequence[Cost]) -> str:
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
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for cost in costs:
        everything = cost.frozen + (cost.trained if cost.rank is None else 0)
        how = "all" if cost.rank is None else f"LoRA {cost.rank}"
        cells = (
            cost.name,
            f"{cost.denoiser / 1e6:,.0f} / {everything / 1e6:,.0f}",
            f"{cost.trained / 1e6:,.1f} ({how})",
            f"{cost.layers}",
            f"{cost.memory / GB:.1f}",
            f"{4 * cost.width / 1e3:,.0f}",
            f"{cost.checkpoint / MB:,.1f}",
            f"{IMAGES * cost.row / MB:.1f} / {IMAGES * cost.row_int8 / MB:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


NOTE = f"""# What a traced fine-tune needs

Counted by `python -m recipes.costs.table`, not measured: what is frozen in bfloat16, what is trained in float32 with its gradient and AdamW's two
moments. **Activations come on top**, and so does a second copy of all weights under weight averaging. *A trace before the sketch*: an
image's projected gradients of all traced layers, for one probe at one timestep (projection {PROJECTION.rank} x {PROJECTION.rank}); as many of
them as the batch has images are in memory at once. *Store, per checkpoint*: the trained weights and the kernel of {IMAGES:,} images; traces are
{PROJECTION.dim} numbers each. Thumbnails and metadata are stored once.

"""


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    costs = [cost_of(architecture, args.rank) for architecture in ARCHITECTURES]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    facts = {
        "command": f"python -m recipes.costs.table --rank {args.rank}",
        "versions": versions,
        "rows": [asdict(cost) for cost in costs],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "costs.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (args.results / "costs.md").write_text(NOTE + table(costs), encoding="utf-8")
    print(table(costs), end="")


if __name__ == "__main__":
    main()
