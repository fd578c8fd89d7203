"""What precision costs: the default method at fewer and more forward passes, from the rows of the ablations.

python -m recipes.emoji_artists.curve    # after `ablations`; writes results/curve.md and curve.png
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.benchmarks.plots import OTHERS, OURS
from recipes.emoji_artists.ablations import REFERENCE
from recipes.emoji_artists.benchmark import STEPS, TIMESTEPS
from recipes.emoji_artists.outcomes import RESULTS
from recipes.emoji_artists.retrain import SAVED_STEPS

FIGURES = (
    "R-precision, object",
    "R-precision, artist",
    "contributions, half by loss, object",
    "contributions, half by judge, object",
)
GENERATION = 100  # forward passes: 50 steps with guidance
MOST = "10 timesteps, 6 checkpoints, 16,384 numbers"


@dataclass(frozen=True)
class Point:
    """A row of the ablations, and how often it looks at an image."""

    row: str
    timesteps: int
    checkpoints: int

    @property
    def per_image(self) -> int:
        """Forward passes that trace a training image, at all checkpoints."""
        return self.timesteps * self.checkpoints

    @property
    def per_query(self) -> int:
        """Forward passes of a question about a generated image: its generation, then two conditions everywhere."""
        return GENERATION + 2 * self.per_image


POINTS = (
    Point("1 timestep", 1, len(STEPS)),
    Point("last checkpoint only", TIMESTEPS, 1),
    Point("2 timesteps", 2, len(STEPS)),
    Point(REFERENCE, TIMESTEPS, len(STEPS)),
    Point("10 timesteps", 10, len(STEPS)),
    Point("6 checkpoints", TIMESTEPS, len(SAVED_STEPS)),
    Point("20 timesteps", 20, len(STEPS)),
    Point(MOST, 10, len(SAVED_STEPS)),
)


def standard_error(figure: Mapping[str, Any]) -> float:
    """Of a mean whose 95 % bootstrap interval is known."""
    return float((figure["high"] - figure["low"]) / (2 * 1.96))


def page(rows: Mapping[str, Mapping[str, Any]], command: str) -> str:
    """The points, and how far below the most expensive one each is, in that one's standard errors."""
    most = rows[MOST]
    lines = [
        f"`python -m recipes.emoji_artists.curve`, from `{command}`.",
        "",
        "Mean (how many standard errors of the last row below it; negative: above).",
        "",
        f"| setting | forwards, training image | forwards, query | {' | '.join(FIGURES)} |",
        "|---" * (3 + len(FIGURES)) + "|",
    ]
    for point in POINTS:
        cells = []
        for name in FIGURES:
            mean = rows[point.row][name]["mean"]
            below = (most[name]["mean"] - mean) / standard_error(most[name])
            cells.append(f"{mean:.2f}" if point.row == MOST else f"{mean:.2f} ({below:+.1f})")
        title = f"{point.timesteps} timesteps x {point.checkpoints} checkpoints"
        title += ", 16,384 numbers" if point.row == MOST else ""
        title = f"**{title}**" if point.row == REFERENCE else title
        lines.append(f"| {title} | {point.per_image} | {point.per_query} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    import matplotlib.pyplot as plt  # slow to import

    figure, panels = plt.subplots(1, len(FIGURES), figsize=(3.4 * len(FIGURES), 3.0), layout="constrained")
    for panel, name in zip(panels, FIGURES, strict=True):
        for point in POINTS:
            cell = rows[point.row][name]
            colour = OURS if point.row == REFERENCE else OTHERS
            panel.plot([point.per_image] * 2, [cell["low"], cell["high"]], color=colour, linewidth=1.2)
            panel.plot(point.per_image, cell["mean"], "o", color=colour, markersize=5)
            label = f"{point.timesteps}x{point.checkpoints}"
            panel.annotate(
                label, (point.per_image, cell["mean"]), (4, 4), textcoords="offset points", fontsize=7
            )
        panel.set_xscale("log")
        panel.set_xticks([3, 5, 6, 15, 30, 60], ["3", "5", "6", "15", "30", "60"], minor=False)
        panel.minorticks_off()
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_xlabel("forward passes per training image", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("timesteps x checkpoints; mean and 95 % interval over questions", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    facts = json.loads((args.results / "ablations.json").read_text("utf-8"))
    if missing := [point.row for point in POINTS if point.row not in facts["rows"]]:
        raise ValueError(f"curve: ablations.json has no rows {missing}. HINT: run `ablations` with them.")
    command = facts["command"].split(" --rows")[0]
    text = page(facts["rows"], command)
    (args.results / "curve.md").write_text(text, encoding="utf-8")
    draw(args.results / "curve.png", facts["rows"])
    print(text)


if __name__ == "__main__":
    main()
