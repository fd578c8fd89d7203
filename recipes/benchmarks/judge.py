"""The judge: how strongly a model has a concept, by an independent classifier and by the model's
own denoising loss.

python -m recipes.benchmarks.judge    # trains the classifier, writes judge.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ctrak_lightning import Sampler
from ctrak_lightning.methods.trajectories import Noised

from ..emoji_artists.data import KINDS, Emoji
from ..emoji_artists.evaluate import Question
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from ..pixels import conditions

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SAMPLER = Sampler(steps=20, guidance=2.5)
LOSS_TIMESTEPS = 10
WIDTH = 32


class EmojiJudge(nn.Module):
    """A small convolutional classifier with one head for the object and one for the artist.

    It is shown every image of the data set, those held out from the generator too: it judges what a
    picture shows, and takes no part in attribution.
    """

    def __init__(self, objects: int = 500, artists: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width in ((3, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 4 * WIDTH)):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            halving = nn.Conv2d(width, width, 3, padding=1, stride=2)
            layers += [halving, nn.GroupNorm(8, width), nn.ReLU()]
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
        """Log odds [B, 2] that each image shows its object (among all 500), and is in its artist's
        style (among the 8)."""
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

    def recognised(self, images: Tensor, asked: Sequence[Question]) -> dict[str, int]:
        """In how many images the object, and the artist, is found that was asked for (odds above
        1)."""
        odds = self.log_odds(images, [q.object for q in asked], [q.artist for q in asked])
        return {
            kind: sum(
                float(row[axis]) > 0 for row, q in zip(odds, asked, strict=True) if q.group == kind
            )
            for axis, kind in enumerate(KINDS)
        }


@torch.no_grad()
def denoising_losses(
    module: EmojiDiffusion, images: Tensor, pairs: list[tuple[str, str]]
) -> Tensor:
    """Clean-image prediction's loss on real images [B, 3, 32, 32] in [-1, 1] of these pairs, mean
    over timesteps and fixed noise [B, 4]: told both names, the artist, the object, nothing."""
    module.eval()
    losses = torch.zeros(len(images), 4)
    for rows in torch.arange(len(images)).split(64):
        latents = patchify(images[rows])
        shown = [dict(zip(KINDS, pairs[i], strict=True)) for i in rows.tolist()]
        told = [
            conditions(module, [{kind: pair[kind] for kind in kinds} for pair in shown])
            for kinds in (KINDS, ("artist",), ("object",), ())
        ]
        noised = Noised(timesteps=LOSS_TIMESTEPS)
        for state in noised.states(module, latents, {}, [""] * len(rows), seed=0):
            for column, condition in enumerate(told):
                predicted = module.predict(state.x_t, state.t, condition)
                error = (predicted - latents).square().flatten(1).mean(1)
                losses[rows, column] += error / LOSS_TIMESTEPS
    return losses


def train(steps: int = 2500, batch_size: int = 64, seed: int = 0) -> EmojiJudge:
    """Trains the classifier on all images, shifted, blurred, faded and noised a little, as
    generated ones are."""
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
        logits = judge(_augmented(pixels[rows]))
        wanted = objects[rows], artists[rows]
        pairs = list(zip(logits, wanted, strict=True))
        loss = torch.stack([F.cross_entropy(each, truth) for each, truth in pairs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            right = [float((each.argmax(1) == truth).float().mean()) for each, truth in pairs]
            print(f"step {step + 1}: loss {loss:.3f}, right on the augmented batch: {right}")
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
    save_file(
        {name: value.half().contiguous() for name, value in judge.state_dict().items()}, WEIGHTS
    )
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
