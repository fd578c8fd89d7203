"""Courses of a run that a store must not be silent about: gone on from elsewhere, drawn from twice,
changed on the way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ctrak_lightning import Encoded, NoiseSchedule, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.errors import DatasetChangedError, TrainingChangedError

from ..toy import Toys, scheduler
from .test_trained import Toy, files_of, steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*step.* ha(s|ve) no trace"),
    pytest.mark.filterwarnings("ignore:.*training resumes at step"),
    # Lightning's own, about what is done here on purpose.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended"
    ),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument in the `training_step`"),
    pytest.mark.filterwarnings(
        "ignore:You defined a `validation_step` but have no `val_dataloader`"
    ),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]


def traced(path: Path, **options: Any) -> ConceptTracer:
    given = {
        "method": methods.d_trak(timesteps=2),
        "rank": 4,
        "dim": 32,
        "every_n_epochs": 1,
        "on_error": "raise",
    }
    return ConceptTracer(str(path / "traces"), **(given | options))


def trainer(*callbacks: Callback, epochs: int = 2, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Toys(), 4, **options)


class Faster(Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = 0.5


def test_a_checkpoint_of_an_abandoned_course_is_not_continued(tmp_path: Path) -> None:
    """From step 4 the run is taken up twice; the store has the second course, the last checkpoint
    is of the first."""

    def run(*others: Callback, ckpt_path: str | None = None, **options: Any) -> None:
        keep = ModelCheckpoint(
            tmp_path / "ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=1
        )
        tracer = traced(tmp_path, every_n_epochs=None, every_n_train_steps=3, at_end=False)
        trainer(tracer, *others, keep, epochs=-1, **options).fit(
            Toy(), loader(), ckpt_path=ckpt_path, weights_only=False
        )

    run(max_steps=8)
    first = str(tmp_path / "step=8.ckpt")
    (tmp_path / "ckpt" / "step=8.ckpt").rename(first)
    run(max_steps=8, ckpt_path=str(tmp_path / "ckpt" / "step=6.ckpt"))  # the same course once more
    run(Faster(), max_steps=7, ckpt_path=str(tmp_path / "ckpt" / "step=4.ckpt"))
    before = files_of(tmp_path / "traces")
    told = r"traces of steps \[6\] are not those of the run that this checkpoint of step 8 is of.*Nothing was changed.*HINT"
    with pytest.raises(MisconfigurationException, match=told):
        run(max_steps=10, ckpt_path=first)
    assert files_of(tmp_path / "traces") == before


def test_one_trainer_goes_on_with_its_own_weights_only(tmp_path: Path) -> None:
    once = trainer(traced(tmp_path, at_end=False), epochs=1)
    module = Toy()
    once.fit(module, loader())
    once.fit_loop.max_epochs = 2
    once.fit(module, loader())
    assert steps(tmp_path) == [3, 6]
    once.fit_loop.max_epochs = 3
    with pytest.raises(
        MisconfigurationException, match=r"goes on from step 6 with other weights.*HINT"
    ):
        once.fit(Toy(), loader())


def test_averaged_weights_that_training_goes_on_with_are_its_own(tmp_path: Path) -> None:
    once, module = trainer(traced(tmp_path), EMAWeightAveraging(decay=0.5), epochs=1), Toy()
    once.fit(module, loader())
    once.fit_loop.max_epochs = 2
    once.fit(module, loader())
    assert steps(tmp_path) == [3, 6]


class Replacing(Callback):
    """Another optimizer from an epoch on."""

    def __init__(self, epoch: int, layers: list[str]) -> None:
        self.epoch, self.layers = epoch, layers

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            held = [
                p
                for name in self.layers
                for p in pl_module.denoiser.get_submodule(name).parameters()
            ]
            trainer.optimizers = [torch.optim.AdamW(held)]


@pytest.mark.filterwarnings("ignore:These parameters require a gradient but are in no optimizer")
def test_an_optimizer_that_is_replaced_decides_what_trains(tmp_path: Path) -> None:
    trainer(traced(tmp_path), Replacing(0, ["conv_out"])).fit(Toy(), loader())
    stored = TraceStore(tmp_path / "traces").checkpoints[-1].weights()
    assert sorted(stored) == ["denoiser.conv_out.bias", "denoiser.conv_out.weight"]
    later = tmp_path / "later"
    with pytest.raises(TrainingChangedError, match=r"4 left"):
        trainer(traced(later), Replacing(1, ["conv_out"])).fit(Toy(), loader())
    assert steps(later) == [3]


class Validating(Callback):
    """Another Trainer with the same callbacks, inside a hook."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            others = [one for one in trainer.callbacks if not isinstance(one, Validating)]  # type: ignore[attr-defined]
            other = L.Trainer(
                accelerator="cpu",
                logger=False,
                callbacks=others,
                enable_progress_bar=False,
                enable_checkpointing=False,
            )
            other.validate(pl_module, loader(), verbose=False)


class Validated(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_another_trainer_does_not_end_the_traces(tmp_path: Path) -> None:
    trainer(traced(tmp_path), Validating(), epochs=3).fit(Validated(), loader())
    assert steps(tmp_path) == [3, 6, 9]


class Adapted(Toy):
    def __init__(self) -> None:
        super().__init__()
        config = peft.LoraConfig(r=2, target_modules=["text", "conv_in"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, self.denoiser)


class Rescaled(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in pl_module.denoiser.modules() if trainer.current_epoch == 1 else []:
            if hasattr(layer, "scaling"):
                layer.scaling["default"] = 0.25


class Rescheduled(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.noise_schedule = NoiseSchedule.from_scheduler(
                scheduler(beta_schedule="squaredcos_cap_v2")
            )


@pytest.mark.parametrize(
    ("module", "change", "told"),
    [
        (Adapted, Rescaled, r"adapters: default, scaling 4 .*now default, scaling 0\.25"),
        (Toy, Rescheduled, "noise_schedule"),
    ],
)
def test_another_function_of_the_same_weights_ends_the_traces(
    tmp_path: Path, module: type[Toy], change: type[Callback], told: str
) -> None:
    with pytest.raises(
        TrainingChangedError, match=rf"The same weights make another function.*{told}.*HINT"
    ):
        trainer(traced(tmp_path), change()).fit(module(), loader())
    assert steps(tmp_path) == [3]


class Own(Toy):
    """Draws from a generator of its own when it encodes; ``what`` says what becomes of it."""

    what = "latents"

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def encode(self, batch: dict[str, Any]) -> Encoded:
        encoded = super().encode(batch)
        drawn = torch.randn(len(encoded.latents), 1, 1, generator=self.generator)
        if self.what == "latents":
            return replace(encoded, latents=encoded.latents + drawn[..., None])
        words = encoded.condition["encoder_hidden_states"]
        return replace(encoded, condition={"encoder_hidden_states": words * (drawn > 0)})


class OwnCondition(Own):
    what = "condition"


class Levels:
    """A ``collate_fn`` with a number a batch from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, rows: list[Any]) -> Any:
        return default_collate(rows) | {"level": float(torch.rand((), generator=self.generator))}


@pytest.mark.parametrize(
    ("module", "options", "where"),
    [
        (Own, {}, r"encode\(\)\.latents"),
        (OwnCondition, {}, r"encode\(\)\.condition\['encoder_hidden_states'\]"),
        (Toy, {"collate_fn": Levels()}, r"batch\['level'\]"),
    ],
)
def test_what_draws_from_a_generator_of_its_own_is_told(
    tmp_path: Path, module: type[Toy], options: dict[str, Any], where: str
) -> None:
    with pytest.raises(DatasetChangedError, match=rf"{where} differs.*generator of its own.*HINT"):
        trainer(traced(tmp_path)).fit(module(), loader(**options))


class Once(IterableDataset[Any]):
    """A stream that is its own iterator, and says how long it is."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[Any]:
        self.place = 0
        return self

    def __next__(self) -> Any:
        if self.place == 12:
            raise StopIteration
        self.place += 1
        return Toys()[self.place - 1]


def test_a_stream_that_is_its_own_iterator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Once, that is an iterator itself.*HINT"):
        trainer(traced(tmp_path)).fit(Toy(), DataLoader(Once(), 4))


class Shared(L.LightningDataModule):
    """One loader, whose workers stay, for training and for traces."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = loader(num_workers=1, persistent_workers=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader

    def trace_dataloader(self) -> DataLoader[Any]:
        return self.loader


class Seen(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen += batch["sample_id"]
        return super().training_step(batch, batch_idx)


def test_the_training_loader_may_be_the_trace_loader(tmp_path: Path) -> None:
    module = Seen()
    trainer(traced(tmp_path, every_n_train_steps=1)).fit(module, datamodule=Shared())
    assert module.seen == [row["sample_id"] for row in Toys()] * 2  # type: ignore[attr-defined]
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


class Iterating(Seen):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Popping(Seen):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        batch.pop("sample_id")
        return loss


class Filtering(Seen):
    """Leaves samples out of the batch that it was given."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        keep = [i for i, owner in enumerate(batch["owner"]) if owner != "owner of red"]
        if not keep:
            return None
        for name, values in list(batch.items()):
            batch[name] = values[keep] if isinstance(values, Tensor) else [values[i] for i in keep]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("module", [Popping, Filtering])
def test_exposures_are_of_the_batch_that_was_trained_on(tmp_path: Path, module: type[Seen]) -> None:
    subject = module()
    trainer(traced(tmp_path), epochs=3).fit(subject, DataLoader(Toys(), 3, shuffle=True))
    found = TraceStore(tmp_path / "traces").checkpoints[-1].exposures()
    assert found is not None
    assert found.tolist() == [subject.seen.count(row["sample_id"]) for row in Toys()]  # type: ignore[attr-defined]


def test_batches_that_a_step_draws_itself_are_not_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer(traced(tmp_path), epochs=1).fit(Iterating(), loader())
    assert TraceStore(tmp_path / "traces").checkpoints[-1].exposures() is None
    assert (
        "not known, and not stored: training_step(dataloader_iter) draws the batches itself"
        in caplog.text
    )
    with pytest.raises(MisconfigurationException, match=r"training_step\(dataloader_iter\).*HINT"):
        trainer(traced(tmp_path, method="inline_trak", mode="inline")).fit(Iterating(), loader())
