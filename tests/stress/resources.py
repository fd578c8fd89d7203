"""Fine-tunes with traces on a machine that runs out of something in the middle: what becomes of
training, store and ledger?

python -m tests.stress.resources

Steps 4 to 6 of nine lack the resource, so that of the traces at steps 3, 6 and 9 one cannot be
stored. With ``on_error="warn"`` the weights must be those of a run without callbacks, the store
must be sound and hold the others, a warning and the ledger must name the step; with ``"raise"`` the
run must stop there with a StoreError. A file system of its own takes root; without it those rows
say so.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ctrak_lightning import TraceStore
from ctrak_lightning.callbacks import ProvenanceRecorder
from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance import Ledger, verify
from ctrak_lightning.tasks import Condition
from tests.stress.figures import RESULTS, keep
from tests.stress.subject import STEPS, Subject, SubjectData, tracer

FROM, TO = 4, 6


class SkippedError(Exception):
    """The scenario cannot be made here."""


class Scenario:
    """Something that is taken away and given back. Its store is in ``folder``."""

    lacking: tuple[int, ...] = (6,)
    """Steps whose traces cannot be stored."""
    message: str | None = None
    """What must be told beside those."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self) -> None:
        raise NotImplementedError

    def give_back(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leaves the machine as it was."""


class FullDisk(Scenario):
    """A tmpfs of two megabytes that something else fills."""

    size = "2m"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        _mount("-t", "tmpfs", "-o", f"size={self.size}", "none", str(folder))

    def take(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\1" * 4096)
            except OSError:
                pass

    def give_back(self) -> None:
        (self.folder / "filler").unlink()

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


class ReadOnly(FullDisk):
    """A file system that turns read-only, as after an error of the disk."""

    def take(self) -> None:
        _mount("-o", "remount,ro", str(self.folder))

    def give_back(self) -> None:
        _mount("-o", "remount,rw", str(self.folder))


class NoHandles(Scenario):
    """No file can be opened any more."""

    def take(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The highest that is in use, not the count of them: the limit is on the number of a new
        # one.
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (min(self.limits[1], _lowest_free()), self.limits[1])
        )

    def give_back(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


class ClockJumps(Scenario):
    """The clock goes back a year, and forward again."""

    lacking = ()

    def take(self) -> None:
        self.time, self.time_ns = time.time, time.time_ns
        time.time = lambda: self.time() - 3.2e7
        time.time_ns = lambda: self.time_ns() - 32 * 10**15

    def give_back(self) -> None:
        time.time, time.time_ns = self.time, self.time_ns


class LittleMemory(Scenario):
    """A capture can take one sample at once and no more; it takes two at first."""

    lacking = ()
    message = "Memory ran out"

    def take(self) -> None:
        self.predict = Subject.predict

        def predict(module: Subject, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            if len(x_t) > 1 and not module.in_a_training_step:
                raise torch.OutOfMemoryError("out of memory, for this test")
            return self.predict(module, x_t, t, condition)

        Subject.predict = predict  # type: ignore[method-assign]

    def give_back(self) -> None:
        Subject.predict = self.predict  # type: ignore[method-assign]


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "full disk": FullDisk,
    "read-only file system": ReadOnly,
    "no file handles": NoHandles,
    "clock jumps": ClockJumps,
    "little memory at a capture": LittleMemory,
}


class Shortage(L.Callback):
    """Takes the resource away before one step and gives it back before another."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == FROM - 1:
            self.scenario.take()
        if trainer.global_step == TO:
            self.scenario.give_back()


class Observed(Subject):
    """Says whether a training step is on."""

    in_a_training_step = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.in_a_training_step = True
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.in_a_training_step = False


def fine_tune(callbacks: list[Any]) -> dict[str, Tensor]:
    L.seed_everything(0, verbose=False)
    module = Observed()
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=SubjectData())
    return {name: value.clone() for name, value in module.state_dict().items()}


def outcome(name: str, on_error: str) -> dict[str, Any]:
    """What became of a run under a shortage; to be called in a process of its own."""
    reference = fine_tune([])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        folder.mkdir()
        try:
            scenario = SCENARIOS[name](folder)
        except SkippedError as reason:
            return {"skipped": str(reason)}
        try:
            return _outcome(scenario, reference, on_error)
        except (
            SkippedError
        ) as reason:  # a file system with a lock that is held is not always made read-only
            return {"skipped": str(reason)}
        finally:
            scenario.close()


def _outcome(scenario: Scenario, reference: dict[str, Tensor], on_error: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    path = scenario.folder / "traces"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            weights = fine_tune(
                [
                    Shortage(scenario),
                    tracer(scenario.folder, on_error=on_error),
                    ProvenanceRecorder(),
                ]
            )
            found["stopped"] = None
            found["weights_equal"] = all(
                torch.equal(weights[key], value) for key, value in reference.items()
            )
        except StoreError as error:
            found["stopped"] = type(error).__name__
            scenario.give_back()
        messages = [str(warning.message) for warning in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = TraceStore(path)
        found["sealed"] = [checkpoint.step for checkpoint in store.checkpoints]
        found["problems"] = [
            p for p in verify(path) if not p.endswith("not recorded in the manifest")
        ]
        last = Ledger(path).entries()[-1]
    expected = scenario.message
    found["told_how"] = expected is None or any(expected in message for message in messages)
    found["told"] = any("have no trace" in message for message in messages)
    found["ledger"] = [last.kind, last.facts.get("untraced_steps", [])]
    lacking = list(scenario.lacking)
    kept = [step for step in (3, 6, 9) if step not in lacking]
    if lacking and on_error == "raise":
        found["as_promised"] = (
            found["stopped"] == "StoreError" and found["sealed"] == [3] and not found["problems"]
        )
    else:
        found["as_promised"] = (
            found["stopped"] is None
            and found["weights_equal"]
            and found["sealed"] == kept
            and not found["problems"]
            and found["told"] == bool(lacking)
            and found["told_how"]
            and found["ledger"] == ["run_ended", lacking]
        )
    return found


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except OSError as error:
        raise SkippedError(f"mount: {error}") from error
    if done.returncode:
        raise SkippedError(f"mount: {done.stderr.strip()}")


def _lowest_free() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def in_a_process(name: str, on_error: str) -> dict[str, Any]:
    """:func:`outcome` in a fork; a crash is an outcome too."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = outcome(name, on_error)
        except BaseException:
            found = {"as_promised": False, "error": traceback.format_exc()[-2000:]}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    result: dict[str, Any] = (
        json.loads(text) if text else {"as_promised": False, "error": f"ended with {status}"}
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    found = {
        name: {on_error: in_a_process(name, on_error) for on_error in ("warn", "raise")}
        for name in args.scenarios
    }
    keep("resources", found, args.results)
    if any(each.get("as_promised") is False for both in found.values() for each in both.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
