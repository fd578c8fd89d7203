"""The same run started twice into one folder: one trains and its store is whole, the other is told.

python -m tests.stress.double_start --starts 30

As a job that is queued again, or launched by every process of a node, does. Two processes begin the
same fine-tune, the second 0, 0.6, 1.1 or a random number of seconds after the first. Looked at is

- that one of them trains to its end, without a step that has no trace;
- that the other ends with a MisconfigurationException that names the first one's process, and
  changes nothing;
- that the store holds every checkpoint, that ``verify`` finds nothing in it or its ledger, and that
  the traces are to the bit those of a run that was alone.
"""

import argparse
import json
import os
import random
import re
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ctrak_lightning import TraceStore
from ctrak_lightning.provenance import verify
from tests.stress import subject
from tests.stress.figures import RESULTS, keep

DELAYS = (0.0, 0.6, 1.1, None)
"""Seconds; None stands for a random number of them."""
LONGEST_DELAY_S, STEP_S = 1.5, 0.25
"""A run of nine steps outlasts the longest delay."""


def start(folder: Path, who: int, delay: float) -> int:
    """A process that waits and then fine-tunes; leaves ``who.json`` behind."""
    if pid := os.fork():
        return pid
    time.sleep(delay)
    told = {"pid": os.getpid(), "ended": "trained", "message": "", "warned": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            subject.fine_tune(folder)
        except BaseException as error:
            told |= {"ended": type(error).__name__, "message": str(error)}
    told["warned"] = [str(one.message) for one in caught if "no trace" in str(one.message)]
    (folder / f"{who}.json").write_text(json.dumps(told))
    os._exit(0)


def double_start(folder: Path, delay: float, alone: TraceStore) -> list[str]:
    """What is wrong with one double start; empty where nothing is."""
    folder.mkdir()
    pids = [start(folder, 0, 0.0), start(folder, 1, delay)]
    for pid in pids:
        os.waitpid(pid, 0)
    first, second = sorted(
        (json.loads((folder / f"{who}.json").read_text()) for who in (0, 1)),
        key=lambda one: one["ended"],
    )
    refused, trained = first, second  # "Misconfiguration..." comes before "trained"
    problems = []
    if (refused["ended"], trained["ended"]) != (MisconfigurationException.__name__, "trained"):
        problems.append(
            f"they ended with {refused['ended']} and {trained['ended']}: {refused['message'][:300]}"
        )
    elif not re.search(
        rf"held by process {trained['pid']} on {re.escape(socket.gethostname())}",
        refused["message"],
    ):
        problems.append(f"the other was told {refused['message'][:300]}")
    problems += trained["warned"]
    try:
        problems += _differences(folder / "traces", alone)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _differences(path: Path, alone: TraceStore) -> list[str]:
    store = TraceStore(path)
    problems = verify(path)
    if [one.step for one in store.checkpoints] != [one.step for one in alone.checkpoints]:
        return [*problems, f"the store has steps {[one.step for one in store.checkpoints]}"]
    for mine, other in zip(store.checkpoints, alone.checkpoints, strict=True):
        if not torch.equal(mine.features(), other.features()):
            problems.append(f"the traces of step {mine.step} are not those of a run that was alone")
    return problems


def stress(root: Path, starts: int, seed: int) -> dict[str, Any]:
    training_step = subject.Subject.training_step

    def slowly(self: subject.Subject, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        time.sleep(STEP_S)
        return training_step(self, batch, batch_idx)

    subject.Subject.training_step = slowly  # type: ignore[method-assign]
    (root / "alone").mkdir()
    os.waitpid(start(root / "alone", 0, 0.0), 0)
    alone = TraceStore(root / "alone" / "traces")
    draw = random.Random(seed)
    problems: dict[str, list[str]] = {}
    by_delay: dict[str, int] = {}
    for number in range(starts):
        fixed = DELAYS[number % len(DELAYS)]
        delay = draw.uniform(0, LONGEST_DELAY_S) if fixed is None else fixed
        name = "random" if fixed is None else f"{fixed} s"
        by_delay[name] = by_delay.get(name, 0) + 1
        if found := double_start(root / str(number), delay, alone):
            problems[f"{number}, {delay:.2f} s later"] = found
        print(number, f"{delay:.2f} s:", found or "one trained, the other was told", flush=True)
    return {
        "starts": starts,
        "by_delay": by_delay,
        "with_problems": len(problems),
        "problems": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = stress(Path(folder), args.starts, args.seed)
    keep("double_start", found, args.results)


if __name__ == "__main__":
    main()
