"""Scores of many methods for the same questions about the same fine-tune, at every damping."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ctrak_lightning import Attributor, Concept, Method, Projection, Sampler
from ctrak_lightning.attribution.attributor import Query
from ctrak_lightning.methods.damping import Damping
from ctrak_lightning.methods.trajectories import Generation

from .replay import replay

GENERATED = "generated.safetensors"
DAMPINGS: tuple[Damping, ...] = (None, 100.0, 10.0, 1.0, 0.1, 0.01, "agreement")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    Args:
        name: of the row and of its files.
        method: what is traced and asked; its damping is the honest one, fixed beforehand.
        layers: name patterns of the layers to trace; None traces all that train.
        steps: which of the saved checkpoints.
        projection: of the gradients.
        scope: ask of the generated image, of some of the concept alone, or of given ones.
        counters: names of the case's other counter-conditions to ask against, the queries averaged;
            none asks against the concepts' own.
    """

    name: str
    method: Method
    layers: tuple[str, ...] | None = None
    steps: tuple[int, ...]
    projection: Projection = field(default_factory=lambda: Projection(rank=16, dim=4096))
    scope: Literal["local", "global", "given"] = "local"
    counters: tuple[str, ...] = ()

    @property
    def damping(self) -> str:
        """The honest damping, as :func:`compare` names it."""
        return str(self.method.damping)

    def store_name(self) -> str:
        """The folder name that variants with the same traces share."""
        traced = self.method.training_dict(), self.layers, self.steps, self.projection.to_dict()
        return _digest(*traced)

    def query_name(self) -> str:
        """The file name of the answer; another one when the row comes to mean something else."""
        facts = self.method.to_dict()
        asked = {key: facts[key] for key in ("query", "query_trajectory")}
        digest = _digest(self.store_name(), asked, self.scope, self.counters)
        return f"{self.name}-{digest}.query.safetensors"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A finished fine-tune and what is asked of it.

    Args:
        folder: of the saved weights.
        module: the model.
        batches: the samples to trace, in a fixed order.
        concepts: the questions.
        seeds: of their images, one each.
        sampler: how the images are generated.
        given: the clean latents of real images for the questions, one each, where there are any.
        counters: the same questions against other counter-conditions, by the name of these.
        batch_size: queries per forward pass.
    """

    folder: Path
    module: Any
    batches: Iterable[Any]
    concepts: list[Concept]
    seeds: list[int]
    sampler: Sampler
    given: Tensor | None = None
    counters: Mapping[str, list[Concept]] = field(default_factory=dict)
    batch_size: int = 64


def answers_folder(folder: Path, *facts: Any) -> Path:
    """A folder within that of a run for the answers to one set of questions about one set of
    samples, said by JSON values: finished traces and queries are taken as they are found, so other
    samples, questions or samplers need another folder."""
    return folder / f"answers-{_digest(*facts)}"


def compare(
    case: Case, variants: Sequence[Variant], out: Path
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Scores of every variant, by variant and damping (``"None"``, ``"1.0"``, ...), each [Q, N];
    and the generated images [Q, 3, H, W] in [0, 1]. See :func:`answers`."""
    found: dict[str, dict[str, Tensor]] = {}
    for variant, attributor, query in answers(case, variants, out):
        found[variant.name] = {
            str(damping): torch.stack([r.scores for r in attributor.score(query, damping=damping)])
            for damping in dict.fromkeys((*DAMPINGS, variant.method.damping))
        }
    return found, load_file(out / GENERATED)["images"]


def answers(
    case: Case, variants: Sequence[Variant], out: Path, traces: Path | None = None
) -> Iterator[tuple[Variant, Attributor, Query]]:
    """Every variant's attributor and its query. Other questions about the same run have another
    ``out`` and the same folder of ``traces``; by default they are in ``out``.

    Traces and queries that are finished are read from ``out``, so that a comparison that was cut
    goes on with the same command, and another damping costs no gradient.
    """
    out.mkdir(parents=True, exist_ok=True)
    generation: Generation | None = None
    for variant in tqdm(variants, "methods"):
        store = replay(
            case.folder,
            case.module,
            case.batches,
            variant.method,
            (traces or out / "traces") / variant.store_name(),
            steps=variant.steps,
            layers=None if variant.layers is None else list(variant.layers),
            projection=variant.projection,
        )
        attributor = Attributor(
            store,
            case.module,
            method=variant.method,
            sampler=case.sampler,
            # As the results in this repository were made.
            given="noised",
            batch_size=case.batch_size,
        )
        path = out / variant.query_name()
        asks_generated = variant.scope == "local" and not path.exists()
        # The baselines without gradients look at the images whatever the variants ask about.
        if generation is None and (asks_generated or not (out / GENERATED).exists()):
            generation = attributor.generate([c.present for c in case.concepts], case.seeds)
            images = attributor.decode(generation.latents)
            assert images is not None
            save_file({"images": images.contiguous()}, out / GENERATED)
        if not path.exists():
            wordings = [case.counters[name] for name in variant.counters] or [case.concepts]
            asked = [_asked(case, variant, attributor, each, generation) for each in wordings]
            features = torch.stack([query.features for query in asked]).mean(0)
            strength = torch.stack([query.strength for query in asked]).mean(0)
            save_file({"features": features, "strength": strength}, path)
        found: dict[str, Any] = load_file(path)  # features and strength
        query = Query(concepts=case.concepts, seeds=case.seeds, images=None, **found)
        yield variant, attributor, query


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(list(facts), sort_keys=True).encode()).hexdigest()[:16]


def _asked(
    case: Case,
    variant: Variant,
    attributor: Attributor,
    concepts: list[Concept],
    generation: Generation | None,
) -> Query:
    if variant.scope == "global":
        return attributor.query_global(concepts)
    if variant.scope == "local":
        return attributor.query(concepts, case.seeds, generation=generation)
    if case.given is None:
        raise ValueError(f"compare({variant.name!r}): it asks of given images; the case has none.")
    return attributor.query_given(concepts, case.given)
