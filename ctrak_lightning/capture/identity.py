"""Which samples a data set has: their numbers, their content."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ctrak_lightning.errors import BatchError, listed
from ctrak_lightning.tasks import Encoded
from ctrak_lightning.tasks.base import plain_id
from ctrak_lightning.utilities.naming import bytes_of


def numbered(batches: Iterable[Any], column: str) -> Iterable[Any]:
    """The same batches, with a column of the samples' positions in the data set where they have no
    such column.

    Args:
        batches: a DataLoader; of anything else, and of a data set that is a stream, positions are
            not known, and it is returned as it is.
        column: the name of the ids in a batch. A batch that is a tuple becomes a mapping with the
            keys ``"0"``, ``"1"``, ...

    Raises:
        BatchError: by the batches, where a ``collate_fn`` leaves samples out and it cannot be known
            which. Samples that are None are known to be left out.
    """
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return batches
    if batches.batch_sampler is None:
        return batches
    collate = _Collate(batches.collate_fn, column)
    options = {"batch_sampler": batches.batch_sampler, "collate_fn": collate}
    return reloaded(batches, _Positions(batches.dataset), **options)


def reloaded(loader: DataLoader[Any], dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """A DataLoader that loads as ``loader`` does, by as many workers of the same kind, but another
    selection of samples.

    It has no generator of its own: whoever goes through it seeds torch's, so that every pass is the
    same.
    """
    if loader.num_workers > 0:
        options |= {
            "prefetch_factor": loader.prefetch_factor,
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return DataLoader(
        dataset,
        **{"collate_fn": loader.collate_fn} | options,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


class _Positions(Dataset[tuple[Any, Any]]):
    """The samples of a data set, each with its position."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, position: Any) -> tuple[Any, Any]:
        return position, self.samples[position]


class _Collate:
    """Puts samples together as ``collate`` does, and their positions beside them."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str) -> None:
        self.collate, self.column = collate, column

    def __call__(self, rows: list[tuple[Any, Any]]) -> Any:
        batch = self.collate([sample for _, sample in rows])
        if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
            batch = {str(i): values for i, values in enumerate(batch)}
        if not isinstance(batch, Mapping) or self.column in batch:
            return batch
        return {**batch, self.column: self._positions(rows, batch)}

    def _positions(self, rows: list[tuple[Any, Any]], batch: Mapping[Any, Any]) -> list[str]:
        every = [plain_id(position) for position, _ in rows]
        kept = [name for name, (_, sample) in zip(every, rows, strict=True) if sample is not None]
        lengths = _lengths(batch)
        # A batch without a column that can be counted is left to `encode`, which compares lengths.
        if not lengths or len(kept) in lengths:
            return kept
        raise BatchError(
            f"The collate_fn made a batch of {sorted(lengths)} rows of the {len(rows)} samples at "
            f"positions {listed(every)} of the data set, of which {len(rows) - len(kept)} are "
            "None. Samples are numbered by these positions, and "
            "which of them are in the batch cannot be known. HINT: let the data set return None "
            "for a sample that is to be left out, or give every sample an id of its own in the "
            f"column {self.column!r}."
        )


def _lengths(batch: Mapping[Any, Any]) -> set[int]:
    """How many rows the columns of a batch have: its tensors, or where it has none, its lists."""
    tensors = {
        len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0
    }
    return tensors or {len(value) for value in batch.values() if isinstance(value, (list, tuple))}


class _Digest(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def content_hashes(batch: Any, encoded: Encoded) -> list[str]:
    """One sha256 (hex) per sample over everything the data set gave for it, whatever the batch it
    is in.

    The batch itself is hashed where its fields have a value for each row: tensors, arrays, images
    of PIL, text, numbers, and lists and mappings of these. So an image is the same image on every
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
        _part(digest, f"tensor {value.dtype} {list(value.shape)}", bytes_of(value))
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
        kind = f"array {value.dtype.str} {list(value.shape)}"
        _part(digest, kind, np.ascontiguousarray(value).tobytes())


def _part(digest: _Digest, kind: str, data: bytes | memoryview = b"") -> None:
    for text in (kind.encode(), data):
        digest.update(struct.pack("<Q", len(text)))
        digest.update(text)
