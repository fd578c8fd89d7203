"""Two processes that Lightning's Fabric starts search one store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctrak_lightning import Attributor
from ctrak_lightning.utilities.processes import ALONE, DistributedProcesses, processes_of

from ..toy import ToyDiffusion
from .test_attributor import BAR, METHODS, RED, SAMPLER, traced

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_processes_of_a_fabric_find_what_one_finds(tmp_path: Path) -> None:
    traced(tmp_path / "s", METHODS["concept_trak"], copies=8)
    command = [
        sys.executable,
        "-m",
        "tests.attribution.fabric_worker",
        str(tmp_path / "s"),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]

    attributor = Attributor(tmp_path / "s", ToyDiffusion().double(), sampler=SAMPLER)
    found = attributor.top(attributor.query([RED, BAR], [4, 5]), 5, damping="agreement")
    expected = [score for records in found for score in [record.score for record in records]]
    for rank in range(2):
        told = json.loads((tmp_path / f"out-{rank}.json").read_text())
        scores = [score for records in told["records"] for _, score in records]
        assert scores == pytest.approx(expected, rel=1e-4)
        assert told["gathered"] == ["from 0", "from 1"]
        assert told["sum"] == [2.0, 1.0]
        assert told["first"] == 0
        for failing, (kind, message) in enumerate(told["errors"]):
            mine = failing == rank
            assert kind == ("OSError" if mine else "RuntimeError")
            assert message == (
                "no disk" if mine else f"The process of rank {failing}: OSError: no disk"
            )


def test_one_process_is_alone_and_several_must_have_been_launched() -> None:
    assert processes_of(1) is ALONE
    assert ALONE.gather(3) == [3]
    assert ALONE.from_first(3) == 3
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(OSError, match="^no disk$"), ALONE.sharing_errors():
        raise OSError("no disk")
    with pytest.raises(RuntimeError, match=r"not initialised. HINT: .*fabric\.launch"):
        DistributedProcesses()
