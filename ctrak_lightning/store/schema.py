"""What a store's manifest says, as dataclasses."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from ctrak_lightning.errors import StoreError
from ctrak_lightning.store.files import FileRecord
from ctrak_lightning.store.formats import BYTES_PER_VALUE, RowDtype

SCHEMA_VERSION = 5
READABLE_SCHEMAS = (4, SCHEMA_VERSION)
"""4 knows nothing of exposures, buffers and the network's function; what it lacks is not
compared."""
MANIFEST = "manifest.json"
SAMPLES = "samples.h5"
WEIGHTS = "weights.safetensors"
KERNEL = "kernel.h5"
VISITS = "visits.h5"
EXPOSURES = "exposures.h5"
BUFFERS = "buffers.safetensors"
FUNCTION = "function.h5"
WRITER_LOCK = "writer.lock"
LEDGER = "ledger.jsonl"
LEDGER_LOCK = "ledger.lock"
LEDGER_SIGNATURE = "ledger.signature.json"
COMMITMENTS = "commitments.h5"


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of a key that one of two headers lacks."""


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What all traces of a store have in common; two runs may share a store only if theirs are
    equal.

    Raises:
        StoreError: A field is not what JSON can hold, or ``dim`` or ``dtype`` is impossible.

    Example:
        >>> facts = {"method": {}, "model": {}, "dataset": {}, "dtype": "float16"}
        >>> header = StoreHeader(projection={"seed": 0}, dim=8, **facts)
        >>> header.differences(StoreHeader(projection={}, dim=4, **facts))
        [('projection.seed', 0, nothing), ('dim', 8, 4)]
    """

    method: dict[str, Any]
    """The attribution method, as JSON values."""
    projection: dict[str, Any]
    """The projection and its seed, as JSON values."""
    model: dict[str, str]
    """Fingerprints of the model, by name."""
    dataset: dict[str, Any]
    """What identifies the dataset, as JSON values: ``{"size": n, "sample_ids": sha256hex}``."""
    dim: int
    """Features per sample, k."""
    dtype: RowDtype
    """How the unit-norm rows are stored (int8 with one scale per row); scales, norms and losses are
    float32 always."""

    def __post_init__(self) -> None:
        for name in ("method", "projection", "model", "dataset"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise StoreError(f"StoreHeader({name}={value!r}): expected a dict of JSON values.")
            # Tuples become lists here, so that a header equals itself after a round trip through
            # JSON.
            object.__setattr__(self, name, _json_value(value, name))
        for name, fingerprint in self.model.items():
            if not isinstance(fingerprint, str):
                raise StoreError(
                    f"StoreHeader(model={{{name!r}: {fingerprint!r}}}): expected a str."
                )
        if not is_integer(self.dim) or self.dim < 1:
            raise StoreError(
                f"StoreHeader(dim={self.dim!r}): expected an int of at least 1, a trace's length."
            )
        if not isinstance(self.dtype, str) or self.dtype not in BYTES_PER_VALUE:
            raise StoreError(
                f"StoreHeader(dtype={self.dtype!r}): expected one of {sorted(BYTES_PER_VALUE)}."
            )

    def differences(self, other: StoreHeader) -> list[tuple[str, Any, Any]]:
        """Fields in which two headers differ, as :func:`differences` gives them."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [found for name in mine for found in differences(mine[name], theirs[name], name)]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def seed_facts(seed: int) -> dict[str, int]:
    """What a header says, beside the method, of the seed of the states' noise: nothing of 0, as
    stores from before that was recorded."""
    return {"noise_seed": seed} if seed else {}


def seed_of(header: StoreHeader) -> int:
    """The seed of the noise that the traces were made with: a question at noised states is asked
    with the same.

    Raises:
        ValueError: it is no whole number.
    """
    seed = header.method.get("noise_seed", 0)
    if not is_integer(seed):
        raise ValueError(f"noise_seed {seed!r}, expected a whole number")
    return int(seed)


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What the manifest says of one checkpoint; its paths are relative to the store."""

    step: int
    """Optimizer steps taken when the traces were captured."""
    epoch: int
    """Epoch of the capture."""
    learning_rate: float | None = None
    """Learning rate at the capture, if known."""
    sealed: bool = False
    """Whether every sample is there."""
    rows: int = 0
    """Samples in the recorded shards; until it is sealed, those of the process of rank 0."""
    shards: tuple[str, ...] = ()
    """Paths of the shards relative to the store, in the order in which they were written; of
    several processes, by rank."""
    processes: int = 1
    """How many processes capture it, each a share of the samples."""
    edition: int = 0
    """The manifest's edition when its files were written."""

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder."""
        return f"checkpoint-{self.step:08d}"

    @property
    def kernel(self) -> str:
        """Path of the kernel."""
        return f"{self.folder}/{edition_name(KERNEL, self.edition)}"

    @property
    def weights(self) -> str:
        """Path of the weights."""
        return f"{self.folder}/{WEIGHTS}"

    @property
    def visits(self) -> str:
        """Path of the visits, there where training itself left the traces."""
        return f"{self.folder}/{edition_name(VISITS, self.edition)}"

    @property
    def exposures(self) -> str:
        """Path of the samples' exposures, there where they are known."""
        return f"{self.folder}/{edition_name(EXPOSURES, self.edition)}"

    @property
    def buffers(self) -> str:
        """Path of the buffers that training changes, if there are any."""
        return f"{self.folder}/{BUFFERS}"

    @property
    def function(self) -> str:
        """Path of the network's outputs on a fixed input."""
        return f"{self.folder}/{FUNCTION}"

    @property
    def companions(self) -> set[str]:
        """Paths of the files that a checkpoint may have beside its shards and kernel: the manifest
        lists those that it has."""
        return {self.weights, self.visits, self.exposures, self.buffers, self.function}

    def shard(self, rank: int) -> str:
        """Path of the shard to write next."""
        return f"{self.folder}/rank{rank}-{len(self.shards):05d}.h5"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``; a change makes a new one, so a write that fails changes
    nothing."""

    header: StoreHeader
    run_id: str
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Every file of the store but the manifest, by path relative to the store."""
    checkpoints: tuple[CheckpointRecord, ...] = ()
    """By step, ascending."""
    edition: int = 0
    """How often samples have been forgotten: each time the files are written anew, under names of
    their own."""

    @property
    def samples(self) -> str:
        """Path of the sample table relative to the store."""
        return edition_name(SAMPLES, self.edition)

    def with_files(self, files: dict[str, FileRecord]) -> Manifest:
        """The manifest with ``files`` added."""
        return replace(self, files=self.files | files)

    def with_checkpoint(self, record: CheckpointRecord) -> Manifest:
        """The manifest with ``record`` added, or put in place of the one of the same step."""
        others = [known for known in self.checkpoints if known.step != record.step]
        return replace(
            self, checkpoints=tuple(sorted([*others, record], key=lambda known: known.step))
        )

    def without_steps(self, steps: Collection[int]) -> Manifest:
        """The manifest without the checkpoints of ``steps`` and their files."""
        gone = {record.folder for record in self.checkpoints if record.step in steps}
        return replace(
            self,
            checkpoints=tuple(record for record in self.checkpoints if record.step not in steps),
            files={
                path: known for path, known in self.files.items() if path.split("/")[0] not in gone
            },
        )

    def find(self, step: int) -> CheckpointRecord | None:
        """The checkpoint of ``step``, if there is one."""
        return next((record for record in self.checkpoints if record.step == step), None)


def edition_name(name: str, edition: int) -> str:
    """The name that the file ``name`` of a store has in an edition.

    Example:
        >>> edition_name("kernel.h5", 0), edition_name("kernel.h5", 2)
        ('kernel.h5', 'kernel-e2.h5')
    """
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-e{edition}{dot}{suffix}" if edition else name


def differences(mine: Any, theirs: Any, where: str) -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ, as ``(dotted name, mine, theirs)``; ``where`` is the name of
    both.

    A key that one side lacks has the value :data:`ABSENT` there.
    """
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted(mine.keys() | theirs.keys())
        pairs = [(f"{where}.{key}", mine.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys]
        return [found for name, a, b in pairs for found in differences(a, b, name)]
    same = mine == theirs and isinstance(mine, bool) == isinstance(theirs, bool)
    return [] if same else [(where, mine, theirs)]


def is_integer(value: object) -> bool:
    """Whether ``value`` is an int and no bool: in JSON ``true`` is not ``1``."""
    return isinstance(value, int) and not isinstance(value, bool)


_DEEPEST = 50
"""Levels of lists and objects within a field: no writer needs ten, and Python's recursion ends at
some."""


def _json_value(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy of ``value`` in the types that JSON returns."""
    if depth > _DEEPEST:
        raise StoreError(
            f"StoreHeader: {where[:200]} is nested more than {_DEEPEST} levels deep. HINT: give "
            "numbers and texts, in few levels of lists and dicts."
        )
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise StoreError(
                    f"StoreHeader: the key {key!r} in {where} is not a str, which JSON needs."
                )
        return {key: _json_value(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [
            _json_value(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)
        ]
    is_finite = isinstance(value, float) and math.isfinite(value)
    if value is None or isinstance(value, str | int) or is_finite:
        return value
    raise StoreError(
        f"StoreHeader: {where} is {value!r}, which JSON cannot hold. HINT: give str, int, bool, "
        "finite float, None, or lists and dicts of these; write a torch.dtype or a Path as str."
    )
