"""Fine-tunes with traces that are killed with SIGKILL at a random moment, checked, resumed, and
held against a whole run.

python -m tests.stress.kill --runs 200

A moment is a random time within a random occurrence of a stage (a training step, a shard, sealing,
the Gram matrix, the manifest, ...), so that short stages are hit as often as long ones. Of every
run it is checked that

- the store opens, every file in it is as it was sealed, and every shard that was recorded before
  the kill is there;
- ``fit(ckpt_path=...)`` from Lightning's newest checkpoint goes on to the end, without a hand on
  the store;
- it goes on inside a batch where the kill left a shard's end there, as many kills do
  (``cut_inside_a_batch``);
- then all files of the store but the ledger (which tells of the interruption) are byte for byte
  those of a run that was never killed, the final weights are bit-identical, and ``verify`` finds
  the ledger and the store in agreement.

Each run is a fork, so that the imports are paid once.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import ctrak_lightning.capture.capture
from ctrak_lightning.callbacks import ProvenanceRecorder
from ctrak_lightning.cli import main as ctrak
from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance import verify
from ctrak_lightning.store import CheckpointWriter, TraceStore, checkpoint_writer, records, writer
from ctrak_lightning.store.manifest import read_manifest
from tests.stress.figures import RESULTS, keep
from tests.stress.subject import Subject, SubjectData, fine_tune

OF_THE_RUN = ("ledger.jsonl", "commitments.h5", "writer.lock")
"""The ledger tells of the interruption, its commitments have random salts, and the lock names the
process."""
UNRECORDED = ": not recorded in the manifest"
SHARD_ROWS = 5
"""Of twelve samples in batches of four: a checkpoint has several shards, and all but the last end
inside a batch."""
Moment = tuple[str, int, float]
"""Stage, occurrence, and seconds after its begin."""


def run(folder: Path, tell: Callable[[str], None]) -> None:
    """The fine-tune from wherever it got to, then an export; tells of every stage as it begins and
    ends."""
    _tell_stages(tell)
    # The id of a run and the ledger's clock are all that two runs differ in.
    checkpoints = sorted(
        (folder / "checkpoints").glob("step=*.ckpt"), key=lambda path: int(path.stem[5:])
    )
    newest = next((path for path in reversed(checkpoints) if _loads(path)), None)
    module = fine_tune(folder, ckpt_path=None if newest is None else str(newest))
    save_file(
        {name: value.detach() for name, value in module.state_dict().items()},
        folder / "final.safetensors",
    )
    tell("begin export")
    # --force: an earlier occurrence may have been killed when the file was there.
    out = ["--out", str(folder / "croissant.json"), "--force"]
    ctrak(["export", str(folder / "traces"), "--format", "croissant", *out])
    tell("end export")


def _loads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def _tell_stages(tell: Callable[[str], None]) -> None:
    import uuid

    uuid.uuid4 = lambda: type("Fixed", (), {"hex": "0" * 32})()  # type: ignore[assignment]

    writer.default_shard_rows = lambda *_: SHARD_ROWS

    def stage(
        name: str, owner: Any, attribute: str, done: Callable[..., str] | None = None
    ) -> None:
        original = getattr(owner, attribute)

        def told(*args: Any, **kwargs: Any) -> Any:
            tell(f"begin {name}")
            result = original(*args, **kwargs)
            tell(f"end {name}" if done is None else f"end {name}: {done(*args)}")
            return result

        setattr(owner, attribute, told)

    stage("training", Subject, "training_step")
    stage("capture", ctrak_lightning.capture.capture, "trace_batch")
    stage(
        "shard", CheckpointWriter, "_write_shard", lambda it, rows: f"{it.step} {len(rows.index)}"
    )
    stage("sealing", CheckpointWriter, "seal")
    stage("manifest", records, "write_manifest")
    stage("Gram", checkpoint_writer, "kernel_of_columns")
    stage("kernel file", checkpoint_writer, "write_kernel")
    stage("ledger", ProvenanceRecorder, "_follow")


class Fork:
    """A run in a child process, and what it tells."""

    def __init__(self, folder: Path) -> None:
        self.told: list[tuple[float, str]] = []
        read, write = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(read)
            _child(folder, write)
        os.close(write)
        self._pipe = os.fdopen(read, "r", encoding="utf-8")

    def finish(self) -> int:
        """Listens to the end; the exit code, or minus the signal."""
        for line in self._pipe:
            self.told.append((time.monotonic(), line.strip()))
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def kill_at(self, moment: Moment) -> int:
        """Kills at a moment, and listens to what was told before."""
        stage, occurrence, delay = moment
        for line in self._pipe:
            self.told.append((time.monotonic(), line.strip()))
            if line.strip() == f"begin {stage}":
                occurrence -= 1
                if occurrence < 0:
                    time.sleep(delay)
                    break
        os.kill(self.child, signal.SIGKILL)
        return self.finish()


def _child(folder: Path, pipe: int) -> None:
    status = 1
    try:
        folder.mkdir(exist_ok=True)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        run(folder, lambda line: os.write(pipe, f"{line}\n".encode()) and None)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def moments(told: Sequence[tuple[float, str]]) -> dict[str, list[float]]:
    """How long every occurrence of each stage took in a run that was not killed."""
    begun: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    for at, line in told:
        word, stage = line.split(":")[0].split(" ", 1)
        if word == "begin":
            begun.setdefault(stage, []).append(at)
        else:
            took.setdefault(stage, []).append(at - begun[stage].pop())
    return took


def content(folder: Path) -> dict[str, bytes]:
    """The store's files, but for those that tell when and how it was made."""
    root = folder / "traces"
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if path.name not in OF_THE_RUN
    }


def check_after_kill(folder: Path, told: Sequence[tuple[float, str]]) -> list[str]:
    """What is wrong with the store as the kill left it."""
    recorded = [line.split(": ")[1] for _, line in told if line.startswith("end shard: ")]
    rows: Counter[int] = Counter()
    for step, count in (map(int, each.split()) for each in recorded):
        rows[step] += count
    path = folder / "traces"
    if not (path / "manifest.json").exists():
        return [f"no manifest, and {dict(rows)} rows had been recorded"] if rows else []
    problems = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = {record.step: record.rows for record in read_manifest(path).checkpoints}
        lost = {step: count for step, count in rows.items() if held.get(step, 0) < count}
        if lost:
            problems.append(f"recorded rows {lost}, the manifest has {held}")
        try:
            # A file that was being written, or was written and not yet recorded, is told and does
            # no harm.
            problems += [
                problem for problem in TraceStore(path).verify() if not problem.endswith(UNRECORDED)
            ]
        except StoreError as error:
            if any("end sealing" in line for _, line in told):
                problems.append(f"does not open: {error}")
    return problems


def is_cut_inside_a_batch(folder: Path) -> bool:
    """Whether the store has a checkpoint whose recorded rows end inside a batch, where the resumed
    run goes on."""
    path, size = folder / "traces", SubjectData().batch_size
    if not (path / "manifest.json").exists():
        return False
    records = read_manifest(path).checkpoints
    return any(not record.sealed and record.rows % size for record in records)


def check_at_end(folder: Path, whole: Path) -> list[str]:
    """Where a resumed run differs from one that was never killed."""
    ours, theirs = content(folder), content(whole)
    problems = [
        f"differs: {name}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    mine, reference = (
        load_file(folder / "final.safetensors"),
        load_file(whole / "final.safetensors"),
    )
    problems += [
        f"weights differ: {name}"
        for name in reference
        if not torch.equal(mine[name], reference[name])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problems + verify(folder / "traces")


def one(folder: Path, whole: Path, moment: Moment) -> dict[str, Any]:
    """Kills one run at a moment, resumes it, and reports."""
    killed = Fork(folder)
    status = killed.kill_at(moment)
    report: dict[str, Any] = {
        "moment": [moment[0], moment[1], round(moment[2], 4)],
        "killed": status == -signal.SIGKILL,
    }
    problems = check_after_kill(folder, killed.told)
    report["cut_inside_a_batch"] = is_cut_inside_a_batch(folder)
    ended = Fork(folder).finish()
    if ended != 0:
        problems.append(
            f"the resumed run ended with {ended}: {(folder / 'log.txt').read_text()[-600:]}"
        )
    else:
        problems += check_at_end(folder, whole)
    return report | {"problems": problems}


def stress(root: Path, runs: int, seed: int) -> dict[str, Any]:
    """Figures of ``runs`` kills."""
    whole = Fork(root / "whole")
    if whole.finish() != 0:
        raise SystemExit((root / "whole" / "log.txt").read_text())
    took = moments(whole.told)
    generator = random.Random(seed)
    stages = sorted(took)
    reports = []
    for number in range(runs):
        stage = stages[number % len(stages)]
        occurrence = generator.randrange(len(took[stage]))
        moment = (stage, occurrence, generator.uniform(0, took[stage][occurrence]))
        folder = root / str(number)
        reports.append(one(folder, root / "whole", moment))
        if not reports[-1]["problems"]:
            shutil.rmtree(folder)
        print(number, reports[-1], flush=True)
    return {
        "runs": runs,
        "seed": seed,
        "killed": sum(report["killed"] for report in reports),
        "cut_inside_a_batch": sum(report["cut_inside_a_batch"] for report in reports),
        "killed_in": dict(Counter(report["moment"][0] for report in reports if report["killed"])),
        "with_problems": sum(bool(report["problems"]) for report in reports),
        "problems": [report for report in reports if report["problems"]],
        "milliseconds_of_stage": {
            stage: round(1000 * sum(times) / len(times), 2) for stage, times in took.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        keep("kill", stress(Path(folder), args.runs, args.seed), args.results)


if __name__ == "__main__":
    main()
