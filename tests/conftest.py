import os
from collections.abc import Iterator

import hypothesis
import pytest

# How long an example takes on a busy machine says nothing.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="session")
def no_fsync() -> Iterator[None]:
    """A busy disk takes 0.2 s for one fsync; what SIGKILL leaves does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
