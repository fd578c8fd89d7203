"""Parts of a face that no caption names: who taught this hair, and what is lost without the faces that
a ranking names? For :mod:`recipes.benchmarks.faces`.

A base model learns the faces of one artist, a fine-tune those of another one; captions say whether
there are glasses and a beard, and nothing else. Four faces with each drawing of a part are held back,
and asked about by image and mask.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution.baselines import image_similarity, random_order
from ctrak_lightning.methods.trajectories import Noised
from ctrak_lightning.metrics import bootstrap_difference

from ..face_artists.data import SIZE, FaceArtists, Faces
from ..pixels import conditions
from .compare import Case
from .counterfactual import best_ranked
from .influence import crossed_objects, scores_of
from .replay import SaveTrained, evenly, finished, fitted, load_trained, record
from .synthetic.model import FactorDiffusion
from .tables import Table, grid, retrieval
from .variants import table_variants

BASE_ARTIST, ARTIST = "notionists", "lorelei"
TOLD = ("glasses", "beard")
ASKED = {"hair": 12, "glasses": 5, "beard": 2}
"""Of each part the commonest drawings."""
HELD = 4
"""Faces with each of these drawings that training never sees."""
SPLIT_SEED = 20261
METHODS = ("influence", "concept_trak", "d_trak")
LIKENESS, ANY = "pixels in the mask", "any that have it"
WITHOUT_GRADIENTS = (LIKENESS, "random", ANY)
"""The rankings that are judged by leaving out, beside the gradient methods; the last is of those with
the same drawing, in a random order: what a perfect search for it would do with as many faces."""
EXPLAINED, FLOOR = 0.5, 0.1
"""Of a mask: the least share of a pixel's squares that the drawing explains, and how far from other
faces it is, in grey levels of [0, 1]."""
LOSS_TIMESTEPS, LOSS_SEEDS = 10, (0, 1, 2)
SAMPLER = Sampler(steps=20, guidance=2.0)


@dataclass(frozen=True)
class Drawing:
    """A part and which drawing of it, such as ``hair`` and ``variant08``."""

    part: str
    variant: str


@dataclass(frozen=True)
class PartFaces:
    """The faces to train on, those held back, and the drawing that each of the latter is asked for,
    :data:`HELD` in a row of each drawing."""

    train: Faces
    held: Faces
    asked: list[Drawing]

    @classmethod
    def split(cls, faces: Faces) -> "PartFaces":
        """Holds back faces with each of the :data:`ASKED` drawings."""
        rng = np.random.default_rng(SPLIT_SEED)
        held: list[int] = []
        asked = []
        for part, count in ASKED.items():
            for variant, rows in list(faces.variants(part).items())[:count]:
                left = [i for i in rows if i not in held]
                held += rng.choice(left, HELD, replace=False).tolist()
                asked += [Drawing(part, variant)] * HELD
        rest = sorted(set(range(len(faces))) - set(held))
        return cls(faces.only(rest), faces.only(held), asked)

    @cached_property
    def drawings(self) -> list[Drawing]:
        return self.asked[::HELD]

    @cached_property
    def relevance(self) -> Tensor:
        """Which training faces have the drawing that is asked for, bool [Q, N]."""
        return torch.tensor(
            [[parts.get(d.part) == d.variant for parts in self.train.parts] for d in self.asked]
        )

    @cached_property
    def masks(self) -> Tensor:
        """Where the drawing is, of every question, bool [Q, 32, 32]."""
        each = {d: drawing_mask(self.train, d) for d in self.drawings}
        return torch.stack([each[d] for d in self.asked])

    def concepts(self) -> list[Concept]:
        """A face under its caption, against no caption, where the drawing is."""
        return [
            Concept(f"{d.part}={d.variant}", {name: known[name] for name in TOLD}, {}, mask=mask)
            for d, known, mask in zip(self.asked, self.held.attributes, self.masks, strict=True)
        ]


def drawing_mask(faces: Faces, drawing: Drawing) -> Tensor:
    """Where a drawing is, bool [32, 32]: where the faces that have it agree and differ from the
    others. Of these faces' squared distances from the mean of the other faces, their own mean
    explains at least half, and the root of the mean distance is a tenth of the range at least."""
    grey = faces.pixels.float().mean(1) / 255
    own = torch.tensor([parts.get(drawing.part) == drawing.variant for parts in faces.parts])
    within = (grey[own] - grey[own].mean(0)).square().mean(0)
    apart = (grey[own] - grey[~own].mean(0)).square().mean(0)
    return (within <= (1 - EXPLAINED) * apart) & (apart >= FLOOR**2)


def likeness(data: PartFaces) -> dict[str, Tensor]:
    """Rankings without gradients [Q, N]: pixels and grey-level correlation in the mask, pixels of the
    whole image, and chance."""
    asked, known = (each.pixels.float() / 255 for each in (data.held, data.train))

    def grey(mask: Tensor) -> Any:
        def encoder(images: Tensor) -> Tensor:
            values = images.mean(1)[:, mask]
            return values - values.mean(1, keepdim=True)

        return encoder

    within, correlated = [], []
    for image, mask in zip(asked, data.masks, strict=True):
        within.append(image_similarity((image * mask)[None], known * mask)[0])
        correlated.append(image_similarity(image[None], known, grey(mask))[0])
    return {
        LIKENESS: torch.stack(within),
        "grey-level correlation in the mask": torch.stack(correlated),
        "pixels of the whole image": image_similarity(asked, known),
        "random": random_order(len(asked), len(known)),
    }


@torch.no_grad()
def masked_losses(module: FactorDiffusion, data: PartFaces) -> Tensor:
    """Clean-image prediction's squared error on the held-back faces under their captions, mean over
    the pixels of the mask, timesteps and fixed noise [Q]."""
    module.eval()
    concepts = data.concepts()
    latents = module.latents(data.held.images())
    weights = torch.stack([module.latent_mask(mask.float()) for mask in data.masks])
    told = conditions(module, [concept.present for concept in concepts])
    losses = torch.zeros(len(latents))
    for seed in LOSS_SEEDS:
        noised = Noised(timesteps=LOSS_TIMESTEPS)
        for state in noised.states(module, latents, {}, [""] * len(latents), seed=seed):
            error = (module.predict(state.x_t, state.t, told) - latents).square()
            losses += (weights * error).flatten(1).sum(1) / weights.flatten(1).sum(1)
    return losses / (LOSS_TIMESTEPS * len(LOSS_SEEDS))


@dataclass(frozen=True, kw_only=True)
class Training:
    """How models are trained.

    Args:
        patch, channels: of :class:`~recipes.benchmarks.synthetic.model.FactorDiffusion`.
        base_steps, steps: of the base and of a fine-tune.
        base_rate, rate: highest learning rates.
        batch_size: images per batch.
    """

    patch: int = 4
    channels: tuple[int, int] = (64, 64)
    base_steps: int = 700
    steps: int = 240
    base_rate: float = 2e-3
    rate: float = 2e-3
    batch_size: int = 32

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "channels": list(self.channels)}


class PartRun:
    """The base, the fine-tunes and what they have of every held-back face, in ``folder``; finished
    models are not trained again.

    Args:
        folder: of the runs.
        data: the faces.
        training: how to train.
        base: the faces of the base model; those of :data:`BASE_ARTIST` by default.
    """

    def __init__(
        self, folder: Path, data: PartFaces, training: Training, base: Faces | None = None
    ) -> None:
        self.folder, self.data, self.training = folder, data, training
        self._base = Faces.load((BASE_ARTIST,)) if base is None else base

    def base(self) -> FactorDiffusion:
        """The base model, trained where it is not there yet."""
        folder, steps = self.folder / "base", self.training.base_steps
        arguments = self.training.facts()
        if finished(folder, arguments) is None:
            folder.mkdir(parents=True, exist_ok=True)
            L.seed_everything(0, verbose=False)
            module = self._new(self.training.base_rate)
            faces = FaceArtists(self._base, self.training.batch_size)
            trainer = fitted(module, faces, steps, SaveTrained(folder, [steps]))
            loss = float(trainer.callback_metrics["loss"])
            record(folder, {"arguments": arguments, "loss": loss})
        module = self._new(self.training.rate)
        load_trained(module, folder, steps)
        return module

    def losses(self, name: str, left_out: set[int], seed: int) -> Tensor:
        """:func:`masked_losses` of a fine-tune without some of the training faces [Q].

        Raises:
            ValueError: its folder holds one without other faces.
        """
        folder = self.folder / f"{name}-seed{seed}"
        arguments = self.training.facts() | {"seed": seed, "left_out": sorted(left_out)}
        known = finished(folder, arguments)
        if known is None:
            folder.mkdir(parents=True, exist_ok=True)
            module, steps = self.base(), self.training.steps
            kept = sorted(set(range(len(self.data.train))) - left_out)
            faces = FaceArtists(self.data.train, self.training.batch_size, kept)
            L.seed_everything(seed, verbose=False)
            # The full model is traced; of the others the losses will do.
            saved = [] if left_out else evenly(steps, 3)
            fitted(module, faces, steps, SaveTrained(folder, saved))
            found = masked_losses(module, self.data).tolist()
            known = record(folder, {"arguments": arguments, "losses": found})
        return torch.tensor(known["losses"], dtype=torch.float64)

    def full(self, seed: int) -> tuple[FactorDiffusion, Path]:
        """The model that saw every training face, and its folder."""
        self.losses("full", set(), seed)
        folder = self.folder / f"full-seed{seed}"
        module = self._new(self.training.rate)
        load_trained(module, folder, self.training.steps)
        return module.eval(), folder

    def scores(self, seed: int, methods: Sequence[str]) -> dict[str, Tensor]:
        """Scores [Q, N] of every ranking: of the gradient methods about the held-back faces and their
        masks, by the full model of this seed, and :func:`likeness`."""
        module, folder = self.full(seed)
        rows = table_variants(
            5, evenly(self.training.steps, 3), [f"{name}_given" for name in methods]
        )
        concepts = self.data.concepts()
        case = Case(
            folder=folder,
            module=module,
            batches=FaceArtists(self.data.train).trace_dataloader(),
            concepts=concepts,
            seeds=[0] * len(concepts),
            sampler=SAMPLER,
            given=module.latents(self.data.held.images()),
        )
        what = json.dumps([self.data.held.sample_ids, [c.name for c in concepts]])
        return scores_of(folder, case, rows, what) | likeness(self.data)

    def _new(self, rate: float) -> FactorDiffusion:
        factors = dict.fromkeys(TOLD, ("no", "yes"))
        training = self.training
        return FactorDiffusion(factors, SIZE, training.patch, training.channels, rate, drop=0.1)


@dataclass(frozen=True)
class LeftOut:
    """One fine-tune per method: of each of these drawings, its ``count`` best-ranked faces are left
    out."""

    name: str
    parts: tuple[str, ...]
    count: int

    def rows(self, data: PartFaces) -> list[int]:
        """The questions about these drawings."""
        return [i for i, drawing in enumerate(data.asked) if drawing.part in self.parts]

    def faces(self, data: PartFaces, scores: Tensor) -> set[int]:
        """What to leave out by the scores [Q, N] of a ranking; of a drawing's questions the mean
        standardised scores."""
        found: set[int] = set()
        for i in self.rows(data)[::HELD]:
            found |= best_ranked(scores[i : i + HELD], self.count)
        return found


def experiments(data: PartFaces) -> list[LeftOut]:
    """24 faces for every hair at once; of parts with 140 faces and more 1 % and 5 % of the training
    set, glasses and beards at once or each on their own."""
    one, five = (round(share * len(data.train)) for share in (0.01, 0.05))
    return [
        LeftOut("hair-24", ("hair",), 24),
        LeftOut("larger-1", ("glasses", "beard"), one),
        LeftOut("glasses-5", ("glasses",), five),
        LeftOut("beard-5", ("beard",), five),
    ]


def retrieved(data: PartFaces, scores: Mapping[str, Tensor]) -> list[str]:
    """The table of what rankings find: one value per drawing, the mean over its faces."""
    kinds = [drawing.part for drawing in data.asked]

    def figures(each: Tensor) -> dict[str, Tensor]:
        found = retrieval(each, data.relevance, kinds)
        return {name: values.view(-1, HELD).mean(1) for name, values in found.items()}

    columns = [f"{metric}, {part}" for metric in ("R-precision", "P@10") for part in ASKED]
    table = Table(columns, oracle=False)
    table.fill({name: {"None": each} for name, each in scores.items()}, figures, {})
    lines = table.page("").splitlines()[3:]  # without a head and the note, which is of questions
    best = figures(scores[LIKENESS])
    cells = []
    for name, each in scores.items():
        if name == LIKENESS:
            continue
        own = figures(each)
        cells.append([name, *(_difference(own[key], best[key]) for key in columns[: len(ASKED)])])
    heads = [f"less *{LIKENESS}*", *columns[: len(ASKED)]]
    return [*lines, "", *grid(heads, cells)]


def _difference(values: Tensor, reference: Tensor) -> str:
    low, high = bootstrap_difference(values, reference)
    return f"{float((values - reference).mean()):+.2f} [{float(low):+.2f}, {float(high):+.2f}]"


def lost(
    run: PartRun,
    experiment: LeftOut,
    scores: Mapping[str, Tensor],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """By ranking (the ``methods`` and :data:`WITHOUT_GRADIENTS`), how much the loss in the mask rises
    without its best-ranked faces [seeds, drawings]."""
    rows = experiment.rows(run.data)
    found = {}
    for name in (*methods, *WITHOUT_GRADIENTS):
        each = run.data.relevance.float() if name == ANY else scores[name]
        left = experiment.faces(run.data, each)
        found[name] = _rises(run, f"{experiment.name}-{_slug(name)}", left, rows, seeds)
    if experiment.parts == ("hair",):
        whole = set(run.data.relevance[rows].any(0).nonzero().flatten().tolist())
        found["all that have it"] = _rises(run, f"{experiment.name}-all", whole, rows, seeds)
    return found


def _rises(
    run: PartRun, name: str, left_out: set[int], rows: Sequence[int], seeds: Sequence[int]
) -> Tensor:
    each = [run.losses(name, left_out, seed) - run.losses("full", set(), seed) for seed in seeds]
    return torch.stack(each)[:, list(rows)].view(len(seeds), -1, HELD).mean(2)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def lost_table(found: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """A line per ranking and a column per experiment: the mean rise, x 1000, with intervals over
    drawings and fine-tunes, crossed; and less the likeness in the mask, paired."""

    def shown(values: Tensor, sign: str = "") -> str:
        low, high = crossed_objects(1000 * values)
        return f"{1000 * float(values.mean()):{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"

    names = list(dict.fromkeys(name for each in found.values() for name in each))
    tables = []
    for against in (None, LIKENESS):
        cells = []
        for name in names:
            if name == against:
                continue
            row = []
            for each in found.values():
                if name not in each or (against and against not in each):
                    row.append("-")
                elif against:
                    row.append(shown(each[name] - each[against], "+"))
                else:
                    row.append(shown(each[name]))
            cells.append([name, *row])
        heads = ["left out by" if against is None else f"less *{against}*", *found]
        tables += ["", *grid(heads, cells)]
    return tables[1:]
