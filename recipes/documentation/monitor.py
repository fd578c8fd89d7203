"""ConceptMonitor on EmojiArtists: a short fine-tune that TensorBoard shows, and the pictures of
docs/tensorboard.md.

python -m recipes.documentation.monitor --help
"""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from ctrak_lightning import Concept, Sampler, methods
from ctrak_lightning.callbacks import ConceptMonitor, ConceptTracer

from ..emoji_artists.data import EmojiArtists
from ..emoji_artists.demo import ARTISTS, TIMESTEPS
from ..emoji_artists.module import EmojiDiffusion

SAMPLER = Sampler(steps=20, guidance=2.5)
PICTURES = Path(__file__).parents[2] / "docs" / "images"


def concepts() -> list[Concept]:
    """Objects and artists of pairs that training never shows together."""
    tree = {"object": "christmas-tree", "artist": "twemoji"}
    butterfly = {"object": "butterfly", "artist": "openmoji"}
    return [
        Concept("christmas-tree", tree, {"artist": "twemoji"}),
        Concept("twemoji's style", tree, {"object": "christmas-tree"}),
        Concept("butterfly", butterfly, {"artist": "openmoji"}),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m recipes.documentation.monitor", description=__doc__)
    parser.add_argument("--out", type=str, default="runs/emoji_monitor", help="a new folder")
    parser.add_argument("--epochs", type=int, default=48, help="an eighth between two traces")
    parser.add_argument("--pictures", type=str, default=str(PICTURES), help="folder; '' for none")
    parser.add_argument("--only_pictures", action="store_true", help="of a run that is there")
    args = parser.parse_args(None if argv is None else list(argv))
    out = Path(args.out)
    if not args.only_pictures:
        fine_tune(out, args.epochs)
    if args.pictures:
        from .screenshots import take

        take(out / "board", Path(args.pictures))


def fine_tune(out: Path, epochs: int) -> None:
    """Fine-tunes on the new emoji of four artists with tracer and monitor."""
    L.seed_everything(0, verbose=False)
    tracer = ConceptTracer(
        str(out / "traces"),
        methods.concept_trak(timesteps=TIMESTEPS),
        every_n_epochs=max(1, epochs // 8),
    )
    monitor = ConceptMonitor(concepts(), group="owner", sampler=SAMPLER)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=TensorBoardLogger(str(out), name="board", version="fine-tune"),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[tracer, monitor],
    )
    trainer.fit(EmojiDiffusion("lora"), datamodule=EmojiArtists("new", ARTISTS))


if __name__ == "__main__":
    main()
