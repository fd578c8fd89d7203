"""The user's model under the weights of a store's checkpoints, for a while, and then as it was."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import (
    CorruptStoreError,
    GradientError,
    StoreMismatchError,
    UnknownMethodError,
    listed,
    shorten,
)
from ctrak_lightning.gradients import GradientTracer, Projection, undisturbed
from ctrak_lightning.gradients.kinds.convolution import TRANSPOSES
from ctrak_lightning.gradients.layers import kinds_from_outside
from ctrak_lightning.methods.numerics import Numerics
from ctrak_lightning.model.fingerprint import as_stored, model_fingerprint
from ctrak_lightning.model.function import refuse_another_function
from ctrak_lightning.model.weights import copy_into, restored, tensors_of
from ctrak_lightning.schedules import Schedule
from ctrak_lightning.store import TraceStore
from ctrak_lightning.store.schema import differences, seed_of
from ctrak_lightning.tasks import (
    Condition,
    DiffusionTask,
    Spec,
    condition_of,
    task_modules,
    under_autocast,
    with_wide_latents,
)
from ctrak_lightning.utilities.dtypes import computation_dtype, input_like
from ctrak_lightning.utilities.naming import parameters_of, same_place

Built = TypeVar("Built")


class CheckpointModel:
    """A model that questions are asked of, under the weights of a store's checkpoints.

    Args:
        store: the traces.
        module: whose parameters a checkpoint names.
        task: how it is addressed.
        numerics: how the network is run.
    """

    def __init__(
        self, store: TraceStore, module: nn.Module, task: DiffusionTask, numerics: Numerics
    ) -> None:
        self.store = store
        self.module = module
        self._own_task, self._numerics = task, numerics
        asked = under_autocast(task, numerics.precision)
        self.task = with_wide_latents(asked, computation_dtype(task.denoiser))
        """As the network is asked: its latents are float32 at least."""
        first = store.checkpoints[0]
        self.trained = sorted(first.weights())
        """Names of the parameters that a checkpoint holds."""
        self._stored = {*self.trained, *first.buffers()}
        self._compared: set[int] = set()

    @cached_property
    def latent_shape(self) -> list[int]:
        """Of one sample."""
        return latent_shape(self.store)

    @property
    def like(self) -> Tensor:
        """A tensor of the latents' device and dtype."""
        own = input_like(self.task.denoiser)
        return own.to(torch.promote_types(own.dtype, torch.float32))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts everything that the task computes with into the state in which it is traced, as a
        capture does."""
        modules = task_modules(self.task)
        with undisturbed(self.module, *modules, attention=self._numerics.attention):
            yield

    @contextmanager
    def asked(self) -> Iterator[None]:
        """The model in evaluation mode, with what was traced requiring grad; afterwards its weights
        and flags are what they were."""
        parameters = parameters_of(self.module)
        flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in self.trained)
            with restored(self.module, self._stored), self.evaluating():
                yield
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(flags[name])

    def load(self, index: int) -> None:
        """Gives the model the weights of a checkpoint, and the first time looks whether it is then
        the one that was traced; only inside :meth:`asked`.

        Raises:
            StoreMismatchError: the weights are not those of the first checkpoint, or not of the
                model's shapes, or the model is another function of them.
        """
        own, checkpoint = tensors_of(self.module), self.store.checkpoints[index]
        values = checkpoint.weights() | checkpoint.buffers()
        wrong = sorted(values.keys() ^ self._stored)
        if wrong:
            raise StoreMismatchError(
                f"What was trained at step {checkpoint.step} is not what was at step "
                f"{self.store.checkpoints[0].step}: {listed(wrong)} are in one checkpoint only. "
                "Traces of the two cannot be asked at once. HINT: parameters were frozen or "
                "unfrozen in that run; trace each part of it into a store of its own."
            )
        wrong = [
            name
            for name, value in values.items()
            if name not in own or own[name].shape != value.shape
        ]
        if wrong:
            raise StoreMismatchError(
                f"The weights of step {checkpoint.step} do not fit the model: {listed(wrong)} are "
                "missing in it, or of another shape. HINT: build the module as in the traced run."
            )
        copy_into(self.module, values)
        stored = None if index in self._compared else checkpoint.function()
        if stored is not None:
            refuse_another_function(stored, self._own_task, self.latent_shape, checkpoint.step)
        self._compared.add(index)

    @cached_property
    def tracer(self) -> GradientTracer:
        """The store's own, for this model.

        Raises:
            StoreMismatchError: it would trace other layers, or by other kinds of layers.
            CorruptStoreError: the manifest describes no projection.
        """
        facts = self.store.header.projection
        projection, layers, kinds = described(
            self.store,
            "projection",
            lambda: (Projection(**facts["projection"]), facts["layers"], _kinds(facts)),
        )
        attention = self._numerics.attention
        made = partial(
            GradientTracer, self.task.denoiser, projection, layers=layers, attention=attention
        )
        unused = _unused_kinds(kinds)
        tracer = _traced_as(facts, partial(made, unused_kinds=unused))
        if differences(facts, _described_as(tracer, kinds), "projection"):
            # A store of before these had hooks has them projected as bare parameters, or left out.
            earlier = partial(made, unused_kinds=unused | EARLIER_WITHOUT_HOOK)
            with suppress(GradientError):
                before = _traced_as(facts, earlier)
                if not differences(facts, _described_as(before, kinds), "projection"):
                    return before
        refuse_differences("projection", facts, _described_as(tracer, kinds))
        return tracer

    @cached_property
    def noise_seed(self) -> int:
        """The seed of the noise of the store's traces.

        Raises:
            CorruptStoreError: the manifest describes none.
        """
        return described(self.store, "seed of the noise", lambda: seed_of(self.store.header))

    def condition(self, specs: Sequence[Spec]) -> Condition:
        """Of B specs, a row each."""
        parts = [condition_of(self.task, spec, 1) for spec in specs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, 3, H, W] in [0, 1], or None where the task decodes none."""
        with self.evaluating(), torch.no_grad():
            images = self.task.decode(latents)
        return None if images is None else images.detach().float().cpu().clamp(0, 1)


EARLIER_WITHOUT_HOOK = frozenset(f"{cls.__module__}.{cls.__qualname__}" for cls in TRANSPOSES)
"""Classes of modules that earlier versions traced by a pass per sample, or left out."""


def _traced_as(facts: Mapping[str, Any], made: Callable[..., GradientTracer]) -> GradientTracer:
    """A tracer of the engine that a store's rows are of."""
    # Stores of training steps hold what has a hook and nothing else.
    by_hooks = None if facts.get("parameters_without_hook") else made(engine="hooks")
    return by_hooks if by_hooks and by_hooks.leaves_out else made(engine="auto")


def _kinds(facts: Mapping[str, Any]) -> dict[str, str]:
    """The kinds from outside that made a store's rows, by the places of their modules' classes."""
    kinds = facts.get("kinds", {})
    if not all(isinstance(text, str) for pair in kinds.items() for text in pair):
        raise ValueError(f"kinds={shorten(kinds)}, expected texts")
    return dict(kinds)


def _unused_kinds(recorded: Mapping[str, str]) -> frozenset[str]:
    """Places of the classes whose kinds from outside were not there when a store was made.

    Args:
        recorded: the kinds that made its rows, by the places of the classes.

    Raises:
        StoreMismatchError: one of these is not registered.
    """
    here = kinds_from_outside()
    for place, kind in recorded.items():
        found = [mine for at, mine in here.items() if same_place(at, place)]
        if not any(same_place(mine, kind) for mine in found):
            other = f"{listed(found)} is" if found else "no kind of layer is"
            raise StoreMismatchError(
                f"The store's rows of {shorten(place, 120)} were made by the kind of layer "
                f"{shorten(kind, 120)}, and {other} registered for it here: rows of another kind are "
                "other numbers. HINT: import the module that calls register_layer for that kind "
                "before the store is opened."
            )
    return frozenset(at for at in here if not any(same_place(at, place) for place in recorded))


def _described_as(tracer: GradientTracer, recorded: Mapping[str, str]) -> dict[str, Any]:
    """What a tracer describes; kinds that are the ``recorded`` ones stand where a store has
    them."""
    facts = tracer.describe()
    # No tracer here uses others than the recorded ones, but it may find no layer of one.
    same = len(facts.get("kinds", ())) == len(recorded)
    return facts | ({"kinds": dict(recorded)} if recorded and same else {})


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
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,  # a RecursionError of what is nested deeply
    ) as error:
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
        fields = "; ".join(
            f"{field}: the store has {a!r}, this model or method has {b!r}" for field, a, b in found
        )
        kinds = (
            " Layers of kinds of your own want the register_layer calls of that run."
            if where == "projection"
            else ""
        )
        raise StoreMismatchError(
            f"The store was made with another set-up: {fields}. HINT: build the module as in the "
            "traced run (same base weights, same adapters, same scheduler), or name the store's "
            "own method. Base weights that LoRA was merged into, and unmerged from, have been "
            "rounded: load them as that run did when it began." + kinds
        )
