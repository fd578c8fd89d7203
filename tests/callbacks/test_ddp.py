"""Two processes: training stays as it was, and rank 0's store is the store of one process with the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctrak_lightning import Capture, GradientTracer, Projection, TraceStore, methods

from ..toy import ToyData, ToyDiffusion

ROOT = Path(__file__).parent.parent.parent


def fit(folder: Path, traced: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "tests.callbacks.ddp_worker", str(folder), "2", traced]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_before_and_trace_every_sample_once(tmp_path: Path) -> None:
    plain, traced = fit(tmp_path / "plain", "plain"), fit(tmp_path / "traced", "traced")
    assert plain.keys() == traced.keys()
    assert all(torch.equal(plain[name], traced[name]) for name in plain)

    store = TraceStore(tmp_path / "traced" / "traces")
    assert store.verify() == []
    assert len(store) == 12
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
    last = store.checkpoints[-1]
    capture.run(last.step, epoch=last.epoch)
    again = TraceStore(tmp_path / "single").checkpoints[0]
    for (index, ours), (expected_index, expected) in zip(last.shards(), again.shards(), strict=True):
        assert list(index) == list(expected_index)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
