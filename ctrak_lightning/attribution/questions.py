"""Questions: what an Attributor may be asked, and the gradients of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.asking import Asker
from ctrak_lightning.attribution.concept import Concept, check_known
from ctrak_lightning.attribution.query import Query, spec_key
from ctrak_lightning.method import Method
from ctrak_lightning.task import Spec
from ctrak_lightning.traces import TraceStore
from ctrak_lightning.trajectory import Generated, Generation, Noised, Sampler


class Questions:
    """The half of an :class:`~ctrak_lightning.Attributor` that asks the model.

    Args:
        store: the traces.
        task: the model's DiffusionTask.
        method: how to ask.
        sampler: how images are generated.
        asker: of this model.
    """

    def __init__(
        self, store: TraceStore, task: Any, *, method: Method, sampler: Sampler, asker: Asker
    ) -> None:
        self.store = store
        self.task = task
        self.method = method
        self.sampler = sampler
        self._asker = asker

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
        return self._asker.gradients(concepts, seeds, generation, self.method, parts=parts)

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
        method, noised = self.method, None
        if isinstance(method.query_trajectory, Generated):
            noised = Noised(timesteps=method.query_trajectory.timesteps or self.sampler.steps)
            method = replace(method, query_trajectory=noised)
        like = next(self.task.denoiser.parameters())
        given = Generation([], latents.to(like))
        asked = self._asker.gradients(concepts, [0] * len(concepts), given, method, parts=parts)
        return replace(asked, trajectories=[noised] * len(concepts))

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
        keys = [spec_key(concept.present) for concept in isolated]
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

    def generate(self, specs: Sequence[Spec], seeds: Sequence[int]) -> Generation:
        """Generates one image per (spec, seed) with the last checkpoint's weights; the same seed gives the same noise.

        Equal (spec, seed) are generated once.
        """
        return self._asker.generate(specs, seeds)

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1], or None where the task has no ``decode``."""
        return self._asker.decode(latents)
