"""Groups of images left out one at a time: did they matter for their concept at all?

python -m recipes.benchmarks.groups --setting labelled    # from the committed outcomes

A ranking that misses images without influence is right. So the recall of hidden or mislabelled
images is read beside this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctrak_lightning.metrics import bootstrap_interval

from ..emoji_artists.data import KINDS, SETTINGS, EmojiArtists
from .outcomes import STRENGTHS, Outcomes
from .tables import command_of, grid, parser_of, publish

PLANS = ("without-hidden", "without-wrong", "without-artist", "without-object")
REAL = 2.0


@dataclass(frozen=True)
class Effect:
    """What leaving out so many images, one group, did to the strength of its concept: ``effect``,
    with the group less without it, so that what taught it is positive; ``noise``, the strength's
    standard deviation over the runs that saw the whole group."""

    plan: str
    kind: str
    value: str
    images: int
    measure: str
    effect: float
    noise: float

    @property
    def is_real(self) -> bool:
        """Whether it is beyond :data:`REAL` standard deviations, either way."""
        return abs(self.effect) > REAL * self.noise


def effects(outcomes: Outcomes, pairs: Sequence[tuple[str, str]]) -> list[Effect]:
    """The effect of every group left out on its own concept, by every measure of strength, of all
    runs of a setting; the held-out (object, artist) pairs are in the order of the outcomes.

    Compared with every run that saw the whole group: full ones and those without some other group.
    """
    runs = [name.rpartition("-seed")[0] for name in outcomes.names]
    comparable = torch.tensor([run == "full" or run.startswith("without-") for run in runs])
    found = []
    for plan in PLANS:
        for run in sorted({run for run in runs if run.startswith(f"{plan}-")}):
            value = run.removeprefix(f"{plan}-")
            kind = next(k for k in KINDS if value in {pair[KINDS.index(k)] for pair in pairs})
            columns = [i for i, pair in enumerate(pairs) if pair[KINDS.index(kind)] == value]
            mine = torch.tensor([each == run for each in runs])
            left_out = ~outcomes.kept[mine][0]
            others = comparable & outcomes.kept[:, left_out].all(1)
            for measure in STRENGTHS:
                strength = outcomes.strength(kind, measure)[:, columns].double().mean(1)
                effect = float(strength[others].mean() - strength[mine].mean())
                noise = float(strength[others].std())
                images = int(left_out.sum())
                found.append(Effect(plan, kind, value, images, measure, effect, noise))
    return found


def lines_of(found: Sequence[Effect]) -> list[str]:
    """A table of the effects, one row per plan, kind and measure."""
    rows = []
    for key in dict.fromkeys((each.plan, each.kind, each.measure) for each in found):
        own = [each for each in found if (each.plan, each.kind, each.measure) == key]
        units = torch.tensor([each.effect / each.noise for each in own], dtype=torch.float64)
        ends = "{:+.2f}, {:+.2f}".format(*bootstrap_interval(units)) if len(units) > 1 else ""
        real = [f"{e.value} ({e.effect / e.noise:+.1f})" for e in own if e.is_real]
        title = f"{key[0].removeprefix('without-')}, {key[1]}s"
        mean = f"{float(units.mean()):+.2f} [{ends}]"
        rows.append((title, key[2], len(own), mean, len(real), ", ".join(real)))
    heads = ("left out", "measure", "groups", "mean effect", "beyond 2", "which")
    return [
        "Effect of a group on its own concept's strength, in standard deviations of the runs that "
        "saw the group; positive: the group taught it.",
        "",
        *grid(heads, rows),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.groups", __doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="labelled")
    args = parser.parse_args(argv)
    outcomes = Outcomes.load(args.setting, args.results)
    head = f"`{command_of(parser, args)}`; {len(outcomes.names)} retrained models."
    lines = lines_of(effects(outcomes, EmojiArtists("new").held_out))
    publish(args.results / f"emoji_{args.setting}.md", "\n".join([head, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
