r"""Teaches the EmojiArtists base to read: its keys and values learn to do what its tokens did.

python -m recipes.emoji_text.pretrain --out runs/a --layer-steps 700 --output-steps 0
python -m recipes.emoji_text.pretrain --out runs/b --init runs/a/layers-700.safetensors --seed 1 \
    --batch-size 32 --layer-steps 0 --output-steps 900      # stopped after 550 steps, for time
python -m recipes.emoji_text.pretrain --export runs/a/layers-700.safetensors \
    runs/b/output-{250,500}.safetensors
python -m recipes.emoji_text.pretrain --draw                # results/base_samples.png

The EmojiArtists base model, which knows objects and artists by tokens, is the teacher; the student
has its weights but for the cross-attention's keys and values, which take MiniLM's states. Only
these are trained, by what the teacher makes of the same noised drawing: first every layer by itself
(the teacher's own input, the teacher's output), then the whole network's output.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..emoji_artists.data import EmojiArtists
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from ..emoji_artists.pretrain import draw
from ..pixels import clean_image_loss
from ..text import read_text
from .captions import BOTH, DROP_ALL, DROP_ARTIST, DROP_OBJECT, all_wordings, caption, wordings
from .pipeline import BASE, MAX_TOKENS, build_task, build_text_unet, load_base, reads_text

WARMUP = 50
SAVE_EVERY = 250
RATES = {"layers": 3e-3, "output": 1e-3}


class Whitened(nn.Module):
    """Trains a matrix through ``weight = w @ whitening``: MiniLM's states vary far more along some
    directions than along others, and the objects differ along the small ones, which a gradient step
    on the matrix itself hardly moves."""

    def __init__(self, whitening: Tensor) -> None:
        super().__init__()
        self.whitening: Tensor
        self.register_buffer("whitening", whitening)

    def forward(self, w: Tensor) -> Tensor:
        return w @ self.whitening

    def right_inverse(self, weight: Tensor) -> Tensor:
        w: Tensor = weight @ torch.linalg.inv(self.whitening)
        return w


def whitening_of(states: Tensor, floor: float = 1e-3) -> Tensor:
    """The inverse square root [D, D] of the second moment of states [n, D]; ``floor`` relative to
    its mean eigenvalue."""
    moment = states.double().T @ states.double() / len(states)
    values, vectors = torch.linalg.eigh(moment)
    scale = (values + floor * values.mean()).rsqrt()
    whitening: Tensor = ((vectors * scale) @ vectors.T).float()
    return whitening


@torch.no_grad()
def read_all(prompts: list[str]) -> dict[str, Tensor]:
    """MiniLM's states [24, 384] of every prompt."""
    tokenizer, encoder = read_text(MAX_TOKENS)
    states: dict[str, Tensor] = {}
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        tokens = tokenizer(
            part, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        states |= dict(zip(part, encoder(**tokens)[0].half(), strict=True))
    return states


@dataclass
class Batch:
    """Noised drawings, what the teacher is told of them, and two captions that say the same."""

    x_t: Tensor
    t: Tensor
    artists: list[str | None]
    objects: list[str | None]
    texts: list[Tensor]


def batches(size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Random batches of the base split, for ever."""
    data = EmojiArtists("base").train_set
    states = read_all(all_wordings(data.pairs))
    latents = patchify(data.images)
    schedule = EmojiDiffusion("none").noise_schedule

    while True:
        rows = torch.randint(0, len(latents), (size,), generator=generator)
        t = torch.randint(0, len(schedule), (size,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        told: list[tuple[str | None, str | None]] = []
        chances = torch.rand(size, generator=generator).tolist()
        for row, u in zip(rows.tolist(), chances, strict=True):
            name, artist = data.pairs[row]
            hides_all = u < DROP_ALL
            hides_object = hides_all or u > 1 - DROP_OBJECT
            hides_artist = hides_all or 1 - DROP_OBJECT - DROP_ARTIST < u <= 1 - DROP_OBJECT
            told.append((None if hides_object else name, None if hides_artist else artist))
        texts = []
        for _ in range(2):
            drawn = []
            for choices in (wordings(*one) for one in told):
                chosen = int(torch.randint(0, len(choices), (), generator=generator))
                drawn.append(states[choices[chosen]])
            texts.append(torch.stack(drawn).float())
        objects, artists = (list(column) for column in zip(*told, strict=True))
        yield Batch(schedule.add_noise(latents[rows], noise, t), t, artists, objects, texts)


class Teacher:
    """The EmojiArtists base model, and what goes into and out of its cross-attention."""

    def __init__(self) -> None:
        self.module = EmojiDiffusion("full").eval().requires_grad_(False)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in cross_attention(self.module.denoiser.unet).items():
            layer.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen[name] = (inputs[0], output)

        return hook

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """The predicted clean latents."""
        condition = self.module._names(batch.artists, batch.objects)
        return self.module.predict(batch.x_t, batch.t, condition)


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """The layers that read the condition, by name."""
    return {name: layer for name, layer in unet.named_modules() if name.endswith("attn2")}


def layer_loss(student: nn.Module, teacher: Teacher, batch: Batch) -> Tensor:
    """The squared error relative to the teacher's variance, mean over layers and captions."""
    teacher(batch)
    losses = []
    for name, layer in cross_attention(student).items():
        hidden, wanted = teacher.seen[name]
        spread = wanted.var()
        losses += [F.mse_loss(layer(hidden, text), wanted) / spread for text in batch.texts]
    return torch.stack(losses).mean()


def output_loss(student: nn.Module, teacher: Teacher, batch: Batch) -> Tensor:
    """The squared error to the teacher's prediction, weighted as in the teacher's own training."""
    wanted = teacher(batch)
    found = student(batch.x_t, batch.t, encoder_hidden_states=batch.texts[0], return_dict=False)[0]
    return clean_image_loss(teacher.module.noise_schedule, found, wanted, batch.t)


def train(args: argparse.Namespace) -> None:
    """Both stages; the text matrices are saved to ``--out`` every so often, as
    ``output-250.safetensors``."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    source = batches(args.batch_size, generator)
    student, teacher = build_text_unet(), Teacher()
    load_base(student, args.init)
    student.requires_grad_(False)
    texts = torch.cat([next(source).texts[0] for _ in range(20)]).flatten(0, 1)
    whitening = Whitened(whitening_of(texts))
    for layer in cross_attention(student).values():
        for part in (layer.to_k, layer.to_v):
            part.weight.requires_grad_(True)
            parametrize.register_parametrization(part, "weight", whitening)
            if not args.init:
                nn.init.normal_(part.parametrizations.weight.original, std=part.in_features**-0.5)
    weights = [p for p in student.parameters() if p.requires_grad]
    for stage, loss_of, steps in (
        ("layers", layer_loss, args.layer_steps),
        ("output", output_loss, args.output_steps),
    ):
        rate, losses = RATES[stage], []
        optimizer = torch.optim.Adam(weights, rate, betas=(0.9, 0.99))
        for step in range(1, steps + 1):
            falling = min(1.0, 2 * (1 - (step - 1) / steps))
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / WARMUP) * falling
            loss = loss_of(student, teacher, next(source))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 50 == 0:
                print(stage, step, f"{sum(losses[-50:]) / 50:.5f}", flush=True)
            if step % SAVE_EVERY == 0 or step == steps:
                save(student, out / f"{stage}-{step}.safetensors")


def save(student: nn.Module, path: Path) -> None:
    """Writes the matrices that read text, float16, as they are without the whitening."""
    layers = cross_attention(student)
    state = {
        f"{name}.{part}.weight": getattr(layer, part).weight.detach().half().contiguous()
        for name, layer in layers.items()
        for part in ("to_k", "to_v")
    }
    assert all(reads_text(name) for name in state)
    save_file(state, path)


def mean_of(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of several files of matrices, float16: the noise of a constant rate averages out."""
    files = [load_file(path) for path in paths]
    return {
        name: torch.stack([file[name].float() for file in files]).mean(0).half().contiguous()
        for name in files[0]
    }


def draw_base(path: Path, text: Path) -> None:
    """Draws what the base model makes of the base objects and artists in words."""
    unet = build_text_unet().eval()
    load_base(unet, text)
    draw(build_task(unet), lambda name, artist: caption(BOTH[0], name, artist), path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_text_base"))
    parser.add_argument("--init", type=Path, help="go on from these matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--layer-steps", type=int, default=1000)
    parser.add_argument("--output-steps", type=int, default=1500)
    parser.add_argument("--export", nargs="+", type=Path, help="their mean becomes the base")
    parser.add_argument("--draw", nargs="?", type=Path, const=BASE, metavar="TEXT")
    args = parser.parse_args()
    if args.draw:
        draw_base(BASE.parent / "results" / "base_samples.png", args.draw)
    elif args.export:
        save_file(mean_of(args.export), BASE)
        print(f"{BASE}, {BASE.stat().st_size:,} bytes")
    else:
        train(args)


if __name__ == "__main__":
    main()
