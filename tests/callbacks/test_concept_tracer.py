"""ConceptTracer: training stays as it was, and the store says what happened."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctrak_lightning import Encoded, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.errors import (
    DatasetChangedError,
    GradientError,
    StoreError,
    StoreMismatchError,
)
from ctrak_lightning.gradients import UntracedParameterWarning

from ..toy import QuickDiffusion, ToyData, ToyDiffusion

FAST = methods.d_trak(timesteps=2)
ROOT = Path(__file__).parent.parent.parent


def tracer(path: Path, **kwargs: Any) -> ConceptTracer:
    arguments: dict[str, Any] = {"method": FAST, "rank": 4, "dim": 64, "every_n_epochs": 1}
    return ConceptTracer(str(path / "traces"), **(arguments | kwargs))


def fit(
    module: L.LightningModule,
    callbacks: list[Any],
    *,
    data: Any = None,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> L.Trainer:
    arguments: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False}
    arguments["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **(arguments | kwargs),
    )
    trainer.fit(
        module,
        datamodule=data or ToyData(),
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    return trainer


def weights_after(path: Path | None, ema: bool = True, **kwargs: Any) -> dict[str, Tensor]:
    L.seed_everything(5, verbose=False)
    module = ToyDiffusion(dropout=0.2)
    callbacks: list[Any] = [EMAWeightAveraging(decay=0.9)] if ema else []
    if path is not None:
        callbacks.append(
            tracer(
                path,
                method=methods.concept_trak_paper(timesteps=2, inversion_steps=2),
                every_n_train_steps=1,
            )
        )
    fit(module, callbacks, **kwargs)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("ema", [True, False])
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path, ema: bool) -> None:
    """AdamW, dropout, shuffling, gradient accumulation, an averaging callback; traced after every
    step and epoch."""
    setting: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    plain, traced = weights_after(None, ema, **setting), weights_after(tmp_path, ema, **setting)
    assert [c.step for c in TraceStore(tmp_path / "traces").checkpoints] == [1, 2, 3, 4, 5, 6]
    assert plain.keys() == traced.keys()
    for name, value in plain.items():
        assert torch.equal(value, traced[name]), name


def test_a_global_draw_in_the_users_encode_does_not_reach_training(tmp_path: Path) -> None:
    class Sampling(ToyDiffusion):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            torch.rand(100)
            return super().encode(batch)

    results = []
    for callbacks in ([], [tracer(tmp_path)]):
        L.seed_everything(1, verbose=False)
        module = Sampling()
        fit(module, callbacks)
        results.append(module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_training_flags_and_gradients_are_left_alone(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, bool], bool]] = []

    class Watcher(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            flags = {name: m.training for name, m in pl_module.named_modules()}
            seen.append((flags, all(p.requires_grad for p in pl_module.parameters())))

    module = ToyDiffusion()
    module.denoiser.down_blocks[1].eval()
    expected = {name: m.training for name, m in module.named_modules()}
    assert not all(expected.values())
    fit(module, [tracer(tmp_path, every_n_train_steps=1), Watcher()])
    assert len(seen) == 6
    for flags, requires in seen:
        assert flags == expected
        assert requires


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharded_strategies_are_refused_with_the_reason(tmp_path: Path, strategy: type) -> None:
    """By hand: Lightning lets none of them run on a CPU."""
    trainer = SimpleNamespace(strategy=object.__new__(strategy), fast_dev_run=False)
    with pytest.raises(
        MisconfigurationException, match=f"{strategy.__name__}: no process holds the whole.*HINT"
    ):
        tracer(tmp_path).setup(trainer, ToyDiffusion(), "fit")  # type: ignore[arg-type]
    assert not (tmp_path / "traces").exists()


def test_when_it_traces(tmp_path: Path) -> None:
    def steps(name: str, **kwargs: Any) -> list[int]:
        fit(QuickDiffusion(), [tracer(tmp_path / name, **kwargs)], max_epochs=3)
        return [c.step for c in TraceStore(tmp_path / name / "traces").checkpoints]

    class Third(ConceptTracer):
        def should_trace(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx in (2, 7)

    assert steps("epochs", every_n_epochs=2) == [6, 9]
    assert steps("epochs-only", every_n_epochs=2, at_end=False) == [6]
    assert steps("steps", every_n_epochs=None, every_n_train_steps=4) == [4, 8, 9]
    assert steps("end", every_n_epochs=None) == [9]
    fit(QuickDiffusion(), [Third(str(tmp_path / "own"), FAST, dim=64, at_end=False)], max_epochs=3)
    assert [c.step for c in TraceStore(tmp_path / "own").checkpoints] == [2, 7]


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = tracer(tmp_path, every_n_epochs=None, every_n_train_steps=1, at_end=False)
    fit(QuickDiffusion(), [callback], accumulate_grad_batches=3, max_epochs=2)
    assert [c.step for c in TraceStore(tmp_path / "traces").checkpoints] == [1, 2]


def test_the_store_describes_the_samples_in_their_own_order(tmp_path: Path) -> None:
    data = ToyData()
    fit(QuickDiffusion(), [tracer(tmp_path)], data=data)
    store = TraceStore(tmp_path / "traces")
    assert store.samples.sample_ids == [data.toys[i]["sample_id"] for i in range(12)]
    assert store.samples.metadata["owner"][:5] == ["owner of red"] * 4 + ["owner of green"]
    assert store.samples.thumbnails is not None
    expected = ((data.toys.images[3].clamp(-1, 1) + 1) / 2 * 255).round().byte().permute(1, 2, 0)
    assert (store.samples.thumbnails[3].int() - expected.int()).abs().max() <= 1
    assert store.verify() == []


@pytest.mark.filterwarnings("ignore:Optimizer steps had .* not in the store")
def test_trace_dataloader_decides_the_samples(tmp_path: Path) -> None:
    class Chosen(ToyData):
        def trace_dataloader(self) -> DataLoader[Any]:
            return DataLoader(torch.utils.data.Subset(self.toys, [5, 2, 9]), 2)

    fit(QuickDiffusion(), [tracer(tmp_path)], data=Chosen())
    ids = TraceStore(tmp_path / "traces").samples.sample_ids
    assert ids == ["green-bar-5", "red-box-2", "blue-bar-9"]


def test_traces_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    stores = []
    for size in (3, 12):
        L.seed_everything(2, verbose=False)
        fit(ToyDiffusion(), [tracer(tmp_path / str(size), batch_size=size)], max_epochs=1)
        stores.append(TraceStore(tmp_path / str(size) / "traces").checkpoints[0].features())
    assert (stores[0] - stores[1]).norm() <= 1e-5 * stores[1].norm()


@pytest.mark.parametrize(("given", "most"), [(None, 4), (1, 1), (3, 3)])
def test_a_forward_pass_has_a_training_batch_at_most_or_what_is_asked(
    tmp_path: Path, given: int | None, most: int
) -> None:
    class Whole(ToyData):
        def trace_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.toys, 12)

    module = QuickDiffusion()
    seen: list[int] = []

    def note(denoiser: nn.Module, args: tuple[Any, ...]) -> None:
        if not denoiser.training:
            seen.append(len(args[0]))

    module.denoiser.register_forward_pre_hook(note)
    fit(module, [tracer(tmp_path, batch_size=given)], data=Whole(batch_size=4), max_epochs=1)
    assert max(seen) == most
    assert len(TraceStore(tmp_path / "traces")) == 12


def test_stored_weights_are_those_of_the_step(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    class Watcher(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen[trainer.global_step] = pl_module.denoiser.conv_in.weight.detach().clone()

    fit(QuickDiffusion(), [tracer(tmp_path), Watcher()])
    for checkpoint in TraceStore(tmp_path / "traces").checkpoints:
        assert torch.equal(checkpoint.weights()["denoiser.conv_in.weight"], seen[checkpoint.step])


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def resumed_store(path: Path, stop_after: int) -> None:
    """Trains three epochs with a checkpoint after each; interrupts after ``stop_after`` and resumes
    from the first."""

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == stop_after:
                raise RuntimeError("power cut")

    def callbacks() -> list[Any]:
        keep = ModelCheckpoint(path / "ckpt", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        return [tracer(path), keep]

    L.seed_everything(3, verbose=False)
    if stop_after < 3:
        with pytest.raises(RuntimeError, match="power cut"):
            fit(QuickDiffusion(), [*callbacks(), Stop()], max_epochs=3)
        with pytest.warns(UserWarning, match=r"resumes at step 3; the traces of steps \[6\]"):
            fit(
                QuickDiffusion(),
                callbacks(),
                max_epochs=3,
                ckpt_path=str(path / "ckpt" / "epoch=0.ckpt"),
            )
    else:
        fit(QuickDiffusion(), callbacks(), max_epochs=3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_resumed_run_leaves_the_store_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uuid.uuid4", lambda: type("Fixed", (), {"hex": "0" * 32}))
    # Shuffling draws from the global generator, which Lightning does not restore: both runs use a
    # fixed order here.
    monkeypatch.setattr(ToyData, "train_dataloader", lambda self: DataLoader(self.toys, 4))
    monkeypatch.setattr(QuickDiffusion, "training_step", deterministic_step)
    resumed_store(tmp_path / "whole", stop_after=3)
    resumed_store(tmp_path / "cut", stop_after=2)
    whole, cut = files_of(tmp_path / "whole" / "traces"), files_of(tmp_path / "cut" / "traces")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


def deterministic_step(self: QuickDiffusion, batch: dict[str, Any], batch_idx: int) -> Tensor:
    t = torch.full((len(batch["image"]),), 10 + 20 * (self.trainer.global_step % 4))
    noise = torch.randn(
        batch["image"].shape, generator=torch.Generator().manual_seed(self.trainer.global_step)
    )
    noised = self.scheduler.add_noise(batch["image"], noise, t)
    condition = {"encoder_hidden_states": self.tokens(batch["colour"], batch["shape"])}
    return (self.predict(noised, t, condition) - noise).square().mean()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_capture_that_was_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the middle of a capture leaves the store of the earlier checkpoint readable, and
    a re-run completes it."""
    from ctrak_lightning.capture import capture

    real, calls = capture.trace_batch, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return real(*args)

    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    monkeypatch.setattr(capture, "trace_batch", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(QuickDiffusion(), [tracer(tmp_path, on_error="raise"), keep])
    monkeypatch.setattr(capture, "trace_batch", real)
    with pytest.warns(UserWarning, match=r"steps \[6\] are not sealed.*HINT"):
        assert [c.step for c in TraceStore(tmp_path / "traces").checkpoints] == [3]
    fit(
        QuickDiffusion(),
        [tracer(tmp_path), keep],
        ckpt_path=str(tmp_path / "ckpt" / "epoch=0.ckpt"),
    )
    store = TraceStore(tmp_path / "traces")
    assert [c.step for c in store.checkpoints] == [3, 6]
    assert store.verify() == []


def test_a_fresh_run_does_not_touch_an_earlier_runs_store(tmp_path: Path) -> None:
    fit(QuickDiffusion(), [tracer(tmp_path)])
    before = files_of(tmp_path / "traces")
    with pytest.raises(
        MisconfigurationException, match=r"traces of steps \[3, 6\] of an earlier run.*HINT"
    ):
        fit(QuickDiffusion(), [tracer(tmp_path)])
    assert files_of(tmp_path / "traces") == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": methods.trak(timesteps=2)}, "method.training.objective.class"),
        ({"method": methods.d_trak(timesteps=3)}, "method.training.trajectory.timesteps"),
        ({"dim": 32}, "dim"),
        ({"rank": 3}, "projection.projection.rank"),
        ({"layers": ["conv*"]}, "projection.layers"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_another_set_up_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    fit(QuickDiffusion(), [tracer(tmp_path)], max_epochs=1)
    before = files_of(tmp_path / "traces")
    with pytest.raises(StoreMismatchError, match=field.replace(".", r"\.")):
        fit(QuickDiffusion(), [tracer(tmp_path, **change)])
    assert files_of(tmp_path / "traces") == before


def test_another_model_or_data_set_is_refused_by_name(tmp_path: Path) -> None:
    def frozen(seed: int) -> QuickDiffusion:
        module = QuickDiffusion(seed=seed)
        module.denoiser.conv_in.requires_grad_(False)
        return module

    fit(frozen(0), [tracer(tmp_path)], max_epochs=1)
    with pytest.raises(StoreMismatchError, match=r"model\.frozen_weights"):
        fit(frozen(1), [tracer(tmp_path)])
    with pytest.raises(StoreMismatchError, match=r"model\.trained_parameters"):
        fit(QuickDiffusion(), [tracer(tmp_path)])
    data = ToyData()
    data.toys.images[4] += 0.5
    with pytest.raises(DatasetChangedError, match=r"dataset\.content"):
        fit(frozen(0), [tracer(tmp_path)], data=data)


def test_samples_that_change_between_captures_are_refused(tmp_path: Path) -> None:
    class Shuffled(ToyData):
        def trace_dataloader(self) -> Any:
            trainer = self.trainer

            class Loader:
                def __iter__(self) -> Any:
                    is_late = trainer is not None and trainer.global_step > 3
                    order = list(range(12))[:: -1 if is_late else 1]
                    return iter(DataLoader(torch.utils.data.Subset(ToyData().toys, order), 4))

            return Loader()

    with pytest.raises(
        DatasetChangedError, match="differ from those the store began with.*HINT: no shuffling"
    ):
        fit(QuickDiffusion(), [tracer(tmp_path, on_error="raise")], data=Shuffled())
    with pytest.warns(UserWarning, match="not sealed"):
        assert [c.step for c in TraceStore(tmp_path / "traces").checkpoints] == [3]


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    fit(QuickDiffusion(), [tracer(tmp_path)], fast_dev_run=True)
    assert not (tmp_path / "traces").exists()


def test_what_it_was_made_with_can_be_read(tmp_path: Path) -> None:
    given = {
        "method": methods.d_trak(),
        "mode": "capture",
        "weights": "ema",
        "every_n_epochs": 2,
        "every_n_train_steps": 3,
        "at_end": False,
        "layers": ["*attn2*"],
        "batch_size": 5,
        "dtype": "float16",
        "thumbnails": False,
        "seed": 7,
        "on_error": "raise",
        "loader": "images",
    }
    callback = tracer(tmp_path, **given)
    assert {name: getattr(callback, name) for name in given} == given
    assert callback.questions == ()


def test_what_is_set_before_training_counts(tmp_path: Path) -> None:
    callback = tracer(tmp_path)
    callback.dtype, callback.thumbnails = "float16", False
    fit(ToyDiffusion(), [callback], max_epochs=1)
    assert TraceStore(tmp_path / "traces").header.dtype == "float16"


@pytest.mark.parametrize("name", ["every_n_epochs", "every_n_train_steps", "batch_size"])
def test_zero_is_refused(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"ConceptTracer\({name}=0\).*HINT"):
        ConceptTracer("x", **{name: 0})  # type: ignore[arg-type]


def test_arguments_that_cannot_work_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="would never trace"):
        ConceptTracer("x", at_end=False)
    with pytest.raises(MisconfigurationException, match="unknown method.*Known: concept_trak"):
        ConceptTracer("x", "nonsense")
    with pytest.raises(MisconfigurationException, match="rank"):
        ConceptTracer("x", rank=0)


def test_a_module_that_is_no_task_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    class Plain(L.LightningModule):
        denoiser = torch.nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(
        MisconfigurationException, match="lacks noise_schedule, encode, condition, predict.*HINT"
    ):
        fit(Plain(), [tracer(tmp_path)])


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file, not a folder")
    module = QuickDiffusion()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match="cannot be written.*HINT"):
        fit(module, [tracer(tmp_path)])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="thesis.tex"):
        fit(QuickDiffusion(), [ConceptTracer(str(tmp_path / "other"), FAST)])
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"


def test_a_batch_without_a_field_is_reported(tmp_path: Path) -> None:
    class Wanting(QuickDiffusion):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            batch["caption"]
            return super().encode(batch)

    told = r"asked for 'caption', and the batch has \['colour', 'image'.*HINT"
    with pytest.raises(MisconfigurationException, match=told):
        fit(Wanting(), [tracer(tmp_path)])


def test_gradients_that_are_not_finite_name_the_samples(tmp_path: Path) -> None:
    class Poisoned(QuickDiffusion):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            encoded = super().encode(batch)
            for i, sample_id in enumerate(encoded.sample_ids):
                if sample_id == "green-box-6":
                    encoded.latents[i] = float("nan")
            return encoded

    with pytest.raises(GradientError, match="not finite.*green-box-6"):
        fit(Poisoned(), [tracer(tmp_path, on_error="raise")])


def test_trained_parameters_outside_the_denoiser_are_named(tmp_path: Path) -> None:
    with pytest.warns(UntracedParameterWarning, match="outside the denoiser.*: embedding.weight. "):
        fit(QuickDiffusion(), [tracer(tmp_path / "outside")], max_epochs=1)
    module = QuickDiffusion()
    module.embedding.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntracedParameterWarning)
        fit(module, [tracer(tmp_path / "inside")], max_epochs=1)


def test_two_tracers_work_side_by_side(tmp_path: Path) -> None:
    callbacks = [tracer(tmp_path / "a"), tracer(tmp_path / "b", method=methods.trak(timesteps=2))]
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="last")
    fit(QuickDiffusion(), [*callbacks, keep])
    stores = [TraceStore(tmp_path / name / "traces") for name in ("a", "b")]
    assert [store.header.method["name"] for store in stores] == ["d_trak", "trak"]
    facts = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    ids = [
        state["run_id"]
        for key, state in facts["callbacks"].items()
        if key.startswith("ConceptTracer")
    ]
    assert sorted(ids) == sorted(store.run_id for store in stores)
