"""What a data set gave for each sample, as one hash: by it a store notices that a sample is another
one."""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.task import Encoded


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def content_hashes(batch: Any, encoded: Encoded) -> list[str]:
    """One sha256 (hex) per sample over everything the data set gave for it, whatever the batch it
    is in.

    The batch itself is hashed where its fields can be told apart by row: tensors, arrays, images of
    PIL, text, numbers, and lists and mappings of these. So an image is the same image on every
    machine. Where a field cannot, or none of them holds a picture, a latent or the like, the
    encoded latents are hashed as well, and what of the condition is whole numbers (tokens); the
    rest of a condition may come from embeddings that training changes.
    """
    rows = len(encoded.sample_ids)
    hashes = [hashlib.sha256() for _ in range(rows)]
    columns = list(_fields(batch, rows))
    named = [(name, values) for name, values in columns if values is not None]
    if len(named) < len(columns) or not any(
        _is_content(values[0]) for _, values in named if len(values)
    ):
        named.append(("latents", encoded.latents))
        for name, value in sorted(encoded.condition.items()):
            if not value.is_floating_point():
                named.append((f"condition {name}", value))
    for name, values in named:
        for digest, value in zip(hashes, values, strict=True):
            _part(digest, "field", name.encode())
            _feed(digest, value)
    return [digest.hexdigest() for digest in hashes]


def changed_samples(
    sample_ids: Sequence[str], expected: Sequence[str], given: Sequence[str]
) -> list[str]:
    """The samples whose content is not what it was, by their hashes then and now."""
    return [name for name, a, b in zip(sample_ids, expected, given, strict=True) if a != b]


def _fields(batch: Any, rows: int) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        yield from _columns("", batch, rows)
    elif isinstance(batch, (list, tuple)) and len(batch) == rows and isinstance(batch[0], Mapping):
        yield "0", list(batch)  # as a `collate_fn` leaves them that does nothing
    else:
        each = batch if isinstance(batch, (list, tuple)) else [batch]
        yield from _columns("", {str(i): value for i, value in enumerate(each)}, rows)


def _columns(name: str, value: Any, rows: int) -> Iterator[tuple[str, Any]]:
    """The fields of a batch by name: a value for each row, or None where it cannot be taken
    apart."""
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items(), key=_by_name):
            yield from _columns(f"{name}.{key}" if name else str(key), inner, rows)
    elif isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
        yield name, value if len(value) == rows else None
    elif isinstance(value, (list, tuple)):
        if _is_of_rows(value, rows):
            yield name, list(value)
        else:
            for i, inner in enumerate(value):
                yield from _columns(f"{name}.{i}" if name else str(i), inner, rows)
    elif not _is_scalar(value):
        yield name, None


def _is_of_rows(values: Sequence[Any], rows: int) -> bool:
    """Whether a list has an entry for each row, rather than being a list of columns as
    ``default_collate`` makes of tuples."""
    if len(values) != rows or not all(map(_is_known, values)):
        return False
    return not all(_is_column(value, rows) for value in values)


def _is_column(value: Any, rows: int) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 1 and len(value) == rows
    return (
        isinstance(value, (list, tuple))
        and len(value) == rows
        and all(isinstance(v, str) for v in value)
    )


def _is_scalar(value: Any) -> bool:
    """Whether a value says something of the batch rather than of one sample."""
    return value is None or isinstance(
        value, (str, int, float, bytes, np.generic, Tensor, np.ndarray)
    )


def _is_known(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_known, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_known, value))
    return _is_scalar(value) or _is_image(value)


def _is_image(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("mode", "size", "tobytes", "getpixel"))


def _is_content(value: Any) -> bool:
    """Whether a row's value may be what a network is trained on, rather than a name or a number for
    it."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, float) or _is_content(v) for v in value)
    if isinstance(value, Mapping):
        return any(map(_is_content, value.values()))
    return isinstance(value, bytes) or _is_image(value)


def _by_name(item: tuple[Any, Any]) -> str:
    return str(item[0])


def _feed(digest: _Digest, value: Any) -> None:
    """Every value with its kind and its length, so that no two values are fed as the same bytes."""
    if isinstance(value, Tensor):
        _part(digest, f"tensor {value.dtype} {list(value.shape)}", _bytes(value))
    elif isinstance(value, np.ndarray):
        _feed_array(digest, value)
    elif _is_image(value):
        # The bytes of a palette image are places in its palette.
        seen = value.convert("RGBA") if value.mode in ("P", "PA") else value
        transparency = getattr(value, "info", {}).get("transparency")
        _part(digest, f"image {value.mode} {value.size} {transparency!r}", seen.tobytes())
    elif isinstance(value, Mapping):
        _part(digest, f"mapping {len(value)}")
        for key, inner in sorted(value.items(), key=_by_name):
            _part(digest, "key", str(key).encode())
            _feed(digest, inner)
    elif isinstance(value, (list, tuple)):
        _part(digest, f"list {len(value)}")
        for inner in value:
            _feed(digest, inner)
    elif isinstance(value, float):
        _part(digest, "float", struct.pack("<d", value))
    else:
        plain = value.item() if isinstance(value, np.generic) else value
        _part(digest, type(plain).__name__, repr(plain).encode())


def _feed_array(digest: _Digest, value: np.ndarray[Any, Any]) -> None:
    if value.dtype.hasobject or value.dtype.kind in "US":
        _feed(digest, value.tolist())
    else:
        _part(
            digest,
            f"array {value.dtype.str} {list(value.shape)}",
            np.ascontiguousarray(value).tobytes(),
        )


def _part(digest: _Digest, kind: str, data: bytes = b"") -> None:
    for text in (kind.encode(), data):
        digest.update(struct.pack("<Q", len(text)))
        digest.update(text)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
