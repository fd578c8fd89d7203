"""What likeness cannot know: of two images of the same object, which one was trained on more?

python -m recipes.benchmarks.interventions --seeds 0 1 2    # results/interventions.md

In one fine-tune each image of an object has a part of its own, drawn at random: two are shown as
usual, one ten times as often, one with a loss weight of 0, one in the first tenth of training only,
one in the last tenth only, one never; and there is a copy of one of the usual ones, under another
owner, that is never shown. Asked about the object's drawing that no model saw, a score should rank
what was trained on more above what was trained on less. AUC: the share of such pairs, of the same
object, that are ranked rightly; what looks at the images alone has 0.5 by chance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from ctrak_lightning import Attributor, TraceStore, methods
from ctrak_lightning.attribution.scoring import ensemble, exposures_at
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.methods.objectives import Residual, contrast
from ctrak_lightning.methods.trajectories import Noised

from ..emoji_artists.data import EmojiArtists, EmojiPairs
from ..emoji_artists.evaluate import Question
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from ..pixels import clean_image_loss
from .compare import Case, answers, answers_folder
from .emoji import SAMPLER
from .influence import STEPS, baselines, crossed_objects, object_questions, variants
from .replay import SaveTrained, finished, fitted, record
from .tables import command_of, grid, machine, parser_of, publish

PARTS = ("usual", "usual", "ten times", "weight 0", "first tenth", "last tenth", "never")
COPY = "copy"
TESTS = (
    ("ten times", "usual"),
    ("usual", "weight 0"),
    ("usual", "first tenth"),
    ("usual", "last tenth"),
    ("usual", "never"),
    ("its original", COPY),
)
"""What should be ranked above what."""
BATCH = 32
ROWS = ("influence", "influence_null", "concept_trak", "concept_trak_published", "d_trak")
INLINE = "influence, inline"
COUNTED = (
    *("label", "label and pixels", "label and judge's features"),
    *("label and grey-level correlation", "label and grey levels and activations", "random"),
)
"""Rows without gradients that are also shown times the exposures."""


@dataclass(frozen=True)
class Design:
    """Which part each of N samples has, and which samples every step shows.

    Args:
        parts: of the samples [N].
        originals: of each object, the places of the image that is copied and of its copy.
        batches: the samples of each training step, in order.
    """

    parts: list[str]
    originals: dict[str, tuple[int, int]]
    batches: list[list[int]]

    @classmethod
    def drawn(cls, pairs: Sequence[tuple[str, str]], seed: int) -> "Design":
        """The design of a seed; the copies come after the images, an object each."""
        rng = np.random.default_rng([20255, seed])
        parts, originals = [""] * len(pairs), {}
        names = sorted({name for name, _ in pairs})
        for i, name in enumerate(names):
            own = [j for j, pair in enumerate(pairs) if pair[0] == name]
            for j, part in zip(rng.permutation(own).tolist(), PARTS, strict=True):
                parts[j] = part
            original = next(j for j in own if parts[j] == "usual")
            originals[name] = (original, len(pairs) + i)
        parts += [COPY] * len(names)
        batches = []
        for step in range(STEPS[-1]):
            share = step / STEPS[-1]
            odds = {"usual": 1.0, "weight 0": 1.0, "ten times": 10.0}
            odds |= {"first tenth": float(share < 0.1), "last tenth": float(share >= 0.9)}
            weights = np.array([odds.get(part, 0.0) for part in parts])
            chosen = rng.choice(len(parts), BATCH, replace=False, p=weights / weights.sum())
            batches.append(chosen.tolist())
        return cls(parts, originals, batches)

    def exposures(self) -> Tensor:
        """How often each sample had been trained on by each of the traced steps, int64 [M, N]: what
        the library has to find."""
        counts = torch.zeros(len(self.batches), len(self.parts), dtype=torch.long)
        for step, batch in enumerate(self.batches):
            counts[step, [i for i in batch if self.parts[i] != "weight 0"]] = 1
        return counts.cumsum(0)[[step - 1 for step in STEPS]]


class Shown(Dataset[dict[str, Any]]):
    """The images with their loss weights, and the copies after them."""

    def __init__(self, images: EmojiPairs, design: Design) -> None:
        self.images, self.design = images, design
        self._copied = [original for original, _ in design.originals.values()]

    def __len__(self) -> int:
        return len(self.design.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        is_copy = index >= len(self.images)
        item = self.images[self._copied[index - len(self.images)] if is_copy else index]
        item["weight"] = 0.0 if self.design.parts[index] == "weight 0" else 1.0
        if is_copy:
            item |= {"sample_id": f"copy/{item['sample_id']}", "owner": "another"}
        return item


class Planned(L.LightningDataModule):
    """Training batches as the design has them; all samples are traced."""

    def __init__(self, shown: Shown) -> None:
        super().__init__()
        self.shown = shown

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.shown, batch_sampler=self.shown.design.batches)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.shown, BATCH)


class WeightedDiffusion(EmojiDiffusion):
    """EmojiDiffusion whose batches say how much each sample's loss counts."""

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        predicted, latents, t = self.denoised(batch)
        scale = batch["weight"].to(latents).sqrt().view(-1, 1, 1, 1)
        return clean_image_loss(self.noise_schedule, predicted * scale, latents * scale, t)


def fine_tuned(folder: Path, shown: Shown, seed: int) -> None:
    """Fine-tunes by the design, with the weights of the traced steps and an inline store."""
    if finished(folder, {"seed": seed}) is not None:
        return
    L.seed_everything(seed, verbose=False)
    states = Noised(timesteps=3, start=2 / 3, end=1.0)
    inline = replace(
        methods.inline_trak(damping=1.0, normalisation="none"),
        name=INLINE,
        query=contrast(Residual()),
        query_trajectory=states,
        per_exposure=True,
    )
    tracer = ConceptTracer(
        str(folder / "inline"),
        inline,
        mode="inline",
        every_n_train_steps=STEPS[0],
        dim=4096,
        on_error="raise",
        thumbnails=False,
    )
    module = WeightedDiffusion("lora")
    fitted(module, Planned(shown), STEPS[-1], SaveTrained(folder, STEPS), tracer)
    record(folder, {"arguments": {"seed": seed}})


def counted(folder: Path, design: Design) -> Tensor:
    """How often each sample had been trained on by each checkpoint, as the callback has counted it,
    int64 [M, N].

    Raises:
        ValueError: that is not what the design says.
    """
    found = exposures_at(TraceStore(folder / "inline").checkpoints)
    if found is None or not torch.equal(found, design.exposures()):
        raise ValueError(f"{folder}: the callback has counted other exposures than the design's.")
    return found


def scores_of(
    folder: Path, shown: Shown, asked: Sequence[Question], given: Tensor, rows: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Scores [Q, N] of each row: as they are, and per exposure times the exposures."""
    module = WeightedDiffusion("lora").eval()
    case = Case(
        folder=folder,
        module=module,
        batches=Planned(shown).trace_dataloader(),
        concepts=[question.concept() for question in asked],
        seeds=[0] * len(asked),
        sampler=SAMPLER,
        given=patchify(given),
    )
    inline = Attributor(folder / "inline", module, sampler=SAMPLER)
    exposures = counted(folder, shown.design).double()
    for variant, attributor, query in answers(case, variants(rows), answers_folder(folder)):
        each = torch.stack([r.checkpoint_scores for r in attributor.score(query)], 1).double()
        name = variant.name.removesuffix("_given")
        yield name, ensemble(each)
        yield f"{name}, times exposures", ensemble(each * exposures[:, None], None, exposures > 0)
    found = inline.score(inline.query_given(case.concepts, patchify(given)))
    yield INLINE, torch.stack([result.scores for result in found]).double()


TIED = 1e-5
"""Of the scores' deviation: what rounding makes of equal gradients."""


def aucs(scores: Tensor, asked: Sequence[Question], shown: Shown) -> dict[str, Tensor]:
    """Of each test and question, the share of pairs of the question's object that are ranked
    rightly [Q]; half of one for a tie, also for scores that rounding alone tells apart: an image and
    its copy have the same gradient."""
    design, pairs = shown.design, shown.images.pairs
    found: dict[str, list[Tensor]] = {f"{above} > {below}": [] for above, below in TESTS}
    for row, question in zip(scores, asked, strict=True):
        rounding = TIED * float(row.std())
        own = [i for i, (name, _) in enumerate(pairs) if name == question.object]
        places: dict[str, list[int]] = {}
        for i in own:
            places.setdefault(design.parts[i], []).append(i)
        original, copy = design.originals[question.object]
        places |= {"its original": [original], COPY: [copy]}
        for above, below in TESTS:
            less = row[places[above], None] - row[None, places[below]]
            right = (less > rounding) + 0.5 * (less.abs() <= rounding)
            found[f"{above} > {below}"].append(right.mean())
    return {name: torch.stack(values) for name, values in found.items()}


def table(found: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """A line per row, of the AUC of every test [T, Q], and their mean, whose interval is over
    questions and fine-tunes, crossed."""
    tests = [f"{above} > {below}" for above, below in TESTS]
    cells = []
    for name, each in found.items():
        mean = torch.stack([each[test] for test in tests]).mean(0)  # [T, Q]
        low, high = crossed_objects(mean)
        shown = f"{float(mean.mean()):.2f} [{low:.2f}, {high:.2f}]"
        cells.append([name, shown, *(f"{float(each[test].mean()):.2f}" for test in tests)])
    return grid(["method", "mean", *tests], cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.interventions", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the designs")
    parser.add_argument("--methods", nargs="+", default=ROWS, help="rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/interventions"))
    args = parser.parse_args(argv)
    data = EmojiArtists("new")
    asked = object_questions(data)
    given = data.held_out_set.images
    found: dict[str, dict[str, list[Tensor]]] = {}
    for seed in args.seeds:
        shown = Shown(data.train_set, Design.drawn(data.train_set.pairs, seed))
        folder = args.runs / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        fine_tuned(folder, shown, seed)
        rows = dict(scores_of(folder, shown, asked, given, args.methods))
        copied = [original for original, _ in shown.design.originals.values()]
        plain = baselines(asked, (given + 1) / 2, data)
        plain = {name: torch.cat([each, each[:, copied]], 1) for name, each in plain.items()}
        # What a count of exposures is worth by itself, without a gradient.
        counts = counted(folder, shown.design)[-1]
        rows |= plain | {f"{name}, times exposures": plain[name] * counts for name in COUNTED}
        for name, scores in rows.items():
            for test, values in aucs(scores, asked, shown).items():
                found.setdefault(name, {}).setdefault(test, []).append(values)
    stacked = {
        name: {test: torch.stack(values) for test, values in each.items()}
        for name, each in found.items()
    }
    lines = [
        f"`{command_of(parser, args)}`; {machine()}; {len(args.seeds)} fine-tunes of "
        f"{STEPS[-1]} steps. Mean AUC [95 % over questions and fine-tunes, crossed].",
        "",
        *table(stacked),
    ]
    publish(args.results / "interventions.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
