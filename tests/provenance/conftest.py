import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .builder import recorded


@pytest.fixture(autouse=True, scope="session")
def no_fsync() -> Iterator[None]:
    """A busy disk takes 0.2 s for one fsync; what SIGKILL leaves does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded store: 10 samples, 6 features, 2 checkpoints. Not to be changed."""
    return recorded(tmp_path_factory.mktemp("recorded") / "store")


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(original, tmp_path / "store")
