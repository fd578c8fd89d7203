r"""Makes the base model, in two stages (about four hours on 2 cores), and draws samples of it.

python -m recipes.emoji_artists.pretrain --out runs/stage1 --batch-size 64 --max-steps 2500 \
    --token-learning-rate 6e-4
python -m recipes.emoji_artists.pretrain --out runs/stage2 --init runs/stage1/step=2500.ckpt \
    --seed 1 --max-steps 10000
python -m recipes.emoji_artists.pretrain --export runs/stage2/step=10000.ckpt  # base.safetensors
python -m recipes.emoji_artists.pretrain --draw             # results/base_samples.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file

from ctrak_lightning import Sampler

from ..pictures import image_grid
from ..pixels import generate
from .data import Emoji, EmojiArtists, EmojiPairs
from .module import BASE, EmojiDiffusion, file_name
from .network import LATENT

SAMPLER = Sampler(steps=20, guidance=2.5)


def export(checkpoint: str) -> None:
    """Writes a Lightning checkpoint's averaged weights as float16 to ``base.safetensors``."""
    facts = torch.load(checkpoint, weights_only=True, map_location="cpu")
    save_file(
        {file_name(name): value.half().contiguous() for name, value in facts["state_dict"].items()},
        BASE,
    )
    print(f"step {facts['global_step']}: {BASE}, {BASE.stat().st_size:,} bytes")


def draw(task: Any, spec_of: Callable[[str, str], Any], path: Path) -> None:
    """Twelve base objects by the six base artists: generated on the left, their own on the right.

    Args:
        task: of the base model.
        spec_of: what it is told of an object and an artist.
        path: of the PNG.
    """
    emoji = Emoji.load()
    names, artists = emoji.split_objects()[0][::33][:12], emoji.base_artists()
    pairs = [(name, artist) for name in names for artist in artists]
    specs, seeds = [spec_of(*pair) for pair in pairs], list(range(len(pairs)))
    generated = generate(task, SAMPLER, specs, seeds, LATENT, batch_size=len(pairs))
    shape = (len(names), len(artists), 3, 32, 32)
    real = ((EmojiPairs(emoji, pairs).images + 1) / 2).view(shape)
    both = torch.cat([generated.view(shape), real], 1).flatten(0, 1)
    image_grid(path, both, columns=2 * len(artists), scale=1)


def draw_base() -> None:
    module = EmojiDiffusion("lora").eval()  # an untrained adapter changes nothing
    path = BASE.parent / "results" / "base_samples.png"
    draw(module, lambda name, artist: {"object": name, "artist": artist}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--token-learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/emoji_base")
    parser.add_argument("--resume", help="go on with an interrupted run: its checkpoint")
    parser.add_argument("--init", help="start a new run from this checkpoint's trained weights")
    parser.add_argument("--export", metavar="CKPT", help="export a checkpoint, train nothing")
    parser.add_argument("--draw", action="store_true", help="draw samples, train nothing")
    args = parser.parse_args()
    if args.draw:
        draw_base()
        return
    if args.export:
        export(args.export)
        return

    L.seed_everything(args.seed)
    module = EmojiDiffusion("none", args.learning_rate, args.token_learning_rate, warmup_steps=200)
    if args.init:
        facts = torch.load(args.init, weights_only=True, map_location="cpu")
        module.load_state_dict(facts["current_model_state"])
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=args.max_steps,
        logger=CSVLogger(args.out, name="", version=""),
        log_every_n_steps=50,
        enable_progress_bar=False,
        callbacks=[
            EMAWeightAveraging(decay=0.999),
            ModelCheckpoint(args.out, filename="{step}", every_n_train_steps=500, save_top_k=-1),
        ],
    )
    data = EmojiArtists("base", batch_size=args.batch_size)
    trainer.fit(module, data, ckpt_path=args.resume, weights_only=True)
    print(f"torch {torch.__version__}, {sum(p.numel() for p in module.parameters()):,} parameters")


if __name__ == "__main__":
    main()
