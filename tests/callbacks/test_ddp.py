"""Two processes: training stays as it was, and the store is that of one process with the same
weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctrak_lightning import Capture, GradientTracer, Projection, TraceStore, methods
from ctrak_lightning.provenance import Ledger, verify

from ..toy import ToyData, ToyDiffusion

ROOT = Path(__file__).parent.parent.parent


def fit(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.callbacks.ddp_worker", str(folder), what]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def weights_after(folder: Path, what: str) -> dict[str, torch.Tensor]:
    done = fit(folder, what)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_before_and_trace_a_share_each(tmp_path: Path) -> None:
    plain, traced = (
        weights_after(tmp_path / "plain", "plain"),
        weights_after(tmp_path / "traced", "traced"),
    )
    assert plain.keys() == traced.keys()
    assert all(torch.equal(plain[name], traced[name]) for name in plain)

    store = TraceStore(tmp_path / "traced" / "traces")
    assert store.verify() == []
    assert len(store) == 12
    last = store.checkpoints[-1]
    folder = tmp_path / "traced" / "traces" / f"checkpoint-{last.step:08d}"
    assert [path.name for path in sorted(folder.glob("rank*"))] == [
        "rank0-00000.h5",
        "rank1-00000.h5",
    ]

    module = ToyDiffusion()
    module.load_state_dict(traced)
    loader = ToyData().train_dataloader()
    in_order = torch.utils.data.DataLoader(loader.dataset, batch_size=4)
    capture = Capture(
        str(tmp_path / "single"),
        module,
        module,
        in_order,
        method=methods.d_trak(timesteps=2),
        tracer=GradientTracer(module.denoiser, Projection(rank=4, dim=64)),
        progress=False,
    )
    capture.run(last.step, epoch=last.epoch)
    single = TraceStore(tmp_path / "single")
    assert single.samples.sample_ids == store.samples.sample_ids
    assert single.samples.content_sha256 == store.samples.content_sha256
    torch.testing.assert_close(
        last.features(), single.checkpoints[0].features(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(last.losses(), single.checkpoints[0].losses())


@pytest.mark.slow
def test_one_of_two_processes_keeps_the_ledger(tmp_path: Path) -> None:
    plain, recorded = (
        weights_after(tmp_path / "plain", "plain"),
        weights_after(tmp_path / "recorded", "recorded"),
    )
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    path = tmp_path / "recorded" / "traces"
    entries = Ledger(path).entries()
    assert [entry.kind for entry in entries] == [
        "run_begun",
        "dataset",
        "checkpoint",
        "checkpoint",
        "run_ended",
    ]
    assert entries[0].facts["hardware"]["processes"] == 2
    assert entries[2].facts["processes"] == 2
    assert verify(path, deep=True) == []


@pytest.mark.slow
def test_of_two_processes_the_first_one_monitors(tmp_path: Path) -> None:
    plain, watched = (
        weights_after(tmp_path / "plain", "plain"),
        weights_after(tmp_path / "m", "monitored"),
    )
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert TraceStore(tmp_path / "m" / "traces").verify() == []
    assert len(list((tmp_path / "m" / "board").glob("events.*"))) == 1
    found = EventAccumulator(str(tmp_path / "m" / "board")).Reload()
    assert [event.step for event in found.Scalars("ctrak/contributors/red")] == [1, 3]
    assert found.Tags()["images"] == ["ctrak/concept/red"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_leaves_what_was_sealed(tmp_path: Path) -> None:
    assert fit(tmp_path, "dies").returncode != 0
    with pytest.warns(UserWarning, match="not sealed"):
        store = TraceStore(tmp_path / "traces")
    [first] = store.checkpoints
    assert store.verify() == []
    features = first.features()

    weights_after(tmp_path, "resumes")
    store = TraceStore(tmp_path / "traces")
    assert [checkpoint.epoch for checkpoint in store.checkpoints] == [0, 1]
    assert torch.equal(store.checkpoints[0].features(), features)
    assert store.verify() == []
