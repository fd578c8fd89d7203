"""The protocol of the CelebA-HQ benchmark, for any images with three binary attributes: a model that
is never shown one triple of values, a judge of what it generates, and precision@10 per attribute.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution.baselines import image_similarity

from ..pictures import image_grid, to_float
from ..pixels import generate
from .compare import Case, answers_folder, compare
from .replay import SaveTrained, evenly, finished, fitted, load_trained, record
from .synthetic.model import FactorDiffusion
from .synthetic.precision import MOST_TRIES, verified_seeds
from .synthetic.verifier import Verifier, fit
from .tables import Table, retrieval
from .variants import swapped, table_variants

VALUES = ("no", "yes")
TIMESTEPS = 5
KEPT_BACK, LEAST_ACCURACY = 0.1, 0.8
"""The share of the images that the judge is measured on, and the least it has to reach."""
SAMPLER = Sampler(steps=25, guidance=2.0)
WHERE = ("held out", "in distribution")
Combo = dict[str, str]
Question = tuple[Combo, str, int]
"""The image of a triple from one seed, and the attribute of it that is asked for."""


def caption(combo: Combo) -> str:
    """``"Male, no Smiling"``."""
    return ", ".join(name if value == "yes" else f"no {name}" for name, value in combo.items())


class Images(Dataset[dict[str, Any]]):
    """Images uint8 [N, 3, H, W] with the values of their attributes, by their files' names."""

    def __init__(self, pixels: Tensor, combos: list[Combo], files: list[str]) -> None:
        self.pixels, self.combos, self.files = pixels, combos, files

    def __len__(self) -> int:
        return len(self.combos)

    def __getitem__(self, i: int) -> dict[str, Any]:
        facts = {"sample_id": self.files[i], "caption": caption(self.combos[i])}
        return {"image": to_float(self.pixels[i]), **self.combos[i], **facts}


class Triples(L.LightningDataModule):
    """Images without those of the held-out triple: three attributes and the values that training
    never sees together.

    Args:
        combos: the attributes' values of each of the N images.
        files: their names.
        read: the images uint8 [N, 3, H, W]; called once the triple is known to be one that can be
            held out.
        held_out: the triple.
        batch_size: images per batch.
        traced: how many training images to trace, chosen by ``seed``.
        seed: of that choice.

    Raises:
        ValueError: no image shows the triple, or none but those one of its values.
    """

    def __init__(
        self,
        combos: list[Combo],
        files: list[str],
        read: Callable[[], Tensor],
        held_out: Combo,
        batch_size: int,
        traced: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.combos, self.held_out, self.batch_size = combos, held_out, batch_size
        self.factors = dict.fromkeys(held_out, VALUES)
        triples = itertools.product(VALUES, repeat=len(held_out))
        self.triples = [dict(zip(held_out, triple, strict=True)) for triple in triples]
        kept = [i for i, combo in enumerate(combos) if combo != held_out]
        seen = {(name, combos[i][name]) for i in kept for name in held_out}
        if len(kept) == len(combos) or len(seen) < 2 * len(held_out):
            raise ValueError(
                f"{type(self).__name__}(held_out={held_out}): no image shows this triple, or none "
                "else shows one of its values. HINT: choose other attributes or values."
            )
        self.pixels = read()
        self.size = self.pixels.shape[-1]
        own = [combos[i] for i in kept], [files[i] for i in kept]
        self.train_set = Images(self.pixels[kept], *own)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        self.traced: list[int] = order[:traced].sort().values.tolist()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace, in their own order."""
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


def train_verifier(data: Triples, seed: int, steps: int) -> tuple[Verifier, dict[str, float]]:
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
            f"expected at least {LEAST_ACCURACY}. HINT: larger images, or attributes that "
            "are easier to see."
        )
    return verifier, accuracy


def judge(
    folder: Path, data: Triples, settings: dict[str, Any]
) -> tuple[Verifier, dict[str, float]]:
    """:func:`train_verifier`, unless ``folder`` already holds that one.

    Raises:
        ValueError: the folder holds another one, or it cannot be trusted.
    """
    arguments = {name: settings[name] for name in ("seed", "verifier_steps")}
    weights = folder / "verifier.safetensors"
    known = finished(folder, arguments)
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        trained, accuracy = train_verifier(data, *arguments.values())
        save_file({name: v.contiguous() for name, v in trained.state_dict().items()}, weights)
        known = record(folder, {"arguments": arguments, "accuracy": accuracy})
    verifier = Verifier(data.factors, data.size)
    verifier.load_state_dict(load_file(weights))
    return verifier.eval(), known["accuracy"]


class Run:
    """A model and its judge, trained unless ``folder`` already holds them.

    Args:
        folder: of the run.
        data: the images.
        settings: of the training; another run has another folder.
        sampler: of the images that are asked about; :data:`SAMPLER` if None.

    Raises:
        ValueError: the folder holds a run with other settings, or the judge cannot be trusted.
    """

    def __init__(
        self,
        folder: Path,
        data: Triples,
        settings: dict[str, Any],
        sampler: Sampler | None = None,
    ) -> None:
        facts = {"held_out": data.held_out, "images": len(data.combos), "size": data.size}
        self.data, arguments, steps = data, settings | facts, evenly(settings["steps"], 3)
        self.seed, self.sampler = settings["seed"], sampler or SAMPLER
        L.seed_everything(settings["seed"], verbose=False)
        patch, channels = settings["patch"], tuple(settings["channels"])
        self.module = FactorDiffusion(data.factors, data.size, patch, channels, drop=0.1)
        self.folder, self.steps = folder, steps
        known = finished(folder, arguments)
        self.verifier, self.accuracy = judge(folder / "judge", data, settings)
        if known is None:
            fitted(self.module, data, steps[-1], SaveTrained(folder, steps), accelerator="auto")
            record(folder, {"arguments": arguments})
        load_trained(self.module.eval(), folder, steps[-1])

    def images(self, combos: Sequence[Combo], seeds: Sequence[int]) -> Tensor:
        """One generated image per (triple, seed) [n, 3, H, W] in [0, 1]."""
        return generate(self.module, self.sampler, combos, seeds, self.module.latent_shape)

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
            sampler=self.sampler,
            counters={"swapped": [concept(each, "swapped") for each in asked]},
        )
        out = answers_folder(self.folder, self.data.traced, asked, asdict(self.sampler))
        found, images = compare(case, rows, out)
        relevant = self.data.relevance(asked).float()
        real = self.data.train_set.pixels[self.data.traced].float() / 255
        similar, chance = image_similarity(images, real), torch.zeros_like(relevant)
        found |= {"label_search": {"None": relevant}, "chance": {"None": chance}}
        found["pixel_similarity"] = {"None": similar}
        honest = {row.name: row.damping for row in rows}
        table.fill(found, partial(self.data.figures, asked), honest)

    def told(self, table: Table, wanted: int, only: Sequence[str] | None) -> str:
        """Draws ``samples.png``, asks about ``wanted`` images of every triple and adds the rows
        (:meth:`fill`); what a page says of the judge and of the model."""
        drawn = [combo for combo in self.data.triples for _ in range(8)]
        samples = self.images(drawn, [*range(8)] * len(self.data.triples))
        image_grid(self.folder / "samples.png", samples, columns=8)
        asked, counts = self.questions(wanted)
        self.fill(table, asked, only)
        accuracy = ", ".join(f"{name} {value:.2f}" for name, value in self.accuracy.items())
        shown = f"{counts[caption(self.data.held_out)]} of {MOST_TRIES * wanted}"
        return f"seed {self.seed}: accepts {shown} images of the held-out triple; {accuracy}"


def concept(question: Question, counter: str) -> Concept:
    """The triple against the same without the attribute's token, or with its other value."""
    combo, attribute, _ = question
    absent = {name: value for name, value in combo.items() if name != attribute}
    if counter == "swapped":
        absent[attribute] = VALUES[1 - VALUES.index(combo[attribute])]
    return Concept(f"{attribute}={combo[attribute]}", dict(combo), absent)
