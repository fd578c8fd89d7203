"""What a store says of its origin, for a reader: names and hashes."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ctrak_lightning.store.files import sha256_of
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.schema import MANIFEST
from ctrak_lightning.store.store import TraceStore

PACKAGES = ("ctrak-lightning", "torch", "lightning", "diffusers")


def provenance_facts(store: TraceStore) -> dict[str, str]:
    """Where the traces of ``store`` come from, each fact as text: the run, the method, the
    fingerprints of model and data set, each checkpoint with the sha256 of its files, and that of
    the manifest, which holds all of them.

    The versions are those of the packages that read the store now.

    Raises:
        CorruptStoreError: The manifest is not valid any more, or a file is missing.
    """
    header, manifest = store.header, read_manifest(store.path)
    facts = {
        "run": store.run_id,
        f"sha256 of {MANIFEST}": sha256_of(store.path / MANIFEST),
        f"sha256 of {manifest.samples}": manifest.files[manifest.samples].sha256,
        "method": header.method["name"],
        "method, in full": _text(header.method),
        "projection": _text(header.projection),
        "traces": f"{len(store)} samples, {header.dim} numbers each, {header.dtype}",
    }
    facts |= {f"model: {name}": _text(value) for name, value in header.model.items()}
    facts.pop("model: frozen_sketch", None)
    facts |= {f"data set: {name}": _text(value) for name, value in header.dataset.items()}
    for record in manifest.checkpoints:
        if not record.sealed:
            continue
        rate = "not recorded" if record.learning_rate is None else f"{record.learning_rate:g}"
        where = f"checkpoint at step {record.step}"
        facts[where] = f"epoch {record.epoch}, learning rate {rate}"
        for name, known in sorted(manifest.files.items()):
            if name.startswith(f"{record.folder}/"):
                facts[f"{where}: sha256 of {name}"] = known.sha256
    return facts | {f"version of {name}": _version(name) for name in PACKAGES}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
