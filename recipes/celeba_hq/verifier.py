"""Whether a generated face shows the attributes asked: a small classifier, and how far it can be trusted.

No classifier comes with the data set, so one is trained on its real images, the held-out triple's included (the diffusion
model never sees them, its judge must). A tenth of the images is kept from it and says how good it is.
"""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from recipes.celeba_hq.data import CelebAHQ, Combo
from recipes.synthetic.data import to_float
from recipes.synthetic.verifier import Verifier, fit

STEPS = 2000
KEPT_BACK = 0.1
LEAST_ACCURACY = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """What a verifier does on real images that it was not trained on.

    Args:
        images: how many.
        accuracy: by attribute, the mean of the shares of the "yes" and of the "no" images that it names rightly; an image
            that it finds unclear counts as wrong. 0.5 is chance.
        accepts_triple: of the images that show the held-out triple, the share accepted as such; None if there were none.
        accepts_others: of all other images, the share accepted as the triple.
    """

    images: int
    accuracy: dict[str, float]
    accepts_triple: float | None
    accepts_others: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def train_verifier(data: CelebAHQ, seed: int = 0, steps: int = STEPS) -> tuple[Verifier, Trust]:
    """Trains a verifier on nine tenths of all images, every triple drawn equally often, and measures it on the rest.

    Raises:
        ValueError: the verifier tells an attribute apart no better than 80 %; nothing that it accepts could be believed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.randperm(len(data.combos))
        count = max(1, round(KEPT_BACK * len(order)))
        tested, trained = order[:count], order[count:]
        combos = [data.combos[i] for i in trained.tolist()]
        shown = Counter(map(_key, combos))
        weights = torch.tensor([1 / shown[_key(combo)] for combo in combos])
        verifier = fit(
            Verifier(data.factors, data.size), data.pixels[trained], combos, steps, weights=weights
        )
    trust = measure(verifier, data.pixels[tested], [data.combos[i] for i in tested.tolist()], data.held_out)
    weak = {name: round(value, 3) for name, value in trust.accuracy.items() if value < LEAST_ACCURACY}
    if weak:
        raise ValueError(
            f"train_verifier: balanced accuracy {weak} on {trust.images} real images, expected at least {LEAST_ACCURACY}; "
            "generated images could not be judged. HINT: larger images (--size), or attributes that are easier to see."
        )
    return verifier, trust


@torch.no_grad()
def measure(verifier: Verifier, pixels: Tensor, combos: list[Combo], triple: Combo) -> Trust:
    """What a verifier says of real images, uint8 [N, 3, H, W], that show ``combos``.

    Raises:
        ValueError: an attribute has one value only among them, so that its accuracy says nothing.
    """
    correct: dict[str, list[Tensor]] = {name: [] for name in verifier.factors}
    accepted = []
    for rows in torch.arange(len(pixels)).split(256):
        images = (to_float(pixels[rows]) + 1) / 2
        part = [combos[i] for i in rows.tolist()]
        for name in verifier.factors:
            correct[name].append(verifier.verify(images, [{name: combo[name]} for combo in part]))
        accepted.append(verifier.verify(images, [triple] * len(part)))
    accuracy = {}
    for name, values in verifier.factors.items():
        truth = [combo[name] for combo in combos]
        if set(truth) != set(values):
            raise ValueError(
                f"measure: all {len(truth)} images kept back have {name} {truth[0]!r}; expected both values. HINT: use more "
                "images, or a commoner attribute."
            )
        right = torch.cat(correct[name]).float()
        shares = [right[torch.tensor([t == value for t in truth])].mean() for value in values]
        accuracy[name] = float(torch.stack(shares).mean())
    shows, taken = torch.tensor([combo == triple for combo in combos]), torch.cat(accepted).float()
    return Trust(
        images=len(combos),
        accuracy=accuracy,
        accepts_triple=float(taken[shows].mean()) if shows.any() else None,
        accepts_others=float(taken[~shows].mean()),
    )


def _key(combo: Combo) -> tuple[str, ...]:
    return tuple(combo.values())
