"""A trace that cannot be stored: training stops with a typed error, or goes on as if nothing had
been attached."""

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ctrak_lightning import Encoded, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.errors import DatasetChangedError, ProcessLostError, StoreError
from ctrak_lightning.methods.trajectories import Inverted
from ctrak_lightning.store import IncompleteStoreWarning, records

from ..toy import QuickDiffusion
from .test_concept_tracer import ROOT, fit, tracer

Fill = Callable[[Path], None]


def full_disk(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[Path], bool]) -> None:
    """Shards and kernels for which ``is_full`` fail half-way through, as on a full disk."""
    real = records.write_atomically

    def write(path: Path, fill: Fill) -> Any:
        def half(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        is_trace = path.suffix == ".h5" and path.stem not in {"samples", "exposures"}
        return real(path, half if is_trace and is_full(path) else fill)

    monkeypatch.setattr(records, "write_atomically", write)


def fitted(callbacks: list[Any]) -> dict[str, torch.Tensor]:
    L.seed_everything(5, verbose=False)
    module = QuickDiffusion(dropout=0.2)
    fit(module, callbacks, max_epochs=3)
    return module.state_dict()


def sealed(path: Path) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteStoreWarning)
        store = TraceStore(path / "traces")
    assert store.verify() == []
    for checkpoint in store.checkpoints:
        checkpoint.features()
    return [checkpoint.step for checkpoint in store.checkpoints]


def test_a_full_disk_costs_its_own_checkpoint_only_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fitted([])
    full_disk(monkeypatch, lambda path: path.parent.name == "checkpoint-00000006")
    with pytest.warns(UserWarning, match="no trace") as caught:
        traced = fitted([tracer(tmp_path)])
    told = [str(warning.message) for warning in caught if "ConceptTracer" in str(warning.message)]
    assert len(told) == 2
    assert "step 6 has no trace" in told[0]
    assert "No space left on device" in told[0]
    assert "HINT" in told[0]
    assert r"steps [6] have no trace" in told[1]
    assert sealed(tmp_path) == [3, 9]
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


def test_failures_are_told_at_the_first_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda path: path.parent.name > "checkpoint-00000004")
    with pytest.warns(UserWarning, match="no trace") as caught:
        fitted([tracer(tmp_path, every_n_epochs=None, every_n_train_steps=2)])
    told = [str(warning.message) for warning in caught if "ConceptTracer" in str(warning.message)]
    assert [text.split(": ", 1)[1].split(" no trace")[0] for text in told] == [
        "step 6 has",
        "steps [6, 8, 9] have",
    ]
    assert sealed(tmp_path) == [2, 4]


def test_the_same_step_is_tried_again_at_the_end_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []

    def once(path: Path) -> bool:
        failures.append(path.parent.name == "checkpoint-00000009")
        return failures[-1] and sum(failures) == 1

    full_disk(monkeypatch, once)
    with pytest.warns(UserWarning, match="no trace") as caught:
        fitted([tracer(tmp_path)])
    assert sum("no trace" in str(warning.message) for warning in caught) == 1
    assert sealed(tmp_path) == [3, 6, 9]


def test_on_error_raise_stops_with_the_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda path: path.parent.name == "checkpoint-00000006")
    with pytest.raises(StoreError, match="checkpoint-00000006.*No space left on device.*HINT"):
        fitted([tracer(tmp_path, on_error="raise")])
    assert sealed(tmp_path) == [3]


class Faulty(QuickDiffusion):
    """Raises in a capture after so many optimizer steps, in one member or another; its training
    steps are sound."""

    in_step = False

    def fails(self, steps: int) -> bool:
        return (
            not self.in_step
            and self.trainer.global_step == steps
            and not self.trainer.sanity_checking
        )

    def encode(self, batch: dict[str, Any]) -> Encoded:
        if self.fails(2):
            raise OSError("the image is truncated")
        encoded = super().encode(batch)
        if self.fails(3):
            encoded.latents[0] = float("nan")
        if self.fails(4):
            return replace(encoded, sample_ids=[f"another-{i}" for i in encoded.sample_ids])
        return encoded

    def condition(self, spec: Any, n: int) -> dict[str, torch.Tensor]:
        if self.fails(5):
            raise KeyError("no such word")
        return super().condition(spec, n)

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        if self.fails(6):
            raise RuntimeError("expected input to have 9 channels")
        if self.fails(7):
            raise MemoryError
        if self.fails(8):
            raise MisconfigurationException("a name was changed")
        return super().predict(x_t, t, condition)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.in_step = True
        loss = super().training_step(batch, batch_idx)
        self.in_step = False
        return loss


GUIDED = replace(methods.d_trak(), training_trajectory=Inverted(steps=1, guidance=2.0))


def test_whatever_a_capture_raises_costs_its_own_checkpoint_only(tmp_path: Path) -> None:
    plain = fitted([])
    module, seen = Faulty(dropout=0.2), []

    class After(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            layers = list(pl_module.modules())
            hooks = sum(
                len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers
            )
            seen.append((all(layer.training for layer in layers), hooks, torch.is_grad_enabled()))

    L.seed_everything(5, verbose=False)
    callback = tracer(tmp_path, method=GUIDED, every_n_epochs=None, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="no trace") as caught:
        fit(module, [callback, After()], max_epochs=3)
    told = [str(warning.message) for warning in caught if "ConceptTracer" in str(warning.message)]
    assert len(told) == 2
    assert "step 2 has no trace: OSError: the image is truncated" in told[0]
    assert "steps [2, 3, 4, 5, 6, 7, 8] have no trace" in told[1]
    assert callback.untraced_steps == [2, 3, 4, 5, 6, 7, 8]
    assert sealed(tmp_path) == [1, 9]
    assert seen == [(True, 1, True)] * 9  # the hook that counts exposures
    assert all(torch.equal(plain[name], module.state_dict()[name]) for name in plain)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ProcessLostError])
def test_an_end_of_the_process_is_no_failure_of_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def ending(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("ctrak_lightning.capture.capture.Capture.run", ending)
    with pytest.raises((error, SystemExit)):  # which is what Lightning makes of an interrupt
        fit(Faulty(), [tracer(tmp_path)])


def test_on_error_raise_stops_with_whatever_it_was(tmp_path: Path) -> None:
    callback = tracer(
        tmp_path, method=GUIDED, every_n_epochs=None, every_n_train_steps=3, on_error="raise"
    )
    with pytest.raises(DatasetChangedError, match="red-dot-0"):
        fit(Faulty(), [callback])


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"on_error='ignore'.*'raise', 'warn'.*HINT"
    ):
        ConceptTracer("x", on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_real_limit_on_file_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.disk_worker", str(tmp_path), "warn", "raise"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = {
        choice: "".join(
            line for line in done.stdout.splitlines(True) if line.startswith(f"{choice}: ")
        )
        for choice in ("warn", "raise")
    }
    assert "step 6 has no trace" in told["warn"]
    assert "steps [6] have no trace" in told["warn"]
    assert sealed(tmp_path / "warn") == [3, 9]
    assert told["raise"].startswith("raise: stopped at step 6: ")
    assert "rank0-00000.h5 cannot be written" in told["raise"]
    assert sealed(tmp_path / "raise") == [3]
