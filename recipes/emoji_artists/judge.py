"""The judge: how strongly a model has a concept, by an independent classifier and by the model's own denoising loss.

python -m recipes.emoji_artists.judge    # trains the classifier, writes judge.safetensors
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ctrak_lightning import Sampler
from ctrak_lightning.methods.trajectories import Noised
from ctrak_lightning.utilities.rng import seeded_noise
from recipes.emoji_artists.data import KINDS, Emoji
from recipes.emoji_artists.module import EmojiDiffusion
from recipes.emoji_artists.network import patchify

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SAMPLER = Sampler(steps=20, guidance=2.5)
LOSS_TIMESTEPS = 10
WIDTH = 32


class EmojiJudge(nn.Module):
    """A small convolutional classifier with one head for the object and one for the artist.

    It is shown every image of the data set, those held out from the generator too: it judges what a picture shows, and
    takes no part in attribution.
    """

    def __init__(self, objects: int = 500, artists: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width in ((3, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 4 * WIDTH)):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, stride=2),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.object = nn.Linear(64 * WIDTH, objects)
        self.artist = nn.Linear(64 * WIDTH, artists)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] in [0, 1] to object logits [B, 500] and artist logits [B, 8]."""
        hidden = self.features(images)
        return self.object(hidden), self.artist(hidden)

    @classmethod
    def trained(cls) -> "EmojiJudge":
        """The committed classifier."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def log_odds(self, images: Tensor, objects: list[str], artists: list[str]) -> Tensor:
        """Log odds [B, 2] that each image shows its object (among all 500), and is in its artist's style (among the 8)."""
        emoji = Emoji.load()
        truths = (
            [emoji.objects.index(name) for name in objects],
            [emoji.artists.index(name) for name in artists],
        )
        columns = []
        for logits, truth in zip(self(images), truths, strict=True):
            log_p = logits.double().log_softmax(1)[torch.arange(len(images)), torch.tensor(truth)]
            # log p - log(1 - p), without losing 1 - p near 1
            columns.append(log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-12))))
        return torch.stack(columns, 1).float()


@torch.no_grad()
def generate_pairs(
    module: EmojiDiffusion, pairs: list[tuple[str, str]], seeds: list[int], batch_size: int = 64
) -> Tensor:
    """Images [len(pairs) * len(seeds), 3, 32, 32] in [0, 1]: every pair with every seed, seeds running fastest."""
    module.eval()
    jobs = [(pair, seed) for pair in pairs for seed in seeds]
    images = []
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        noise = torch.stack([seeded_noise((48, 8, 8), seed, 0, "generation") for _, seed in part])
        condition = _conditions(module, [{"object": name, "artist": artist} for (name, artist), _ in part])
        generation = SAMPLER.run(module, noise, condition, module.condition({}, len(part)))
        images.append(module.decode(generation.latents))
    return torch.cat(images)


@torch.no_grad()
def denoising_losses(module: EmojiDiffusion, images: Tensor, pairs: list[tuple[str, str]]) -> Tensor:
    """The loss of clean-image prediction, mean over timesteps and fixed noise, under four conditions.

    Args:
        module: the model.
        images: real images [B, 3, 32, 32] in [-1, 1].
        pairs: what they show.

    Returns:
        [B, 4]: told both names, the artist only, the object only, nothing.
    """
    module.eval()
    losses = torch.zeros(len(images), 4)
    for rows in torch.arange(len(images)).split(64):
        latents = patchify(images[rows])
        shown = [pairs[i] for i in rows.tolist()]
        told = [
            _conditions(module, [{kind: pair[KINDS.index(kind)] for kind in kinds} for pair in shown])
            for kinds in (("object", "artist"), ("artist",), ("object",), ())
        ]
        states = Noised(timesteps=LOSS_TIMESTEPS).states(module, latents, {}, [""] * len(rows), seed=0)
        for state in states:
            for column, condition in enumerate(told):
                predicted = module.predict(state.x_t, state.t, condition)
                losses[rows, column] += (predicted - latents).square().flatten(1).mean(1) / LOSS_TIMESTEPS
    return losses


def _conditions(module: EmojiDiffusion, specs: list[dict[str, str]]) -> dict[str, Tensor]:
    """One condition per row."""
    rows = [module.condition(spec, 1) for spec in specs]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def train(steps: int = 2500, batch_size: int = 64, seed: int = 0) -> EmojiJudge:
    """Trains the classifier on all images, shifted, blurred, faded and noised a little, as generated ones are."""
    torch.manual_seed(seed)
    emoji = Emoji.load()
    pixels = torch.from_numpy(emoji.images).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    objects = torch.arange(len(emoji.objects)).repeat_interleave(len(emoji.artists))
    artists = torch.arange(len(emoji.artists)).repeat(len(emoji.objects))
    judge = EmojiJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), "judge"):
        rows = torch.randint(len(pixels), (batch_size,))
        object_logits, artist_logits = judge(_augmented(pixels[rows]))
        loss = F.cross_entropy(object_logits, objects[rows]) + F.cross_entropy(artist_logits, artists[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            right = (
                (object_logits.argmax(1) == objects[rows]).float().mean(),
                (artist_logits.argmax(1) == artists[rows]).float().mean(),
            )
            print(
                f"step {step + 1}: loss {loss:.3f}, right on the (augmented) batch: {right[0]:.3f}, {right[1]:.3f}"
            )
    return judge.eval()


def _augmented(images: Tensor) -> Tensor:
    shift = torch.randint(-2, 3, (2,)).tolist()
    images = torch.roll(images, shift, (2, 3))
    if torch.rand(()) < 0.5:
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        images = images + torch.rand(len(images), 1, 1, 1) * (blurred - images)
    fade = 1 - 0.3 * torch.rand(len(images), 1, 1, 1)
    images = fade * images + (1 - fade) * torch.rand(len(images), 1, 1, 1)
    return (images + 0.15 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    judge = train(args.steps, seed=args.seed)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
