"""What a run is made with: packages, code, seeds, hardware, settings."""

import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ctrak_lightning.provenance.ledger import canonical, digest

PACKAGES = (
    "ctrak-lightning",
    "torch",
    "lightning",
    "pytorch-lightning",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "h5py",
    "numpy",
)
SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PYTHONHASHSEED")
_GIT_TIMEOUT_S = 10
_MOST_BYTES = 2**20


def code() -> dict[str, Any]:
    """Versions of Python and of the packages that matter, and the git commit of the working folder,
    if it is in a repository."""
    git = git_state(Path.cwd())
    return {"python": platform.python_version(), "packages": _packages(), "git": git}


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"commit": hash, "dirty": whether tracked files differ from it}``, or None outside of a
    repository or without git.

    Files that git does not track do not count as a difference.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def seeds() -> dict[str, Any]:
    """The seed of PyTorch's generator, and those that ``seed_everything`` leaves in the
    environment."""
    found = {name: os.environ[name] for name in SEED_VARIABLES if name in os.environ}
    return {"torch": torch.initial_seed(), "environment": found}


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """Operating system, processor and accelerators."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "gpus": names,
        "device": None if device is None else str(device),
    }


def bounded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON values; those that take more than 1 MiB as their size and sha256."""
    found: dict[str, Any] = json_value(settings)
    size = len(canonical(found))
    return found if size <= _MOST_BYTES else {"bytes": size, "sha256": digest(found)}


def json_value(value: Any) -> Any:
    """``value`` in the types of JSON: what JSON lacks becomes text, an object the name of its
    class."""
    if isinstance(value, Mapping):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [json_value(item) for item in value]
        return sorted(items, key=canonical) if isinstance(value, set | frozenset) else items
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        # Lone surrogates (a file name that is not UTF-8) have no place in text that others must
        # read.
        return value.encode("utf-8", errors="backslashreplace").decode("utf-8")
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    # Not its repr: that may hold an address, or anything.
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
