"""Several processes trace a data set: each its share, and the store is that of one."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ctrak_lightning import Capture, GradientTracer, Projection, TraceStore, methods
from ctrak_lightning.errors import DatasetChangedError, GradientError, ProcessLostError
from ctrak_lightning.utilities.processes import ALONE, DistributedProcesses, Processes, _longest

from ..threads import together
from ..toy import QuickDiffusion, Toys

MODULE = (
    QuickDiffusion()
)  # made once: threads that seed the global generator get in each other's way


class Counted(Dataset[dict[str, Any]]):
    """The toys, and which of them were looked at."""

    def __init__(self) -> None:
        self.toys, self.seen = Toys(), list[int]()

    def __len__(self) -> int:
        return len(self.toys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.seen.append(index)
        return self.toys[index]


def capture(path: Path, batches: Iterable[Any], processes: Processes, runs: int = 1) -> Capture:
    module = copy.deepcopy(MODULE)
    made = Capture(
        str(path),
        module,
        module,
        batches,
        method=methods.d_trak(timesteps=2),
        tracer=GradientTracer(module.denoiser, Projection(rank=4, dim=64)),
        progress=False,
        processes=processes,
    )
    for step in range(runs):
        made.run(step, epoch=0)
    return made


@pytest.mark.parametrize("count", [2, 3, 5], ids=["2", "3", "more than batches"])
@pytest.mark.parametrize("kind", ["loader", "list", "shuffled once"])
def test_the_store_is_that_of_one_process(tmp_path: Path, count: int, kind: str) -> None:
    def batches() -> Iterable[Any]:
        loader = DataLoader(Toys(), batch_size=3)
        if kind == "loader":
            return loader
        order = [2, 0, 3, 1] if kind == "shuffled once" else range(4)
        all_batches = list(loader)
        return [all_batches[i] for i in order]

    ended = together(
        count, lambda processes: capture(tmp_path / "many", batches(), processes, runs=2)
    )
    assert [error for error in ended if isinstance(error, Exception)] == []
    capture(tmp_path / "one", batches(), ALONE, runs=2)
    many, one = TraceStore(tmp_path / "many"), TraceStore(tmp_path / "one")
    assert many.verify() == []
    assert many.header == one.header
    assert many.samples.metadata == one.samples.metadata
    assert many.samples.thumbnails is not None
    assert one.samples.thumbnails is not None
    assert torch.equal(many.samples.thumbnails, one.samples.thumbnails)
    for mine, other in zip(many.checkpoints, one.checkpoints, strict=True):
        assert torch.equal(mine.features(), other.features())
        assert torch.equal(mine.losses(), other.losses())


def test_a_loader_in_order_loads_no_others_samples(tmp_path: Path) -> None:
    seen: list[list[int]] = [[], []]

    def one(processes: Processes) -> None:
        data = Counted()
        capture(tmp_path, DataLoader(data, batch_size=3), processes)
        seen[processes.rank] = data.seen

    assert together(2, one) == [None, None]
    # The first batch on trial; all once to see who they are; the first again, whether it is the
    # same; all to trace them.
    own = [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert seen == [[*batches[:3], *batches, *batches[:3], *batches] for batches in own]


def test_a_sample_that_cannot_be_traced_stops_all(tmp_path: Path) -> None:
    def one(processes: Processes) -> None:
        toys = Toys()
        toys.images[10] = float("nan")  # none of those on trial
        capture(tmp_path, DataLoader(toys, batch_size=3), processes)

    for error in together(2, one):
        assert isinstance(error, GradientError)
        assert "not finite" in str(error)


def test_an_order_that_changes_is_refused_by_all(tmp_path: Path) -> None:
    class Unsteady:
        """Other batches each time."""

        def __init__(self) -> None:
            self.times = 0

        def __iter__(self) -> Any:
            self.times += 1
            batches = list(DataLoader(Toys(), batch_size=3))
            return iter(
                batches[:: 1 if self.times <= 2 else -1]
            )  # on trial, and to see who they are

    errors = together(2, lambda processes: capture(tmp_path, Unsteady(), processes))
    assert [type(error) for error in errors] == [DatasetChangedError] * 2


def test_shapes_that_differ_between_processes_are_refused_by_all(tmp_path: Path) -> None:
    batches = list(DataLoader(Toys(), batch_size=3))
    batches[1]["image"] = batches[1]["image"][..., :4]
    errors = together(2, lambda processes: capture(tmp_path, batches, processes))
    assert [type(error) for error in errors] == [GradientError] * 2
    assert "(3, 8, 8) and (3, 8, 4)" in str(errors[0])


@pytest.mark.parametrize("call", ["gather", "sum"])
def test_a_process_that_has_gone_is_told_of_with_the_way_on(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(dist, "all_gather_object", lost)
    monkeypatch.setattr(dist, "all_reduce", lost)
    process = object.__new__(DistributedProcesses)
    process.rank, process.count, process._group = 1, 3, None
    with pytest.raises(ProcessLostError, match="Process 1 of 3: another.*Connection reset.*HINT"):
        getattr(process, call)(torch.ones(2))


HANGING = """
import sys, time
import torch.distributed as dist
from ctrak_lightning.utilities.processes import DistributedProcesses
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
processes = DistributedProcesses()
processes.gather(rank)
if rank == 1:
    time.sleep(120)
began = time.monotonic()
try:
    processes.gather(rank)
except Exception as error:
    print(type(error).__name__, time.monotonic() - began)
    sys.stdout.flush()
    import os
    os._exit(0)
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_within_the_stated_time(tmp_path: Path) -> None:
    environment = os.environ | {"CTRAK_PROCESS_TIMEOUT": "0.05", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HANGING]
    hanging = subprocess.Popen([*command, "1", str(tmp_path / "store")], env=environment)
    try:
        waiting = subprocess.run(
            [*command, "0", str(tmp_path / "store")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
    finally:
        hanging.kill()
        hanging.wait()
    kind, seconds = waiting.stdout.split()
    assert kind == "ProcessLostError"
    assert 2 < float(seconds) < 20


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_to_wait_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CTRAK_PROCESS_TIMEOUT", text)
    with pytest.raises(ValueError, match="expected a positive number of minutes.*HINT"):
        _longest()
