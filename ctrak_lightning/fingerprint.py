"""Fingerprints by which a store recognises its model."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctrak_lightning.adapters import adapter_facts
from ctrak_lightning.frozen import Frozen, is_rounded, warn_of_rounding
from ctrak_lightning.naming import parameters_of


def model_fingerprint(
    module: nn.Module, trained: Collection[str], schedule: Any, parts: Collection[str] | None
) -> dict[str, str]:
    """Hashes (sha256, hex) of the trained parameters' names and shapes, of what is frozen, and of
    the schedule; and how adapters are applied, where there are any.

    Args:
        module: the model.
        trained: names of the trained parameters.
        schedule: its noise schedule.
        parts: which parts of the module the task computes with
            (:func:`~ctrak_lightning.frozen.parts_of`), recorded beside the hashes; None takes all
            frozen parameters and no buffers, as stores of schema 4 do.
    """
    own = parameters_of(module)
    shapes = "".join(f"{name}:{tuple(own[name].shape)};" for name in sorted(trained) if name in own)
    facts = {
        "trained_parameters": hashlib.sha256(shapes.encode()).hexdigest(),
        "noise_schedule": schedule_digest(schedule),
    }
    if parts is None:
        return facts | {"frozen_weights": _all_frozen(own, trained)}
    frozen = Frozen(module, parts, trained)
    facts |= {"frozen_weights": frozen.digest, "frozen_sketch": frozen.sketch}
    return facts | {"frozen_parts": json.dumps(sorted(parts))} | adapter_facts(module, parts)


def schedule_digest(schedule: Any) -> str:
    """Sha256 (hex) of a noise schedule."""
    return hashlib.sha256(repr(sorted(schedule.to_dict().items())).encode()).hexdigest()


def as_stored(stored: Mapping[str, str], mine: Mapping[str, str]) -> dict[str, str]:
    """A model's facts as a store has them, where they differ in nothing but the rounding of frozen
    weights.

    Warns:
        RoundedWeightsWarning: they have been rounded.
    """
    facts, sketch, own = dict(mine), stored.get("frozen_sketch"), mine.get("frozen_sketch")
    if sketch is None or own is None:  # of an earlier version, or of weights that are not frozen
        facts.pop("frozen_sketch", None)
        return facts
    is_same = stored.get("frozen_weights") == mine["frozen_weights"]
    if not is_same and is_rounded(sketch, own):
        is_same = True
        warn_of_rounding(
            f"sha256 {mine['frozen_weights']}, and in the store {stored.get('frozen_weights')}"
        )
    # The last digits of a sketch depend on the processor.
    return facts | (
        {name: stored[name] for name in ("frozen_weights", "frozen_sketch")}
        if is_same
        else {"frozen_sketch": sketch}
    )


def _all_frozen(parameters: Mapping[str, Tensor], trained: Collection[str]) -> str:
    frozen = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        if name not in trained:
            frozen.update(f"{name}:{tuple(value.shape)};".encode())
            frozen.update(_bytes(value))
    return frozen.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of weights: their names, dtypes, shapes and bytes, whatever their order."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        found.update(_bytes(value))
    return found.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
