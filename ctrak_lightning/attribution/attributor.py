"""Attributor: asks a trace store which samples taught the model a concept."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from ctrak_lightning.attribution.attributions import Attributions, cosines_of, warn_of_alike
from ctrak_lightning.attribution.checkpoint_model import (
    CheckpointModel,
    described,
    model_facts,
    refuse_differences,
)
from ctrak_lightning.attribution.concept import Concept, check_known
from ctrak_lightning.attribution.generation import Generator
from ctrak_lightning.attribution.parts import score_parts
from ctrak_lightning.attribution.queries import Given, Query, QueryGradients, assembled
from ctrak_lightning.attribution.result import Attribution, Record
from ctrak_lightning.attribution.scoring import Factors, chosen_scores, exposures_at, factors_of
from ctrak_lightning.attribution.search import top_scores
from ctrak_lightning.capture.exposures import UnknownExposuresWarning
from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.gradients import Attention
from ctrak_lightning.methods.damping import Damping, rule_of
from ctrak_lightning.methods.ensembles import ensemble_of, weights_of
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.numerics import Numerics, numerics_of
from ctrak_lightning.methods.presets import by_name
from ctrak_lightning.methods.trajectories import Generation, Sampler
from ctrak_lightning.provenance.recording import QueryLog
from ctrak_lightning.store import TraceStore
from ctrak_lightning.store.schema import differences
from ctrak_lightning.tasks import (
    DiffusersTask,
    DiffusionTask,
    Precision,
    Spec,
    in_own_precision,
    resolve_task,
    task_modules,
)
from ctrak_lightning.utilities.dtypes import device_of
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.processes import processes_of


class Attributor:
    """Scores generated concepts against the traces of a training run.

    Args:
        store: the traces, or the path of their folder.
        module: the model that was traced: a LightningModule that is, or carries as ``task``, a
            DiffusionTask. Its present weights do not matter (each checkpoint's are taken from the
            store and the present ones put back afterwards), the frozen ones must be those of the
            traced run.
        task: how the module is addressed, if it is no DiffusionTask itself: the
            :class:`~ctrak_lightning.DiffusersTask` that the tracer had, say.
        method: how to ask, or the name of a preset; by default as the store was made. Its training
            side must be the store's.
        sampler: how images are generated.
        given: where the method looks at the states of a generation, which states of an existing
            image it gets: ``"inverted"``, those through which the sampler would have made it
            (:func:`ctrak_lightning.methods.trajectories.inverted`), or ``"noised"``.
        device: where questions are computed, and where the model then stays; by default where it
            is, or, if that is the CPU and there is a GPU, on the GPU: after ``Trainer.fit`` a
            module is on the CPU again.
        precision: in which the network is run, ``"true"``, ``"bf16-mixed"`` or ``"16-mixed"``; by
            default as the traces were made.
        attention: ``"fused"`` or ``"math"``, as of :func:`ctrak_lightning.gradients.tracing_mode`;
            by default as the traces were made.
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
        method: Method | str | None = None,
        sampler: Sampler | None = None,
        given: Given = "inverted",
        device: torch.device | str | None = None,
        precision: Precision | None = None,
        attention: Attention | None = None,
        batch_size: int = 32,
        progress: bool = False,
        record: bool = True,
        asker: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Attributor(batch_size={batch_size}): expected at least 1.")
        if given not in get_args(Given):
            raise ValueError(f"Attributor(given={given!r}): expected one of {get_args(Given)}.")
        self.task = in_own_precision(resolve_task(module, task))
        self.store = store if isinstance(store, TraceStore) else TraceStore(store)
        stored_method = described(
            self.store, "method", lambda: Method.from_dict(self.store.header.method)
        )
        self.method = by_name(method) if isinstance(method, str) else method or stored_method
        self.sampler = sampler or Sampler()
        owner: nn.Module = module if isinstance(module, nn.Module) else self.task.denoiser
        _move(owner, self.task, device)
        stored = described(self.store, "numerics", lambda: numerics_of(self.store.header))
        numerics = Numerics(attention or stored.attention, precision or stored.precision)
        model = CheckpointModel(self.store, owner, self.task, numerics)
        row_limit = RowLimit(batch_size)
        self._model = model
        self._generator = Generator(model, self.sampler, row_limit, progress)
        self._gradients = QueryGradients(
            model, self.method, self._generator, given, row_limit, progress
        )
        self._log = QueryLog(self.store.path, self.store.edition, asker) if record else None
        if stored_method.training_dict() != self.method.training_dict():
            found = differences(
                *(stored_method.training_dict(), self.method.training_dict(), "method.training")
            )
            raise StoreMismatchError(
                f"Attributor(method={self.method.name!r}): the store was traced by "
                f"{stored_method.name!r}, whose training side is another one ({found[0][0]}: the "
                f"store has {found[0][1]!r}, this method {found[0][2]!r}). Traces of one cannot be "
                "asked by the other. HINT: leave `method` out to ask as the store was made, or "
                f"trace again with method={self.method.name!r} into another folder."
            )
        schedule = self.task.noise_schedule
        refuse_differences("model", *model_facts(self.store, owner, model.trained, schedule))

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

    def query(
        self,
        concepts: Sequence[Concept],
        seeds: int | Sequence[int] = 0,
        *,
        generation: Generation | None = None,
        images: int = 8,
        parts: bool = False,
    ) -> Query:
        """The questions' own gradients, under the weights of every checkpoint; each as its
        :attr:`Concept.image` says.

        Args:
            concepts: the questions.
            seeds: of their images, one for all or one for each; of a global query, of its first
                image, the others follow. An existing image needs none.
            generation: the images, one for each concept, where :meth:`generate` has made them
                before (with the same sampler, for another store of the same run).
            images: how many images stand for the model's own distribution, in a global query.
            parts: also split the gradients by timestep and by group of layers.

        Raises:
            ConceptError: the model does not know an attribute, or an image or a mask is not of its
                size.
            TaskError: the task lacks a method that an image or a mask needs.
            InversionError: the schedule cannot be inverted for an existing image.
        """
        seeds = [seeds] * len(concepts) if isinstance(seeds, int) else list(seeds)
        if not concepts or len(seeds) != len(concepts):
            raise ValueError(
                f"query({len(concepts)} concepts, {len(seeds)} seeds): expected at least one "
                "concept, and one seed for each."
            )
        if images < 1:
            raise ValueError(f"query(images={images}): expected at least 1.")
        for concept in concepts:
            check_known(concept, self.task)
        kinds = [concept.kind for concept in concepts]
        if generation is not None and (
            set(kinds) != {"generated"} or len(generation.latents) != len(concepts)
        ):
            raise ValueError(
                f"query({len(concepts)} concepts, generation of {len(generation.latents)}): "
                "expected one image for each concept, and no concept with an image of its own or "
                "without any."
            )
        places = {
            kind: [i for i, each in enumerate(kinds) if each == kind]
            for kind in dict.fromkeys(kinds)
        }
        found = []
        for kind, rows in places.items():
            some, own_seeds = [concepts[i] for i in rows], [seeds[i] for i in rows]
            if kind == "given":
                found.append(replace(self._gradients.of_images(some, parts), seeds=own_seeds))
            elif kind == "global":
                found.append(self._gradients.of_distribution(some, own_seeds, images, parts))
            else:
                made = generation or self.generate([concept.present for concept in some], own_seeds)
                found.append(
                    self._gradients.of_generation(some, own_seeds, made, self.method, parts)
                )
        return assembled(found, list(places.values()))

    def query_given(
        self, concepts: Sequence[Concept], latents: Tensor, *, parts: bool = False
    ) -> Query:
        """Questions about images that are there as latents already; ``Concept(..., image=...)``
        takes the image itself.

        Args:
            concepts: the questions.
            latents: clean latents of their images, one each [Q, ...], as ``task.encode`` gives
                them.
            parts: as in :meth:`query`.

        Raises:
            ConceptError: the model does not know an attribute.
            InversionError: the schedule cannot be inverted.
            ValueError: the latents are not one for each concept, in the shape of the traced ones.
        """
        shape = self._model.latent_shape
        if not concepts or list(latents.shape) != [len(concepts), *shape]:
            raise ValueError(
                f"query_given({len(concepts)} concepts, latents {list(latents.shape)}): expected "
                f"at least one concept, and latents of {shape} for each. HINT: "
                "task.encode(batch).latents."
            )
        for concept in concepts:
            check_known(concept, self.task)
        return self._gradients.of_latents(concepts, latents.to(self._model.like), parts)

    def query_global(self, concepts: Sequence[Concept], seed: int = 0, *, images: int = 8) -> Query:
        """The concepts themselves rather than one image of each, whatever their ``image``: the mean
        gradient over images generated from the concept alone, against the null condition. Equal
        concepts are asked once.

        Args:
            concepts: the questions; see :meth:`Concept.isolated`.
            seed: of the first image; the others follow.
            images: how many images for each concept.
        """
        if images < 1:
            raise ValueError(f"query_global(images={images}): expected at least 1.")
        return self._gradients.of_distribution(concepts, [seed] * len(concepts), images, False)

    def score(self, query: Query, damping: Damping | Literal["method"] = "method") -> Attributions:
        """Scores of all training samples for every question of a query.

        Args:
            query: from :meth:`query` or :meth:`query_global`.
            damping: another one than the method's; None leaves the kernel out.
        """
        used, factors = self._used(damping)
        methods = _methods(query, used)
        scores, dampings = chosen_scores(
            query.features, self.store.checkpoints, rule_of(used.damping), factors=factors
        )
        weights = weights_of(ensemble_of(used.ensemble), self.store.checkpoints)
        exposures = exposures_at(self.store.checkpoints)
        results = []
        for i, concept in enumerate(query.concepts):
            parts = None
            if query.parts is not None:
                parts = score_parts(
                    *(query.parts[i], self.store.checkpoints, scores[:, i], dampings[i]),
                    factors=factors,
                    weights=weights,
                )
            found = Attribution(
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
                parts=parts,
                exposures=exposures,
                store=self.store,
            )
            results.append(found)
        answers = ((result.samples.sample_ids, result.scores.tolist()) for result in results)
        self._note(query, methods, dampings, answers, "all")
        return Attributions(results, cosines_of(query.features))

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
        used, factors = self._used(damping)
        processes = processes_of(1 if fabric is None else fabric.world_size)
        found = top_scores(
            query.features,
            self.store.checkpoints,
            n,
            rule_of(used.damping),
            weights=weights_of(ensemble_of(used.ensemble), self.store.checkpoints),
            factors=factors,
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
                for rank, (i, position, score) in enumerate(zip(*one, strict=True), start=1)
            ]
            for one in zip(
                where.tolist(), found.positions.tolist(), found.scores.tolist(), strict=True
            )
        ]
        if processes.is_first:
            answers = [
                ([one.sample_id for one in rows], [one.score for one in rows]) for rows in results
            ]
            self._note(query, _methods(query, used), found.dampings, answers, "top")
        return results

    def generate(self, specs: Sequence[Spec], seeds: Sequence[int]) -> Generation:
        """Generates one image per (spec, seed) with the last checkpoint's weights; the same seed
        gives the same noise.

        Equal (spec, seed) are generated once.
        """
        return self._generator.generate(specs, seeds)

    def invert(
        self, specs: Sequence[Spec], latents: Tensor, *, guidance: float = 1.0
    ) -> Generation:
        """The states through which the sampler would have made images, given as clean latents [B,
        ...] (:func:`ctrak_lightning.methods.trajectories.inverted`), with the last checkpoint's weights.

        Args:
            specs: what the images show.
            latents: of the images.
            guidance: classifier-free guidance scale, instead of the sampler's. Guidance doubles the
                cost and adds up errors (Mokady et al. 2023, arXiv 2211.09794), and ranked no better
                (``recipes/benchmarks/results/inversion.md``).

        Raises:
            InversionError: the schedule cannot be inverted.
        """
        return self._generator.invert(specs, latents, guidance)

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1], or None where the task has no ``decode``."""
        return self._model.decode(latents)

    def _used(self, damping: Damping | Literal["method"]) -> tuple[Method, Factors]:
        """The method as it is used here, and what it multiplies scores by."""
        used = self.method if damping == "method" else replace(self.method, damping=damping)
        found = factors_of(used.residual, used.per_exposure, self.store.checkpoints)
        if used.per_exposure and "exposures" not in found:
            warnings.warn(
                f"{used.name} multiplies a sample's score by how often it was trained on, which this "
                "store does not know of every checkpoint: every sample is taken to have been seen "
                "as often as every other. HINT: let training batches have the samples' ids, by a "
                "field or the task's sample_ids(batch); in a loop of your own, call "
                "Capture.note_step(batch).",
                UnknownExposuresWarning,
                stacklevel=3,
            )
            # What is said of an answer is how it was made.
            used = replace(used, per_exposure=False)
        return used, found

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


def _move(owner: nn.Module, task: DiffusionTask, device: torch.device | str | None) -> None:
    """Moves what a task computes with to a device, and says so."""
    present = device_of(task.denoiser)
    if device is None:
        target = torch.device(
            "cuda" if present.type == "cpu" and torch.cuda.is_available() else present
        )
    else:
        target = torch.device(device)
    if target == present or (target.index is None and target.type == present.type):
        return
    for module in (owner, task.denoiser, *task_modules(task)):
        module.to(target)
    rank_zero_info(
        f"Attributor: the model was moved from {present} to {target}, where questions are computed. "
        f"HINT: Attributor(device={str(present)!r}) leaves it."
    )


def _methods(query: Query, used: Method) -> list[Method]:
    """As each question was asked."""
    trajectories = [query.trajectory(i) for i in range(len(query.concepts))]
    return [
        used if states is None else replace(used, query_trajectory=states)
        for states in trajectories
    ]
