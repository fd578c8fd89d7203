"""What a store says it holds, it holds: after SIGKILL at any moment."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_builder import Capture, make_table, read_bytes

from ctrak_lightning.errors import StoreError
from ctrak_lightning.store import TraceStore


@pytest.mark.slow
def test_killed_and_continued_stores_are_byte_identical(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("crash_worker.py")), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name, files, least in (
        ("every_tick", 6, 80),
        ("again_and_again", 12, 2),
        ("any_time", 12, 1),
    ):
        assert report[name]["bad"] == [], (name, done.stderr)
        assert report[name]["files"] == files
        assert report[name]["killed"] >= least


@pytest.mark.parametrize("stop", [0, 3, 4, 7, 8, 10])
@pytest.mark.parametrize("batch", [1, 4, 10])
def test_capture_that_stopped_goes_on_where_its_shards_end(
    tmp_path: Path, capture: Capture, stop: int, batch: int
) -> None:
    whole = read_bytes(capture.run(tmp_path / "whole"))
    writer = capture.open(tmp_path / "stopped")
    writer.write_samples(make_table())
    capture.run_checkpoint(writer, 300, batch, stop=stop)
    writer.close()
    options = {"epoch": 3, "learning_rate": 0.1, "weights": capture.weights(300)}
    with capture.open(tmp_path / "stopped") as again:
        assert again.begin_checkpoint(300, **options).rows_done == (stop // 4 * 4)
    assert read_bytes(capture.run(tmp_path / "stopped", batch)) == whole


def test_exception_inside_a_capture_keeps_sealed_shards(tmp_path: Path, capture: Capture) -> None:
    writer = capture.open(tmp_path)
    writer.write_samples(make_table())
    features, loss = capture.traces(300)

    def interrupted() -> None:
        with writer.begin_checkpoint(300, epoch=3) as checkpoint:
            checkpoint.append(torch.arange(9), features[:9], loss[:9])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    again = writer.begin_checkpoint(300, epoch=3)
    assert again.rows_done == 8
    again.append(torch.arange(8, 10), features[8:], loss[8:])
    again.seal()
    torch.testing.assert_close(
        TraceStore(tmp_path).checkpoints[0].features(), features, rtol=1e-6, atol=0
    )


def test_leftovers_of_a_killed_run_are_removed_and_other_files_are_not(
    tmp_path: Path, capture: Capture
) -> None:
    whole = read_bytes(capture.run(tmp_path))
    leftovers = [
        "manifest.json.ctrak-tmp",
        "checkpoint-00000300/rank0-00003.h5",
        "checkpoint-00000300/kernel.h5.ctrak-tmp",
        "checkpoint-00000900/rank0-00000.h5",
    ]
    (tmp_path / "checkpoint-00000900").mkdir()
    for name in [*leftovers, "notes.txt"]:
        (tmp_path / name).write_text("x")
    assert len(TraceStore(tmp_path).verify()) == 5
    capture.open(tmp_path)
    assert read_bytes(tmp_path) == whole | {"notes.txt": b"x"}
    assert not (tmp_path / "checkpoint-00000900").exists()
    assert TraceStore(tmp_path).verify() == ["notes.txt: not recorded in the manifest"]


def test_samples_renamed_but_not_recorded_are_written_again(
    tmp_path: Path, capture: Capture
) -> None:
    capture.open(tmp_path).close()
    (tmp_path / "samples.h5").write_text("half a table")
    with capture.open(tmp_path) as writer:
        assert not (tmp_path / "samples.h5").exists()
        writer.write_samples(make_table())
    assert TraceStore(capture.run(tmp_path)).verify() == []


@pytest.mark.parametrize("failing", ["checkpoint-00000300/rank0-00001.h5", "manifest.json"])
def test_disk_that_fails_once_loses_and_doubles_nothing(
    tmp_path: Path, capture: Capture, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    whole = read_bytes(capture.run(tmp_path / "whole"))
    writer = capture.open(tmp_path / "failed")
    writer.write_samples(make_table())
    features, loss = capture.traces(300)
    order = capture.order(300)
    checkpoint = writer.begin_checkpoint(
        300, epoch=3, learning_rate=0.1, weights=capture.weights(300)
    )
    checkpoint.append(order[:4], features[order[:4]], loss[order[:4]])
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if str(target).endswith(failing):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full_disk)
        checkpoint.append(order[4:8], features[order[4:8]], loss[order[4:8]])
        with pytest.raises(StoreError, match=r"No space left on device.*HINT") as caught:
            checkpoint.flush()
    assert isinstance(caught.value.__cause__, OSError)
    checkpoint.append(order[8:], features[order[8:]], loss[order[8:]])
    checkpoint.seal()
    writer.close()
    assert read_bytes(capture.run(tmp_path / "failed")) == whole


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names open files through /proc")
def test_content_and_names_are_durable_before_the_manifest_says_so(
    tmp_path: Path, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = capture.open(tmp_path)
    writer.write_samples(make_table())
    checkpoint = writer.begin_checkpoint(300, epoch=3)
    events: list[str] = []
    replace = os.replace

    def note_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"fsync {re.sub('[.][0-9]+-[0-9a-f]{16}[.]ctrak-tmp$', ' aside', name)}")

    def note_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.append(f"replace {Path(target).name}")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    features, loss = capture.traces(300)
    checkpoint.append(torch.arange(4), features[:4], loss[:4])
    checkpoint.flush()
    assert events == [
        "fsync rank0-00000.h5 aside",
        "replace rank0-00000.h5",
        "fsync checkpoint-00000300",
        "fsync manifest.json aside",
        "replace manifest.json",
        f"fsync {tmp_path.name}",
    ]


def test_other_weights_begin_the_checkpoint_anew(tmp_path: Path, capture: Capture) -> None:
    """A capture that was cut and whose training then went another way must not keep the first
    model's rows."""
    whole = read_bytes(capture.run(tmp_path / "whole"))
    writer = capture.open(tmp_path / "cut")
    writer.write_samples(make_table())
    features, loss = capture.traces(300)
    options = {"epoch": 3, "learning_rate": 0.1}
    other = {name: value + 1 for name, value in capture.weights(300).items()}
    with writer.begin_checkpoint(300, **options, weights=other) as checkpoint:
        checkpoint.append(torch.arange(10), features + 1, loss)
    writer.close()
    with capture.open(tmp_path / "cut") as again:
        assert again.begin_checkpoint(300, **options, weights=capture.weights(300)).rows_done == 0
    assert read_bytes(capture.run(tmp_path / "cut")) == whole
