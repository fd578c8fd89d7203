"""Attributor: asks a trace store which samples taught the model a concept."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from ctrak_lightning.attribution.concept import Concept, check_known
from ctrak_lightning.attribution.lending import LentModel
from ctrak_lightning.attribution.parts import Parts, concatenated, score_parts
from ctrak_lightning.attribution.result import Attribution, Record
from ctrak_lightning.attribution.solve import (
    AGREEMENT_GRID,
    LONE_DAMPING,
    chosen_scores,
)
from ctrak_lightning.attribution.top import Shortlist, top_scores
from ctrak_lightning.errors import GradientError, StoreMismatchError
from ctrak_lightning.fingerprint import model_fingerprint
from ctrak_lightning.gradients import Engine, GradientTracer, Projection, tracing_mode
from ctrak_lightning.memory import RowLimit
from ctrak_lightning.method import Damping, Method
from ctrak_lightning.objective import Side
from ctrak_lightning.processes import processes_of
from ctrak_lightning.provenance.query_log import QueryLog
from ctrak_lightning.rng import isolated_rng
from ctrak_lightning.task import Condition, Spec, resolve_task
from ctrak_lightning.traces import TraceStore
from ctrak_lightning.traces.schema import differences
from ctrak_lightning.tracing import FeatureParts, QueryTrace, trace_query, warn_if_faint
from ctrak_lightning.trajectory import (
    Generated,
    Generation,
    Noised,
    Sampler,
    State,
    Trajectory,
    seeded_noise,
)


@dataclass(frozen=True, kw_only=True)
class Query:
    """What was asked, and its gradients: ``features`` [M, Q, k] per checkpoint, the concept ``strength`` [Q] (see
    :func:`ctrak_lightning.tracing.trace_query`), the ``images`` [Q, 3, H, W] where the task can decode, and the
    ``trajectory`` of the states where it was not the method's own, and the features' ``parts`` at each checkpoint where they
    were asked for."""

    concepts: list[Concept]
    seeds: list[int]
    features: Tensor
    strength: Tensor
    images: Tensor | None
    trajectory: Trajectory | None = None
    parts: list[FeatureParts] | None = None


class Attributor:
    """Scores generated concepts against the traces of a training run.

    Args:
        store: the traces, or the path of their folder.
        module: the model that was traced: a LightningModule that is, or carries as ``task``, a DiffusionTask. Its present
            weights do not matter (each checkpoint's are taken from the store and the present ones put back afterwards), the
            frozen ones must be those of the traced run.
        task: how the module is addressed, if it is no DiffusionTask itself: the :class:`~ctrak_lightning.DiffusersTask` that the
            tracer had, say.
        method: how to ask; by default as the store was made. Its training side must be the store's.
        sampler: how images are generated.
        batch_size: queries per forward pass; fewer where memory is short (:class:`~ctrak_lightning.memory.RowLimit`).
        progress: show a progress bar.
        record: note every question in the store's ledger, where it has one.
        asker: who asks, for the ledger; may be left out.

    Raises:
        TaskError: the module is no DiffusionTask.
        StoreMismatchError: the store is of another model or method; the message names what differs.
    """

    def __init__(
        self,
        store: TraceStore | str | Path,
        module: Any,
        *,
        task: Any = None,
        method: Method | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 32,
        progress: bool = False,
        record: bool = True,
        asker: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Attributor(batch_size={batch_size}): expected at least 1.")
        self.task = resolve_task(module, task)
        self.store = store if isinstance(store, TraceStore) else TraceStore(store)
        self.method = method or Method.from_dict(self.store.header.method)
        self.sampler = sampler or Sampler()
        self._row_limit = RowLimit(batch_size)
        self.progress = progress
        self._log = QueryLog(self.store.path, asker) if record else None
        self._owner: nn.Module = module if isinstance(module, nn.Module) else self.task.denoiser
        self._model = LentModel(self._owner, self.store.checkpoints)
        self._check_method()
        self._check_model()
        self._tracer: GradientTracer | None = None

    def attribute(self, concept: Concept, seed: int = 0, *, parts: bool = False) -> Attribution:
        """Generates the concept's image with ``seed`` and scores every training sample for the concept.

        Args:
            concept: the question.
            seed: of the image.
            parts: also split the scores by timestep and by group of layers (:attr:`Attribution.parts`).

        Raises:
            ConceptError: the model does not know an attribute; the message lists the known ones.
            GradientError: the query's gradient is zero or not finite.
        """
        return self.attribute_many([concept], seed, parts=parts)[0]

    def attribute_many(
        self,
        concepts: Sequence[Concept],
        seeds: int | Sequence[int] = 0,
        *,
        generation: Generation | None = None,
        parts: bool = False,
    ) -> list[Attribution]:
        """The same for several concepts in one pass over the store; :meth:`query`, then :meth:`score`."""
        return self.score(self.query(concepts, seeds, generation=generation, parts=parts))

    def query(
        self,
        concepts: Sequence[Concept],
        seeds: int | Sequence[int] = 0,
        *,
        generation: Generation | None = None,
        parts: bool = False,
    ) -> Query:
        """The queries' own gradients, under the weights of every checkpoint.

        Args:
            concepts: the questions.
            seeds: one for all, or one for each.
            generation: the images, one for each concept, where :meth:`generate` has made them before (with the same
                sampler, for another store of the same run).
            parts: also split the gradients by timestep and by group of layers.
        """
        seeds = [seeds] * len(concepts) if isinstance(seeds, int) else list(seeds)
        if not concepts or len(seeds) != len(concepts):
            raise ValueError(
                f"query({len(concepts)} concepts, {len(seeds)} seeds): expected at least one concept, and one seed for each."
            )
        for concept in concepts:
            check_known(concept, self.task)
        if generation is None:
            generation = self.generate([concept.present for concept in concepts], seeds)
        if len(generation.latents) != len(concepts):
            raise ValueError(
                f"query({len(concepts)} concepts, generation of {len(generation.latents)}): expected one image for each "
                "concept."
            )
        return self._asked(concepts, seeds, generation, self.method, parts)

    def query_given(self, concepts: Sequence[Concept], latents: Tensor, *, parts: bool = False) -> Query:
        """Questions about images that are there, rather than generated: a disputed picture, or one that another model made.

        Such an image has no generation states; where the method would look at those, it is noised instead (with as many
        timesteps).

        Args:
            concepts: the questions.
            latents: clean latents of their images, one each [Q, ...], as ``task.encode`` gives them.
            parts: as in :meth:`query`.

        Raises:
            ConceptError: the model does not know an attribute.
            ValueError: the latents are not one for each concept, in the shape of the traced ones.
        """
        shape = list(self.store.header.dataset["latent_shape"])
        if not concepts or list(latents.shape) != [len(concepts), *shape]:
            raise ValueError(
                f"query_given({len(concepts)} concepts, latents {list(latents.shape)}): expected at least one concept, and "
                f"latents of {shape} for each. HINT: task.encode(batch).latents."
            )
        for concept in concepts:
            check_known(concept, self.task)
        method = self.method
        if isinstance(method.query_trajectory, Generated):
            count = method.query_trajectory.timesteps or self.sampler.steps
            method = replace(method, query_trajectory=Noised(timesteps=count))
        like = next(self.task.denoiser.parameters())
        return self._asked(concepts, [0] * len(concepts), Generation([], latents.to(like)), method, parts)

    def query_global(self, concepts: Sequence[Concept], seed: int = 0, *, images: int = 8) -> Query:
        """The concepts themselves rather than one image of each: the mean gradient over images generated from the concept
        alone, against the null condition. Equal concepts are asked once.

        Args:
            concepts: the questions; see :meth:`Concept.isolated`.
            seed: of the first image; the others follow.
            images: how many images for each concept.
        """
        if images < 1:
            raise ValueError(f"query_global(images={images}): expected at least 1.")
        isolated = [concept.isolated() for concept in concepts]
        keys = [_key(concept.present) for concept in isolated]
        once = dict(zip(keys, isolated, strict=True))
        each = self.query(
            [concept for concept in once.values() for _ in range(images)],
            [seed + i for _ in once for i in range(images)],
        )
        rows = torch.tensor([list(once).index(key) for key in keys])
        shape = (len(self.store.checkpoints), len(once), images, -1)
        return Query(
            concepts=list(concepts),
            seeds=[seed] * len(concepts),
            features=each.features.view(shape).mean(2)[:, rows],
            strength=each.strength.view(-1, images).mean(1)[rows],
            images=None if each.images is None else each.images[::images][rows],
        )

    def score(self, query: Query, damping: Damping | Literal["method"] = "method") -> list[Attribution]:
        """Scores of all training samples for every question of a query.

        Args:
            query: from :meth:`query` or :meth:`query_global`.
            damping: another one than the method's; None leaves the kernel out.
        """
        used = self.method if damping == "method" else replace(self.method, damping=damping)
        if query.trajectory is not None:
            used = replace(used, query_trajectory=query.trajectory)
        scores, dampings = chosen_scores(
            query.features, self.store.checkpoints, self._grid(used.damping), residual=used.residual
        )
        weights = self._learning_rates() if used.ensemble == "learning_rate" else None
        results = [
            Attribution(
                concept=concept,
                seed=query.seeds[i],
                checkpoint_scores=scores[:, i].clone(),
                steps=[checkpoint.step for checkpoint in self.store.checkpoints],
                samples=self.store.samples,
                method=used.to_dict(),
                strength=float(query.strength[i]),
                image=None if query.images is None else query.images[i],
                damping=dampings[i],
                weights=weights,
                parts=self._parts(query, i, scores[:, i], dampings[i], used, weights),
                store=self.store,
            )
            for i, concept in enumerate(query.concepts)
        ]
        answers = ((result.samples.sample_ids, result.scores.tolist()) for result in results)
        self._note(query, used, dampings, answers, "all")
        return results

    def top(
        self,
        query: Query,
        n: int = 10,
        *,
        damping: Damping | Literal["method"] = "method",
        shortlist: Shortlist | None = None,
        fabric: Fabric | None = None,
    ) -> list[list[Record]]:
        """The ``n`` samples that taught each concept most, as :meth:`score` and :meth:`Attribution.top` give them, but without
        holding the scores of all samples; for stores that are larger than memory.

        Args:
            query: from :meth:`query` or :meth:`query_global`.
            n: how many samples for each question.
            damping: another one than the method's; None leaves the kernel out.
            shortlist: look at a part of each row first, which may miss a sample and was slower wherever it was measured
                (``recipes/benchmarks/results/scale.md``).
            fabric: whose processes search together, each its share of the store's files. All of them call this (and
                :meth:`query` before), and all get the result.

        Returns:
            For each question, its samples, best first (ties by position in the data set).

        Raises:
            ValueError: ``n`` is below 1, or a shortlist is asked of a store with fewer samples than features.
            CorruptStoreError: the store is damaged.
        """
        processes = processes_of(1 if fabric is None else fabric.world_size)
        found = top_scores(
            query.features,
            self.store.checkpoints,
            n,
            self._grid(self.method.damping if damping == "method" else damping),
            weights=self._learning_rates() if self.method.ensemble == "learning_rate" else None,
            residual=self.method.residual,
            shortlist=shortlist,
            processes=processes,
        )
        # Of a large store the table of all samples takes more memory than the search.
        samples = self.store.samples_of(found.positions)
        _, where = torch.unique(found.positions, return_inverse=True)
        results = [
            [
                Record(samples.sample_ids[i], score, rank, samples.metadata_of(i))
                for rank, (i, score) in enumerate(zip(rows, scores, strict=True), start=1)
            ]
            for rows, scores in zip(where.tolist(), found.scores.tolist(), strict=True)
        ]
        if processes.is_first:
            answers = [([one.sample_id for one in rows], [one.score for one in rows]) for rows in results]
            used = self.method if damping == "method" else replace(self.method, damping=damping)
            self._note(query, used, found.dampings, answers, "top")
        return results

    def _note(
        self,
        query: Query,
        method: Method,
        dampings: Sequence[float | None],
        answers: Iterable[tuple[Sequence[str], Sequence[float]]],
        samples: Literal["all", "top"],
    ) -> None:
        """Puts the questions and the digests of their answers (sample ids and scores) into the store's ledger."""
        if self._log is not None:
            self._log.note(
                [concept.to_dict() for concept in query.concepts],
                query.seeds,
                answers,
                dampings=dampings,
                method=method.to_dict(),
                steps=[checkpoint.step for checkpoint in self.store.checkpoints],
                samples=samples,
            )

    def _grid(self, damping: Damping) -> Sequence[float | None]:
        """The dampings to choose among."""
        if damping == "agreement" and len(self.store.checkpoints) < 2:
            warnings.warn(
                f"damping='agreement' compares checkpoints and the store has one: {LONE_DAMPING} is used. HINT: trace at two "
                "or more steps, or give a damping.",
                UserWarning,
                stacklevel=3,
            )
            damping = LONE_DAMPING
        return AGREEMENT_GRID if isinstance(damping, str) else (damping,)

    def generate(self, specs: Sequence[Spec], seeds: Sequence[int]) -> Generation:
        """Generates one image per (spec, seed) with the last checkpoint's weights; the same seed gives the same noise.

        Equal (spec, seed) are generated once.
        """
        keys = [(_key(spec), seed) for spec, seed in zip(specs, seeds, strict=True)]
        unique = {key: i for i, key in reversed(list(enumerate(keys)))}
        if len(unique) < len(keys):
            first = sorted(unique.values())
            made = self.generate([specs[i] for i in first], [seeds[i] for i in first])
            where = {i: position for position, i in enumerate(first)}
            rows = torch.tensor([where[unique[key]] for key in keys])
            return made.rows(rows)
        shape = self.store.header.dataset["latent_shape"]
        like = next(self.task.denoiser.parameters())
        noise = torch.stack([seeded_noise(shape, seed, 0, "generation") for seed in seeds]).to(like)
        bar = tqdm(total=len(specs), desc="generate", disable=not self.progress)

        def generated(start: int, stop: int) -> Generation:
            condition = self._condition(specs[start:stop])
            null = None if self.sampler.guidance == 1.0 else self.task.condition({}, stop - start)
            made = self.sampler.run(self.task, noise[start:stop], condition, null)
            bar.update(stop - start)
            return made

        with self._model.borrowed(), tracing_mode(self._owner), torch.no_grad(), bar:
            self._model.load(-1)
            parts = self._row_limit.run(len(specs), generated)
        states = [_joined([part.states[i] for part in parts]) for i in range(len(parts[0].states))]
        return Generation(states, torch.cat([part.latents for part in parts]))

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1], or None where the task has no ``decode``."""
        if not hasattr(self.task, "decode"):
            return None
        with torch.no_grad():
            images: Tensor = self.task.decode(latents)
        return images.detach().float().cpu().clamp(0, 1)

    def _asked(
        self,
        concepts: Sequence[Concept],
        seeds: list[int],
        generation: Generation,
        method: Method,
        with_parts: bool,
    ) -> Query:
        with self._model.borrowed(), isolated_rng(0):
            features, strength = [], torch.zeros(len(concepts))
            parts: list[FeatureParts] = []
            for index in tqdm(
                range(len(self.store.checkpoints)), desc="attribute", disable=not self.progress
            ):
                traces = self._query_traces(index, concepts, generation, method, with_parts)
                rows = torch.cat([trace.features for trace in traces])
                self._refuse_unusable(rows, concepts)
                features.append(rows)
                strength += torch.cat([trace.strength for trace in traces]) / len(self.store.checkpoints)
                if with_parts:
                    parts.append(concatenated([trace.parts for trace in traces if trace.parts is not None]))
        warn_if_faint(strength, [concept.name for concept in concepts])
        return Query(
            concepts=list(concepts),
            seeds=seeds,
            features=torch.stack(features),
            strength=strength,
            images=self.decode(generation.latents),
            trajectory=None if method is self.method else method.query_trajectory,
            parts=parts or None,
        )

    def _query_traces(
        self,
        index: int,
        concepts: Sequence[Concept],
        generation: Generation,
        method: Method,
        with_parts: bool,
    ) -> list[QueryTrace]:
        self._model.load(index)
        tracer = self._gradient_tracer()

        def traced(start: int, stop: int) -> QueryTrace:
            rows, part = torch.arange(start, stop), concepts[start:stop]
            with torch.no_grad():
                conditions: dict[Side, Condition] = {
                    "present": self._condition([concept.present for concept in part]),
                    "absent": self._condition([concept.absent for concept in part]),
                }
            x0 = generation.latents[rows]
            states = self._states(method.query_trajectory, generation, rows, x0, conditions["present"])
            return trace_query(self.task, tracer, method, states, x0, conditions, parts=with_parts)

        return self._row_limit.run(len(concepts), traced)

    def _parts(
        self,
        query: Query,
        i: int,
        scores: Tensor,
        damping: float | None,
        method: Method,
        weights: Sequence[float] | None,
    ) -> Parts | None:
        if query.parts is None:
            return None
        features = [parts.query(i) for parts in query.parts]
        checkpoints = self.store.checkpoints
        return score_parts(features, checkpoints, scores, damping, residual=method.residual, weights=weights)

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
        with tracing_mode(self._owner), torch.no_grad():
            return list(trajectory.states(self.task, x0, condition, [f"query-{int(i)}" for i in rows], 0))

    def _learning_rates(self) -> list[float]:
        rates = [checkpoint.learning_rate for checkpoint in self.store.checkpoints]
        missing = [c.step for c, rate in zip(self.store.checkpoints, rates, strict=True) if rate is None]
        if missing:
            raise StoreMismatchError(
                f"Method({self.method.name!r}, ensemble='learning_rate'): the store has no learning rate for steps {missing}. "
                "HINT: Capture.run(..., learning_rate=...), or ensemble='standardised'."
            )
        return [float(rate) for rate in rates if rate is not None]

    def _condition(self, specs: Sequence[Spec]) -> Condition:
        parts = [self.task.condition(spec, 1) for spec in specs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _gradient_tracer(self) -> GradientTracer:
        if self._tracer is None:
            facts = self.store.header.projection
            projection = Projection(**facts["projection"])
            # Stores of training steps hold what has a hook and nothing else.
            engine: Engine = "auto" if facts.get("parameters_without_hook") else "hooks"
            self._tracer = GradientTracer(
                self.task.denoiser, projection, layers=facts["layers"], engine=engine
            )
            _refuse_differences("projection", facts, self._tracer.describe())
        return self._tracer

    def _check_method(self) -> None:
        mine, stored = self.method.training_dict(), self.store.header.method["training"]
        _refuse_differences("method.training", stored, mine)

    def _check_model(self) -> None:
        mine = model_fingerprint(self._owner, self._model.trained, self.task.noise_schedule)
        _refuse_differences("model", self.store.header.model, mine)

    @staticmethod
    def _refuse_unusable(features: Tensor, concepts: Sequence[Concept]) -> None:
        bad = ~torch.isfinite(features).all(1) | (features == 0).all(1)
        if bad.any():
            names = [concepts[i].name for i in bad.nonzero().flatten().tolist()]
            raise GradientError(
                f"The gradients of these concepts are zero or not finite: {names}. Expected a model that tells `present` "
                "from `absent`. HINT: look at the generated images, and at the loss of the run."
            )


def _key(spec: Spec) -> str:
    """Equal for equal conditions, whatever the order of their attributes."""
    return repr(sorted(spec.items()) if isinstance(spec, Mapping) else spec)


def _joined(states: Sequence[State]) -> State:
    """The same state of several batches, as one."""
    clean = [state.x0 for state in states if state.x0 is not None]
    return State(
        torch.cat([state.x_t for state in states]),
        torch.cat([state.t for state in states]),
        torch.cat(clean) if clean else None,
    )


def _refuse_differences(where: str, stored: Any, mine: Any) -> None:
    found = differences(stored, mine, where)
    if found:
        listed = "; ".join(
            f"{field}: the store has {a!r}, this model or method has {b!r}" for field, a, b in found
        )
        raise StoreMismatchError(
            f"The store was made with another set-up: {listed}. HINT: build the module as in the traced run (same base "
            "weights, same adapters, same scheduler), or name the store's own method."
        )
