"""ConceptTracer under Lightning's own options: training is the same to the bit, and the store is
right."""

import copy
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from ctrak_lightning import TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer

from ..stress.subject import Small
from ..toy import ToyData, ToyDiffusion

METHOD = methods.d_trak(timesteps=2)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*overfit.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]


class Module(ToyDiffusion):
    """The toys on a small network; its steps draw from the global generator, so that a draw of ours
    would be seen."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = Small()
        super().__init__(denoiser=denoiser)
        self.embedding.requires_grad_(False)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.log("validation", loss, batch_size=len(batch["image"]))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images: Tensor = batch["image"]
        return images


class Silent(Module):
    """Without ``self.log``, which PyTorch's compiler cannot see through."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return ToyDiffusion.training_step(self, batch, batch_idx)


class ByHand(Module):
    """Two optimizer steps a batch, by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *others = self.denoiser.parameters()
        return [torch.optim.AdamW([first], lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]


class Data(ToyData):
    """With sets to validate and test on."""

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.toys, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def trainer_of(callbacks: list[Any], options: dict[str, Any]) -> L.Trainer:
    given = {"max_epochs": 3, "enable_checkpointing": False} | options
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **given,
    )


def trained(
    module: L.LightningModule, callbacks: list[Any], options: dict[str, Any]
) -> tuple[dict[str, Tensor], L.Trainer]:
    L.seed_everything(4, verbose=False)
    trainer = trainer_of(callbacks, options)
    trainer.fit(module, datamodule=Data())
    return {name: value.clone() for name, value in module.state_dict().items()}, trainer


def tracer(path: Path, **options: Any) -> ConceptTracer:
    given = {"method": METHOD, "rank": 4, "dim": 16, "every_n_train_steps": 2} | options
    return ConceptTracer(str(path / "traces"), **given)


def no_callbacks(path: Path) -> list[Any]:
    return []


# Name, Trainer's options, other callbacks, steps of the traces (twelve samples in batches of four:
# three steps an epoch).
CASES: list[tuple[str, dict[str, Any], Callable[[Path], list[Any]], list[int]]] = [
    ("plain", {}, no_callbacks, [2, 4, 6, 8, 9]),
    ("accumulation", {"accumulate_grad_batches": 2}, no_callbacks, [2, 4, 6]),
    ("max_steps", {"max_steps": 5, "max_epochs": -1}, no_callbacks, [2, 4, 5]),
    ("max_steps=0", {"max_steps": 0, "max_epochs": -1}, no_callbacks, []),
    ("limit_train_batches", {"limit_train_batches": 2}, no_callbacks, [2, 4, 6]),
    ("overfit_batches", {"overfit_batches": 1}, no_callbacks, [2, 3]),
    ("val_check_interval", {"val_check_interval": 1, "num_sanity_val_steps": 2}, no_callbacks, [2, 4, 6, 8, 9]),
    ("no validation", {"limit_val_batches": 0}, no_callbacks, [2, 4, 6, 8, 9]),
    ("gradient clipping", {"gradient_clip_val": 0.1}, no_callbacks, [2, 4, 6, 8, 9]),
    ("deterministic", {"deterministic": True}, no_callbacks, [2, 4, 6, 8, 9]),
    ("detect_anomaly", {"detect_anomaly": True}, no_callbacks, [2, 4, 6, 8, 9]),
    ("reload_dataloaders", {"reload_dataloaders_every_n_epochs": 1}, no_callbacks, [2, 4, 6, 8, 9]),
    ("bf16-mixed", {"precision": "bf16-mixed"}, no_callbacks, [2, 4, 6, 8, 9]),
    ("bf16-true", {"precision": "bf16-true"}, no_callbacks, [2, 4, 6, 8, 9]),
    ("64-true", {"precision": "64-true"}, no_callbacks, [2, 4, 6, 8, 9]),
    (
        "early stopping",
        {"max_epochs": 20},
        lambda path: [EarlyStopping("validation", patience=1, stopping_threshold=1e9)],
        [2, 3],
    ),
    (
        "save_weights_only",
        {"enable_checkpointing": True},
        lambda path: [ModelCheckpoint(path / "kept", save_weights_only=True, every_n_train_steps=1, save_top_k=-1)],
        [2, 4, 6, 8, 9],
    ),
    ("EMA", {}, lambda path: [EMAWeightAveraging(decay=0.5)], [2, 4, 6, 8, 9]),
    ("SWA", {}, lambda path: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], [2, 4, 6, 8, 9]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "others", "steps"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_training_is_the_same_and_the_store_is_right(
    tmp_path: Path, options: dict[str, Any], others: Callable[[Path], list[Any]], steps: list[int]
) -> None:
    (tmp_path / "a").mkdir()
    reference, without = trained(Module(), others(tmp_path / "a"), options)
    found, trainer = trained(Module(), [*others(tmp_path), tracer(tmp_path)], options)
    assert trainer.global_step == without.global_step
    assert not [name for name in reference if not torch.equal(reference[name], found[name])]
    if not steps:
        assert not list((tmp_path / "traces").glob("checkpoint-*"))
        return
    store = TraceStore(tmp_path / "traces")
    assert [checkpoint.step for checkpoint in store.checkpoints] == steps
    assert store.verify() == []
    # One batch, the same each epoch, is all that `overfit_batches=1` can draw.
    drawn = sorted(Data().toys[i]["sample_id"] for i in range(12))
    found_ids = sorted(store.samples.sample_ids)
    assert (
        found_ids == drawn
        if "overfit_batches" not in options
        else len(set(found_ids) & set(drawn)) == 4
    )
    for checkpoint in store.checkpoints:
        assert bool(torch.isfinite(checkpoint.features()).all())


def test_manual_optimization_counts_every_optimizers_steps(tmp_path: Path) -> None:
    reference, _ = trained(ByHand(), [], {})
    found, trainer = trained(ByHand(), [tracer(tmp_path, every_n_train_steps=6)], {})
    assert trainer.global_step == 18
    assert not [name for name in reference if not torch.equal(reference[name], found[name])]
    assert [checkpoint.step for checkpoint in TraceStore(tmp_path / "traces").checkpoints] == [
        6,
        12,
        18,
    ]


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_other_loops_leave_the_store_alone(tmp_path: Path, what: str) -> None:
    module = Module()
    one = tracer(tmp_path)
    _, trainer = trained(module, [one], {})
    before = {
        path: path.read_bytes() for path in (tmp_path / "traces").rglob("*") if path.is_file()
    }
    for each in (trainer, trainer_of([tracer(tmp_path)], {})):
        getattr(each, what)(
            module, datamodule=Data(), **({} if what == "predict" else {"verbose": False})
        )
    assert {
        path: path.read_bytes() for path in (tmp_path / "traces").rglob("*") if path.is_file()
    } == before


def test_lr_find_before_the_run_leaves_no_traces_of_its_own(tmp_path: Path) -> None:
    class Findable(Module):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 1e-3

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.denoiser.parameters(), lr=self.lr)

    def run(callbacks: list[Any]) -> dict[str, Tensor]:
        L.seed_everything(4, verbose=False)
        module = Findable()
        trainer = trainer_of(
            callbacks, {"default_root_dir": str(tmp_path), "enable_checkpointing": True}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Tuner(trainer).lr_find(module, datamodule=Data(), num_training=5)
        trainer.fit(module, datamodule=Data())
        return {name: value.clone() for name, value in module.state_dict().items()}

    reference = run([])
    found = run([tracer(tmp_path)])
    assert not [name for name in reference if not torch.equal(reference[name], found[name])]
    assert [checkpoint.step for checkpoint in TraceStore(tmp_path / "traces").checkpoints] == [
        2,
        4,
        6,
        8,
        9,
    ]


class Failing(Module):
    """Ends its fifth step in some way."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self.end = end

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_step == 4:
            self.end()
        return super().training_step(batch, batch_idx)


def an_error() -> None:
    raise RuntimeError("the user's own")


def an_interruption() -> None:
    raise KeyboardInterrupt


def a_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# What Lightning makes of each.
ENDS = {an_error: RuntimeError, an_interruption: SystemExit, a_signal: SIGTERMException}


@pytest.mark.parametrize("end", list(ENDS))
def test_what_was_sealed_survives_the_end_of_the_users_step(
    tmp_path: Path, end: Callable[[], None]
) -> None:
    with pytest.raises(ENDS[end]):
        trained(Failing(end), [tracer(tmp_path)], {})
    store = TraceStore(tmp_path / "traces")
    assert [checkpoint.step for checkpoint in store.checkpoints] == [2, 4]
    assert store.verify() == []


def test_a_tracer_can_be_pickled_and_copied_before_a_run(tmp_path: Path) -> None:
    """As ``ddp_spawn`` does."""
    one = tracer(tmp_path)
    for twin in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):  # noqa: S301
        assert (twin.dirpath, twin.method, twin.projection) == (
            one.dirpath,
            one.method,
            one.projection,
        )
        assert twin.should_trace(step_idx=2)


def test_half_precision_on_a_cpu_is_lightnings_to_refuse_or_run(tmp_path: Path) -> None:
    """16-mixed on a CPU: whatever Lightning does with it, with the tracer it does the same."""

    def attempt(callbacks: list[Any]) -> Any:
        try:
            return trained(Module(), callbacks, {"precision": "16-mixed"})[0]
        except Exception as error:
            return type(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference, found = attempt([]), attempt([tracer(tmp_path)])
    if isinstance(reference, dict):
        assert not [name for name in reference if not torch.equal(reference[name], found[name])]
        assert TraceStore(tmp_path / "traces").verify() == []
    else:
        assert found is reference


@pytest.mark.filterwarnings("ignore:.*Dynamo.*", "ignore:.*dynamo.*")
@pytest.mark.parametrize("what", ["network", "module"])
def test_a_compiled_module_trains_the_same_and_is_traced_as_itself(
    tmp_path: Path, what: str
) -> None:
    """``torch.compile`` with the eager backend: no compiler is needed, and hooks are cut out as
    with any other."""

    def compiled() -> Any:
        torch.compiler.reset()
        module = Silent()
        if what == "module":
            return torch.compile(module, backend="eager")
        module.denoiser.compile(backend="eager")
        return module

    plain, _ = trained(compiled(), [], {})
    traced, _ = trained(compiled(), [tracer(tmp_path)], {})
    assert all(torch.equal(traced[name], value) for name, value in plain.items())
    trained(Silent(), [tracer(tmp_path / "eager")], {})
    found, expected = (
        TraceStore(path / "traces").checkpoints for path in (tmp_path, tmp_path / "eager")
    )
    assert [each.step for each in found] == [2, 4, 6, 8, 9]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.features(), other.features(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_spawned_processes_train_the_same_and_leave_one_store(tmp_path: Path) -> None:
    """``ddp_spawn`` pickles trainer, callbacks and module."""
    options: dict[str, Any] = {"strategy": "ddp_spawn", "devices": 2}
    plain, _ = trained(Module(), [], options)
    traced, _ = trained(Module(), [tracer(tmp_path)], options)
    assert all(torch.equal(traced[name], value) for name, value in plain.items())
    store = TraceStore(tmp_path / "traces")
    assert store.verify() == []
    # Two of the four batches of an epoch for each process: twelve samples in batches of four are
    # two steps an epoch.
    assert [each.step for each in store.checkpoints] == [2, 4, 6]
    assert len(store.samples.sample_ids) == 12
