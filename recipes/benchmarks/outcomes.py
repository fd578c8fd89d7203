"""What retrained models have of every concept: the evidence of all runs in one committed file.

python -m recipes.benchmarks.outcomes runs/emoji/labelled    # judges finished runs, adds them
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..emoji_artists.data import KINDS, EmojiArtists
from .judge import EmojiJudge
from .tables import RESULTS

STRENGTHS = ("judge", "loss")
MEASURES = (*STRENGTHS, "likeness")
FILE = "retrained.safetensors"
GENERATED = RESULTS / "generated.safetensors"
ASKED_RUNS = ("full-seed0", "full-seed1")
"""Fully trained models whose images (image seed 0) are asked about, and every retrained model is
judged by."""
ASKED = len(ASKED_RUNS)
NONE = torch.empty(0)


@dataclass(frozen=True)
class Outcomes:
    """What R retrained models have of the concepts of the 64 held-out pairs.

    Args:
        names: of the runs, such as ``half-03-seed0``.
        kept: which training samples each run saw, bool [R, N].
        odds: the judge's log odds of the object and the artist in images of the pair, mean over
            image seeds [R, 64, 2].
        losses: denoising losses on the pair's real image, told both names, the artist, the object,
            nothing [R, 64, 4].
        likeness: cosine of the judge's features of the generated and the real image of the pair,
            mean over image seeds [R, 64].
        asked_losses: as ``losses``, on the A images of each pair that are asked about
            (:func:`~recipes.benchmarks.retrain.generated_images`) [R, A, 64, 4]; NaN where a run
            was not judged by them.
        drift: root mean square distance, of pixels in [0, 1], of the image that the run generates
            from the same noise to each of those [R, A, 64]; NaN there too.
    """

    names: list[str]
    kept: Tensor
    odds: Tensor
    losses: Tensor
    likeness: Tensor
    asked_losses: Tensor = NONE
    drift: Tensor = NONE

    def __post_init__(self) -> None:
        for name, shape in (("asked_losses", (ASKED, 64, 4)), ("drift", (ASKED, 64))):
            if getattr(self, name) is NONE:
                unknown = torch.full((len(self.names), *shape), torch.nan)
                object.__setattr__(self, name, unknown)

    @classmethod
    def load(cls, setting: str, results: Path = RESULTS) -> "Outcomes":
        """The committed outcomes of a setting; empty where there are none yet."""
        size = len(EmojiArtists("new").train_set)
        names, tensors = _read(results / FILE)
        if setting not in names:
            empty = (torch.zeros(0, *shape) for shape in ((64, 2), (64, 4), (64,)))
            return cls([], torch.zeros(0, size).bool(), *empty)
        own = {name: tensors[f"{setting}.{name}"] for name in TENSORS if name not in BY_ASKED}
        own |= {name: _whole(tensors, setting, name) for name in BY_ASKED}
        own["kept"] = torch.from_numpy(
            np.unpackbits(own["kept"].numpy(), axis=1, count=size)
        ).bool()
        return cls(json.loads(names[setting]), **own)

    def save(self, setting: str, results: Path = RESULTS) -> None:
        """Writes them beside those of the other settings; what was seen as single bits."""
        names, tensors = _read(results / FILE)
        own = {name: getattr(self, name).contiguous() for name in TENSORS}
        own["kept"] = torch.from_numpy(np.packbits(self.kept.numpy(), axis=1))
        rows = self.drift.isfinite().flatten(1).all(1)
        own |= {name: own[name][rows].contiguous() for name in BY_ASKED}
        own["asked_rows"] = rows.nonzero().flatten()
        tensors |= {f"{setting}.{name}": value for name, value in own.items()}
        save_file(tensors, results / FILE, names | {setting: json.dumps(self.names)})

    def of(self, prefix: str, seeds: Sequence[int]) -> "Outcomes":
        """The runs of a plan, each the mean over those of the training seeds that are there; by
        name without the seed."""
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            run, _, seed = name.rpartition("-seed")
            if run.startswith(prefix) and int(seed) in seeds:
                rows.setdefault(run, []).append(i)
        runs = sorted(rows)

        def mean(values: Tensor) -> Tensor:
            return torch.stack([values[rows[run]].mean(0) for run in runs]) if runs else values[:0]

        kept = self.kept[[rows[run][0] for run in runs]]
        rest = (mean(getattr(self, name)) for name in TENSORS if name != "kept")
        return Outcomes(runs, kept, *rest)

    def only(self, runs: Sequence[str]) -> "Outcomes":
        """Some of the runs, in the order asked."""
        rows = [self.names.index(run) for run in runs]
        return Outcomes(list(runs), *(getattr(self, name)[rows] for name in TENSORS))

    def strength(self, kind: str, measure: str) -> Tensor:
        """The strength of the pairs' objects or artists [R, 64], higher = more of it.

        ``judge``: the classifier's log odds on generated images. ``loss``: how much the concept's
        name lowers the denoising loss on the pair's real image, told beside the other name.
        ``likeness``: of generated images to the pair's real one, the same for both kinds.
        """
        if measure == "likeness":
            return self.likeness
        if measure == "judge":
            return self.odds[:, :, KINDS.index(kind)]
        without = {"object": 1, "artist": 2}[kind]
        return self.losses[:, :, without] - self.losses[:, :, 0]


TENSORS = tuple(field.name for field in fields(Outcomes) if field.name != "names")
BY_ASKED = ("asked_losses", "drift")


def generated_images(setting: str) -> dict[str, Tensor]:
    """Images of the held-out pairs [64, 3, 32, 32] in [-1, 1] that fully trained models generated, by
    the name of the run: those that are asked about."""
    found = load_file(GENERATED) if GENERATED.exists() else {}
    own = {name.partition(".")[2]: x for name, x in found.items() if name.startswith(f"{setting}.")}
    return {name: x.permute(0, 3, 1, 2).float() / 127.5 - 1 for name, x in sorted(own.items())}


def keep_generated(name: str, setting: str, images: Tensor) -> None:
    """Commits the images of one of the runs that are asked about, uint8 [64, 32, 32, 3]."""
    known = load_file(GENERATED) if GENERATED.exists() else {}
    if name in ASKED_RUNS and f"{setting}.{name}" not in known:
        save_file(known | {f"{setting}.{name}": images.contiguous()}, GENERATED)


def judged(folder: Path, known: Outcomes) -> Outcomes:
    """``known`` and the finished runs of a folder."""
    data, judge = EmojiArtists("new"), EmojiJudge.trained()
    real = F.normalize(judge.features((data.held_out_set.images + 1) / 2), dim=1)
    names, columns = list(known.names), {name: list(getattr(known, name)) for name in TENSORS}
    for path in sorted(folder.glob("*/facts.json")):
        if path.parent.name in names:
            continue
        facts = json.loads(path.read_text(encoding="utf-8"))
        evidence = load_file(path.parent / "evidence.safetensors")
        images = evidence["images"].permute(0, 3, 1, 2).float() / 255
        seeds = len(images) // len(data.held_out)
        objects = [name for name, _ in data.held_out for _ in range(seeds)]
        artists = [artist for _, artist in data.held_out for _ in range(seeds)]
        mask = torch.zeros(known.kept.shape[1], dtype=torch.bool)
        mask[facts["kept"]] = True
        odds = judge.log_odds(images, objects, artists).view(-1, seeds, 2).mean(1)
        features = F.normalize(judge.features(images), dim=1).view(-1, seeds, real.shape[1])
        likeness = (features * real.unsqueeze(1)).sum(2).mean(1)
        losses = torch.full((ASKED, len(real), 4), torch.nan)
        drift = torch.full((ASKED, len(real)), torch.nan)
        if "generated_losses" in evidence:
            losses = evidence["generated_losses"]
            own = images.view(len(real), seeds, *images.shape[1:])[:, 0]
            asked = torch.stack([(one + 1) / 2 for one in generated_images(folder.name).values()])
            drift = (own - asked).square().flatten(2).mean(2).sqrt()
        names.append(path.parent.name)
        found = (mask, odds, evidence["losses"], likeness, losses, drift)
        for name, value in zip(TENSORS, found, strict=True):
            columns[name].append(value)
    if names == known.names:
        return known
    return Outcomes(names, *(torch.stack(columns[name]) for name in TENSORS))


def _whole(tensors: dict[str, Tensor], setting: str, name: str) -> Tensor:
    """A tensor of the runs that were judged by the images asked about, with NaN for the others."""
    shape = (ASKED, 64, 4) if name == "asked_losses" else (ASKED, 64)
    whole = torch.full((len(tensors[f"{setting}.losses"]), *shape), torch.nan)
    if f"{setting}.asked_rows" in tensors:
        whole[tensors[f"{setting}.asked_rows"]] = tensors[f"{setting}.{name}"]
    return whole


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The names of the runs by setting, as JSON, and all tensors."""
    if not path.exists():
        return {}, {}
    with safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    setting = args.folder.name
    outcomes = judged(args.folder, Outcomes.load(setting))
    outcomes.save(setting)
    print(f"{setting}: {len(outcomes.names)} runs")


if __name__ == "__main__":
    main()
