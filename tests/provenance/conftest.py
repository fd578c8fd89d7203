import shutil
from pathlib import Path

import pytest

from .builder import recorded


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded store: 10 samples, 6 features, 2 checkpoints. Not to be changed."""
    return recorded(tmp_path_factory.mktemp("recorded") / "store")


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(original, tmp_path / "store")
