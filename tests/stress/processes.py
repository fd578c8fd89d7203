"""Fine-tunes with traces by several processes: the same training, the store of one process, and an
end where one process dies.

python -m tests.stress.processes

Thirteen samples, which no number of processes here divides: the sampler of DDP pads, and the store
must hold each once. For 2 and 4 processes (gloo):

- final weights with and without the tracer, to the bit;
- the last checkpoint's traces against those of one process with the same weights, row for row;
- one process is killed with SIGKILL while it traces (the last one, or the first): the others must
  end, with an error, without waiting for ever; what was sealed stays;
- the run goes on from there with another number of processes.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from ctrak_lightning import Capture, GradientTracer, Projection, TraceStore
from ctrak_lightning.store import CheckpointWriter
from tests.stress.figures import RESULTS, keep
from tests.stress.subject import Subject, tracer
from tests.toy import Toys

ROOT = Path(__file__).parent.parent.parent
SAMPLES, EPOCHS, BATCH_SIZE = 13, 3, 2
LONGEST_S = 240
TOLERANCE = 1e-4
"""Of a trace, relative to its norm: the processes trace batches of other sizes."""


class Thirteen(Dataset[dict[str, Any]]):
    """The twelve toys, and one of them with an id of its own."""

    def __init__(self) -> None:
        self.toys = Toys(copies=2)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.toys[index]


class Plain(Subject):
    """Trains on the batches that it is given, of which every process has others."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches = [batch]
        return super().training_step(batch, batch_idx)


def work(folder: Path, processes: int, what: str) -> None:
    """One of the processes; ``what`` is plain, traced, resumed, or dies-RANK."""
    L.seed_everything(3, verbose=False)
    module = Plain()
    saver = ModelCheckpoint(folder / "checkpoints", filename="last", save_on_train_epoch_end=True)
    ours = tracer(folder, every_n_train_steps=None, every_n_epochs=1)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver] if what == "plain" else [ours, saver],
    )
    if what.startswith("dies") and trainer.global_rank == int(what.split("-")[1]):
        _die_at_the_second_checkpoint()
    loader = DataLoader(Thirteen(), BATCH_SIZE, shuffle=True)
    trainer.fit(
        module,
        loader,
        ckpt_path=str(folder / "checkpoints" / "last.ckpt") if what == "resumed" else None,
        weights_only=True,
    )
    if trainer.is_global_zero:
        save_file(
            {name: value.clone() for name, value in module.state_dict().items()},
            folder / "final.safetensors",
        )


def _die_at_the_second_checkpoint() -> None:
    append, first = CheckpointWriter.append, []

    def dying(self: CheckpointWriter, *args: Any) -> None:
        first.append(self.step)
        if self.step != first[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *args)

    CheckpointWriter.append = dying  # type: ignore[method-assign]


def launch(folder: Path, processes: int, what: str) -> dict[str, Any]:
    """Runs the processes; how they ended, and after how long."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.stress.processes",
        "--work",
        str(folder),
        str(processes),
        what,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with (folder / f"{what}.log").open("w") as log:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | str = running.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            code = "hang"
        while (left := _session(running.pid)) and time.monotonic() - began < LONGEST_S:
            time.sleep(0.2)
        for process in left:
            process.kill()
    text = (folder / f"{what}.log").read_text()
    return {
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "left_over": len(left),
        "said": [line for line in text.splitlines() if "Error" in line][-1:],
        "tail": text[-1500:],
    }


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def against_one(folder: Path) -> float:
    """The largest relative difference of a row of the last checkpoint to that of one process."""
    store = TraceStore(folder / "traces")
    last = store.checkpoints[-1]
    module = Plain()
    module.load_state_dict(load_file(folder / "final.safetensors"))
    how = tracer(folder)
    capture = Capture(
        str(folder / "single"),
        module,
        module,
        DataLoader(Thirteen(), 4),
        method=how.method,
        tracer=GradientTracer(module.denoiser, Projection(rank=4, dim=32)),
        progress=False,
    )
    capture.run(last.step, epoch=last.epoch)
    single = TraceStore(folder / "single")
    if single.samples.sample_ids != store.samples.sample_ids:
        raise AssertionError(f"{store.samples.sample_ids} instead of {single.samples.sample_ids}")
    ours, theirs = last.features(), single.checkpoints[0].features()
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def stress(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count, other in ((2, 4), (4, 1)):
        here = root / str(count)
        plain, traced = (
            launch(here / "plain", count, "plain"),
            launch(here / "traced", count, "traced"),
        )
        if plain["code"] != 0 or traced["code"] != 0:
            raise SystemExit(plain["tail"] + traced["tail"])
        mine, reference = (
            load_file(here / name / "final.safetensors") for name in ("traced", "plain")
        )
        row: dict[str, Any] = {
            "weights_equal": all(
                torch.equal(mine[name], value) for name, value in reference.items()
            ),
            "samples": len(TraceStore(here / "traced" / "traces")),
            "verified": TraceStore(here / "traced" / "traces").verify() == [],
            "relative_difference_to_one_process": against_one(here / "traced"),
            "tolerance": TOLERANCE,
        }
        for rank in (count - 1, 0):
            row[f"rank {rank} killed"] = _killed(here / f"dies-{rank}", count, rank, other)
        found[f"{count} processes"] = row
        print(found, flush=True)
    return found


def _killed(folder: Path, count: int, rank: int, other: int) -> dict[str, Any]:
    ended = launch(folder, count, f"dies-{rank}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sealed = [checkpoint.step for checkpoint in TraceStore(folder / "traces").checkpoints]
    resumed = launch(folder, other, "resumed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = TraceStore(folder / "traces")
        return {
            "code": ended["code"],
            "seconds": ended["seconds"],
            "left_over": ended["left_over"],
            "said": ended["said"],
            "sealed": sealed,
            f"resumed_with_{other}": {
                "code": resumed["code"],
                "sealed": [checkpoint.step for checkpoint in store.checkpoints],
                "kept": [c.step for c in store.checkpoints][: len(sealed)] == sealed,
                "verified": store.verify() == [],
                "tail": "" if resumed["code"] == 0 else resumed["tail"],
            },
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", nargs=3, metavar=("FOLDER", "PROCESSES", "WHAT"), help=argparse.SUPPRESS
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.work:
        folder, processes, what = args.work
        work(Path(folder), int(processes), what)
        return
    with tempfile.TemporaryDirectory() as place:
        keep("processes", stress(Path(place)), args.results)


if __name__ == "__main__":
    main()
