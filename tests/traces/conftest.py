import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The builders are shared with a subprocess, so they are a plain module, found here in every import mode.
sys.path.insert(0, str(Path(__file__).parent))

from store_builder import Capture


@pytest.fixture(autouse=True, scope="session")
def no_fsync() -> Iterator[None]:
    """A busy disk takes 0.2 s for one fsync; what SIGKILL leaves does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def capture() -> Capture:
    """A small capture: 10 samples, 6 features, 2 checkpoints, shards of 4 rows."""
    return Capture()
