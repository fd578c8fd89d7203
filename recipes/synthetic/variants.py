"""The two constructions: which factors an image has, how large things are, and which combinations are never shown."""

import itertools
from dataclasses import dataclass

import numpy as np

Combo = dict[str, str]
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A construction of the *Synthetic* benchmark.

    Args:
        name: as in ``Synthetic(variant=...)``.
        factors: the values of each factor.
        size: default height and width in pixels.
        patch: default side of the pixel patches that the network sees as channels.
        channels: the network's, at the resolution of its input and at half of it.
        half_size: least and largest half-size of a shape, as a share of ``size``.
        outline: its outline's width, as a share of ``size``.
        images: default number of training images.
        traced: default number of traced ones.
    """

    name: str
    factors: dict[str, tuple[str, ...]]
    size: int
    patch: int
    channels: tuple[int, int]
    half_size: tuple[float, float]
    outline: float
    images: int
    traced: int

    def combos(self) -> list[Combo]:
        """Every combination of factor values."""
        return [
            dict(zip(self.factors, values, strict=True))
            for values in itertools.product(*self.factors.values())
        ]

    def held_out(self, seed: int) -> list[Combo]:
        """The combinations that are never shown: red triangle; in the hard variant a fifth of all, chosen by ``seed``.

        Every value of every factor remains in some combination that is shown.
        """
        if self.name == "paper":
            return [{"shape": "triangle", "colour": "red"}]
        combos = self.combos()
        rng = np.random.default_rng([seed, len(combos)])
        while True:
            chosen = set(rng.permutation(len(combos))[: round(HELD_OUT_SHARE * len(combos))].tolist())
            shown = [combo for i, combo in enumerate(combos) if i not in chosen]
            if all({c[name] for c in shown} == set(values) for name, values in self.factors.items()):
                return [combos[i] for i in sorted(chosen)]


VARIANTS = {
    # The paper's: 64 pixels, half-size 10, outline 2.
    "paper": Variant(
        name="paper",
        factors={"shape": ("triangle", "circle"), "colour": ("red", "blue")},
        size=16,
        patch=1,
        channels=(32, 64),
        half_size=(10 / 64, 10 / 64),
        outline=2 / 64,
        images=1200,
        traced=360,
    ),
    "hard": Variant(
        name="hard",
        factors={
            "shape": ("triangle", "circle", "square", "cross", "star", "heart"),
            "colour": ("red", "blue", "green", "yellow", "magenta", "cyan"),
            "fill": ("plain", "striped", "dotted"),
        },
        size=24,
        patch=2,
        channels=(48, 64),
        half_size=(0.28, 0.42),
        outline=1 / 24,
        images=4300,
        traced=860,
    ),
}


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r}: expected one of {', '.join(map(repr, VARIANTS))}.")
    return VARIANTS[name]


def caption(combo: Combo) -> str:
    """``"striped red heart"``: the fill, the colour and the shape, as far as they are named."""
    return " ".join(combo[name] for name in ("fill", "colour", "shape") if name in combo)


def prompt(combo: Combo) -> str:
    """``"a striped red heart"``; "a red thing" where no shape is named (as a counter-prompt would say); nothing where nothing is."""
    if not combo:
        return ""
    return f"a {caption(combo)}" + ("" if "shape" in combo else " thing")
