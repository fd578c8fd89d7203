"""On a GPU: the same numbers, tensors of one device in every operation, and no more copies and waits
than a batch needs. No GPU is needed: see :mod:`tests.devices.logical_gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def measured(name: str, fault: str = "") -> dict[str, Any]:
    """In a process of its own, since the logical device is one of the whole process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.devices.worker", name, fault],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """What is more than one copy to the host for a batch more, and none and no wait for a state
    more."""
    counts = found["counts"]
    usual = counts["2 states, 2 batches"]
    more_states, more_batches = counts["3 states, 2 batches"], counts["2 states, 3 batches"]
    return [
        f"{what} for {of}: {more[what] - usual[what]}\n{more['table']}"
        for what, more, of, most in (
            ("copies", more_states, "a state", 0),
            ("waits", more_states, "a state", 0),
            ("copies", more_batches, "a batch", 1),
            ("waits", more_batches, "a batch", 0),
        )
        if more[what] - usual[what] > most
    ]


@pytest.mark.parametrize("name", ["toy", pytest.param("sd1", marks=pytest.mark.slow)])
def test_a_capture_and_a_question_on_a_gpu(name: str) -> None:
    found = measured(name)
    assert all(difference < 1e-3 for difference in found["differences"])
    assert problems(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["copy in every state", "wait in every state"])
def test_what_is_planted_is_seen(fault: str) -> None:
    assert any("for a state" in problem for problem in problems(measured("toy", fault)))
