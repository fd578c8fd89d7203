"""The stress scripts, short."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="needs fork")]


def run(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """What a script found."""
    command = [sys.executable, "-m", f"tests.stress.{name}", *arguments, "--results", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["found"]
    return found


def test_killed_runs_go_on_as_if_they_had_not_been_killed(tmp_path: Path) -> None:
    found = run(tmp_path, "kill", "--runs", "9", "--seed", "77")
    assert found["with_problems"] == 0, found["problems"]
    # A kill may come after the end, where a stage is the last one.
    assert found["killed"] >= 8
    assert found["cut_inside_a_batch"] >= 1


def test_hostile_inputs_end_in_typed_errors_or_results(tmp_path: Path) -> None:
    found = run(tmp_path, "inputs", "--cases", "270", "--seed", "77000")
    assert set(found["outcomes"]) <= {"typed error", "told", "result"}, found["bad"]
    assert found["outcomes"]["result"] > 10
    assert found["outcomes"]["typed error"] > 150


def test_shortages_cost_their_own_checkpoint_only(tmp_path: Path) -> None:
    found = run(tmp_path, "resources")
    ran = [each for both in found.values() for each in both.values() if "skipped" not in each]
    assert len(ran) >= 6
    assert all(each["as_promised"] for each in ran), found


def test_of_two_runs_started_into_one_folder_one_trains_and_the_other_is_told(
    tmp_path: Path,
) -> None:
    found = run(tmp_path, "double_start", "--starts", "4")
    assert found["with_problems"] == 0, found["problems"]
    assert found["by_delay"] == {"0.0 s": 1, "0.6 s": 1, "1.1 s": 1, "random": 1}
