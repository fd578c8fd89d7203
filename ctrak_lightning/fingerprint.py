"""Fingerprints by which a store recognises its model."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctrak_lightning.adapters import adapter_facts
from ctrak_lightning.frozen import Frozen


def model_fingerprint(
    module: nn.Module, trained: Collection[str], schedule: Any, parts: Collection[str] | None
) -> dict[str, str]:
    """Hashes (sha256, hex) of the trained parameters' names and shapes, of what is frozen, and of the schedule; and how adapters are
    applied, where there are any.

    Args:
        module: the model.
        trained: names of the trained parameters.
        schedule: its noise schedule.
        parts: which parts of the module the task computes with (:func:`~ctrak_lightning.frozen.parts_of`), recorded beside the
            hashes; None takes all frozen parameters and no buffers, as stores of schema 4 do.
    """
    own = dict(module.named_parameters())
    shapes = "".join(f"{name}:{tuple(own[name].shape)};" for name in sorted(trained) if name in own)
    facts = {
        "trained_parameters": hashlib.sha256(shapes.encode()).hexdigest(),
        "noise_schedule": hashlib.sha256(repr(sorted(schedule.to_dict().items())).encode()).hexdigest(),
    }
    if parts is None:
        return facts | {"frozen_weights": _all_frozen(own, trained)}
    frozen = Frozen(module, parts, trained).digest
    facts |= {"frozen_weights": frozen, "frozen_parts": json.dumps(sorted(parts))}
    return facts | adapter_facts(module, parts)


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
