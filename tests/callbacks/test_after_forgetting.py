"""A store that forgot a sample goes on as if it had never seen it: the report, the record, a
training and its monitor."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Subset

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.callbacks import ConceptMonitor, ConceptTracer, ProvenanceRecorder
from ctrak_lightning.provenance import Ledger, croissant, forget, model_card, prov_json, verify
from ctrak_lightning.store.facts import provenance_facts

from ..toy import ToyData, ToyDiffusion

GONE = "red-dot-0"
RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})


class Remaining(ToyData):
    """The toys without the first."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            Subset(self.toys, range(1, len(self.toys))), self.batch_size, shuffle=True
        )


def trained(path: Path, data: ToyData, epochs: int, **kwargs: Any) -> L.Trainer:
    """A run with everything that reads the store while it is made."""
    tracer = ConceptTracer(
        str(path / "traces"),
        methods.concept_trak_norm(timesteps=2),
        every_n_epochs=1,
        dim=64,
        rank=4,
    )
    monitor = ConceptMonitor([RED], sampler=Sampler(steps=4), on_error="raise")
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[tracer, monitor, ProvenanceRecorder()],
        logger=TensorBoardLogger(str(path / "board"), name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(ToyDiffusion(), data, **kwargs)
    return trainer


@pytest.mark.filterwarnings("ignore:damping='agreement' compares checkpoints")
@pytest.mark.filterwarnings("ignore:The rankings of these concepts say nothing")
def test_report_record_and_a_training_with_a_monitor_go_on_without_the_sample(
    tmp_path: Path,
) -> None:
    path = tmp_path / "traces"
    trained(tmp_path, ToyData(), 1).save_checkpoint(tmp_path / "last.ckpt")
    assert GONE in TraceStore(path).samples.sample_ids
    forget(path, [GONE])

    store = TraceStore(path)
    result = Attributor(store, ToyDiffusion(), sampler=Sampler(steps=4)).attribute(RED)
    result.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert GONE not in page
    assert "red-bar-1" in page
    assert "sha256 of samples-e1.h5" in provenance_facts(store)
    for record in (croissant(path), prov_json(path), model_card(path)):
        assert GONE not in str(record)

    trained(tmp_path, Remaining(), 2, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert [checkpoint.step for checkpoint in TraceStore(path).checkpoints] == [3, 6]
    assert len(TraceStore(path).checkpoints[-1].features()) == 11
    assert verify(path, deep=True) == []
    kinds = [entry.kind for entry in Ledger(path).entries()]
    assert kinds[-3:] == ["run_resumed", "checkpoint", "run_ended"]
    assert kinds.count("dataset") == kinds.count("forget") == 1
