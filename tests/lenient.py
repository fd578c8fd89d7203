"""A toy of a few steps has learnt nothing, and answers about it say so first; for tests of what is
shown of models that have."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ctrak_lightning.attribution import diagnostics

OFF = {"BLIND": float("inf"), "STILL": 0.0, "INDISTINCT": 0.0, "UNSTABLE": -1.0, "SMOOTH": 1.0}


@contextmanager
def lenient() -> Iterator[None]:
    """Every check but that of the strength finds every answer sound."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFF.items():
            patch.setattr(diagnostics, name, value)
        yield
