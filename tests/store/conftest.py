import sys
from pathlib import Path

import pytest

# The builders are shared with a subprocess, so they are a plain module, found here in every import
# mode.
sys.path.insert(0, str(Path(__file__).parent))

from store_builder import Capture


@pytest.fixture(scope="session")
def capture() -> Capture:
    """A small capture: 10 samples, 6 features, 2 checkpoints, shards of 4 rows."""
    return Capture()
