"""The CelebA-HQ benchmark: precision@10 for each attribute, on triples that training showed and on
the one it did not.

python -m recipes.benchmarks.celeba_hq --root DATA/CelebAMask-HQ
python -m recipes.benchmarks.celeba_hq --root DATA/CelebAMask-HQ --attributes Male Young Wearing_Hat

Trains a model and its judge, generates images of every triple, traces and asks every method, and
writes `results/celeba_hq.md`. Finished runs are not repeated. The data set is not in this
repository; celeba_hq.md says where to put it.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution.baselines import image_similarity

from ..pictures import image_grid, read_square, to_float
from ..pixels import generate
from .compare import Case, answers_folder, compare
from .replay import SaveTrained, evenly, finished, fitted, load_trained, record
from .synthetic.model import FactorDiffusion
from .synthetic.precision import MOST_TRIES, verified_seeds
from .synthetic.verifier import Verifier, fit
from .tables import Table, command_of, machine, parser_of, publish, retrieval
from .variants import swapped, table_variants

ANNOTATIONS, IMAGES = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-img"
LAYOUT = f"expected <root>/{ANNOTATIONS} and <root>/{IMAGES}/0.jpg, 1.jpg, ..."
VALUES = ("no", "yes")
TIMESTEPS = 5
KEPT_BACK, LEAST_ACCURACY = 0.1, 0.8
"""The share of the images that the judge is measured on, and the least it has to reach."""
SAMPLER = Sampler(steps=25, guidance=2.0)
WHERE = ("held out", "in distribution")
Combo = dict[str, str]
Question = tuple[Combo, str, int]
"""The image of a triple from one seed, and the attribute of it that is asked for."""


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


def caption(combo: Combo) -> str:
    """``"Male, no Smiling"``."""
    return ", ".join(name if value == "yes" else f"no {name}" for name, value in combo.items())


class Faces(Dataset[dict[str, Any]]):
    """Images uint8 [N, 3, H, W] with the values of their attributes, by their files' names."""

    def __init__(self, pixels: Tensor, combos: list[Combo], files: list[str]) -> None:
        self.pixels, self.combos, self.files = pixels, combos, files

    def __len__(self) -> int:
        return len(self.combos)

    def __getitem__(self, i: int) -> dict[str, Any]:
        facts = {"sample_id": self.files[i], "caption": caption(self.combos[i])}
        return {"image": to_float(self.pixels[i]), **self.combos[i], **facts}


class CelebAHQ(L.LightningDataModule):
    """CelebA-HQ without the images that show the held-out triple: three attributes and the values
    that training never sees together. ``traced`` training images, chosen by ``seed``, are traced.

    Raises:
        FileNotFoundError, ValueError: a file is missing; an attribute is unknown; no image shows
            the triple, or none but those one of its values.
    """

    def __init__(
        self, root: Path, held_out: Combo, size: int, batch_size: int, traced: int, seed: int
    ) -> None:
        super().__init__()
        names, files, values = read_annotations(root / ANNOTATIONS)
        if unknown := sorted(set(held_out) - set(names)):
            raise ValueError(f"Unknown attributes {unknown}. Known: {', '.join(names)}.")
        self.held_out, self.size, self.batch_size = held_out, size, batch_size
        self.factors = dict.fromkeys(held_out, VALUES)
        triples = itertools.product(VALUES, repeat=len(held_out))
        self.triples = [dict(zip(held_out, triple, strict=True)) for triple in triples]
        columns = values[:, [names.index(name) for name in held_out]].tolist()
        self.combos = [
            {name: VALUES[value] for name, value in zip(held_out, row, strict=True)}
            for row in columns
        ]
        kept = [i for i, combo in enumerate(self.combos) if combo != held_out]
        seen = {(name, self.combos[i][name]) for i in kept for name in held_out}
        if len(kept) == len(self.combos) or len(seen) < 2 * len(held_out):
            raise ValueError(
                f"CelebAHQ(held_out={held_out}): no image shows this triple, or none else shows "
                "one of its values. HINT: choose other attributes or values."
            )
        paths = [root / IMAGES / name for name in files]
        self.pixels = torch.stack([read_square(path, size) for path in tqdm(paths, "images")])
        own = [self.combos[i] for i in kept], [files[i] for i in kept]
        self.train_set = Faces(self.pixels[kept], *own)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        self.traced: list[int] = order[:traced].sort().values.tolist()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace, in the order of the attribute list."""
        return DataLoader(Subset(self.train_set, self.traced), self.batch_size)

    def relevance(self, asked: Sequence[Question]) -> Tensor:
        """Which traced images have the asked value of the asked attribute, bool [Q, N].

        Raises:
            ValueError: fewer than ten of them have it, so that precision@10 could not be 1.
        """
        shown = [self.train_set.combos[i] for i in self.traced]
        found = torch.tensor([[each[name] == c[name] for each in shown] for c, name, _ in asked])
        if (fewest := int(found.sum(1).min())) < 10:
            raise ValueError(
                f"relevance: a value that is asked for is that of {fewest} of {len(shown)} traced "
                "images, expected at least 10. HINT: trace more (--traced), or choose a commoner "
                "attribute."
            )
        return found

    def figures(self, asked: Sequence[Question], scores: Tensor) -> dict[str, Tensor]:
        """Every retrieval metric per attribute and kind of triple, one value per question."""
        kinds = [f"{WHERE[combo != self.held_out]}, {name}" for combo, name, _ in asked]
        return retrieval(scores, self.relevance(asked), kinds)


def train_verifier(data: CelebAHQ, seed: int, steps: int) -> tuple[Verifier, dict[str, float]]:
    """A judge, trained on nine tenths of all images, every triple drawn equally often, and its
    balanced accuracy per attribute on the rest (0.5 is chance; an image that it finds unclear
    counts as wrong).

    Raises:
        ValueError: it tells an attribute apart no better than 80 %, so it is not to be believed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.randperm(len(data.combos))
        tested, trained = order.tensor_split([max(1, round(KEPT_BACK * len(order)))])
        combos = [data.combos[i] for i in trained.tolist()]
        shown = Counter(map(caption, combos))
        weights = torch.tensor([1 / shown[caption(combo)] for combo in combos])
        new = Verifier(data.factors, data.size)
        verifier = fit(new, data.pixels[trained], combos, steps, weights=weights)
    accuracy = {}
    images = (to_float(data.pixels[tested]) + 1) / 2
    for name in data.factors:
        truth = [data.combos[i][name] for i in tested.tolist()]
        right = verifier.verify(images, [{name: value} for value in truth]).float()
        shares = [right[torch.tensor([t == value for t in truth])].mean() for value in VALUES]
        accuracy[name] = float(torch.stack(shares).mean())
    if weak := {name: value for name, value in accuracy.items() if not value >= LEAST_ACCURACY}:
        raise ValueError(
            f"train_verifier: balanced accuracy {weak} on real images that were kept back, "
            f"expected at least {LEAST_ACCURACY}. HINT: larger images (--size), or attributes that "
            "are easier to see."
        )
    return verifier, accuracy


class Run:
    """A model and its judge, trained unless ``folder`` already holds them.

    Raises:
        ValueError: the folder holds a run with other settings, or the judge cannot be trusted.
    """

    def __init__(self, folder: Path, data: CelebAHQ, settings: dict[str, Any]) -> None:
        facts = {"held_out": data.held_out, "images": len(data.combos), "size": data.size}
        self.data, arguments, steps = data, settings | facts, evenly(settings["steps"], 3)
        L.seed_everything(settings["seed"], verbose=False)
        patch, channels = settings["patch"], tuple(settings["channels"])
        self.module = FactorDiffusion(data.factors, data.size, patch, channels, drop=0.1)
        weights = folder / "verifier.safetensors"
        known = finished(folder, arguments)
        if known is None:
            folder.mkdir(parents=True, exist_ok=True)
            judge, accuracy = train_verifier(data, settings["seed"], settings["verifier_steps"])
            save_file({name: v.contiguous() for name, v in judge.state_dict().items()}, weights)
            fitted(self.module, data, steps[-1], SaveTrained(folder, steps), accelerator="auto")
            known = record(folder, {"arguments": arguments, "accuracy": accuracy})
        self.folder, self.steps, self.accuracy = folder, steps, known["accuracy"]
        self.verifier = Verifier(data.factors, data.size)
        self.verifier.load_state_dict(load_file(weights))
        self.verifier.eval()
        load_trained(self.module.eval(), folder, steps[-1])

    def images(self, combos: Sequence[Combo], seeds: Sequence[int]) -> Tensor:
        """One generated image per (triple, seed) [n, 3, H, W] in [0, 1]."""
        return generate(self.module, SAMPLER, combos, seeds, self.module.latent_shape)

    def questions(self, wanted: int) -> tuple[list[Question], dict[str, int]]:
        """For the first ``wanted`` accepted images of every triple, the attributes in which it has
        the held-out triple's value (ten images without a rare attribute are no achievement); and
        how many of four times as many were accepted."""
        accepted = {caption(c): verified_seeds(self, c, wanted) for c in self.data.triples}
        asked = [
            (combo, name, seed)
            for combo in self.data.triples
            for seed in accepted[caption(combo)][:wanted]
            for name, value in self.data.held_out.items()
            if combo[name] == value
        ]
        return asked, {name: len(found) for name, found in accepted.items()}

    def fill(self, table: Table, asked: list[Question], only: Sequence[str] | None) -> None:
        """The rows: every method against both counter-conditions, and the baselines."""
        rows = table_variants(TIMESTEPS, self.steps, only, scopes=("local", "global"))
        rows += swapped(rows)
        case = Case(
            folder=self.folder,
            module=self.module,
            batches=self.data.trace_dataloader(),
            concepts=[concept(each, "dropped") for each in asked],
            seeds=[seed for _, _, seed in asked],
            sampler=SAMPLER,
            counters={"swapped": [concept(each, "swapped") for each in asked]},
        )
        out = answers_folder(self.folder, self.data.traced, asked)
        found, images = compare(case, rows, out)
        relevant = self.data.relevance(asked).float()
        real = self.data.train_set.pixels[self.data.traced].float() / 255
        similar, chance = image_similarity(images, real), torch.zeros_like(relevant)
        found |= {"label_search": {"None": relevant}, "chance": {"None": chance}}
        found["pixel_similarity"] = {"None": similar}
        honest = {row.name: row.damping for row in rows}
        table.fill(found, partial(self.data.figures, asked), honest)


def concept(question: Question, counter: str) -> Concept:
    """The triple against the same without the attribute's token, or with its other value."""
    combo, attribute, _ = question
    absent = {name: value for name, value in combo.items() if name != attribute}
    if counter == "swapped":
        absent[attribute] = VALUES[1 - VALUES.index(combo[attribute])]
    return Concept(f"{attribute}={combo[attribute]}", dict(combo), absent)


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
        drawn = [combo for combo in data.triples for _ in range(8)]
        samples = run.images(drawn, [*range(8)] * len(data.triples))
        image_grid(run.folder / "samples.png", samples, columns=8)
        asked, counts = run.questions(args.queries)
        run.fill(table, asked, args.methods)
        accuracy = ", ".join(f"{name} {value:.2f}" for name, value in run.accuracy.items())
        shown = f"{counts[caption(held_out)]} of {MOST_TRIES * args.queries}"
        told.append(f"seed {seed}: accepts {shown} images of the held-out triple; {accuracy}")
    head = (
        f"`{command_of(parser, args)}`; {machine()}. Held out: {caption(held_out)}. The judge and "
        f"its balanced accuracy: {'. '.join(told)}.\n"
    )
    publish(args.results / "celeba_hq.md", table.page(head))


if __name__ == "__main__":
    main()
