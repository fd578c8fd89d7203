"""Questions: what an Attributor may be asked, and the gradients of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ctrak_lightning.attribution.asking import Asker, latent_shape
from ctrak_lightning.attribution.concept import Concept, check_known
from ctrak_lightning.attribution.parts import mean_parts
from ctrak_lightning.attribution.query import Query, assembled, latents_of, spec_key
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import Generated, Generation, Noised, Sampler
from ctrak_lightning.store import TraceStore
from ctrak_lightning.tasks import DiffusionTask, Spec

Given = Literal["inverted", "noised"]


class Questions:
    """The half of an :class:`~ctrak_lightning.Attributor` that asks the model.

    Args:
        store: the traces.
        task: the model's DiffusionTask.
        method: how to ask.
        sampler: how images are generated.
        given: which states of an existing image, where the method looks at those of a generation.
        asker: of this model.
    """

    def __init__(
        self,
        store: TraceStore,
        task: DiffusionTask,
        *,
        method: Method,
        sampler: Sampler,
        given: Given,
        asker: Asker,
    ) -> None:
        self.store = store
        self.task = task
        self.method = method
        self.sampler = sampler
        self.given = given
        self._asker = asker

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
        kinds = [_kind(concept) for concept in concepts]
        if generation is not None and (
            set(kinds) != {"generated"} or len(generation.latents) != len(concepts)
        ):
            raise ValueError(
                f"query({len(concepts)} concepts, generation of {len(generation.latents)}): "
                "expected one image for each concept, and no concept with an image of its own or "
                "without any."
            )
        found: dict[str, Query] = {}
        places = {
            kind: [i for i, each in enumerate(kinds) if each == kind]
            for kind in dict.fromkeys(kinds)
        }
        for kind, rows in places.items():
            some, own_seeds = [concepts[i] for i in rows], [seeds[i] for i in rows]
            if kind == "given":
                latents = torch.cat([self._latents(concept) for concept in some])
                found[kind] = replace(self._of_latents(some, latents, parts), seeds=own_seeds)
            elif kind == "global":
                found[kind] = self._of_distribution(some, own_seeds, images, parts)
            else:
                made = generation or self.generate([concept.present for concept in some], own_seeds)
                found[kind] = self._asker.gradients(some, own_seeds, made, self.method, parts=parts)
        return (
            assembled(list(found.values()), list(places.values()))
            if len(found) > 1
            else found[kinds[0]]
        )

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
        if not concepts or list(latents.shape) != [len(concepts), *self._latent_shape]:
            raise ValueError(
                f"query_given({len(concepts)} concepts, latents {list(latents.shape)}): expected "
                f"at least one concept, and latents of {self._latent_shape} for each. HINT: "
                "task.encode(batch).latents."
            )
        for concept in concepts:
            check_known(concept, self.task)
        return self._of_latents(concepts, latents.to(self._asker.like), parts)

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
        return self._of_distribution(concepts, [seed] * len(concepts), images, False)

    @property
    def _latent_shape(self) -> list[int]:
        return latent_shape(self.store)

    def _latents(self, concept: Concept) -> Tensor:
        with self._asker.model.evaluating():
            return latents_of(self.task, concept, self._latent_shape, self._asker.like)

    def _of_latents(self, concepts: Sequence[Concept], latents: Tensor, parts: bool) -> Query:
        method, given = self.method, Generation([], latents)
        noised = None
        if isinstance(method.query_trajectory, Generated):
            if self.given == "inverted":
                given = self.invert([concept.present for concept in concepts], latents)
            else:
                noised = Noised(timesteps=method.query_trajectory.timesteps or self.sampler.steps)
                method = replace(method, query_trajectory=noised)
        asked = self._asker.gradients(concepts, [0] * len(concepts), given, method, parts=parts)
        return replace(asked, trajectories=[noised] * len(concepts))

    def _of_distribution(
        self, concepts: Sequence[Concept], seeds: Sequence[int], images: int, parts: bool
    ) -> Query:
        isolated = [concept.isolated() for concept in concepts]
        for concept in isolated:
            check_known(concept, self.task)
        keys = [
            (spec_key(concept.present), seed) for concept, seed in zip(isolated, seeds, strict=True)
        ]
        once = dict(zip(keys, isolated, strict=True))
        several = [concept for concept in once.values() for _ in range(images)]
        of_each = [seed + i for _, seed in once for i in range(images)]
        made = self.generate([concept.present for concept in several], of_each)
        each = self._asker.gradients(several, of_each, made, self.method, parts=parts)
        rows = torch.tensor([list(once).index(key) for key in keys])
        shape = (len(self.store.checkpoints), len(once), images, -1)
        split = None
        if each.parts is not None:
            means = [mean_parts(each.parts[i : i + images]) for i in range(0, len(several), images)]
            split = [means[i] for i in rows.tolist()]
        return Query(
            concepts=list(concepts),
            seeds=list(seeds),
            features=each.features.view(shape).mean(2)[:, rows],
            strength=each.strength.view(-1, images).mean(1)[rows],
            images=None if each.images is None else each.images[::images][rows],
            parts=split,
        )

    def generate(self, specs: Sequence[Spec], seeds: Sequence[int]) -> Generation:
        """Generates one image per (spec, seed) with the last checkpoint's weights; the same seed
        gives the same noise.

        Equal (spec, seed) are generated once.
        """
        return self._asker.generate(specs, seeds)

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
        return self._asker.invert(specs, latents, guidance)

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1], or None where the task has no ``decode``."""
        return self._asker.decode(latents)


def _kind(concept: Concept) -> Literal["generated", "given", "global"]:
    if concept.image is None:
        return "global"
    return "given" if isinstance(concept.image, Tensor) else "generated"
