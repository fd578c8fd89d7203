"""Makes the base model.

python -m recipes.emoji_artists.pretrain                                     # train (about two hours on 2 cores)
python -m recipes.emoji_artists.pretrain --export runs/emoji_base/last.ckpt  # averaged weights -> base.safetensors
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file

from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.module import BASE, EmojiDiffusion


def export(checkpoint: str) -> None:
    """Writes a Lightning checkpoint's averaged weights as float16 to ``base.safetensors``."""
    facts = torch.load(checkpoint, weights_only=True, map_location="cpu")
    save_file({name: value.half().contiguous() for name, value in facts["state_dict"].items()}, BASE)
    print(f"step {facts['global_step']}: {BASE}, {BASE.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--token-learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/emoji_base")
    parser.add_argument("--resume", default=None, help="go on with an interrupted run: its checkpoint")
    parser.add_argument(
        "--init", default=None, help="start a new run from the trained weights of this checkpoint"
    )
    parser.add_argument(
        "--export", metavar="CKPT", default=None, help="export this checkpoint instead of training"
    )
    args = parser.parse_args()
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
    trainer.fit(
        module, EmojiArtists("base", batch_size=args.batch_size), ckpt_path=args.resume, weights_only=True
    )
    print(f"torch {torch.__version__}, {sum(p.numel() for p in module.parameters()):,} parameters")


if __name__ == "__main__":
    main()
