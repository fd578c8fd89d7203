"""Images for questions: generated, or traced back to the states of a generation, with the last
checkpoint's weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ctrak_lightning.attribution.checkpoint_model import CheckpointModel
from ctrak_lightning.methods.trajectories import Generation, Sampler, State, inverted
from ctrak_lightning.tasks import Spec, condition_of
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.rng import seeded_noise


class Generator:
    """Generates and inverts images.

    Args:
        model: of the store that is asked.
        sampler: how images are generated.
        row_limit: of rows per forward pass.
        progress: show a progress bar.
    """

    def __init__(
        self, model: CheckpointModel, sampler: Sampler, row_limit: RowLimit, progress: bool
    ) -> None:
        self.model = model
        self.sampler = sampler
        self._row_limit = row_limit
        self._progress = progress

    def generate(self, specs: Sequence[Spec], seeds: Sequence[int]) -> Generation:
        """One image per (spec, seed), equal ones once; the same seed gives the same noise."""
        keys = [(spec_key(spec), seed) for spec, seed in zip(specs, seeds, strict=True)]
        first, rows = _once(keys)
        noise = [seeded_noise(self.model.latent_shape, seeds[i], 0, "generation") for i in first]
        start_from = torch.stack(noise).to(self.model.like)
        run = self.sampler.run
        made = self._sampled(self.sampler, run, "generate", [specs[i] for i in first], start_from)
        return made.rows(rows)

    def invert(self, specs: Sequence[Spec], latents: Tensor, guidance: float) -> Generation:
        """The states through which the sampler would have made images [B, ...].

        Raises:
            InversionError: the schedule cannot be inverted.
        """
        # Several questions about one image are the rule.
        keys = [
            (spec_key(spec), row.float().cpu().numpy().tobytes())
            for spec, row in zip(specs, latents, strict=True)
        ]
        first, rows = _once(keys)
        sampler = replace(self.sampler, guidance=guidance)
        run = partial(inverted, sampler)
        made = self._sampled(sampler, run, "invert", [specs[i] for i in first], latents[first])
        return made.rows(rows)

    def _sampled(
        self,
        sampler: Sampler,
        run: Callable[..., Generation],
        name: str,
        specs: Sequence[Spec],
        start_from: Tensor,
    ) -> Generation:
        task = self.model.task
        bar = tqdm(total=len(specs), desc=name, disable=not self._progress)

        def sampled(start: int, stop: int) -> Generation:
            condition = self.model.condition(specs[start:stop])
            null = None if sampler.guidance == 1.0 else condition_of(task, {}, stop - start)
            made = run(task, start_from[start:stop], condition, null)
            bar.update(stop - start)
            return made

        with self.model.asked(), torch.no_grad(), bar:
            self.model.load(len(self.model.store.checkpoints) - 1)
            parts = self._row_limit.run(len(specs), sampled)
        states = [_joined([part.states[i] for part in parts]) for i in range(len(parts[0].states))]
        return Generation(states, torch.cat([part.latents for part in parts]))


def spec_key(spec: Spec) -> str:
    """Equal for equal conditions, whatever the order of their attributes."""
    return repr(sorted(spec.items()) if isinstance(spec, Mapping) else spec)


def _once(keys: Sequence[object]) -> tuple[list[int], Tensor]:
    """Where each key is first, and which of these each one is [B]."""
    places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [keys.index(key) for key in places], torch.tensor([places[key] for key in keys])


def _joined(states: Sequence[State]) -> State:
    """The same state of several batches, as one."""
    clean = [state.x0 for state in states if state.x0 is not None]
    return State(
        torch.cat([state.x_t for state in states]),
        torch.cat([state.t for state in states]),
        torch.cat(clean) if clean else None,
    )
