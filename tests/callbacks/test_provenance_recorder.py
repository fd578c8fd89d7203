"""ProvenanceRecorder: training stays as it was, and the ledger says what happened."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from ctrak_lightning import Attributor, Concept, TraceStore
from ctrak_lightning.callbacks import ProvenanceRecorder
from ctrak_lightning.errors import CorruptStoreError, DatasetChangedError, StoreError
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.provenance import Ledger, LedgerWarning, forget, verify
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.recording import result_digest

from ..toy import QuickDiffusion, ToyData
from .test_concept_tracer import files_of, fit, tracer


def kinds(path: Path) -> list[str]:
    return [entry.kind for entry in Ledger(path / "traces").entries()]


def facts_of(path: Path, kind: str) -> list[dict[str, Any]]:
    return [entry.facts for entry in Ledger(path / "traces").entries() if entry.kind == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs with a ledger. Not to be changed."""
    path = tmp_path_factory.mktemp("run")
    L.seed_everything(11, verbose=False)
    fit(
        QuickDiffusion(seed=4),
        [tracer(path), ProvenanceRecorder(base_model="toys/base", revision="7")],
    )
    return path


@pytest.mark.parametrize("first", ["tracer", "recorder"])
def test_training_is_bit_identical_and_the_order_of_callbacks_does_not_matter(
    tmp_path: Path, first: str
) -> None:
    results = []
    for name in ("without", "with"):
        L.seed_everything(5, verbose=False)
        module = QuickDiffusion(dropout=0.2)
        callbacks: list[Any] = [tracer(tmp_path / name, every_n_train_steps=2)]
        if name == "with":
            callbacks.insert(first == "tracer", ProvenanceRecorder())
        fit(module, callbacks, accumulate_grad_batches=2, max_epochs=3)
        results.append(module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    plain, traced = (
        files_of(tmp_path / "without" / "traces"),
        files_of(tmp_path / "with" / "traces"),
    )
    assert traced.keys() - plain.keys() == {"ledger.jsonl", "ledger.lock", "commitments.h5"}
    assert [name for name in plain if name != "manifest.json" and plain[name] != traced[name]] == []

    steps = [c.step for c in TraceStore(tmp_path / "with" / "traces").checkpoints]
    assert [facts["step"] for facts in facts_of(tmp_path / "with", "checkpoint")] == steps
    assert kinds(tmp_path / "with") == [
        "run_begun",
        "dataset",
        *["checkpoint"] * len(steps),
        "run_ended",
    ]
    assert TraceStore(tmp_path / "with" / "traces").verify() == []


def test_a_run_is_described(run: Path) -> None:
    [begun] = facts_of(run, "run_begun")
    store, initial = TraceStore(run / "traces"), QuickDiffusion(seed=4)
    assert begun["run_id"] == store.run_id
    assert begun["header"]["method"] == store.header.method
    assert begun["base_model"]["name"] == "toys/base"
    assert begun["base_model"]["revision"] == "7"
    # The toy trains all of its parameters: the initial ones are those of the module as it was
    # built.
    assert begun["base_model"]["trained"] == weights_digest(dict(initial.named_parameters()))
    assert begun["base_model"]["frozen"] == weights_digest({})
    assert begun["code"]["packages"]["torch"] == torch.__version__
    assert begun["seeds"] == {
        "torch": 11,
        "environment": {"PL_GLOBAL_SEED": "11", "PL_SEED_WORKERS": "0"},
    }
    assert begun["configuration"]["trainer"]["max_epochs"] == 2
    assert begun["configuration"]["optimizers"][0]["defaults"]["lr"] == 1e-3
    assert begun["parent"] is None
    [dataset] = facts_of(run, "dataset")
    assert (dataset["size"], dataset["columns"]) == (12, ["colour", "owner", "shape"])
    [ended] = facts_of(run, "run_ended")
    last = store.checkpoints[-1].weights()
    assert ended == {"step": 6, "epoch": 2, "weights": weights_digest(last)}


def test_a_checkpoint_is_described(run: Path) -> None:
    store = TraceStore(run / "traces")
    for checkpoint, facts in zip(store.checkpoints, facts_of(run, "checkpoint"), strict=True):
        assert (facts["step"], facts["epoch"]) == (checkpoint.step, checkpoint.epoch)
        assert facts["learning_rate"] == 1e-3
        assert facts["weights"] == weights_digest(checkpoint.weights())
        found = {
            str(p.relative_to(store.path))
            for p in (store.path / f"checkpoint-{checkpoint.step:08d}").iterdir()
        }
        assert set(facts["files"]) == found


def test_the_chain_has_no_sample_in_clear(run: Path) -> None:
    text = (run / "traces" / "ledger.jsonl").read_text()
    table = TraceStore(run / "traces").samples
    secret = [
        *table.sample_ids,
        *table.content_sha256,
        *table.metadata["owner"],
        table.fingerprint(),
    ]
    assert [value for value in secret if value in text] == []


def test_frozen_weights_and_hyperparameters(tmp_path: Path) -> None:
    class Configured(QuickDiffusion):
        def __init__(self, rate: float, where: Path, other: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.denoiser.conv_in.requires_grad_(False)

    module = Configured(float("inf"), Path("a"), other=object())
    frozen = {
        f"denoiser.conv_in.{name}": v.clone()
        for name, v in module.denoiser.conv_in.named_parameters()
    }
    fit(module, [tracer(tmp_path), ProvenanceRecorder()], max_epochs=1)
    [begun] = facts_of(tmp_path, "run_begun")
    assert begun["base_model"]["frozen"] == weights_digest(frozen)
    hparams = begun["configuration"]["module"]["hparams"]
    assert hparams == {"rate": "inf", "where": "a", "other": "<builtins.object>"}


def test_a_run_without_a_tracer_or_with_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"the Trainer has 0 ConceptTracers.*HINT"):
        fit(QuickDiffusion(), [ProvenanceRecorder()])
    two = [tracer(tmp_path / "a"), tracer(tmp_path / "b")]
    with pytest.raises(MisconfigurationException, match="the Trainer has 2 ConceptTracers"):
        fit(QuickDiffusion(), [*two, ProvenanceRecorder()])
    fit(QuickDiffusion(), [*two, ProvenanceRecorder(str(tmp_path / "b" / "traces"))], max_epochs=1)
    assert not (tmp_path / "a" / "traces" / "ledger.jsonl").exists()
    assert kinds(tmp_path / "b")[-1] == "run_ended"


def test_fast_dev_run_and_validation_leave_nothing(tmp_path: Path) -> None:
    fit(QuickDiffusion(), [tracer(tmp_path), ProvenanceRecorder()], fast_dev_run=True)
    assert not (tmp_path / "traces").exists()


class Stop(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("a secret")


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run that failed after two of three epochs, with checkpoints of both."""
    with pytest.raises(RuntimeError, match="a secret"):
        fit(
            QuickDiffusion(),
            [ProvenanceRecorder(), tracer(tmp_path), keep(tmp_path), Stop()],
            max_epochs=3,
        )
    return tmp_path


def keep(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path / "ckpt", filename="{epoch}", save_top_k=-1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_fails_and_is_resumed(interrupted: Path) -> None:
    path = interrupted
    assert kinds(path) == ["run_begun", "dataset", "checkpoint", "checkpoint", "run_failed"]
    [failed] = facts_of(path, "run_failed")
    assert failed == {"step": 6, "epoch": 2, "error": "RuntimeError"}
    with pytest.warns(UserWarning, match=r"resumes at step 3; the traces of steps \[6\]"):
        fit(
            QuickDiffusion(),
            [ProvenanceRecorder(), tracer(path), keep(path)],
            max_epochs=2,
            ckpt_path=str(path / "ckpt" / "epoch=0.ckpt"),
        )
    assert kinds(path)[5:] == ["run_resumed", "discarded", "checkpoint", "run_ended"]
    [resumed] = facts_of(path, "run_resumed")
    store = TraceStore(path / "traces")
    assert (resumed["run_id"], resumed["step"]) == (store.run_id, 3)
    assert resumed["base_model"]["trained"] == weights_digest(store.checkpoints[0].weights())
    assert facts_of(path, "discarded") == [{"steps": [6]}]
    assert sorted(replay(Ledger(path / "traces").entries()).checkpoints) == [3, 6]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_store_that_was_tampered_with_is_not_recorded_on(interrupted: Path) -> None:
    path = interrupted
    manifest = path / "traces" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"learning_rate": 0.001', '"learning_rate": 0.002', 1))
    before = (path / "traces" / "ledger.jsonl").read_bytes()
    with pytest.raises(
        CorruptStoreError, match=r"learning_rate is 0\.002, the ledger records 0\.001.*HINT"
    ):
        fit(
            QuickDiffusion(),
            [tracer(path), ProvenanceRecorder(), keep(path)],
            max_epochs=3,
            ckpt_path=str(path / "ckpt" / "epoch=1.ckpt"),
        )
    assert (path / "traces" / "ledger.jsonl").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Optimizer steps had .* not in the store")
def test_a_run_that_is_resumed_after_a_sample_was_forgotten(interrupted: Path) -> None:
    """With the whole data set it is refused; without the sample it goes on, and the sample does not
    come back."""

    class Without(ToyData):
        def trace_dataloader(self) -> DataLoader[Any]:
            return DataLoader(torch.utils.data.Subset(self.toys, [*range(5), *range(6, 12)]), 4)

    path = interrupted
    forget(path / "traces", ["green-bar-5"])
    before = files_of(path / "traces")
    resumed = {"ckpt_path": str(path / "ckpt" / "epoch=1.ckpt"), "max_epochs": 3}
    with pytest.raises(
        DatasetChangedError, match="Samples have been forgotten from this store.*HINT"
    ):
        fit(QuickDiffusion(), [tracer(path), ProvenanceRecorder(), keep(path)], **resumed)
    assert files_of(path / "traces") == before
    fit(
        QuickDiffusion(),
        [tracer(path), ProvenanceRecorder(), keep(path)],
        data=Without(),
        **resumed,
    )
    store = TraceStore(path / "traces")
    assert [c.step for c in store.checkpoints] == [3, 6, 9]
    assert len(store) == 11
    assert "green-bar-5" not in store.samples.sample_ids
    assert kinds(path)[5:] == ["forget", "run_resumed", "checkpoint", "run_ended"]
    assert verify(path / "traces", deep=True) == []


def test_training_goes_on_when_the_ledger_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Ledger.write, itertools.count()

    def failing(self: Ledger, news: Any) -> Any:
        call = next(calls)
        if call in (1, 2):
            raise (StoreError, RuntimeError)[call - 1]("the disk is full")
        return real(self, news)

    monkeypatch.setattr(Ledger, "write", failing)
    with pytest.warns(UserWarning, match="ProvenanceRecorder: the ledger .*the disk is full"):
        fit(QuickDiffusion(), [tracer(tmp_path), ProvenanceRecorder()], max_epochs=3)
    assert kinds(tmp_path) == ["run_begun", "dataset", *["checkpoint"] * 3, "run_ended"]


@pytest.mark.filterwarnings("ignore:damping='agreement' compares checkpoints")
def test_questions_are_recorded_with_the_hash_of_their_answer(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run / "traces", tmp_path / "traces")
    module = QuickDiffusion(seed=4)
    concept = Concept("bar", {"colour": "red", "shape": "bar"}, {"colour": "red"})
    attributor = Attributor(tmp_path / "traces", module, asker="a clerk", batch_size=4)
    query = attributor.query([concept], 3)
    [result] = attributor.score(query, damping=0.5)
    [entry] = facts_of(tmp_path, "query")
    assert entry["concept"] == concept.to_dict()
    assert (entry["seed"], entry["damping"], entry["asker"]) == (3, 0.5, "a clerk")
    assert entry["steps"] == [3, 6]
    assert entry["result_sha256"] == _by_hand(
        tmp_path / "traces", result.samples.sample_ids, result.scores
    )
    [[best, *_]] = attributor.top(query, 2)
    listed = facts_of(tmp_path, "query")[1]
    assert (listed["samples"], listed["count"]) == ("top", 2)
    Attributor(tmp_path / "traces", module, record=False).score(query)
    assert kinds(tmp_path).count("query") == 2
    assert best.sample_id in result.samples.sample_ids


def _by_hand(store: Path, sample_ids: list[str], scores: torch.Tensor) -> str:
    import hashlib
    import struct

    import h5py

    with h5py.File(store / "commitments.h5") as file:
        salt = file["salt"][:].tobytes()
    assert len(salt) == 32
    content = b"".join(sample_id.encode() + b"\0" for sample_id in sample_ids)
    content += b"".join(struct.pack("<f", score) for score in scores.tolist())
    return hashlib.sha256(salt + hashlib.sha256(content).digest()).hexdigest()


def test_another_answer_has_another_digest() -> None:
    plain = result_digest(["ab", "c"], [1.0, 2.0])
    assert plain == result_digest(["ab", "c"], np.array([1.0, 2.0], dtype=np.float64).tolist())
    for ids, scores in (
        (["a", "bc"], [1.0, 2.0]),
        (["ab", "c"], [2.0, 1.0]),
        (["ab", "c"], [1.0, 2.0000005]),
    ):
        assert result_digest(ids, scores) != plain


def test_a_question_to_a_read_only_store_is_answered_with_one_warning(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Ledger, news: Any) -> Any:
        raise StoreError("the folder is read-only.")

    monkeypatch.setattr(Ledger, "append_all", read_only)
    attributor = Attributor(run / "traces", QuickDiffusion(seed=4))
    query = attributor.query([Concept("bar", {"shape": "bar"}, {})])
    with pytest.warns(LedgerWarning, match=r"not recorded: the folder is read-only.*HINT"):
        assert len(attributor.score(query, damping=1.0)) == 1
    assert len(attributor.score(query, damping=1.0)) == 1  # a second warning would be an error here


def test_a_fine_tune_of_a_fine_tune_names_its_parent(run: Path, tmp_path: Path) -> None:
    parent = TraceStore(run / "traces")
    module = QuickDiffusion()
    module.load_state_dict(parent.checkpoints[-1].weights(), strict=False)
    fit(
        module,
        [tracer(tmp_path / "child"), ProvenanceRecorder(parent=str(run / "traces"))],
        max_epochs=1,
    )
    [begun] = facts_of(tmp_path / "child", "run_begun")
    entries = Ledger(run / "traces").entries()
    expected = {
        "run_id": parent.run_id,
        "head": entries[-1].sha256,
        "entries": len(entries),
        "step": 6,
    }
    assert {name: begun["parent"][name] for name in expected} == expected
    assert begun["parent"]["weights"] == "equal"

    with pytest.warns(UserWarning, match="are not those of the parent's last checkpoint"):
        fit(
            QuickDiffusion(seed=8),
            [tracer(tmp_path / "other"), ProvenanceRecorder(parent=str(run / "traces"))],
            max_epochs=1,
        )
    assert facts_of(tmp_path / "other", "run_begun")[0]["parent"]["weights"] == "different"
    with pytest.raises(StoreError, match=r"has no ledger\.jsonl"):
        fit(
            QuickDiffusion(),
            [tracer(tmp_path / "third"), ProvenanceRecorder(parent=str(tmp_path / "nowhere"))],
            max_epochs=1,
        )
