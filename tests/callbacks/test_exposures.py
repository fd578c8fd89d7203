"""Exposures: how often each sample entered an optimizer step, compared with what the module itself
saw."""

import copy
import logging
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, WeightedRandomSampler

from ctrak_lightning import DiffusionTask, Encoded, NoiseSchedule, TraceStore
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.exposures import (
    BatchIds,
    Exposures,
    Found,
    ReachedRows,
    UnknownExposuresWarning,
    UntracedSampleWarning,
)
from ctrak_lightning.errors import BatchError
from ctrak_lightning.methods import d_trak, inline_trak
from ctrak_lightning.methods.objectives import Denoising, Term
from ctrak_lightning.store import Checkpoint
from ctrak_lightning.utilities.processes import ALONE, Processes

from ..threads import together
from ..toy import CHANNELS, Toys, scheduler
from .test_concept_tracer import fit, tracer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, 4, 1)
        self.last = nn.Conv2d(4, CHANNELS, 1)

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.last(self.first(x).relu()),)


class Small(DiffusionTask, L.LightningModule):
    """Keeps the ids of the batches that a step is made of, and counts them when its optimizer
    steps."""

    manual: str | None = None

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = Net()
        self.noise_schedule = NoiseSchedule.from_scheduler(scheduler())
        self.automatic_optimization = self.manual is None
        self.waiting: list[str] = []
        self.seen: dict[str, int] = {}

    def encode(self, batch: dict[str, Any]) -> Encoded:
        return Encoded(latents=batch["image"], condition={}, sample_ids=batch["sample_id"])

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        return {}

    def skips(self, batch_idx: int) -> bool:
        return False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        if self.skips(batch_idx):
            return None
        noise = torch.randn_like(batch["image"])
        t = torch.randint(0, 100, (len(noise),))
        noised = self.noise_schedule.add_noise(batch["image"], noise, t)
        loss: Tensor = (self.predict(noised, t, {}) - noise).square().mean()
        self.waiting += batch["sample_id"]
        if self.manual is None:
            return loss
        optimizer: Any = self.optimizers(use_pl_optimizer=self.manual != "raw")
        self.manual_backward(loss) if self.manual == "lightning" else loss.backward()
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
            self.note()
        return None

    def note(self) -> None:
        for name in self.waiting:
            self.seen[name] = self.seen.get(name, 0) + 1
        self.waiting = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.note()


class Data(L.LightningDataModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {"batch_size": 5, "shuffle": True} | options

    def train_dataloader(self) -> Any:
        return DataLoader(Toys(), **self.options)


class Skipping(Small):
    def skips(self, batch_idx: int) -> bool:
        return batch_idx == 1


class Guarded(Small):
    """Clears the gradients of some batches, and of those that were added up with them."""

    def on_after_backward(self) -> None:
        if any(name.endswith("-3") for name in self.waiting):
            self.zero_grad()
            self.waiting = []


class Adversarial(Small):
    """Also trains a critic, on every batch; the denoiser on every other one."""

    manual = "two"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            self.critic = nn.Conv2d(CHANNELS, 1, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        drawn = self.predict(batch["image"], torch.zeros(len(batch["image"])), {})
        for optimizer, loss in (
            (first, self.critic(drawn.detach()).square().mean()),
            *([(second, (drawn - 1).square().mean())] if batch_idx % 2 else []),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if batch_idx % 2:
            self.waiting += batch["sample_id"]
            self.note()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(part.parameters(), lr=1e-2) for part in (self.critic, self.denoiser)
        ]


class Labelled(Data):
    """In the first batch that is traced, the samples' labels are equal to their ids."""

    def train_dataloader(self) -> Any:
        rows = [{"label": str(i % 3)} | row | {"sample_id": str(i)} for i, row in enumerate(Toys())]  # type: ignore[arg-type]
        return DataLoader(rows, **self.options)  # type: ignore[arg-type]


class Manual(Small):
    manual = "lightning"


class Plain(Small):
    manual = "plain"


class Raw(Small):
    manual = "raw"


def known(checkpoint: Checkpoint) -> list[int]:
    counts = checkpoint.exposures()
    assert counts is not None
    return counts.tolist()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:These trained parameters are outside the denoiser")
@pytest.mark.parametrize(
    ("kind", "options", "trainer"),
    [
        (Small, {}, {}),
        (Small, {"drop_last": True}, {"max_epochs": 1}),
        (Small, {"batch_size": 2}, {"accumulate_grad_batches": 4}),
        (Small, {"shuffle": None, "sampler": WeightedRandomSampler([9.0, 1, *[0] * 10], 15)}, {}),
        (Small, {}, {"limit_train_batches": 1, "max_epochs": 1}),
        (Skipping, {}, {"max_epochs": 1}),
        (Manual, {"batch_size": 2}, {}),
        (Guarded, {"batch_size": 2}, {"accumulate_grad_batches": 2}),
        (Adversarial, {"batch_size": 2}, {}),
        (Plain, {"batch_size": 2}, {}),
    ],
)
def test_they_are_what_the_module_itself_counts(
    tmp_path: Path, kind: type[Small], options: dict[str, Any], trainer: dict[str, Any]
) -> None:
    weights = []
    for callbacks in ([tracer(tmp_path, every_n_epochs=1)], []):
        L.seed_everything(4, verbose=False)
        module = kind()
        fit(module, callbacks, data=Data(**options), **trainer)
        weights.append([value.clone() for value in module.parameters()])
    store = TraceStore(tmp_path / "traces")
    last = store.checkpoints[-1]
    assert known(last) == [module.seen.get(name, 0) for name in store.samples.sample_ids]
    assert any(known(last))
    # Nothing was learnt from a sample that was in no step, and its trace says so.
    zeros = torch.tensor(known(last)) == 0
    assert torch.equal((last.features() == 0).all(1), zeros)
    assert torch.equal(last.norms() == 0, zeros)
    assert store.verify() == []
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Skips(torch.amp.GradScaler):
    """Finds something that is not finite in every other step."""

    calls = 0

    def spoil(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.spoil(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if optimizer.defaults["fused"]:  # which unscales by itself
            self.spoil(optimizer)
        return super().step(optimizer, *args, **kwargs)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_leaves_out_do_not_count(tmp_path: Path, fused: bool) -> None:
    class Recorded(Small):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-2, fused=fused)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            before = [value.clone() for value in self.parameters()]
            L.LightningModule.optimizer_step(self, *args, **kwargs)
            if any(not torch.equal(a, b) for a, b in zip(before, self.parameters(), strict=True)):
                self.note()
            self.waiting = []

    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = Skips("cpu", init_scale=2.0)
    module = Recorded()
    fit(module, [tracer(tmp_path)], data=Data(), plugins=[precision])
    store = TraceStore(tmp_path / "traces")
    assert known(store.checkpoints[-1]) == [
        module.seen.get(name, 0) for name in store.samples.sample_ids
    ]
    assert 0 < sum(module.seen.values()) < 24


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*training resumes at step 4")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint")
def test_a_resumed_run_counts_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """From the middle of an epoch; and what was counted before is not guessed where it is not
    known."""
    order: dict[str, Any] = {"shuffle": False, "batch_size": 2}
    module = Small()
    saver = ModelCheckpoint(
        tmp_path / "weights", filename="middle", every_n_train_steps=4, save_top_k=-1
    )
    fit(
        module,
        [tracer(tmp_path / "a", every_n_epochs=None), saver],
        data=Data(**order),
        max_epochs=1,
    )
    [whole] = TraceStore(tmp_path / "a" / "traces").checkpoints
    assert known(whole) == [1] * 12
    resumed = str(tmp_path / "weights" / "middle.ckpt")
    state = torch.load(resumed, weights_only=True)["callbacks"]
    [counted] = [each["exposures"] for name, each in state.items() if "ConceptTracer" in name]
    assert counted["step"] == 4
    assert counted["counts"].tolist() == [1] * 8 + [0] * 4

    again = Small()
    at = tracer(tmp_path / "a", every_n_epochs=None)
    fit(again, [at], data=Data(**order), max_epochs=1, ckpt_path=resumed)
    [checkpoint] = TraceStore(tmp_path / "a" / "traces").checkpoints
    assert sum(known(checkpoint)) == 8 + sum(again.seen.values())

    fresh = ConceptTracer(str(tmp_path / "b"), "d_trak", rank=4, dim=16)
    fit(Small(), [fresh], data=Data(**order), max_epochs=1, ckpt_path=resumed)
    [checkpoint] = TraceStore(tmp_path / "b").checkpoints
    assert checkpoint.exposures() is None


def test_they_are_unknown_rather_than_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where training batches have no ids, or others than the samples that are traced."""

    class Hidden(Small):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            names = [f"image {name}" for name in batch["sample_id"]]
            return Encoded(latents=batch["image"], condition={}, sample_ids=names)

    class Others(Data):
        def trace_dataloader(self) -> Any:
            rows = [row | {"sample_id": f"other {i}"} for i, row in enumerate(Toys())]  # type: ignore[arg-type]
            return DataLoader(rows, 6)  # type: ignore[arg-type]

    for module, data, match in (
        (Hidden(), Data(), "no field of a batch holds the samples' ids"),
        (
            Small(),
            Others(),
            "no training batch has a sample that is traced; the ids of training batches are like '",
        ),
    ):
        path = tmp_path / type(module).__name__
        with (
            caplog.at_level(logging.INFO, logger="lightning"),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            fit(module, [tracer(path)], data=data, max_epochs=2)
        assert [at.exposures() for at in TraceStore(path / "traces").checkpoints] == [None, None]
        loud = [str(one.message) for one in warned if one.category is UntracedSampleWarning]
        assert len(loud) == isinstance(data, Others)  # it may be that nothing traced was trained on
        if loud:
            assert "the traced samples' ids are like 'other 0'" in loud[0]
        told = loud + [
            record.message
            for record in caplog.records
            if "entered an optimizer step is not known" in record.message
        ]
        assert len(told) == 1
        assert match in told[0]
        caplog.clear()


def test_a_method_that_multiplies_by_what_is_not_known_is_told_of_it(tmp_path: Path) -> None:
    class Hidden(Small):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            names = [f"image {name}" for name in batch["sample_id"]]
            return Encoded(latents=batch["image"], condition={}, sample_ids=names)

    method = replace(d_trak(timesteps=2), per_exposure=True)
    with pytest.warns(UnknownExposuresWarning, match=r"'d_trak' multiplies scores.*HINT") as told:
        fit(Hidden(), [tracer(tmp_path, method=method)], max_epochs=2)
    assert sum(one.category is UnknownExposuresWarning for one in told) == 1


def test_where_the_loss_depends_on_no_sample_none_was_trained_on(tmp_path: Path) -> None:
    class Weightless(Small):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

    module = Weightless()
    fit(module, [tracer(tmp_path)], max_epochs=1)
    [checkpoint] = TraceStore(tmp_path / "traces").checkpoints
    assert known(checkpoint) == [0] * 12


def test_samples_that_are_trained_on_and_not_in_the_store_are_told(tmp_path: Path) -> None:
    """At the first, and all of them at the end; once each."""
    sampler = SubsetRandomSampler([0, 1, 2, 3])

    class Moves(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            sampler.indices = [range(4), range(1, 5), range(4, 8)][trainer.current_epoch]

    data = Data(shuffle=None, sampler=sampler, batch_size=2)
    with pytest.warns(UntracedSampleWarning, match="HINT.*trace_dataloader") as all_told:
        fit(Small(), [tracer(tmp_path), Moves()], data=data, max_epochs=3)
    told = [str(one.message) for one in all_told if one.category is UntracedSampleWarning]
    first, last = told
    assert "had 1 samples that are not in the store" in first
    assert "green-dot-4" in first
    assert "so far" in first
    assert "had 5 samples that are not in the store" in last
    assert "in all" in last
    store = TraceStore(tmp_path / "traces")
    assert [sum(known(at)) for at in store.checkpoints] == [4, 7, 7]


def test_a_label_is_not_taken_for_the_id(tmp_path: Path) -> None:
    module = Small()
    fit(module, [tracer(tmp_path)], data=Labelled(batch_size=2), max_epochs=1)
    [checkpoint] = TraceStore(tmp_path / "traces").checkpoints
    assert known(checkpoint) == [1] * 12
    assert checkpoint.features().any(1).all()


def test_the_field_of_the_ids_is_the_only_one_that_has_them_in_all_batches() -> None:
    batches = [
        {
            "label": ["0", "1"],
            "name": ["0", "1"],
            "n": torch.tensor([0, 1]),
            "half": torch.ones(2).bfloat16(),
        },
        {
            "label": ["2", "0"],
            "name": ["2", "3"],
            "n": torch.tensor([2, 3]),
            "half": torch.ones(2).bfloat16(),
        },
    ]
    training = {"label": ["1", "1"], "name": ["4", "7"], "n": torch.tensor([4, 7])}

    def read(members: dict[str, Any], *left_out: str) -> list[str]:
        task = DiffusionTask()
        vars(task).update(members)
        ids = BatchIds(task)
        for batch in batches:
            ids.compare({key: batch[key] for key in batch if key not in left_out}, batch["name"])  # type: ignore[arg-type]
        ids.share(ALONE)
        return ids.of(training)

    assert read({}, "n") == read({}, "name") == read({"id_column": "n"}) == ["4", "7"]
    assert read({"sample_ids": lambda batch: batch["label"]}) == ["1", "1"]
    for members, left_out, match in (
        ({}, (), r"\['name', 'n'\] of a batch are all equal"),
        ({}, ("name", "n"), "no field of a batch holds"),
        ({"id_column": "label"}, ("n",), "a batch's 'label' does not hold"),
    ):
        with pytest.raises(BatchError, match=match):
            read(members, *left_out)


def test_what_one_process_rules_out_is_ruled_out() -> None:
    def each(processes: Processes) -> list[str]:
        ids = BatchIds(DiffusionTask())
        names = ["0", "1"] if processes.is_first else ["2", "3"]
        ids.compare({"label": ["0", "1"], "name": names}, names)
        ids.share(processes)
        return ids.of({"label": ["0"], "name": ["5"]})

    assert together(2, each) == [["5"]] * 2


def test_processes_add_up_and_what_one_does_not_know_none_knows() -> None:
    def each(processes: Processes) -> tuple[list[int], bool]:
        exposures = Exposures(["a", "b", "c"], processes)
        for batch in (["a", "b"], ["b", "other"]) if processes.is_first else (["b"],):
            exposures.draw(batch)
        exposures.step()
        exposures.draw(["c"])  # of a step that is left out
        exposures.drop()
        exposures.step()
        exposures.share()
        counts = exposures.counts()
        assert counts is not None
        if not processes.is_first:
            exposures.unknown = "no ids"
        exposures.share()
        return counts.tolist(), exposures.counts() is None

    with pytest.warns(UntracedSampleWarning, match="had 1 samples .* 'other'. The end") as told:
        assert together(2, each) == [([1, 3, 0], True)] * 2
    assert len(told) == 1


class Weighted(Small):
    """Samples whose id ends with -3 have a loss weight of 0, those with -4 are masked out of every
    other batch; what is counted by hand are the others."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        latents, ids = batch["image"], batch["sample_id"]
        noise = torch.randn_like(latents)
        t = torch.randint(0, 100, (len(noise),))
        noised = self.noise_schedule.add_noise(latents, noise, t)
        weight = torch.tensor([not name.endswith("-3") for name in ids]).float()
        masked = torch.tensor([name.endswith("-4") and batch_idx % 2 == 1 for name in ids])
        losses = (self.predict(noised, t, {}) - noise).square().mean((1, 2, 3)) * weight
        used = ~masked & (weight > 0)
        self.waiting += [name for name, one in zip(ids, used.tolist(), strict=True) if one]
        return losses.masked_fill(masked, 0.0).mean()


class Half(Small):
    """Its network sees every sample twice, so that rows are not samples."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        twice = batch["image"].repeat(2, 1, 1, 1)
        t = torch.zeros(len(twice))
        self.waiting += batch["sample_id"]
        return self.predict(twice, t, {})[: len(batch["image"])].square().mean()


class Beside(Small):
    """Its loss does not go through the denoiser's output, but through its first layer alone."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.predict(batch["image"], torch.zeros(len(batch["image"])), {})
        self.waiting += batch["sample_id"]
        return self.denoiser.first(batch["image"]).square().mean()


@pytest.mark.parametrize("kind", [Weighted, Half, Beside])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_sample_that_the_loss_does_not_depend_on_is_not_trained_on(
    tmp_path: Path, kind: type[Small], accumulated: int
) -> None:
    weights = []
    for callbacks in ([tracer(tmp_path, every_n_epochs=1)], []):
        L.seed_everything(4, verbose=False)
        module = kind()
        fit(module, callbacks, data=Data(batch_size=3), accumulate_grad_batches=accumulated)
        weights.append([value.clone() for value in module.parameters()])
        assert not module.denoiser._forward_hooks
    last = TraceStore(tmp_path / "traces").checkpoints[-1]
    ids = [row["sample_id"] for row in Toys()]  # type: ignore[attr-defined]
    assert known(last) == [module.seen.get(name, 0) for name in ids]
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_what_is_done_between_batches_is_no_training(tmp_path: Path) -> None:
    class Looks(L.Callback):
        """Takes gradients of its own of every sample, after the tracer's hooks."""

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            with torch.enable_grad():
                images = batch["image"]
                drawn = pl_module.predict(images, torch.zeros(len(images)), {})
                torch.autograd.grad(drawn.sum(), list(pl_module.parameters()))

    module = Weighted()
    fit(module, [tracer(tmp_path, every_n_epochs=1), Looks()], data=Data(batch_size=3))
    ids = [row["sample_id"] for row in Toys()]  # type: ignore[attr-defined]
    last = TraceStore(tmp_path / "traces").checkpoints[-1]
    assert known(last) == [module.seen.get(name, 0) for name in ids]


def test_what_was_found_inside_a_transform_that_has_ended_counts_whole() -> None:
    found = Found()
    torch.func.vmap(lambda row: (found.add(row), row)[1])(torch.zeros(4, 2, 3))
    assert found.of(2) == [True, True]
    found.clear()
    found.add(torch.zeros(2, 3))
    assert found.of(2) == [False, False]


def test_inline_rows_of_samples_without_weight_leave_the_counts_known(tmp_path: Path) -> None:
    L.seed_everything(4, verbose=False)
    module = Weighted()
    method = replace(inline_trak(), query=(Term(Denoising()),))
    fit(module, [tracer(tmp_path, method=method, mode="inline")], data=Data(batch_size=3))
    last = TraceStore(tmp_path / "traces").checkpoints[-1]
    ids = [row["sample_id"] for row in Toys()]  # type: ignore[attr-defined]
    assert known(last) == [module.seen.get(name, 0) for name in ids]
    assert 0 in known(last)


def test_the_hook_that_looks_is_in_no_copy_and_no_pickle_of_the_denoiser(tmp_path: Path) -> None:
    copies: list[nn.Module] = []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if not copies:
                hooks = pl_module.denoiser._forward_hooks.values()
                assert [type(hook) for hook in hooks] == [ReachedRows]
                copies.append(copy.deepcopy(pl_module.denoiser))
                copies.append(pickle.loads(pickle.dumps(pl_module.denoiser)))  # noqa: S301

    fit(Small(), [tracer(tmp_path), Copies()], data=Data(batch_size=3))
    given = torch.ones(2, CHANNELS, 4, 4, requires_grad=True), torch.zeros(2)
    for each in copies:
        (output,) = each(*given)
        output.sum().backward()
        assert not any(isinstance(hook, ReachedRows) for hook in each._forward_hooks.values())
        assert all(parameter.grad is not None for parameter in each.parameters())
    assert len(copies) == 2
