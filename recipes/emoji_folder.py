"""Writes EmojiArtists as a folder of images with metadata.jsonl, real data for the tiny runs: 64
objects by 8 artists, one drawing each held out.

python -m recipes.emoji_folder --out runs/emoji_folder
python -m recipes.emoji_folder --out runs/emoji_small --objects 6 --artists noto twemoji
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .emoji_artists.data import EmojiArtists
from .images import FILE
from .pictures import to_uint8

COLUMNS = ("object", "artist", "category", "owner", "licence")


def write(out: Path, objects: int | None = None, artists: list[str] | None = None) -> int:
    """Writes the training images of EmojiArtists' fine-tune, ``<artist>/<object>.png``, with
    captions such as "angry face by noto"; returns how many.

    Args:
        out: the folder.
        objects: how many of the objects, the first by name; all by default.
        artists: whose drawings; all eight's by default.
    """
    drawings = EmojiArtists("new", artists).train_set
    names = sorted({name for name, _ in drawings.pairs})[:objects]
    lines = []
    for index, (name, artist) in enumerate(drawings.pairs):
        if name not in names:
            continue
        facts = drawings[index]
        file = Path(artist) / f"{name}.png"
        (out / artist).mkdir(parents=True, exist_ok=True)
        pixels = to_uint8((facts["image"][None] + 1) / 2)[0]
        Image.fromarray(pixels).save(out / file)
        row = {"file_name": file.as_posix(), "text": f"{name.replace('-', ' ')} by {artist}"}
        lines.append(json.dumps(row | {column: facts[column] for column in COLUMNS}))
    (out / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_folder"))
    parser.add_argument("--objects", type=int, default=None)
    parser.add_argument("--artists", nargs="+", default=None)
    args = parser.parse_args(argv)
    print(f"{args.out}: {write(args.out, args.objects, args.artists)} images and {FILE}")


if __name__ == "__main__":
    main()
