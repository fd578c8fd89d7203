"""``manifest.json``: strict when read, deterministic when written."""

import json
import math
import re
from pathlib import Path
from typing import Any

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store.files import (
    CHECKPOINT_FOLDER,
    FileRecord,
    reading,
    size_of,
    write_atomically,
)
from ctrak_lightning.store.formats import BYTES_PER_VALUE
from ctrak_lightning.store.schema import (
    MANIFEST,
    READABLE_SCHEMAS,
    SCHEMA_VERSION,
    CheckpointRecord,
    Manifest,
    StoreHeader,
    is_integer,
)

_EDITION = "(-e[1-9][0-9]{0,8})?"
_SHARD_PATTERN = re.compile(rf"{CHECKPOINT_FOLDER}/rank[0-9]{{1,9}}-[0-9]{{5,9}}{_EDITION}\.h5")
_SAMPLES_PATTERN = re.compile(rf"samples{_EDITION}\.h5")
_FILE_PATTERN = re.compile(
    rf"{_SAMPLES_PATTERN.pattern}|{_SHARD_PATTERN.pattern}|{CHECKPOINT_FOLDER}/"
    rf"((weights|buffers)\.safetensors|function\.h5|(kernel|visits|exposures){_EDITION}\.h5)"
)
_SHA256_PATTERN = re.compile("[0-9a-f]{64}")
LONGEST_MANIFEST = 2**30


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Replace the manifest ``name`` of the store at ``folder`` durably; the same content gives the
    same bytes."""
    content = manifest_text(manifest).encode("ascii")
    write_atomically(folder / name, lambda path: path.write_bytes(content))


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read the manifest ``name`` of the store at ``folder``, validate it, and compare every
    recorded file's size.

    Raises:
        StoreError: There is no store, or its schema is another version's.
        CorruptStoreError: The manifest is invalid, or a recorded file is missing or truncated.
    """
    path = folder / name
    manifest = parse_manifest(read_text(path), str(path))
    check_sizes(folder, manifest)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes of all recorded files.

    Raises:
        CorruptStoreError: One is missing, truncated, or a link.
    """
    for name, known in manifest.files.items():
        path = folder / name
        try:
            found: int | None = size_of(path)
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise _corrupt(f"{path} cannot be read ({error})") from error
        if found != known.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise _corrupt(f"{path} {state}, the manifest records {known.bytes} bytes")


def read_text(path: Path) -> str:
    """The text of the manifest at ``path``.

    Raises:
        StoreError: There is no store.
        CorruptStoreError: The file is not UTF-8, or longer than any manifest.
    """
    folder, name = path.parent, path.name
    try:
        with reading(path) as file:
            if size_of(path) > LONGEST_MANIFEST:
                raise _corrupt(
                    f"{path}: longer than {LONGEST_MANIFEST} bytes, which no manifest is"
                )
            return file.readall().decode("utf-8")
    except FileNotFoundError as error:
        what = f"has no {name}" if folder.is_dir() else "does not exist"
        raise StoreError(
            f"{folder} {what}, so it is not a trace store. HINT: give the `dirpath` of the "
            "ConceptTracer."
        ) from error
    except UnicodeDecodeError as error:
        raise _corrupt(f"{path}: not UTF-8 ({error})") from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error}). HINT: give the folder of a trace store."
        ) from error


def parse_manifest(text: str, source: str = MANIFEST) -> Manifest:
    """Validate the text of a manifest; ``source`` names it in errors.

    Raises:
        StoreError: The schema is another version's.
        CorruptStoreError: The text is not JSON, or a field is missing, unknown or of the wrong
            kind.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        return _manifest(content, source)
    except StoreError:
        raise
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"{source}: not valid JSON ({error})") from error


def is_sample_table(name: str) -> bool:
    """Whether a file of this name, in the folder of the store, is a sample table of some
    edition."""
    return _SAMPLES_PATTERN.fullmatch(name) is not None


def manifest_text(manifest: Manifest, schema: int = SCHEMA_VERSION) -> str:
    """The text of a manifest; equal manifests give equal text. An earlier ``schema`` gives that of
    the version that wrote it."""
    content = {
        "schema": schema,
        "header": manifest.header.to_dict(),
        "run_id": manifest.run_id,
        "edition": manifest.edition,
        "files": {
            name: {"sha256": known.sha256, "bytes": known.bytes}
            for name, known in manifest.files.items()
        },
        "checkpoints": [vars(record) for record in manifest.checkpoints],
    }
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _manifest(content: Any, source: str) -> Manifest:
    if (
        isinstance(content, dict)
        and is_integer(content.get("schema"))
        and content["schema"] not in READABLE_SCHEMAS
    ):
        raise StoreError(
            f"{source}: schema is {content['schema']}, this version of ctrak-lightning reads "
            f"{' and '.join(map(str, READABLE_SCHEMAS))}. "
            "HINT: use the version that wrote the store."
        )
    content = _object(
        content, source, ("schema", "header", "run_id", "edition", "files", "checkpoints")
    )
    _integer(content["schema"], f"{source}: schema")
    files = _files(content["files"], f"{source}: files")
    manifest = Manifest(
        header=_header(content["header"], f"{source}: header"),
        run_id=_string(content["run_id"], f"{source}: run_id"),
        files=files,
        checkpoints=_checkpoints(content["checkpoints"], f"{source}: checkpoints", files),
        edition=_integer(content["edition"], f"{source}: edition"),
    )
    _check_files_belong(manifest, source)
    for record in manifest.checkpoints:
        _check_rows_fit(record, manifest, f"{source}: checkpoint {record.step}")
    return manifest


def _header(value: Any, where: str) -> StoreHeader:
    fields = _object(value, where, tuple(StoreHeader.__dataclass_fields__))
    try:
        return StoreHeader(**fields)
    except StoreError as error:
        raise _corrupt(f"{where}: {error}") from error


def _files(value: Any, where: str) -> dict[str, FileRecord]:
    files = {}
    for name, item in _object(value, where).items():
        _relative_path(name, where, _FILE_PATTERN)
        fields = _object(item, f"{where}: {name}", ("sha256", "bytes"))
        sha256 = _string(fields["sha256"], f"{where}: {name}: sha256")
        if not _SHA256_PATTERN.fullmatch(sha256):
            raise _corrupt(
                f"{where}: {name}: sha256 is {_short(sha256)}, expected 64 hexadecimal digits"
            )
        files[name] = FileRecord(
            sha256=sha256, bytes=_integer(fields["bytes"], f"{where}: {name}: bytes")
        )
    return files


def _checkpoints(
    value: Any, where: str, files: dict[str, FileRecord]
) -> tuple[CheckpointRecord, ...]:
    records: list[CheckpointRecord] = []
    for position, item in enumerate(_list(value, where)):
        record = _checkpoint(item, f"{where}[{position}]", files)
        if records and record.step <= records[-1].step:
            raise _corrupt(
                f"{where}[{position}]: step {record.step} does not come after step "
                f"{records[-1].step}"
            )
        records.append(record)
    return tuple(records)


def _checkpoint(value: Any, where: str, files: dict[str, FileRecord]) -> CheckpointRecord:
    fields = _object(value, where, tuple(CheckpointRecord.__dataclass_fields__))
    shards = [
        _relative_path(name, f"{where}.shards", _SHARD_PATTERN)
        for name in _list(fields["shards"], f"{where}.shards")
    ]
    is_boolean = isinstance(fields["sealed"], bool)
    _expect(is_boolean, fields["sealed"], f"{where}.sealed", "true or false")
    record = CheckpointRecord(
        step=_integer(fields["step"], f"{where}.step"),
        epoch=_integer(fields["epoch"], f"{where}.epoch"),
        learning_rate=_optional_float(fields["learning_rate"], f"{where}.learning_rate"),
        sealed=fields["sealed"],
        rows=_integer(fields["rows"], f"{where}.rows"),
        shards=tuple(shards),
        processes=_integer(fields["processes"], f"{where}.processes"),
        edition=_integer(fields["edition"], f"{where}.edition"),
    )
    if record.processes < 1:
        raise _corrupt(f"{where}.processes is 0, expected at least 1")
    if len(set(shards)) < len(shards):
        raise _corrupt(f"{where}.shards names a shard twice")
    for name in [*shards, *([record.kernel] if record.sealed else [])]:
        if name not in files or not name.startswith(f"{record.folder}/"):
            raise _corrupt(f"{where}: {name} is not among the recorded files of {record.folder}")
    return record


def _check_files_belong(manifest: Manifest, source: str) -> None:
    if manifest.checkpoints and manifest.samples not in manifest.files:
        raise _corrupt(f"{source}: files lacks {manifest.samples}, which the checkpoints refer to")
    owned = {manifest.samples}
    for record in manifest.checkpoints:
        owned |= {*record.companions, *record.shards, *([record.kernel] if record.sealed else [])}
    if strangers := sorted(manifest.files.keys() - owned):
        raise _corrupt(
            f"{source}: files has {strangers[0]}, which belongs to no recorded checkpoint"
        )


def _check_rows_fit(record: CheckpointRecord, manifest: Manifest, where: str) -> None:
    """Rows are stored uncompressed, so a forged count is found before anybody allocates for it."""
    needed = record.rows * manifest.header.dim * BYTES_PER_VALUE[manifest.header.dtype]
    stored = sum(manifest.files[name].bytes for name in record.shards)
    if needed > stored:
        raise _corrupt(
            f"{where}: {record.rows} rows of {manifest.header.dim} {manifest.header.dtype} "
            f"features need {needed} bytes, its shards have {stored}"
        )


def _expect(is_right: bool, value: Any, where: str, what: str) -> None:
    if not is_right:
        raise _corrupt(f"{where} is {_short(value)}, expected {what}")


def _object(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    _expect(isinstance(value, dict), value, where, "an object")
    if keys is not None and value.keys() != set(keys):
        missing, unknown = sorted(set(keys) - value.keys()), sorted(value.keys() - set(keys))
        raise _corrupt(f"{where}: missing keys {missing}, unknown keys {_short(unknown)}")
    found: dict[str, Any] = value
    return found


def _list(value: Any, where: str) -> list[Any]:
    _expect(isinstance(value, list), value, where, "a list")
    return list(value)


def _integer(value: Any, where: str) -> int:
    _expect(is_integer(value) and value >= 0, value, where, "an integer of at least 0")
    return int(value)


def _string(value: Any, where: str) -> str:
    _expect(isinstance(value, str) and value != "", value, where, "a string that is not empty")
    return str(value)


def _optional_float(value: Any, where: str) -> float | None:
    if value is None:
        return None
    is_exact = is_integer(value) and abs(value) < 2**53
    is_finite = isinstance(value, float) and math.isfinite(value)
    _expect(is_exact or is_finite, value, where, "a finite number or null")
    return float(value)


def _relative_path(value: Any, where: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _corrupt(
            f"{where}: {_short(value)} is not a path that a store uses. Expected a name like "
            "checkpoint-00000300/rank0-00000.h5, "
            "relative to the store; never an absolute path or one with '..'"
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _corrupt(problem: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{problem}. HINT: the store was damaged or edited after it was written; restore it from a "
        "copy or capture again into a new folder."
    )


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
