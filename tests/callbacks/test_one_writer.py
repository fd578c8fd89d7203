"""Two runs into one folder: the second is told at its start, and a run that has ended, however,
holds nothing."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ctrak_lightning import TraceStore
from ctrak_lightning.store.lock import hold_folder

from ..toy import QuickDiffusion
from .test_concept_tracer import fit, tracer


class FailingError(Exception):
    pass


class Failing(QuickDiffusion):
    """Its training ends with an error once it is asked to."""

    encoded = 0
    fails = True

    def encode(self, batch: Any) -> Any:
        self.encoded += 1
        return super().encode(batch)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fails and self.global_step == 1:
            raise FailingError
        return super().training_step(batch, batch_idx)


def test_a_folder_that_another_run_has_is_refused_at_the_start(tmp_path: Path) -> None:
    module, ours = Failing(), tracer(tmp_path)
    held = hold_folder(tmp_path / "traces")
    with pytest.raises(
        MisconfigurationException,
        match=rf"ConceptTracer\(dirpath=.*process \({os.getpid()} on .*HINT",
    ):
        fit(module, [ours], max_epochs=2)
    assert module.encoded == 0  # before the data is gone through, let alone a step
    assert os.listdir(tmp_path / "traces") == ["writer.lock"]
    held.release()
    # The same callback again, whose run ends with an error; what was raised is kept, as a notebook
    # does.
    with pytest.raises(FailingError) as kept:
        fit(module, [ours], max_epochs=2)
    hold_folder(tmp_path / "traces").release()
    module.fails = False
    fit(module, [tracer(tmp_path)], max_epochs=2)
    hold_folder(tmp_path / "traces").release()
    assert TraceStore(tmp_path / "traces").verify() == []
    assert kept.value.__traceback__ is not None
