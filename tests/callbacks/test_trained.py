"""ConceptTracer: what trains, how its steps are counted, and what becomes of a run in which that
changes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from ctrak_lightning import TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer, ProvenanceRecorder
from ctrak_lightning.callbacks.traced_run import ChangedWeightsWarning
from ctrak_lightning.errors import TrainingChangedError
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.model.weights import UntrainedParameterWarning
from ctrak_lightning.provenance.ledger import Ledger

from ..stress.subject import Small
from ..toy import ToyData, ToyDiffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*steps .6. have no trace"),
    pytest.mark.filterwarnings("ignore:.*steps .12. have no trace"),
    pytest.mark.filterwarnings("ignore:.*step 12 has no trace"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Toy(ToyDiffusion):
    """Three steps an epoch; a step's noise depends on its number in the epoch alone."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(denoiser=Small())
        self.embedding.requires_grad_(False)

    def loss(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)
            return super().training_step(batch, batch_idx)

    training_step = loss


class Raw(Toy):
    """Manual optimization with the plain optimizer; Lightning's ``global_step`` stays 0."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = super().configure_optimizers()
        return self.optimizer

    def step(self) -> None:
        self.optimizer.step()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        self.optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        self.step()


class Adversarial(Raw):
    """Two optimizers a batch: one that Lightning counts, one of the module's own that it does not
    know."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(1, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-3)
        return self.optimizer

    def step(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        other = self.__dict__.setdefault("other", torch.optim.SGD(self.judge.parameters(), lr=0.1))
        other.step()
        # An optimizer of something else does not count.
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()


class ByHand(Raw):
    """Weights change, and no optimizer steps."""

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.denoiser.parameters():
                parameter.sub_(0.01)


def fit(
    path: Path,
    module: L.LightningModule,
    *others: Any,
    ckpt_path: str | None = None,
    epochs: int = 2,
    tracer_first: bool = False,
    **options: Any,
) -> ConceptTracer:
    given = {"method": methods.d_trak(timesteps=2), "rank": 4, "dim": 32, "every_n_epochs": 1}
    tracer = ConceptTracer(str(path / "traces"), **(given | options))
    data = ToyData()
    data.train_dataloader = lambda: torch.utils.data.DataLoader(data.toys, 4)  # type: ignore[method-assign]
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in others),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tracer, *others] if tracer_first else [*others, tracer],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return tracer


def files_of(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def steps(path: Path) -> list[int]:
    return [checkpoint.step for checkpoint in TraceStore(path / "traces").checkpoints]


def test_steps_that_lightning_does_not_count_are_counted(tmp_path: Path) -> None:
    module = Raw()
    fit(tmp_path, module, every_n_train_steps=2)
    assert steps(tmp_path) == [2, 3, 4, 6]
    stored = TraceStore(tmp_path / "traces").checkpoints[-1].weights()
    assert all(
        torch.equal(value, stored[n]) for n, value in module.named_parameters() if n in stored
    )
    assert len(stored) == 6


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, Raw(), epochs=3)
    # After the tracer, as ModelCheckpoint always is.
    fit(cut, Raw(), ModelCheckpoint(cut, save_last=True), epochs=2)
    fit(cut, Raw(), ModelCheckpoint(cut), epochs=3, ckpt_path=str(cut / "last.ckpt"))
    assert steps(whole) == steps(cut) == [3, 6, 9]
    for ours, theirs in zip(
        TraceStore(whole / "traces").checkpoints,
        TraceStore(cut / "traces").checkpoints,
        strict=True,
    ):
        torch.testing.assert_close(ours.features(), theirs.features(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:These trained parameters are outside the denoiser")
def test_every_optimizer_of_the_run_counts_and_no_due_step_is_jumped_over(tmp_path: Path) -> None:
    with pytest.warns(UntrainedParameterWarning, match=r"judge\.bias, judge\.weight"):
        tracer = fit(tmp_path / "a", Adversarial(), every_n_epochs=None, every_n_train_steps=12)
    # Two steps a batch, six batches; the second optimizer is met in training only, when the first
    # traces are due.
    assert tracer.untraced_steps == [12]
    module = Adversarial()
    module.judge.requires_grad_(False)
    fit(tmp_path / "b", module, every_n_epochs=None, every_n_train_steps=3)
    assert steps(tmp_path / "b") == [4, 6, 10, 12]


def test_changes_that_no_step_tells_of_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingChangedError, match=r"Step 0 has traces already.*6 parameters.*HINT"
    ):
        fit(tmp_path, ByHand(), on_error="raise")


class Thaw(BaseFinetuning):
    """The first layer joins after an epoch."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.denoiser.conv_in)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.denoiser.conv_in, optimizer)


class ThawAtOnce(Thaw):
    """The first layer joins as the first epoch begins."""

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        super().finetune_function(pl_module, epoch + 1, optimizer)


class Chosen(Toy):
    """Decides what trains, and with which frozen weights, when training starts; ``hook`` says in
    which of Lightning's hooks."""

    hook = "on_train_start"

    def choose(self) -> None:
        if self.current_epoch == 0:
            self.denoiser.text.requires_grad_(False)
            with torch.no_grad():
                self.denoiser.text.weight.mul_(2)

    def on_train_start(self) -> None:
        if self.hook == "on_train_start":
            self.choose()

    def on_train_epoch_start(self) -> None:
        if self.hook == "on_train_epoch_start":
            self.choose()


class ChosenLater(Chosen):
    hook = "on_train_epoch_start"


OUTER = ["conv_in.bias", "conv_in.weight", "conv_out.bias", "conv_out.weight"]


@pytest.mark.filterwarnings("ignore:You have overridden `on_epoch")
@pytest.mark.parametrize(
    ("module", "callbacks", "trained"),
    [
        (Chosen, list, OUTER),
        (ChosenLater, list, OUTER),
        (Toy, lambda: [ThawAtOnce()], [*OUTER, "text.bias", "text.weight"]),
    ],
)
def test_what_trains_is_what_does_at_the_first_step(
    tmp_path: Path,
    module: Callable[[], Toy],
    callbacks: Callable[[], list[Any]],
    trained: list[str],
) -> None:
    subject = module()
    tracer = fit(
        tmp_path, subject, *callbacks(), ProvenanceRecorder(), on_error="raise", tracer_first=True
    )
    assert tracer.trial_seconds > 0
    assert steps(tmp_path) == [3, 6]
    stored = TraceStore(tmp_path / "traces").checkpoints[-1].weights()
    assert sorted(stored) == [f"denoiser.{name}" for name in trained]
    begun = Ledger(tmp_path / "traces").entries()[0].facts["base_model"]
    assert begun["frozen"] == weights_digest(
        {name: value for name, value in subject.named_parameters() if name not in stored}
    )


class Later(Toy):
    """A layer that the optimizer has from the start, and that is frozen for an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser.text.requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def on_train_epoch_start(self) -> None:
        self.denoiser.text.requires_grad_(self.current_epoch > 0)
        self.denoiser.conv_out.requires_grad_(self.current_epoch == 0)


@pytest.mark.filterwarnings("ignore:You have overridden `on_epoch")
@pytest.mark.parametrize(
    ("module", "callbacks", "named"),
    [
        (Toy, lambda: [Thaw()], r"2 joined \(denoiser\.conv_in\.bias, denoiser\.conv_in\.weight\)"),
        (Later, list, r"2 joined \(denoiser\.text\..*\), 2 left \(denoiser\.conv_out\.bias, "),
    ],
)
def test_parameters_that_join_or_leave_are_told_and_end_the_traces(
    tmp_path: Path, module: Callable[[], Toy], callbacks: Callable[[], list[Any]], named: str
) -> None:
    with pytest.warns(UserWarning, match="step 6 has no trace.*" + named):
        tracer = fit(tmp_path, module(), *callbacks())
    assert tracer.untraced_steps == [6]
    assert steps(tmp_path) == [3]
    with pytest.raises(TrainingChangedError, match=named):
        fit(tmp_path / "raise", module(), *callbacks(), on_error="raise")
    assert steps(tmp_path / "raise") == [3]


class Idle(Toy):
    """The optimizer has one layer; all require a gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.denoiser.conv_out.parameters(), lr=1e-3)


def test_what_is_in_no_optimizer_is_named_and_neither_traced_nor_stored(tmp_path: Path) -> None:
    with pytest.warns(
        UntrainedParameterWarning, match=r"denoiser\.conv_in\.bias, .*denoiser\.text\.weight\. HINT"
    ):
        fit(tmp_path / "idle", Idle())
    frozen = Idle()
    frozen.denoiser.conv_in.requires_grad_(False)
    frozen.denoiser.text.requires_grad_(False)
    fit(tmp_path / "frozen", frozen)
    idle, plain = (TraceStore(tmp_path / name / "traces") for name in ("idle", "frozen"))
    assert idle.header == plain.header
    assert sorted(idle.checkpoints[-1].weights()) == [
        "denoiser.conv_out.bias",
        "denoiser.conv_out.weight",
    ]
    torch.testing.assert_close(idle.checkpoints[-1].features(), plain.checkpoints[-1].features())


class OwnAverage(Callback):
    """An average of the weights by hand, put in their place at the end of every epoch, or for as
    long as a validation takes."""

    def __init__(self, gives_back: bool) -> None:
        self.gives_back = gives_back

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self.average = {
            name: value.detach().clone() for name, value in pl_module.denoiser.named_parameters()
        }

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        for name, value in pl_module.denoiser.named_parameters():
            self.average[name].lerp_(value.detach(), 0.5)

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        for name, value in pl_module.denoiser.named_parameters():
            before = value.data.clone()
            value.data.copy_(self.average[name])  # which no version of a tensor tells of
            if self.gives_back:
                value.data.copy_(before)


def changes_told(path: Path, *callbacks: Callback, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(path, Toy(), *callbacks, on_error="raise", **options)
    return [str(one.message) for one in caught if issubclass(one.category, ChangedWeightsWarning)]


def test_weights_that_no_step_has_left_are_told_once(tmp_path: Path) -> None:
    at_end: dict[str, Any] = {"every_n_epochs": None}
    [told] = changes_told(tmp_path / "swapped", OwnAverage(gives_back=False), **at_end)
    assert "at step 6" in told
    assert "'denoiser.conv_in.weight' has changed since, as have 6 of 6 parameters" in told
    assert "EMAWeightAveraging" in told
    # Where the average goes back in time, or is Lightning's own, what is traced is what trains.
    assert changes_told(tmp_path / "lent", OwnAverage(gives_back=True), **at_end) == []
    assert changes_told(tmp_path / "known", EMAWeightAveraging(decay=0.5), **at_end) == []
    assert (
        changes_told(tmp_path / "ema", EMAWeightAveraging(decay=0.5), weights="ema", **at_end) == []
    )


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used"
)  # Lightning's own
def test_another_runs_checkpoint_is_not_continued_into_a_store(tmp_path: Path) -> None:
    def saved(name: str, module: Toy, **options: Any) -> str:
        fit(tmp_path / name, module, ModelCheckpoint(tmp_path / name, save_last=True), **options)
        return str(tmp_path / name / "last.ckpt")

    differing = Toy()
    with torch.no_grad():
        differing.denoiser.conv_out.bias += 1
    saved("mine", Toy())
    twin, other = saved("twin", Toy()), saved("other", differing)
    longer = saved("longer", Toy(), epochs=3)
    mine = tmp_path / "mine"
    before = files_of(mine / "traces")
    # At a step that has traces the weights tell; at another one, nothing shows that the two are one
    # run.
    for checkpoint, told in {
        other: r"traces of step 6 are of other weights .*6 parameters differ.*Nothing was changed.*HINT",
        longer: r"holds traces of steps \[3, 6\] of run .*from step 9 of a checkpoint that was saved without this folder.*Nothing was changed.*HINT",
    }.items():
        with pytest.raises(MisconfigurationException, match=told):
            fit(mine, Toy(), ckpt_path=checkpoint, epochs=4)
        assert files_of(mine / "traces") == before
    fit(mine, Toy(), ckpt_path=twin, epochs=3)
    assert steps(mine) == [3, 6, 9]
    exposures = TraceStore(mine / "traces").checkpoints[-1].exposures()
    assert exposures is not None
    assert exposures.tolist() == [3] * 12
