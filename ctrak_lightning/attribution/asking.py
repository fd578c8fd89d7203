"""The model's side of an attribution: images are generated, and questions become gradients."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.lent_model import LentModel
from ctrak_lightning.attribution.parts import concatenated
from ctrak_lightning.attribution.query import Query, spec_key, weights_of
from ctrak_lightning.capture.trace import FeatureParts, QueryTrace, trace_query, warn_if_faint
from ctrak_lightning.errors import (
    CorruptStoreError,
    GradientError,
    StoreMismatchError,
    UnknownMethodError,
)
from ctrak_lightning.gradients import GradientTracer, Projection
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.objectives import Side
from ctrak_lightning.methods.trajectories import (
    Generated,
    Generation,
    Sampler,
    State,
    Trajectory,
    inverted,
    seeded_noise,
)
from ctrak_lightning.model.fingerprint import as_stored, model_fingerprint
from ctrak_lightning.model.function import refuse_another_function
from ctrak_lightning.schedules import Schedule
from ctrak_lightning.store import TraceStore
from ctrak_lightning.store.schema import differences
from ctrak_lightning.tasks import Condition, DiffusionTask, Spec
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.rng import isolated_rng

Built = TypeVar("Built")


def described(store: TraceStore, what: str, build: Callable[[], Built]) -> Built:
    """What a store's manifest describes, built.

    Raises:
        UnknownMethodError: it has a class of the user's own that is not imported.
        CorruptStoreError: it describes nothing that is known here.
    """
    try:
        return build()
    except UnknownMethodError as error:
        raise UnknownMethodError(f"{store.path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptStoreError(
            f"{store.path}: its manifest describes no {what} that is known here ({error}). HINT: a "
            "store of a newer version wants that version of ctrak-lightning; an altered one, its "
            "backup."
        ) from error


def latent_shape(store: TraceStore) -> list[int]:
    """The shape of one sample's latents.

    Raises:
        CorruptStoreError: the manifest does not tell.
    """
    return described(
        store, "shape of latents", lambda: [int(n) for n in store.header.dataset["latent_shape"]]
    )


class Asker:
    """Asks the model, under the weights of a store's checkpoints; afterwards its weights and flags
    are what they were.

    Args:
        store: the traces.
        owner: the module whose parameters a checkpoint names.
        task: its DiffusionTask.
        sampler: how images are generated.
        batch_size: queries per forward pass; fewer where memory is short.
        progress: show a progress bar.
    """

    def __init__(
        self,
        store: TraceStore,
        owner: nn.Module,
        task: DiffusionTask,
        *,
        sampler: Sampler,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.store = store
        self.task = task
        self.sampler = sampler
        self.progress = progress
        self.model = LentModel(owner, store.checkpoints, task)
        self._row_limit = RowLimit(batch_size)
        self._tracer: GradientTracer | None = None
        self._compared: set[int] = set()

    def generate(self, specs: Sequence[Spec], seeds: Sequence[int]) -> Generation:
        """Generates one image per (spec, seed) with the last checkpoint's weights; the same seed
        gives the same noise.

        Equal (spec, seed) are generated once.
        """
        keys = [(spec_key(spec), seed) for spec, seed in zip(specs, seeds, strict=True)]
        unique = {key: i for i, key in reversed(list(enumerate(keys)))}
        if len(unique) < len(keys):
            first = sorted(unique.values())
            made = self.generate([specs[i] for i in first], [seeds[i] for i in first])
            where = {i: position for position, i in enumerate(first)}
            rows = torch.tensor([where[unique[key]] for key in keys])
            return made.rows(rows)
        shape = latent_shape(self.store)
        noise = torch.stack([seeded_noise(shape, seed, 0, "generation") for seed in seeds]).to(
            self.like
        )
        return self._sampled(self.sampler, self.sampler.run, "generate", specs, noise)

    def invert(self, specs: Sequence[Spec], latents: Tensor, guidance: float) -> Generation:
        """The states through which the sampler would have made images [B, ...], with the last
        checkpoint's weights.

        Raises:
            InversionError: the schedule cannot be inverted.
        """
        # Several questions about one image are the rule.
        keys = [
            (spec_key(spec), row.float().cpu().numpy().tobytes())
            for spec, row in zip(specs, latents, strict=True)
        ]
        first = [keys.index(key) for key in dict.fromkeys(keys)]
        rows = torch.tensor([first.index(keys.index(key)) for key in keys])
        sampler = replace(self.sampler, guidance=guidance)
        return self._sampled(
            sampler, partial(inverted, sampler), "invert", [specs[i] for i in first], latents[first]
        ).rows(rows)

    def _sampled(
        self,
        sampler: Sampler,
        run: Callable[..., Generation],
        name: str,
        specs: Sequence[Spec],
        start_from: Tensor,
    ) -> Generation:
        bar = tqdm(total=len(specs), desc=name, disable=not self.progress)

        def sampled(start: int, stop: int) -> Generation:
            condition = self._condition(specs[start:stop])
            null = None if sampler.guidance == 1.0 else self.task.condition({}, stop - start)
            made = run(self.task, start_from[start:stop], condition, null)
            bar.update(stop - start)
            return made

        with self.model.borrowed(), torch.no_grad(), bar:
            self._take_on(len(self.store.checkpoints) - 1)
            parts = self._row_limit.run(len(specs), sampled)
        states = [_joined([part.states[i] for part in parts]) for i in range(len(parts[0].states))]
        return Generation(states, torch.cat([part.latents for part in parts]))

    @property
    def like(self) -> Tensor:
        """A tensor of the denoiser's device and dtype."""
        parameter: Tensor = next(self.task.denoiser.parameters())
        return parameter.detach()

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1], or None where the task decodes none."""
        with self.model.evaluating(), torch.no_grad():
            images = self.task.decode(latents)
        return None if images is None else images.detach().float().cpu().clamp(0, 1)

    def gradients(
        self,
        concepts: Sequence[Concept],
        seeds: list[int],
        generation: Generation,
        method: Method,
        *,
        parts: bool = False,
    ) -> Query:
        """The gradients of questions about the images of a ``generation``, one each, under the
        weights of every checkpoint.

        Raises:
            GradientError: a gradient is zero or not finite.
        """
        with self.model.borrowed(), isolated_rng(0):
            features, strength = [], torch.zeros(len(concepts))
            split: list[FeatureParts] = []
            for index in tqdm(
                range(len(self.store.checkpoints)), desc="attribute", disable=not self.progress
            ):
                traces = self._query_traces(index, concepts, generation, method, parts)
                rows = torch.cat([trace.features for trace in traces])
                self._refuse_unusable(rows, concepts)
                features.append(rows)
                strength += torch.cat([trace.strength for trace in traces]) / len(
                    self.store.checkpoints
                )
                if parts:
                    split.append(
                        concatenated([trace.parts for trace in traces if trace.parts is not None])
                    )
        warn_if_faint(strength, [concept.name for concept in concepts])
        return Query(
            concepts=list(concepts),
            seeds=seeds,
            features=torch.stack(features),
            strength=strength,
            images=self.decode(generation.latents),
            parts=[[at_one.query(i) for at_one in split] for i in range(len(concepts))]
            if parts
            else None,
        )

    def _query_traces(
        self,
        index: int,
        concepts: Sequence[Concept],
        generation: Generation,
        method: Method,
        with_parts: bool,
    ) -> list[QueryTrace]:
        self._take_on(index)
        tracer = self.tracer()

        def traced(start: int, stop: int) -> QueryTrace:
            rows, part = torch.arange(start, stop), concepts[start:stop]
            with torch.no_grad():
                conditions: dict[Side, Condition] = {
                    "present": self._condition([concept.present for concept in part]),
                    "absent": self._condition([concept.absent for concept in part]),
                }
            x0 = generation.latents[rows]
            states = self._states(
                method.query_trajectory, generation, rows, x0, conditions["present"]
            )
            weights = weights_of(self.task, part, x0)
            return trace_query(
                self.task, tracer, method, states, x0, conditions, weights=weights, parts=with_parts
            )

        return self._row_limit.run(len(concepts), traced)

    def _take_on(self, index: int) -> None:
        """Gives the model the weights of a checkpoint, and at the first time looks whether it is
        then the one that was traced."""
        self.model.load(index)
        if index in self._compared:
            return
        checkpoint = self.store.checkpoints[index]
        stored = checkpoint.function()
        if stored is not None:
            shape = latent_shape(self.store)
            refuse_another_function(stored, self.task, shape, checkpoint.step)
        self._compared.add(index)

    def tracer(self) -> GradientTracer:
        """The store's own, for this model.

        Raises:
            StoreMismatchError: it would trace other layers.
            CorruptStoreError: the manifest describes no projection.
        """
        if self._tracer is None:
            facts = self.store.header.projection
            projection, layers = described(
                self.store,
                "projection",
                lambda: (Projection(**facts["projection"]), facts["layers"]),
            )
            made = partial(GradientTracer, self.task.denoiser, projection, layers=layers)
            # Stores of training steps hold what has a hook and nothing else.
            by_hooks = None if facts.get("parameters_without_hook") else made(engine="hooks")
            self._tracer = by_hooks if by_hooks and by_hooks.leaves_out else made(engine="auto")
            refuse_differences("projection", facts, self._tracer.describe())
        return self._tracer

    def _states(
        self,
        trajectory: Trajectory,
        generation: Generation,
        rows: Tensor,
        x0: Tensor,
        condition: Condition,
    ) -> list[State]:
        if isinstance(trajectory, Generated):
            return trajectory.select(generation.rows(rows), self.task.noise_schedule)
        with torch.no_grad():
            return list(
                trajectory.states(self.task, x0, condition, [f"query-{int(i)}" for i in rows], 0)
            )

    def _condition(self, specs: Sequence[Spec]) -> Condition:
        parts = [self.task.condition(spec, 1) for spec in specs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @staticmethod
    def _refuse_unusable(features: Tensor, concepts: Sequence[Concept]) -> None:
        bad = ~torch.isfinite(features).all(1) | (features == 0).all(1)
        if bad.any():
            names = [concepts[i].name for i in bad.nonzero().flatten().tolist()]
            raise GradientError(
                f"The gradients of these concepts are zero or not finite: {names}. Expected a "
                "model that tells `present` from `absent`. HINT: look at the generated images, "
                "and at the loss of the run."
            )


def _joined(states: Sequence[State]) -> State:
    """The same state of several batches, as one."""
    clean = [state.x0 for state in states if state.x0 is not None]
    return State(
        torch.cat([state.x_t for state in states]),
        torch.cat([state.t for state in states]),
        torch.cat(clean) if clean else None,
    )


def model_facts(
    store: TraceStore, owner: nn.Module, trained: Sequence[str], schedule: Schedule
) -> tuple[dict[str, str], dict[str, str]]:
    """What the store's header says of its model, as far as another one can be compared with it, and
    the same of ``owner``."""
    stored = {name: fact for name, fact in store.header.model.items() if name != "weights"}
    parts = described(
        store,
        "model",
        lambda: json.loads(stored["frozen_parts"]) if "frozen_parts" in stored else None,
    )
    mine = as_stored(stored, model_fingerprint(owner, trained, schedule, parts))
    if "adapters" not in stored:
        mine.pop("adapters", None)  # recorded where there were some, and not by earlier versions
    return stored, mine


def refuse_differences(where: str, stored: Any, mine: Any) -> None:
    """Raises :class:`StoreMismatchError`, naming the fields in which two sets of facts differ."""
    found = differences(stored, mine, where)
    if found:
        listed = "; ".join(
            f"{field}: the store has {a!r}, this model or method has {b!r}" for field, a, b in found
        )
        raise StoreMismatchError(
            f"The store was made with another set-up: {listed}. HINT: build the module as in the "
            "traced run (same base weights, same adapters, same scheduler), or name the store's "
            "own method. Base weights that LoRA was merged into, and unmerged from, have been "
            "rounded: load them as that run did when it began."
        )
