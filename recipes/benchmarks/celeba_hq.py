"""The CelebA-HQ benchmark: precision@10 for each attribute, on triples that training showed and on
the one it did not.

python -m recipes.benchmarks.celeba_hq --root DATA/CelebAMask-HQ
python -m recipes.benchmarks.celeba_hq --root DATA/CelebAMask-HQ --attributes Male Young Wearing_Hat

Trains a model and its judge, generates images of every triple, traces and asks every method, and
writes `results/celeba_hq.md`. Finished runs are not repeated. The data set is not in this
repository; celeba_hq.md says where to put it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..pictures import read_square
from .tables import Table, command_of, machine, parser_of, publish
from .triples import VALUES, WHERE, Combo, Run, Triples, caption

ANNOTATIONS, IMAGES = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-img"
LAYOUT = f"expected <root>/{ANNOTATIONS} and <root>/{IMAGES}/0.jpg, 1.jpg, ..."


def read_annotations(path: Path) -> tuple[list[str], list[str], Tensor]:
    """An attribute list: names of the A attributes, files of the N images, values bool [N, A].

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is not of the published form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {LAYOUT}. HINT: --root is its folder.")
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names, rows = (lines[1], lines[2:]) if len(lines) > 2 else ([], [])
    fine = [len(row) == 1 + len(names) and {*row[1:]} <= {"1", "-1"} for row in rows]
    if not rows or not all(fine) or lines[0] != [str(len({row[0] for row in rows}))]:
        at = fine.index(False) + 3 if False in fine else 1
        raise ValueError(
            f"{path}, line {at}: expected the number of images in the first line, the attributes' "
            "names in the second, then a file and a 1 or -1 for each attribute. HINT: fetch the "
            "file anew."
        )
    values = torch.tensor([[value == "1" for value in row[1:]] for row in rows])
    return names, [row[0] for row in rows], values


class CelebAHQ(Triples):
    """CelebA-HQ as :class:`~recipes.benchmarks.triples.Triples`, resized to ``size``.

    Raises:
        FileNotFoundError, ValueError: a file is missing; an attribute is unknown; the triple cannot
            be held out.
    """

    def __init__(
        self, root: Path, held_out: Combo, size: int, batch_size: int, traced: int, seed: int
    ) -> None:
        names, files, values = read_annotations(root / ANNOTATIONS)
        if unknown := sorted(set(held_out) - set(names)):
            raise ValueError(f"Unknown attributes {unknown}. Known: {', '.join(names)}.")
        columns = values[:, [names.index(name) for name in held_out]].tolist()
        combos = [
            {name: VALUES[value] for name, value in zip(held_out, row, strict=True)}
            for row in columns
        ]
        paths = [root / IMAGES / name for name in files]

        def read() -> Tensor:
            return torch.stack([read_square(path, size) for path in tqdm(paths, "images")])

        super().__init__(combos, files, read, held_out, batch_size, traced, seed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.celeba_hq", __doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--attributes", nargs=3, default=["Male", "Smiling", "Eyeglasses"])
    parser.add_argument("--held-out", nargs=3, choices=VALUES, default=["yes"] * 3)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--channels", nargs=2, type=int, default=[96, 192])
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--verifier-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--traced", type=int, default=3000, help="training images to trace")
    parser.add_argument("--queries", type=int, default=16, help="of each triple, at least 2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", default=None, help="rows; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/celeba_hq"))
    args = parser.parse_args(argv)
    held_out = dict(zip(args.attributes, args.held_out, strict=True))
    names = ("patch", "channels", "steps", "verifier_steps", "batch_size")
    table, told = Table([f"P@10, {where}, {name}" for where in WHERE for name in held_out]), []
    for seed in args.seeds:
        data = CelebAHQ(args.root, held_out, args.size, args.batch_size, args.traced, seed)
        settings = {name: getattr(args, name) for name in names} | {"seed": seed}
        run = Run(args.runs / f"seed-{seed}", data, settings)
        told.append(run.told(table, args.queries, args.methods))
    head = (
        f"`{command_of(parser, args)}`; {machine()}. Held out: {caption(held_out)}. The judge and "
        f"its balanced accuracy: {'. '.join(told)}.\n"
    )
    publish(args.results / "celeba_hq.md", table.page(head))


if __name__ == "__main__":
    main()
