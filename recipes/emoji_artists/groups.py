"""Groups of images left out one at a time: did they matter for their concept at all?

python -m recipes.emoji_artists.groups --setting labelled    # from the committed outcomes; writes results/groups_labelled.md

A ranking that misses images without influence is right. So the recall of hidden or mislabelled images is read beside this.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ctrak_lightning.metrics import bootstrap_interval
from recipes.emoji_artists.data import KINDS, SETTINGS, EmojiArtists
from recipes.emoji_artists.outcomes import RESULTS, STRENGTHS, Outcomes

PLANS = ("without-hidden", "without-wrong", "without-artist", "without-object")
REAL = 2.0


@dataclass(frozen=True)
class Effect:
    """What leaving out one group did to its concept.

    Args:
        plan: of the group.
        kind: of the concept.
        value: the concept.
        images: how many were left out.
        measure: of strength.
        effect: the strength with the group less the strength without it; positive = the group taught the concept.
        noise: the standard deviation of the strength over the runs that saw the whole group.
    """

    plan: str
    kind: str
    value: str
    images: int
    measure: str
    effect: float
    noise: float

    @property
    def is_real(self) -> bool:
        """Whether it is beyond :data:`REAL` standard deviations of the runs with the group, either way."""
        return abs(self.effect) > REAL * self.noise


def effects(outcomes: Outcomes, pairs: Sequence[tuple[str, str]], measures: Sequence[str]) -> list[Effect]:
    """The effect of every group left out on its own concept.

    It is compared with every run that saw the whole group: the full ones and those without some other group.

    Args:
        outcomes: of all runs of a setting.
        pairs: the held-out (object, artist) pairs, in the order of the outcomes.
        measures: of strength.
    """
    runs = [name.rpartition("-seed")[0] for name in outcomes.names]
    comparable = torch.tensor([run == "full" or run.startswith("without-") for run in runs])
    found = []
    for plan in PLANS:
        for run in sorted({run for run in runs if run.startswith(f"{plan}-")}):
            value = run.removeprefix(f"{plan}-")
            kind = next(kind for kind in KINDS if value in {pair[KINDS.index(kind)] for pair in pairs})
            columns = [i for i, pair in enumerate(pairs) if pair[KINDS.index(kind)] == value]
            mine = torch.tensor([each == run for each in runs])
            left_out = ~outcomes.kept[mine][0]
            others = comparable & outcomes.kept[:, left_out].all(1)
            for measure in measures:
                strength = outcomes.strength(kind, measure)[:, columns].double().mean(1)
                found.append(
                    Effect(
                        plan=plan,
                        kind=kind,
                        value=value,
                        images=int(left_out.sum()),
                        measure=measure,
                        effect=float(strength[others].mean() - strength[mine].mean()),
                        noise=float(strength[others].std()),
                    )
                )
    return found


def lines_of(found: list[dict[str, Any]]) -> list[str]:
    """A table of the effects, one row per plan, kind and measure."""
    lines = [
        "Effect of a group on its own concept's strength, in standard deviations of the runs that saw the group; positive: "
        "the group taught it.",
        "",
        "| left out | measure | groups | mean effect | beyond 2 | which |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((each["plan"], each["kind"], each["measure"]) for each in found):
        rows = [each for each in found if (each["plan"], each["kind"], each["measure"]) == key]
        units = torch.tensor([each["effect"] / each["noise"] for each in rows], dtype=torch.float64)
        interval = "{:+.2f}, {:+.2f}".format(*bootstrap_interval(units)) if len(units) > 1 else ""
        real = [
            f"{each['value']} ({each['effect'] / each['noise']:+.1f})" for each in rows if each["is_real"]
        ]
        title = f"{key[0].removeprefix('without-')}, {key[1]}s"
        lines.append(
            f"| {title} | {key[2]} | {len(rows)} | {float(units.mean()):+.2f} [{interval}] | {len(real)} | {', '.join(real)} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="labelled")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    outcomes = Outcomes.load(args.setting, args.results)
    found = [
        asdict(effect) | {"is_real": effect.is_real}
        for effect in effects(outcomes, EmojiArtists("new").held_out, STRENGTHS)
    ]
    head = f"`python -m recipes.emoji_artists.groups --setting {args.setting}`; {len(outcomes.names)} retrained models."
    text = "\n".join([head, "", *lines_of(found)]) + "\n"
    (args.results / f"groups_{args.setting}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
