"""Fingerprints by which a store recognises its model."""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_fingerprint(module: nn.Module, trained: Collection[str], schedule: Any) -> dict[str, str]:
    """Three hashes (sha256, hex): of the trained parameters' names and shapes, of the frozen weights, of the schedule."""
    names, frozen = hashlib.sha256(), hashlib.sha256()
    for name, value in sorted(module.named_parameters()):
        label = f"{name}:{tuple(value.shape)};".encode()
        if name in trained:
            names.update(label)
        else:
            frozen.update(label)
            frozen.update(_bytes(value))
    return {
        "trained_parameters": names.hexdigest(),
        "frozen_weights": frozen.hexdigest(),
        "noise_schedule": hashlib.sha256(repr(sorted(schedule.to_dict().items())).encode()).hexdigest(),
    }


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of weights: their names, dtypes, shapes and bytes, whatever their order."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        found.update(_bytes(value))
    return found.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
