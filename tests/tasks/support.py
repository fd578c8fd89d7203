"""Which checks each pipeline passes: the table that the tests are parametrised by, and that
docs/support.md shows.

``python -m tests.tasks.support`` writes it there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
BEGIN, END = (
    "<!-- support table: python -m tests.tasks.support -->",
    "<!-- end of the support table -->",
)
PIPELINES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x (v prediction)",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "sd35": "Stable Diffusion 3.5 (without T5, shift by size)",
    "flux": "Flux dev",
    "flux-schnell": "Flux schnell",
    "pixart": "PixArt-alpha",
    "pixart-sized": "PixArt-alpha 1024 (told sizes)",
    "pixart-sigma": "PixArt-sigma",
    "dit": "DiT",
    "ddpm-classes": "UNet2DModel with classes",
    "ddpm": "UNet2DModel",
}
ALL = tuple(PIPELINES)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A column of the table: what it is called, the pipelines it is made of, and those of them
    whose test is among the slow ones."""

    title: str
    pipelines: tuple[str, ...] = ALL
    slow: tuple[str, ...] = ()


CHECKS = {
    "generation": Check(title="generation equals the pipeline's"),
    "lora": Check(title="hooks = loop: LoRA"),
    "attention": Check(title="attention, all"),
    "end to end": Check(
        title="traced and asked",
        slow=("sd2", "sd35", "flux-schnell", "pixart-sized", "pixart-sigma"),
    ),
    "same training": Check(
        title="training same to the bit", slow=tuple(n for n in ALL if n not in ("sd1", "sd3"))
    ),
    "half": Check(
        title="bf16, mixed and true",
        pipelines=("sd1", "sdxl", "sd3", "flux"),
        slow=("sdxl", "sd3", "flux"),
    ),
    "checkpointing": Check(
        title="gradient checkpointing",
        pipelines=("sd1", "sdxl", "sd3", "flux"),
        slow=("sdxl", "sd3", "flux"),
    ),
    "accumulation": Check(
        title="accumulation and EMA", pipelines=("sd1", "sdxl", "sd3"), slow=("sd1", "sdxl", "sd3")
    ),
    "resume": Check(title="resume", pipelines=("sd1", "sdxl", "sd3"), slow=("sd1", "sdxl", "sd3")),
    "ddp": Check(title="DDP", pipelines=("sd1", "sd3"), slow=("sd1", "sd3")),
}


def pipelines_of(check: str, among: Any = ALL) -> list[Any]:
    """The pipelines of a check for ``pytest.mark.parametrize``, of those in ``among``."""
    facts = CHECKS[check]
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in facts.slow else [])
        for name in facts.pipelines
        if name in among
    ]


def table() -> str:
    """The table in Markdown."""
    heads = ["", *(check.title for check in CHECKS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, title in PIPELINES.items():
        cells = ["yes" if name in check.pipelines else "-" for check in CHECKS.values()]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def block() -> str:
    """What stands between the markers of the page."""
    return (
        f"{BEGIN}\n**Tiny networks with random weights, on a CPU**: what is tested of each "
        "pipeline, every cell by a test that has the table as its list (`tests/tasks/support.py`); "
        '"-" is not tested. "Traced and asked" is a fine-tune with the default method (without '
        "conditions, which is without concepts: D-TRAK), two timesteps: a stored row is that of "
        "its sample traced alone, and the scores are the stored rows' own, computed anew. No "
        "published checkpoint was loaded, and 16-bit floats (fp16) need a GPU, which no test "
        f"had.\n\n{table()}\n{END}"
    )


def with_table(text: str) -> str:
    """The page's text with the table between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE}: expected the markers {BEGIN!r} and {END!r} once each.")
    before, _, rest = text.partition(BEGIN)
    return before + block() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
