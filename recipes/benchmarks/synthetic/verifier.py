"""Whether a generated image shows what it should: a small classifier of every factor, trained and
written to verifier-<variant>.safetensors in a minute.

python -m recipes.benchmarks.synthetic.verifier --variant paper
python -m recipes.benchmarks.synthetic.verifier --variant hard
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...pictures import to_float
from .figures import VARIANTS, Combo, Figures, Variant, find_variant

FOLDER = Path(__file__).parent
FRESH = 1_000_003  # added to the seed, so that no image of a training set is seen
UNCLEAR = 0
CONFIDENCE = 0.5


class Verifier(nn.Module):
    """A convolutional network with one head per factor; class 0 of each head means that the image
    shows no one shape clearly.

    Args:
        factors: the values of each factor.
        size: height and width of the images in pixels.
    """

    def __init__(self, factors: Mapping[str, Sequence[str]], size: int) -> None:
        super().__init__()
        self.factors = {name: list(values) for name, values in factors.items()}
        self.size = size
        self.body = nn.Sequential(
            *[nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()],
            *[nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.ReLU()],
            *[nn.Conv2d(64, 96, 3, padding=1, stride=2), nn.GroupNorm(8, 96), nn.ReLU()],
            *[nn.Conv2d(96, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.ReLU()],
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * 96, 1 + len(values)) for name, values in self.factors.items()}
        )

    @classmethod
    def load(cls, variant: str) -> "Verifier":
        """The committed verifier of a variant, in evaluation mode."""
        chosen = find_variant(variant)
        verifier = cls(chosen.factors, chosen.size)
        weights = load_file(weights_path(variant))
        verifier.load_state_dict({name: value.float() for name, value in weights.items()})
        return verifier.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [n, 3, H, W] in [0, 1] to logits [n, 1 + values] per factor."""
        features = self.body(2 * images - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def verify(self, images: Tensor, specs: Sequence[Mapping[str, str]]) -> Tensor:
        """Which images show clearly what their spec names, bool [n]; other factors are free.

        Args:
            images: [n, 3, H, W] in [0, 1], as ``SyntheticDiffusion.decode`` gives them.
            specs: one per image, such as ``{"shape": "triangle", "colour": "red"}``.

        Raises:
            ValueError: images of another size, or not one spec per image.
        """
        expected = (len(specs), 3, self.size, self.size)
        if tuple(images.shape) != expected:
            raise ValueError(
                f"Verifier.verify(images {list(images.shape)}, {len(specs)} specs): expected "
                f"{list(expected)}. HINT: the verifier reads images of the size it was built for, "
                "one spec each."
            )
        accepted = torch.ones(len(specs), dtype=torch.bool)
        for name, logits in self(images.float().cpu()).items():
            confidence, found = logits.softmax(1).max(1)
            accepted &= (found != UNCLEAR) & (confidence > CONFIDENCE)
            values = [spec.get(name) for spec in specs]
            wanted = [
                UNCLEAR if value is None else 1 + self.factors[name].index(value)
                for value in values
            ]
            accepted &= torch.tensor([value is None for value in values]) | (
                found == torch.tensor(wanted)
            )
        return accepted


def train_verifier(
    variant: Variant, images: int = 12000, steps: int = 600, seed: int = 0
) -> Verifier:
    """Trains on fresh renders of all combinations, the held-out ones included; a third of each
    batch is spoiled."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        verifier = Verifier(variant.factors, variant.size)
        figures = Figures(variant, variant.combos(), images, variant.size, FRESH + seed)
        return fit(verifier, figures.pixels, figures.combos, steps)


def fit(
    verifier: Verifier,
    pixels: Tensor,
    combos: Sequence[Combo],
    steps: int,
    weights: Tensor | None = None,
) -> Verifier:
    """Trains a verifier on images uint8 [n, 3, H, W], a third of each batch spoiled; it comes back
    frozen. ``weights`` [n]: how often to draw each image; all alike by default."""
    targets = _targets(verifier, combos)
    optimizer = torch.optim.AdamW(verifier.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        drawn = None if weights is None else torch.multinomial(weights, 96, replacement=True)
        rows = torch.randint(0, len(pixels), (96,)) if drawn is None else drawn
        clean, spoiled = (to_float(pixels[rows]) + 1) / 2, torch.rand(96) < 1 / 3
        shown = torch.where(spoiled[:, None, None, None], _spoil(clean), _disturb(clean))
        logits = verifier(shown)
        wanted = {
            name: torch.where(spoiled, UNCLEAR, column[rows]) for name, column in targets.items()
        }
        loss = torch.stack([F.cross_entropy(logits[name], wanted[name]) for name in targets]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return verifier.eval().requires_grad_(False)


def acceptance(
    verifier: Verifier, variant: Variant, images: int = 2000, seed: int = 1
) -> tuple[float, float]:
    """The shares accepted of fresh renders under their own combination, and under another one
    chosen at random."""
    figures = Figures(variant, variant.combos(), images, variant.size, FRESH + seed)
    pictures = (to_float(figures.pixels) + 1) / 2
    generator = torch.Generator().manual_seed(seed)
    combos = variant.combos()
    steps = torch.randint(1, len(combos), (images,), generator=generator).tolist()
    others = [combos[(i + step) % len(combos)] for i, step in enumerate(steps)]
    own = verifier.verify(pictures, figures.combos).float().mean()
    return float(own), float(verifier.verify(pictures, others).float().mean())


def weights_path(variant: str) -> Path:
    return FOLDER / f"verifier-{variant}.safetensors"


def _targets(verifier: Verifier, combos: Sequence[Combo]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([1 + values.index(combo[name]) for combo in combos])
        for name, values in verifier.factors.items()
    }


def _disturb(images: Tensor) -> Tensor:
    """A little blur and noise, as generated images have them."""
    blurred = F.avg_pool2d(F.pad(images, [1, 1, 1, 1], mode="replicate"), 3, stride=1)
    mix = torch.rand(len(images), 1, 1, 1) * 0.4
    noise = torch.randn_like(images) * torch.rand(len(images), 1, 1, 1) * 0.08
    return (images + mix * (blurred - images) + noise).clamp(0, 1)


def _spoil(images: Tensor) -> Tensor:
    """Images that show no one shape clearly: two cross-faded, two drawn over each other, nothing,
    or noise."""
    other = images.roll(1, 0)
    fade = 0.35 + 0.3 * torch.rand(len(images), 1, 1, 1)
    kinds = [
        images + fade * (other - images),
        torch.minimum(images, other),
        torch.ones_like(images) - 0.1 * torch.rand_like(images),
        (images + 0.7 * torch.randn_like(images)).clamp(0, 1),
    ]
    chosen = torch.randint(0, len(kinds), (len(images),))
    return torch.stack(kinds)[chosen, torch.arange(len(images))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=list(VARIANTS), default="paper")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    variant = find_variant(args.variant)
    verifier = train_verifier(variant, seed=args.seed)
    weights = {name: value.half().contiguous() for name, value in verifier.state_dict().items()}
    path = weights_path(variant.name)
    save_file(weights, path)
    own, other = acceptance(Verifier.load(variant.name), variant)
    print(
        f"{path.name}: {path.stat().st_size:,} bytes; accepts {own:.3f} of fresh images, "
        f"{other:.3f} under another name"
    )


if __name__ == "__main__":
    main()
