"""What a traced fine-tune of the published models needs: counts against published ones, a store's
files, and each other."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ctrak_lightning import GradientTracer
from ctrak_lightning.store.shards import Rows, write_shard
from recipes.benchmarks import costs
from recipes.benchmarks.costs import ARCHITECTURES, FACTS, Architecture, cost_of, on_meta, table
from recipes.benchmarks.tables import RESULTS
from recipes.lora import ATTENTION, add_lora

ROOT = Path(__file__).parents[2]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [
        ("sd15", 859_520_964),
        ("sd21", 865_910_724),
        ("sdxl", 2_567_463_684),
        ("sd3", 2_028_328_000),
        ("flux", 11_901_408_320),
        ("ddpm", 113_673_219),
        ("t5_xxl", 4_762_310_656),
        ("clip_l", 123_060_480),
        ("openclip_g", 694_659_840),
        ("vae", 83_653_863),
    ],
)
def test_the_networks_have_as_many_parameters_as_the_published_ones(
    build: str, published: int
) -> None:
    network = on_meta(getattr(costs, build))
    assert parameters(network) == published
    assert next(network.parameters()).device.type == "meta"


def test_lora_of_rank_four_on_stable_diffusion_has_the_published_size() -> None:
    unet = on_meta(costs.sd15)
    with torch.device("meta"):
        add_lora(unet, 4, ATTENTION)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 797_184
    # Two matrices for each of four projections, in two attentions of sixteen blocks.
    assert len(trained) == 2 * 4 * 2 * 16


def small() -> nn.Module:
    network = nn.Module()
    network.block = nn.Module()
    network.block.to_q = nn.Linear(40, 20)
    network.block.to_k = nn.Linear(10, 20)
    network.rest = nn.Linear(7, 5)
    return network


def test_the_costs_of_a_small_network_by_hand() -> None:
    def beside() -> nn.Module:
        return nn.Linear(9, 9)

    lora = cost_of(
        Architecture(name="x", denoiser=small, frozen=(beside,), targets=("to_q", "to_k")),
        2,
    )
    whole = 41 * 20 + 11 * 20 + 8 * 5
    trained = 2 * (40 + 20) + 2 * (10 + 20)
    assert (lora.denoiser, lora.frozen, lora.trained, lora.layers) == (
        whole,
        whole + 90,
        trained,
        4,
    )
    # Gradients [2, 40], [20, 2], [2, 10] and [20, 2], each side cut to 16.
    assert lora.width == 2 * 16 + 16 * 2 + 2 * 10 + 16 * 2
    assert lora.memory == 2 * (whole + 90) + 16 * trained
    full = cost_of(Architecture(name="x", denoiser=small, frozen=(beside,), targets=None), 2)
    assert (full.frozen, full.trained, full.memory) == (90, whole, 2 * 90 + 16 * whole)
    tracer = GradientTracer(small())
    assert full.width == tracer.width
    assert "| x | 0 / 0 | 0.0 (LoRA 2) | 4 |" in "\n".join(table([lora]))


def test_the_bytes_of_traces_are_those_of_a_stores_file(tmp_path: Path) -> None:
    rows = 400
    for dtype, expected in (("float32", 4 * 2048 + FACTS), ("int8", 2048 + FACTS)):
        unit = torch.randn(rows, 2048).to(getattr(torch, dtype))
        path = tmp_path / f"{dtype}.h5"
        facts = {name: torch.ones(rows) for name in ("norm", "scale", "loss")}
        write_shard(path, Rows(index=torch.arange(rows), unit=unit, **facts))
        assert path.stat().st_size == pytest.approx(rows * expected, rel=0.03)


def test_the_committed_table_is_what_the_script_prints_now() -> None:
    committed = (RESULTS / "costs.md").read_text()
    lines = [line for line in committed.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0][2:] for line in lines] == [each.name for each in ARCHITECTURES]
    assert table([cost_of(ARCHITECTURES[0], rank=8)])[-1] == lines[0]
    readmes = "".join(path.read_text() for path in (ROOT / "recipes").glob("*/README.md"))
    for line in lines:
        assert line in readmes or line.startswith("| PixArt")
