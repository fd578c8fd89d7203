"""Fingerprints by which a store recognises its model and its samples."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctrak_lightning.task import Encoded


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


def content_hashes(batch: Any, encoded: Encoded) -> list[str]:
    """One sha256 (hex) per sample over everything the dataset gave for it.

    The batch itself is hashed where its fields can be told apart by row (a mapping or sequence of tensors and strings),
    so that an image is the same image on every machine; otherwise the encoded latents are.
    """
    rows = len(encoded.sample_ids)
    fields = sorted(batch.items()) if isinstance(batch, Mapping) else list(enumerate(_as_fields(batch)))
    hashes = [hashlib.sha256() for _ in range(rows)]
    usable = [(name, value) for name, value in fields if _has_rows(value, rows)]
    if not any(isinstance(value, Tensor) for _, value in usable):
        usable.append(("latents", encoded.latents))
    for name, value in usable:
        for digest, row in zip(hashes, value, strict=True):
            digest.update(f"\0{name}\0".encode())
            digest.update(_bytes(row) if isinstance(row, Tensor) else repr(row).encode())
    return [digest.hexdigest() for digest in hashes]


def _as_fields(batch: Any) -> Iterable[Any]:
    return batch if isinstance(batch, (list, tuple)) else [batch]


def _has_rows(value: Any, rows: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == rows
    return (
        isinstance(value, (list, tuple))
        and len(value) == rows
        and all(isinstance(v, (str, int)) for v in value)
    )


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
