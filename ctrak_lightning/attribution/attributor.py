"""Attributor: asks a trace store which samples taught the model a concept."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ctrak_lightning.attribution.asking import Asker, described, model_facts, refuse_differences
from ctrak_lightning.attribution.attributions import Attributions, cosines_of, warn_of_alike
from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.parts import Parts, score_parts
from ctrak_lightning.attribution.query import Query
from ctrak_lightning.attribution.questions import Given, Questions
from ctrak_lightning.attribution.result import Attribution, Record
from ctrak_lightning.attribution.scoring import chosen_scores, exposures_at
from ctrak_lightning.attribution.search import top_scores
from ctrak_lightning.methods.damping import Damping, rule_of
from ctrak_lightning.methods.ensembles import ensemble_of
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import Generation, Sampler
from ctrak_lightning.provenance.forgetting import QueryLog
from ctrak_lightning.store import TraceStore
from ctrak_lightning.tasks import DiffusersTask, DiffusionTask, in_own_precision, resolve_task
from ctrak_lightning.utilities.processes import processes_of


class Attributor(Questions):
    """Scores generated concepts against the traces of a training run.

    Args:
        store: the traces, or the path of their folder.
        module: the model that was traced: a LightningModule that is, or carries as ``task``, a
            DiffusionTask. Its present weights do not matter (each checkpoint's are taken from the
            store and the present ones put back afterwards), the frozen ones must be those of the
            traced run.
        task: how the module is addressed, if it is no DiffusionTask itself: the
            :class:`~ctrak_lightning.DiffusersTask` that the tracer had, say.
        method: how to ask; by default as the store was made. Its training side must be the store's.
        sampler: how images are generated.
        given: where the method looks at the states of a generation, which states of an existing
            image it gets: ``"inverted"``, those through which the sampler would have made it
            (:func:`ctrak_lightning.methods.trajectories.inverted`), or ``"noised"``.
        batch_size: queries per forward pass; fewer where memory is short
            (:class:`~ctrak_lightning.utilities.memory.RowLimit`).
        progress: show a progress bar.
        record: note every question in the store's ledger, where it has one.
        asker: who asks, for the ledger; may be left out.

    Raises:
        TaskError: the module is no DiffusionTask.
        StoreMismatchError: the store is of another model or method; the message names what differs.
        CorruptStoreError: the manifest describes a method that is not known here.
    """

    def __init__(
        self,
        store: TraceStore | str | Path,
        module: Any,
        *,
        task: DiffusersTask | DiffusionTask | None = None,
        method: Method | None = None,
        sampler: Sampler | None = None,
        given: Given = "inverted",
        batch_size: int = 32,
        progress: bool = False,
        record: bool = True,
        asker: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Attributor(batch_size={batch_size}): expected at least 1.")
        if given not in get_args(Given):
            raise ValueError(f"Attributor(given={given!r}): expected one of {get_args(Given)}.")
        task = in_own_precision(resolve_task(module, task))
        store = store if isinstance(store, TraceStore) else TraceStore(store)
        method = method or described(store, "method", lambda: Method.from_dict(store.header.method))
        sampler = sampler or Sampler()
        owner: nn.Module = module if isinstance(module, nn.Module) else task.denoiser
        questioner = Asker(
            store, owner, task, sampler=sampler, batch_size=batch_size, progress=progress
        )
        super().__init__(store, task, method=method, sampler=sampler, given=given, asker=questioner)
        self._log = QueryLog(store.path, store.edition, asker) if record else None
        refuse_differences(
            "method.training", store.header.method["training"], method.training_dict()
        )
        refuse_differences(
            "model", *model_facts(store, owner, questioner.model.trained, task.noise_schedule)
        )

    def attribute(self, concept: Concept, seed: int = 0, *, parts: bool = False) -> Attribution:
        """Scores every training sample for the concept, in the image that ``seed`` makes of it, in
        an image that exists, or in none (:attr:`Concept.image`).

        Args:
            concept: the question.
            seed: of the image.
            parts: also split the scores by timestep and by group of layers
                (:attr:`Attribution.parts`).

        Raises:
            ConceptError, TaskError, InversionError: as :meth:`query`.
            GradientError: the query's gradient is zero or not finite.
        """
        return self.attribute_many([concept], seed, parts=parts)[0]

    def attribute_many(
        self,
        concepts: Sequence[Concept],
        seeds: int | Sequence[int] = 0,
        *,
        generation: Generation | None = None,
        images: int = 8,
        parts: bool = False,
    ) -> Attributions:
        """The same for several concepts in one pass over the store; :meth:`query`, then
        :meth:`score`.

        Warns:
            CoincidingConceptsWarning: two concepts of one image ask for nearly the same; it names
                them.
        """
        query = self.query(concepts, seeds, generation=generation, images=images, parts=parts)
        results = self.score(query)
        # A method that looks at one condition asks the same of all concepts of an image, as its
        # description says.
        if self.method.sees_absent:
            warn_of_alike(query.concepts, query.seeds, results.cosines)
        return results

    def score(self, query: Query, damping: Damping | Literal["method"] = "method") -> Attributions:
        """Scores of all training samples for every question of a query.

        Args:
            query: from :meth:`query` or :meth:`query_global`.
            damping: another one than the method's; None leaves the kernel out.
        """
        used = self._used(damping)
        methods = _methods(query, used)
        scores, dampings = chosen_scores(
            query.features, self.store.checkpoints, rule_of(used.damping), residual=used.residual
        )
        weights = ensemble_of(used.ensemble).weights(self.store.checkpoints)
        exposures = exposures_at(self.store.checkpoints)
        each = (
            Attribution(
                concept=concept,
                seed=query.seeds[i],
                checkpoint_scores=scores[:, i].clone(),
                steps=[checkpoint.step for checkpoint in self.store.checkpoints],
                samples=self.store.samples,
                method=methods[i].to_dict(),
                strength=float(query.strength[i]),
                image=None if query.images is None else query.images[i],
                damping=dampings[i],
                weights=weights,
                parts=self._parts(query, i, scores[:, i], dampings[i], used, weights),
                exposures=exposures,
                store=self.store,
            )
            for i, concept in enumerate(query.concepts)
        )
        results = Attributions(each, cosines_of(query.features))
        answers = ((result.samples.sample_ids, result.scores.tolist()) for result in results)
        self._note(query, methods, dampings, answers, "all")
        return results

    def top(
        self,
        query: Query,
        n: int = 10,
        *,
        damping: Damping | Literal["method"] = "method",
        fabric: Fabric | None = None,
    ) -> list[list[Record]]:
        """The ``n`` samples that taught each concept most, as :meth:`score` and
        :meth:`Attribution.top` give them, but without holding the scores of all samples; for stores
        that are larger than memory.

        Args:
            query: from :meth:`query` or :meth:`query_global`.
            n: how many samples for each question.
            damping: another one than the method's; None leaves the kernel out.
            fabric: whose processes search together, each its share of the store's files. All of
                them call this (and :meth:`query` before), and all get the result.

        Returns:
            For each question, its samples, best first (ties by position in the data set).

        Raises:
            ValueError: ``n`` is below 1.
            CorruptStoreError: the store is damaged.
        """
        used = self._used(damping)
        processes = processes_of(1 if fabric is None else fabric.world_size)
        found = top_scores(
            query.features,
            self.store.checkpoints,
            n,
            rule_of(used.damping),
            weights=ensemble_of(used.ensemble).weights(self.store.checkpoints),
            residual=used.residual,
            processes=processes,
        )
        # Of a large store the table of all samples takes more memory than the search.
        samples = self.store.samples_of(found.positions)
        exposures = self.store.checkpoints[-1].exposures()
        _, where = torch.unique(found.positions, return_inverse=True)
        results = [
            [
                Record(
                    samples.sample_ids[i],
                    score,
                    rank,
                    samples.metadata_of(i),
                    None if exposures is None else int(exposures[position]),
                )
                for rank, (i, position, score) in enumerate(
                    zip(rows, places, scores, strict=True), start=1
                )
            ]
            for rows, places, scores in zip(
                where.tolist(), found.positions.tolist(), found.scores.tolist(), strict=True
            )
        ]
        if processes.is_first:
            answers = [
                ([one.sample_id for one in rows], [one.score for one in rows]) for rows in results
            ]
            self._note(query, _methods(query, used), found.dampings, answers, "top")
        return results

    def _used(self, damping: Damping | Literal["method"]) -> Method:
        return self.method if damping == "method" else replace(self.method, damping=damping)

    def _note(
        self,
        query: Query,
        methods: Sequence[Method],
        dampings: Sequence[float | None],
        answers: Iterable[tuple[Sequence[str], Sequence[float]]],
        samples: Literal["all", "top"],
    ) -> None:
        """Puts the questions and the digests of their answers (sample ids and scores) into the
        store's ledger."""
        if self._log is not None:
            self._log.note(
                [concept.to_dict() for concept in query.concepts],
                query.seeds,
                answers,
                dampings=dampings,
                methods=[method.to_dict() for method in methods],
                steps=[checkpoint.step for checkpoint in self.store.checkpoints],
                samples=samples,
            )

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
        checkpoints = self.store.checkpoints
        return score_parts(
            query.parts[i], checkpoints, scores, damping, residual=method.residual, weights=weights
        )


def _methods(query: Query, used: Method) -> list[Method]:
    """As each question was asked."""
    trajectories = [query.trajectory(i) for i in range(len(query.concepts))]
    return [
        used if states is None else replace(used, query_trajectory=states)
        for states in trajectories
    ]
