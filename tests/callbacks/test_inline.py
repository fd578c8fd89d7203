"""ConceptTracer(mode="inline"): the training steps' own gradients, exactly, and training as it
was."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from ctrak_lightning import (
    Attributor,
    Concept,
    Encoded,
    GradientTracer,
    Projection,
    TraceStore,
    methods,
)
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.exposures import Exposures, UntracedSampleWarning
from ctrak_lightning.capture.inline import TIMESTEP_NAMES, _timesteps
from ctrak_lightning.capture.trial import ZeroGradientWarning
from ctrak_lightning.errors import BatchError, GradientError, StoreError

from ..toy import QuickDiffusion, ToyData, ToyDiffusion, Toys
from .test_concept_tracer import files_of, fit
from .test_on_error import full_disk

RAW = replace(methods.inline_trak(timesteps=2), normalisation="none")
TOLERANCE = 1e-4
UNEVEN = 5


class Recorded(ToyDiffusion):
    """Keeps what every training step drew, by sample id: state, timestep, noise and condition."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drawn: list[dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]] = []
        self.learning_rate = 1e-3

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        latents = batch["image"]
        noise = torch.randn_like(latents)
        t = torch.randint(0, len(self.noise_schedule), (len(latents),))
        noised = self.scheduler.add_noise(latents, noise, t)
        tokens = self.tokens(batch["colour"], batch["shape"])
        facts = zip(noised, t, noise, tokens.detach(), strict=True)
        self.drawn.append(dict(zip(batch["sample_id"], facts, strict=True)))
        return (self.predict(noised, t, {"encoder_hidden_states": tokens}) - noise).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def inline(path: Path, **kwargs: Any) -> ConceptTracer:
    arguments: dict[str, Any] = {
        "method": RAW,
        "rank": 4,
        "dim": 64,
        "every_n_epochs": 1,
        "at_end": False,
    }
    return ConceptTracer(str(path / "traces"), mode="inline", **(arguments | kwargs))


def sample_gradient(module: Recorded, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The projected gradient [k] of one sample's own loss, by autograd."""
    noised, t, noise, tokens = (part.unsqueeze(0) for part in drawn)
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=64))
    loss = (module.predict(noised, t, {"encoder_hidden_states": tokens}) - noise).square().mean()
    named = dict(module.denoiser.named_parameters())
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    blocks = {}
    for layer in tracer._layers:
        own = {
            name.removeprefix(f"{layer.name}."): found[name].unsqueeze(0)
            for name in sorted(layer.parameters)
        }
        blocks[layer.name] = tracer._projector.project(layer.name, layer.matrix(own))
    projector = tracer._projector
    return projector.sketch(projector.join(blocks, 1, torch.device("cpu")))[0]


def expected_rows(module: Recorded, store: TraceStore) -> Tensor:
    rows = []
    for sample_id in store.samples.sample_ids:
        each = [
            sample_gradient(module, drawn[sample_id])
            for drawn in module.drawn
            if sample_id in drawn
        ]
        rows.append(torch.stack(each).mean(0))
    return torch.stack(rows)


def assert_rows(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ((ours - theirs).norm(dim=1) <= tolerance * theirs.norm(dim=1)).all()


@pytest.mark.parametrize("batch_size", [12, UNEVEN])
def test_a_trace_is_the_mean_gradient_of_the_samples_own_losses(
    tmp_path: Path, batch_size: int
) -> None:
    """Two epochs with unchanged weights; batches of 5, 5 and 2, whose losses Lightning divides for
    accumulation."""
    L.seed_everything(4, verbose=False)
    module = Recorded()
    module.learning_rate = 0.0
    steps = -(-12 // batch_size)
    fit(
        module,
        [inline(tmp_path, every_n_epochs=2)],
        data=ToyData(batch_size),
        accumulate_grad_batches=steps,
    )
    store = TraceStore(tmp_path / "traces")
    [at] = store.checkpoints
    assert at.step == 2
    assert_rows(at.features(), expected_rows(module, store))
    visits = at.visits()
    assert visits is not None
    for i, sample_id in enumerate(store.samples.sample_ids):
        timesteps, taken = visits.of(i)
        drawn = [float(each[sample_id][1]) for each in module.drawn if sample_id in each]
        assert timesteps.tolist() == drawn
        assert taken.tolist() == [0, 1]
    assert store.verify() == []


def test_each_checkpoint_has_its_own_steps(tmp_path: Path) -> None:
    L.seed_everything(4, verbose=False)
    module = Recorded()
    module.learning_rate = 0.0
    fit(module, [inline(tmp_path)], data=ToyData(12), max_epochs=3)
    store = TraceStore(tmp_path / "traces")
    drawn = module.drawn
    for i, at in enumerate(store.checkpoints):
        module.drawn = [drawn[i]]
        assert_rows(at.features(), expected_rows(module, store))


def test_normalised_rows_are_averaged(tmp_path: Path) -> None:
    """``"sample"``: the mean of unit rows, not the unit row of a mean."""
    L.seed_everything(4, verbose=False)
    module = Recorded()
    module.learning_rate = 0.0
    method = replace(RAW, normalisation="sample")
    fit(module, [inline(tmp_path, method=method, every_n_epochs=2)], data=ToyData(6))
    store = TraceStore(tmp_path / "traces")
    for row, sample_id in zip(
        store.checkpoints[0].features(), store.samples.sample_ids, strict=True
    ):
        each = [
            sample_gradient(module, drawn[sample_id])
            for drawn in module.drawn
            if sample_id in drawn
        ]
        expected = sum(one / one.norm() for one in each) / 2
        assert torch.allclose(row, expected, atol=TOLERANCE)  # type: ignore[arg-type]


class Sampling(ToyDiffusion):
    """An ``encode`` that draws, and a layer that training changes in passing."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.statistics = nn.BatchNorm2d(3)

    def encode(self, batch: dict[str, Any]) -> Encoded:
        torch.rand(100)
        self.statistics(batch["image"])
        return super().encode(batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical_with_and_without_the_callback(
    tmp_path: Path, precision: Any
) -> None:
    """AdamW, dropout, shuffling, gradient accumulation, weight averaging, an ``encode`` with side
    effects."""
    weights, states = [], []
    for callbacks in ([], [inline(tmp_path)]):
        L.seed_everything(5, verbose=False)
        module = Sampling()
        averaging = EMAWeightAveraging(decay=0.9)
        fit(
            module,
            [averaging, *callbacks],
            accumulate_grad_batches=2,
            max_epochs=3,
            precision=precision,
        )
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
        states.append(torch.random.get_rng_state())
    assert len(TraceStore(tmp_path / "traces").checkpoints) == 3
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert torch.equal(*states)


def test_gradients_and_hooks_are_left_alone(tmp_path: Path) -> None:
    seen: list[list[dict[str, Tensor]]] = []
    for callbacks in ([], [inline(tmp_path)]):
        found: list[dict[str, Tensor]] = []

        class Watcher(L.Callback):
            def __init__(self, found: list[dict[str, Tensor]]) -> None:
                self.found = found

            def on_before_optimizer_step(
                self, trainer: Any, pl_module: Any, optimizer: Any
            ) -> None:
                named = pl_module.named_parameters()
                self.found.append({n: p.grad.clone() for n, p in named if p.grad is not None})

        L.seed_everything(5, verbose=False)
        module = ToyDiffusion()
        fit(module, [*callbacks, Watcher(found)], max_epochs=1)
        seen.append(found)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    for plain, traced in zip(*seen, strict=True):
        assert plain.keys() == traced.keys()
        assert all(torch.equal(plain[name], traced[name]) for name in plain)


def test_bf16_rows_point_where_those_of_full_precision_do(tmp_path: Path) -> None:
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        L.seed_everything(4, verbose=False)
        path = tmp_path / precision
        fit(ToyDiffusion(), [inline(path)], data=ToyData(12), max_epochs=1, precision=precision)
        rows.append(TraceStore(path / "traces").checkpoints[0].features())
    assert torch.cosine_similarity(*rows, dim=1).min() > 0.98


def test_a_grad_scalers_scale_is_taken_out(tmp_path: Path) -> None:
    rows = []
    for name, scaler in {
        "none": None,
        "scaled": torch.amp.GradScaler("cpu", init_scale=1024.0),
    }.items():
        L.seed_everything(4, verbose=False)
        precision = MixedPrecision("bf16-mixed", "cpu")
        precision.scaler = scaler
        fit(
            ToyDiffusion(),
            [inline(tmp_path / name)],
            data=ToyData(12),
            max_epochs=1,
            plugins=[precision],
        )
        rows.append(TraceStore(tmp_path / name / "traces").checkpoints[0].features())
    assert_rows(rows[1], rows[0], tolerance=1e-2)


def test_the_attributor_asks_the_store(tmp_path: Path) -> None:
    L.seed_everything(4, verbose=False)
    module = ToyDiffusion()
    fit(
        module,
        [ConceptTracer(str(tmp_path), mode="inline", rank=4, dim=64, every_n_epochs=2)],
        max_epochs=6,
    )
    store = TraceStore(tmp_path)
    assert store.header.method["name"] == "inline_trak"
    assert [at.step for at in store.checkpoints] == [6, 12, 18]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The concept direction")
        result = Attributor(store, module).attribute(Concept("red", {"colour": "red"}, {}))
    assert result.scores.isfinite().all()
    assert len(result.top(3)) == 3


class Dropping(ToyData):
    """Two batches of 5 an epoch, in a fixed rotation: each epoch leaves two samples out."""

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.toys, UNEVEN, sampler=Rotating(), drop_last=True)  # type: ignore[arg-type]


class Rotating:
    def __init__(self) -> None:
        self.epoch = -1

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter([(i + 2 * self.epoch) % 12 for i in range(12)])


def trace_all(self: Any) -> DataLoader[dict[str, Any]]:
    return DataLoader(self.toys, 4)


def test_a_sample_that_no_step_saw_has_no_trace_or_keeps_that_of_the_last_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyData, "trace_dataloader", trace_all, raising=False)
    fit(QuickDiffusion(), [inline(tmp_path)], data=Dropping(), max_epochs=3)
    store = TraceStore(tmp_path / "traces")
    assert [at.step for at in store.checkpoints] == [2, 4, 6]
    # Rows 10 and 11 are left out of the first epoch, 0 and 1 of the second, 2 and 3 of the third.
    exposures = [at.exposures() for at in store.checkpoints]
    assert [None if at is None else at.tolist() for at in exposures] == [
        [1] * 10 + [0, 0],
        [1, 1] + [2] * 8 + [1, 1],
        [2] * 4 + [3] * 6 + [2, 2],
    ]
    visits = [at.visits() for at in store.checkpoints]
    assert [None if at is None else at.counts.tolist() for at in visits] == [
        [1] * 10 + [0, 0],
        [1] * 12,
        [1] * 12,
    ]
    assert visits[2] is not None
    assert [visits[2].of(i)[1].tolist() for i in (1, 2, 3, 4)] == [[5], [2], [2], [4]]
    features = [at.features() for at in store.checkpoints]
    assert [(at == 0).all(1).nonzero().flatten().tolist() for at in features] == [[10, 11], [], []]
    assert torch.equal(features[0][:2], features[1][:2])
    assert torch.equal(features[1][2:4], features[2][2:4])
    assert not torch.isclose(features[1][4:], features[2][4:]).all(1).any()


def test_a_row_is_not_lost_where_ids_could_be_mistaken_or_a_step_was_left_out(
    tmp_path: Path,
) -> None:
    """Labels that are equal to ids in the first batch; then also gradients that a guard clears
    after they were recorded."""

    class Labelled(ToyData):
        def train_dataloader(self) -> DataLoader[dict[str, Any]]:
            rows = [
                {"label": str(i % 3)} | row | {"sample_id": str(i)}
                for i, row in enumerate(self.toys)
            ]  # type: ignore[arg-type]
            return DataLoader(rows, 2)  # type: ignore[arg-type]

    class Guarded(QuickDiffusion):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.batch_idx == 1:
                self.zero_grad()

    for kind in (QuickDiffusion, Guarded):
        fit(kind(), [inline(tmp_path / kind.__name__)], data=Labelled(), max_epochs=1)
        [at] = TraceStore(tmp_path / kind.__name__ / "traces").checkpoints
        exposures, visits = at.exposures(), at.visits()
        assert visits is not None
        assert visits.counts.tolist() == [1] * 12
        assert at.features().any(1).all()
        assert (None if exposures is None else exposures.tolist()) == (
            None if kind is Guarded else [1] * 12
        )


def test_samples_that_training_batches_never_have_stop_it_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamed(self: ToyData) -> DataLoader[Any]:
        rows = [row | {"sample_id": f"other {i}"} for i, row in enumerate(self.toys)]  # type: ignore[arg-type]
        return DataLoader(rows, 4)  # type: ignore[arg-type]

    monkeypatch.setattr(ToyData, "trace_dataloader", renamed, raising=False)
    with (
        pytest.warns(UntracedSampleWarning, match="no training batch has a sample that is traced"),
        pytest.raises(StoreError, match="12 of 12 samples.*HINT.*every_n_epochs"),
    ):
        fit(QuickDiffusion(), [inline(tmp_path, on_error="raise")], max_epochs=1)


@pytest.mark.filterwarnings("ignore:Optimizer steps had .* not in the store")
def test_samples_that_are_not_traced_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(self: ToyData) -> DataLoader[Any]:
        return DataLoader(Subset(self.toys, [7, 2]), 2)

    monkeypatch.setattr(ToyData, "trace_dataloader", some, raising=False)
    L.seed_everything(4, verbose=False)
    module = Recorded()
    module.learning_rate = 0.0
    fit(module, [inline(tmp_path)], max_epochs=1)
    store = TraceStore(tmp_path / "traces")
    assert store.samples.sample_ids == ["green-ring-7", "red-box-2"]
    assert_rows(store.checkpoints[0].features(), expected_rows(module, store))


def test_sample_ids_go_before_encode(tmp_path: Path) -> None:
    class Dear(QuickDiffusion):
        encoded = 0

        def encode(self, batch: dict[str, Any]) -> Encoded:
            self.encoded += 1
            return super().encode(batch)

        def sample_ids(self, batch: dict[str, Any]) -> list[str]:
            return list(batch["sample_id"])

    module = Dear()
    fit(module, [inline(tmp_path)], max_epochs=2)
    assert module.encoded == 5  # the trial's two, which are compared, and the survey's
    assert len(TraceStore(tmp_path / "traces").checkpoints) == 2

    class Wanting(QuickDiffusion):
        def sample_ids(self, batch: dict[str, Any]) -> list[str]:
            return list(batch["uuid"])

    told = r"asked for 'uuid', and the batch has \['colour'.*HINT"
    with pytest.raises(MisconfigurationException, match=told) as found:
        fit(Wanting(), [inline(tmp_path / "wanting")])
    assert isinstance(found.value.__cause__, BatchError)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_resumed_run_leaves_the_store_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .test_concept_tracer import deterministic_step

    monkeypatch.setattr("uuid.uuid4", lambda: type("Fixed", (), {"hex": "0" * 32}))
    monkeypatch.setattr(ToyData, "train_dataloader", lambda self: DataLoader(self.toys, 4))
    monkeypatch.setattr(QuickDiffusion, "training_step", deterministic_step)
    for name, parts in {"whole": [3], "cut": [1, 3]}.items():
        path = tmp_path / name
        for i, epochs in enumerate(parts):
            keep = ModelCheckpoint(path / "ckpt", filename="{epoch}", save_top_k=-1)
            resume = str(path / "ckpt" / "epoch=0.ckpt") if i else None
            fit(QuickDiffusion(), [inline(path), keep], max_epochs=epochs, ckpt_path=resume)
    whole, cut = files_of(tmp_path / "whole" / "traces"), files_of(tmp_path / "cut" / "traces")
    assert whole.keys() == cut.keys()
    assert "checkpoint-00000009/visits.h5" in whole
    assert [name for name in whole if whole[name] != cut[name]] == []


@pytest.mark.filterwarnings("ignore:.*have no trace, because")
def test_a_resumed_run_knows_the_samples_of_earlier_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyData, "trace_dataloader", trace_all, raising=False)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    fit(QuickDiffusion(), [inline(tmp_path), keep], data=Dropping(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory")
        fit(
            QuickDiffusion(),
            [inline(tmp_path), keep],
            data=Dropping(),
            max_epochs=3,
            ckpt_path=str(tmp_path / "ckpt" / "epoch=1.ckpt"),
        )
    before, after = (at.features() for at in TraceStore(tmp_path / "traces").checkpoints[-2:])
    kept = torch.isclose(before, after, rtol=1e-5).all(1)
    assert (
        kept.tolist() == [False] * 10 + [True] * 2
    )  # the new sampler's first epoch leaves out the last two


@pytest.mark.filterwarnings("ignore:.*have no trace, because")
@pytest.mark.filterwarnings("ignore:.*are not sealed:ctrak_lightning.store.IncompleteStoreWarning")
def test_rows_of_a_checkpoint_that_could_not_be_stored_go_into_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda path: path.parent.name == "checkpoint-00000003")
    with pytest.warns(UserWarning, match="no trace"):
        fit(QuickDiffusion(), [inline(tmp_path)])
    [at] = TraceStore(tmp_path / "traces").checkpoints
    assert at.step == 6
    visits = at.visits()
    assert visits is not None
    assert visits.counts.tolist() == [2] * 12


class Twice(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Elsewhere(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.embedding.weight.square().mean()


class Penalised(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return (
            super().training_step(batch, batch_idx) + self.denoiser.conv_in.weight.square().mean()
        )


class Reentrant(ToyDiffusion):
    def __init__(self) -> None:
        super().__init__()
        block = self.denoiser.down_blocks[1].resnets[0]
        forward = block.forward
        block.forward = lambda *args, **kwargs: checkpoint(
            lambda x: forward(x, *args[1:], **kwargs), args[0], use_reentrant=True
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, "called the denoiser 2 times.*expected once.*HINT"),
        (Elsewhere, "called the denoiser 0 times.*expected once.*HINT"),
        (Penalised, "'conv_in.weight' enters the loss 2 times.*HINT"),
        (Reentrant, r"reentrant checkpointing.*down_blocks\.1\.resnets\.0.*use_reentrant=False"),
    ],
)
def test_steps_that_cannot_be_followed_are_refused(
    tmp_path: Path, kind: type[ToyDiffusion], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=rf"ConceptTracer\(.*{message}"):
        fit(kind(), [inline(tmp_path)])


def test_a_call_without_gradient_does_not_count(tmp_path: Path) -> None:
    class SelfConditioned(ToyDiffusion):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            with torch.no_grad():
                super().training_step(batch, batch_idx)
            return super().training_step(batch, batch_idx)

    fit(SelfConditioned(), [inline(tmp_path)])
    visits = TraceStore(tmp_path / "traces").checkpoints[0].visits()
    assert visits is not None
    assert visits.counts.tolist() == [1] * 12


def test_a_doubled_batch_is_refused(tmp_path: Path) -> None:
    class Doubled(ToyDiffusion):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            both = {name: value + value for name, value in batch.items() if isinstance(value, list)}
            return super().training_step(
                both | {"image": batch["image"].repeat(2, 1, 1, 1)}, batch_idx
            )

    with pytest.raises(
        MisconfigurationException, match="gave the denoiser 8 rows for a batch of 4 samples.*HINT"
    ):
        fit(Doubled(), [inline(tmp_path)])


def test_manual_optimization_and_compiled_modules_are_refused(tmp_path: Path) -> None:
    module = ToyDiffusion()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization.*HINT"):
        fit(module, [inline(tmp_path)])
    module = ToyDiffusion()
    module.denoiser.down_blocks[1].compile()
    with pytest.raises(
        MisconfigurationException, match=r"'denoiser\.down_blocks\.1' is compiled.*HINT"
    ):
        fit(module, [inline(tmp_path)])
    module = ToyDiffusion()
    with pytest.raises(MisconfigurationException, match="'ToyDiffusion' is compiled.*HINT"):
        fit(torch.compile(module), [inline(tmp_path)])  # type: ignore[arg-type]
    assert not list((tmp_path).glob("traces/*"))


def test_a_gradient_that_is_not_finite_names_the_sample(tmp_path: Path) -> None:
    data = ToyData()
    data.toys.images[6] = float("nan")
    with pytest.raises(GradientError, match=r"not finite, for example \['green-box-6'\].*HINT"):
        fit(ToyDiffusion(), [inline(tmp_path, thumbnails=False, on_error="raise")], data=data)


class Weighted(Recorded):
    """Leaves the samples of these ids out of the loss."""

    left_out: frozenset[str] = frozenset()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        noised, tokens = batch["image"], self.tokens(batch["colour"], batch["shape"])
        t = torch.full((len(noised),), 40)
        predicted = self.predict(noised, t, {"encoder_hidden_states": tokens})
        weights = torch.tensor([float(one not in self.left_out) for one in batch["sample_id"]])
        return (predicted.square().flatten(1).mean(1) * weights).mean()


def test_a_sample_whose_loss_has_no_weight_is_not_trained_on(tmp_path: Path) -> None:
    ids = [toy["sample_id"] for toy in ToyData().toys]
    module = Weighted()
    module.left_out = frozenset(ids[1:3])
    fit(module, [inline(tmp_path, on_error="raise")])
    store = TraceStore(tmp_path / "traces")
    assert store.verify() == []
    last = store.checkpoints[-1]
    empty = (last.features() == 0).all(1)
    assert [id for id, is_empty in zip(ids, empty.tolist(), strict=True) if is_empty] == ids[1:3]
    exposures, visits = last.exposures(), last.visits()
    assert exposures is not None
    assert visits is not None
    for counts in (exposures, visits.counts):
        assert [id for id, count in zip(ids, counts.tolist(), strict=True) if not count] == ids[1:3]
    module.left_out = frozenset(ids)
    with pytest.raises(GradientError, match="gradients of all samples are zero.*HINT"):
        fit(module, [inline(tmp_path / "none", on_error="raise")])


def test_a_trace_of_zero_is_told_where_exposures_are_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [toy["sample_id"] for toy in ToyData().toys]
    module = Weighted()
    module.left_out = frozenset(ids[1:3])
    monkeypatch.setattr(Exposures, "counts", lambda self: None)
    told = f"the gradients of 2 samples that were trained on are zero \\('{ids[1]}', '{ids[2]}'\\)"
    with pytest.warns(ZeroGradientWarning, match=told):
        fit(module, [inline(tmp_path, on_error="raise")])
    assert TraceStore(tmp_path / "traces").verify() == []


def test_a_step_that_fails_later_costs_its_own_rows_only(tmp_path: Path) -> None:
    """A doubled batch, ids that are lost and a gradient that is not finite, in the second epoch;
    all of it on top of dropout."""

    class Faulty(ToyDiffusion):
        def sample_ids(self, batch: dict[str, Any]) -> list[str]:
            if self.trainer.global_step == 4:
                raise RuntimeError("the ids are lost")
            return list(batch["sample_id"])

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            if self.trainer.global_step != 3:
                return super().training_step(batch, batch_idx)
            both = {name: value + value for name, value in batch.items() if isinstance(value, list)}
            return super().training_step(
                both | {"image": batch["image"].repeat(2, 1, 1, 1)}, batch_idx
            )

    trained = []
    for callbacks in ([], [inline(tmp_path)]):
        L.seed_everything(5, verbose=False)
        module = Faulty(dropout=0.2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, callbacks, max_epochs=3)
        trained.append(module.state_dict())
    told = [str(warning.message) for warning in caught if "is in no trace" in str(warning.message)]
    assert len(told) == 1
    assert "after 3 optimizer steps" in told[0]
    assert "gave the denoiser 8 rows" in told[0]
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    checkpoints = TraceStore(tmp_path / "traces").checkpoints
    assert [at.step for at in checkpoints] == [3, 6, 9]
    visits = [at.visits() for at in checkpoints]
    seen = {step for each in visits if each is not None for step in each.steps.tolist()}
    assert seen == {0, 1, 2, 5, 6, 7, 8}


def test_modes_and_methods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"mode='online'.*'capture', 'inline'.*HINT"
    ):
        ConceptTracer("x", mode="online")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"'d_trak', mode='inline'.*inline_trak"):
        ConceptTracer("x", "d_trak", mode="inline")
    with pytest.raises(MisconfigurationException, match=r"'inline_trak', mode='capture'.*HINT"):
        ConceptTracer("x", "inline_trak")
    assert ConceptTracer("x", mode="inline").method == methods.inline_trak()
    assert ConceptTracer("x").method == methods.influence()


class Named(nn.Module):
    def forward(
        self, x: Tensor, context: Tensor | None = None, timestep: Tensor | None = None
    ) -> Tensor:
        return x


class Positional(nn.Module):
    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return x


class Wrapped(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]


def test_timesteps_are_found_in_the_denoisers_call() -> None:
    x, t, other = torch.zeros(3, 2), torch.tensor([5, 6, 7]), torch.ones(3, 4)
    assert _timesteps(Named(), (x, other, t), {}, 3).tolist() == [5, 6, 7]
    assert _timesteps(Named(), (x,), {"timestep": t}, 3).tolist() == [5, 6, 7]
    assert _timesteps(Positional(), (x, t), {}, 3).tolist() == [5, 6, 7]
    assert _timesteps(Wrapped(), (x, torch.tensor(9)), {}, 3).tolist() == [9, 9, 9]
    assert _timesteps(Wrapped(), (x,), {"timestep": 0.5}, 3).tolist() == [0.5, 0.5, 0.5]
    for args, kwargs in (((x,), {"noise": t}), ((x, other), {}), ((x,), {"t": t[:2]})):
        with pytest.raises(
            GradientError, match=f"timesteps for 3 samples.*HINT.*{TIMESTEP_NAMES[0]}"
        ):
            _timesteps(Wrapped(), args, kwargs, 3)


def test_toys_have_the_ids_that_the_tests_name() -> None:
    assert [Toys()[i]["sample_id"] for i in (6, 10)] == ["green-box-6", "blue-box-10"]
