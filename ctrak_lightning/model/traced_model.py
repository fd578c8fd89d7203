"""The model of a capture: what of it trains, what stays as it is, and the function that both
make."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ctrak_lightning.errors import TrainingChangedError
from ctrak_lightning.gradients import undisturbed
from ctrak_lightning.model.fingerprint import (
    adapter_facts,
    as_stored,
    model_fingerprint,
    schedule_digest,
)
from ctrak_lightning.model.frozen import Frozen, Used, changing_buffers, parts_of
from ctrak_lightning.model.function import (
    TIMESTEPS,
    UnrecordedFunctionWarning,
    fixed_condition,
    function_of,
    outputs_under,
)
from ctrak_lightning.model.weights import Trained, loaded
from ctrak_lightning.store import CheckpointWriter
from ctrak_lightning.tasks import DiffusionTask, Encoded, name_of, task_modules, whole
from ctrak_lightning.utilities.processes import Processes

Weights = Literal["raw", "ema"]


class TracedModel:
    """What a store records of a model, and what must stay the same from one capture to the next."""

    def __init__(
        self,
        owner: nn.Module,
        task: DiffusionTask,
        optimizers: Sequence[Optimizer],
        *,
        weights: Weights,
        processes: Processes,
    ) -> None:
        self.trained = Trained(owner, optimizers)
        self._owner, self._task = owner, whole(task)
        self._weights, self._processes = weights, processes
        self._parts: list[str] = []
        self._frozen: Frozen | None = None
        self._latent_shape: Sequence[int] = ()
        self._has_function = False
        self._used = Used()
        self._first: Encoded | None = None
        self._settings: dict[str, str] = {}

    def noticing(self) -> AbstractContextManager[None]:
        """Notices what encoding a batch computes with; once, in the first process."""
        is_due = self._first is None and self._processes.is_first
        return self._used.watching() if is_due else nullcontext()

    def notice(self, encoded: Encoded) -> None:
        """What that batch became, of which one sample is kept until :meth:`observe`."""
        if self._first is None and self._processes.is_first:
            self._first = encoded.rows(0, 1)

    def observe(
        self, latent_shape: Sequence[int], stored: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Looks which parts of the owner the task computes with, and hashes what is frozen of them;
        all processes call it.

        Args:
            latent_shape: of one sample.
            stored: the header's facts of a run that is resumed. What it computes again may be less,
                so its parts are looked at.

        Returns:
            the header's facts of the model.
        """
        self._latent_shape = latent_shape
        facts: dict[str, str] = {}
        problem: str | None = None
        with self._processes.sharing_errors():
            if self._first is not None:
                used, self._first = self._used_parts(self._first), None
                fixed = fixed_condition(self._task)
                if fixed.condition is None:
                    problem = f"{type(fixed.error).__name__}: {fixed.error}"
                self._parts = (_parts_in(stored) if stored else None) or used
                self._frozen = Frozen(self._owner, self._parts, self.trained.names)
                facts = model_fingerprint(
                    self._owner, self.trained.names, self._task.noise_schedule, self._parts
                )
                facts = (as_stored(stored, facts) if stored else facts) | {"weights": self._weights}
                self._settings = self._settings_now()
        self._parts, problem, facts = self._processes.from_first((self._parts, problem, facts))
        self._has_function = problem is None
        if problem is not None:
            warnings.warn(
                f"{name_of(self._task)}.condition({{}}, 1) gives no null condition ({problem}), "
                "under which the network's outputs would be recorded without anything of a "
                "training sample. A question will not notice another network with the same "
                "weights (another adapter scale, say). HINT: let condition() take `{}`: what a "
                "spec does not name is dropped; or define known_attributes(), whose first value "
                "is taken instead.",
                UnrecordedFunctionWarning,
                stacklevel=4,
            )
        return facts

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The ``weights`` and ``buffers`` to store with a checkpoint; all processes call it.

        Raises:
            TrainingChangedError: other parameters train than at the start, or what was frozen has
                changed, or how adapters are applied, or the noise schedule.
        """
        with self._processes.sharing_errors():
            weights = self.trained.now()
            if self._frozen is not None:
                self._frozen.require_unchanged()
                self._require_settings()
        return {"weights": weights, "buffers": changing_buffers(self._owner, self._parts)}

    def _settings_now(self) -> dict[str, str]:
        """What makes another function of the same weights."""
        adapters = adapter_facts(self._owner, self._parts)
        return adapters | {"noise_schedule": schedule_digest(self._task.noise_schedule)}

    def _require_settings(self) -> None:
        now = self._settings_now()
        changed = [
            f"{name}: {self._settings.get(name)}, now {now.get(name)}"
            for name in sorted(now.keys() | self._settings)
            if now.get(name) != self._settings.get(name)
        ]
        if changed:
            raise TrainingChangedError(
                "The same weights make another function than when the traces began "
                f"({'; '.join(changed)}). No "
                "one model could be asked about both. HINT: leave an adapter's scaling and state, "
                "and the noise schedule, as they are during a traced run; unmerge and enable "
                "adapters before the next trace."
            )

    def changed_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The names of the trained parameters that are not, to the bit, these ``weights``."""
        now = self.trained.now().items()
        return [name for name, value in now if not torch.equal(weights[name], value.cpu())]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Gives all processes the first one's buffers: each has its own running means after a
        training step."""
        own = changing_buffers(self._owner, self._parts) if self._processes.count > 1 else {}
        first = self._processes.from_first({name: value.cpu() for name, value in own.items()})
        with loaded(self._owner, first):
            yield

    def write_function(self, checkpoint: CheckpointWriter) -> None:
        """Stores what the network answers to a fixed input with its present weights; all processes
        call it."""
        with self._processes.sharing_errors(), undisturbed(self._owner, *task_modules(self._task)):
            if self._has_function and self._processes.is_first:
                function = function_of(self._task, self._latent_shape)
                if function is not None:
                    checkpoint.write_function(function)

    def _used_parts(self, encoded: Encoded) -> list[str]:
        if self._task.denoiser is self._owner:
            return [""]
        with self._used.watching():
            # A network may have parts for some noise levels alone: one condition is enough to see
            # which.
            for each, timesteps in (
                (encoded.condition, TIMESTEPS),
                (fixed_condition(self._task).condition, 1),
            ):
                if each is not None:
                    outputs_under(self._task, self._latent_shape, each, timesteps)
            # What a report shows; a store without thumbnails does not need it.
            with suppress(Exception):
                self._task.decode(encoded.latents)
        return parts_of(self._owner, self._used, self.trained.names)


def _parts_in(stored: Mapping[str, str]) -> list[str] | None:
    try:
        parts = json.loads(stored.get("frozen_parts", "null"))
    except ValueError:  # the store is damaged: its writer says so
        return None
    is_sound = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    return parts if is_sound else None
