"""A capture that was cut inside a batch goes on with the next sample, as if it had not been cut."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ctrak_lightning import Capture, GradientTracer, Projection, TraceStore, methods
from ctrak_lightning.store import writer
from ctrak_lightning.store.manifest import read_manifest
from tests.stress.subject import Subject
from tests.toy import Toys

SHARD, BATCH = 5, 4
"""Twelve samples: the first shard ends behind the first sample of the second batch, the second
behind the second of the third."""


class Stopped(Subject):
    """Fails at a pass of the network over a whole batch; ``passes`` counts them."""

    fails_at = -1
    passes = 0

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.passes += len(x_t) == BATCH
        if len(x_t) == BATCH and self.passes - 1 == self.fails_at:
            raise KeyboardInterrupt
        return super().predict(x_t, t, condition)


def capture(folder: Path, fails_at: int = -1) -> None:
    task = Stopped()
    task.fails_at = fails_at
    method = methods.d_trak(timesteps=1)
    tracer = GradientTracer(task.denoiser, Projection(rank=4, dim=32))
    made = Capture(
        str(folder),
        task,
        task,
        DataLoader(Toys(), BATCH),
        method=method,
        tracer=tracer,
        progress=False,
    )
    task.passes = 0
    made.run(1, epoch=0)


@pytest.mark.parametrize(
    "passes", [2, -1], ids=["cut in the second batch", "cut in the third batch"]
)
def test_a_capture_that_was_cut_inside_a_batch_goes_on_with_the_next_sample(
    tmp_path: Path, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "default_shard_rows", lambda *_: SHARD)
    capture(tmp_path / "whole")
    whole = TraceStore(tmp_path / "whole")
    # d_trak has one pass a state: two batches were traced, of which a shard is on disk, or all
    # three, of which two are.
    with pytest.MonkeyPatch.context() as patched:
        if passes < 0:
            patched.setattr("ctrak_lightning.store.CheckpointWriter.seal", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture(tmp_path / "cut", fails_at=passes)
    [record] = read_manifest(tmp_path / "cut").checkpoints
    assert not record.sealed
    assert record.rows == (SHARD if passes > 0 else 2 * SHARD)
    capture(tmp_path / "cut")
    found, expected = (store.checkpoints[0] for store in (TraceStore(tmp_path / "cut"), whole))
    assert torch.equal(found.features(), expected.features())
    assert torch.equal(found.losses(), expected.losses())
    names = {
        str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*.h5")
    }
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name
        )


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
