"""ConceptMonitor: training stays as it was, and the event file says what the traces say."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch import Tensor

from ctrak_lightning import Attribution, Attributor, Concept, Encoded, Sampler, TraceStore, methods
from ctrak_lightning.attribution import diagnostics
from ctrak_lightning.callbacks import ConceptMonitor, ConceptTracer
from ctrak_lightning.panels import watch
from ctrak_lightning.panels.grid import CELL, Geometry
from ctrak_lightning.panels.tables import escaped

from ..lenient import lenient
from ..toy import QuickDiffusion, ToyData, tiny_unet
from .test_on_error import full_disk

SAMPLER = Sampler(steps=4)
RED = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})
RING = {"name": "a ring | 猫", "present": {"shape": "ring"}, "absent": {}}
NAMES = ("red", "a_ring_猫")


class Logging(QuickDiffusion):
    """The toy that logs its loss, per step and per epoch, and its hyperparameters."""

    def __init__(self, dropout: float = 0.0, width: int = 7) -> None:
        super().__init__(dropout=dropout)
        self.save_hyperparameters()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["image"]))
        return loss


def monitor(concepts: Any = (RED, RING), **kwargs: Any) -> ConceptMonitor:
    arguments: dict[str, Any] = {"sampler": SAMPLER, "on_error": "raise", "seed": 1}
    return ConceptMonitor(list(concepts), **(arguments | kwargs))


def tracer(path: Path, **kwargs: Any) -> ConceptTracer:
    arguments: dict[str, Any] = {"rank": 4, "dim": 64, "every_n_epochs": 1}
    arguments["method"] = methods.concept_trak(timesteps=2, channel_probes=1)
    return ConceptTracer(str(path / "traces"), **(arguments | kwargs))


def fit(
    path: Path,
    callbacks: list[Any],
    module: Any = None,
    *,
    data: Any = None,
    logger: Any = None,
    **kwargs: Any,
) -> L.Trainer:
    logger = (
        TensorBoardLogger(str(path / "board"), name="", version="") if logger is None else logger
    )
    arguments: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1}
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=callbacks,
        **(arguments | kwargs),
    )
    trainer.fit(
        module or Logging(),
        datamodule=data or ToyData(),
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    return trainer


def events(path: Path) -> EventAccumulator:
    everything = {"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}
    return EventAccumulator(str(path / "board"), size_guidance=everything).Reload()


def curves(found: EventAccumulator) -> dict[str, dict[int, float]]:
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def text(found: EventAccumulator, name: str) -> dict[int, str]:
    return {
        e.step: e.tensor_proto.string_val[0].decode()
        for e in found.Tensors(f"ctrak/ranking/{name}/text_summary")
    }


@pytest.fixture(scope="module", autouse=True)
def taken_for_learnt() -> Iterator[None]:
    with lenient():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run of three epochs, and its module."""
    path = tmp_path_factory.mktemp("run")
    L.seed_everything(4, verbose=False)
    module = Logging()
    fit(path, [tracer(path), monitor()], module, max_epochs=3)
    return path, module


@pytest.fixture(scope="module")
def expected(run: tuple[Path, Any]) -> dict[int, list[Attribution]]:
    """What an Attributor says afterwards, asked with the first one, two and three checkpoints."""
    path, module = run
    answers = {}
    for count, x in enumerate([2, 5, 8], start=1):
        store = TraceStore(path / "traces")
        store.checkpoints = store.checkpoints[:count]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            attributor = Attributor(store, module, sampler=SAMPLER)
            answers[x] = attributor.attribute_many([RED, Concept(**RING)], 1)
    return answers


class OnUNet(Logging):
    network = staticmethod(tiny_unet)


@pytest.mark.parametrize(
    ("first", "kind", "epochs"), [("tracer", OnUNet, 1), ("monitor", Logging, 2)]
)
def test_training_is_bit_identical_with_and_without_the_monitor(
    tmp_path: Path, first: str, kind: type[Logging], epochs: int
) -> None:
    """AdamW, dropout, shuffling, gradient accumulation, an averaging callback; looked at after
    every step and epoch."""

    def weights_after(attached: bool) -> dict[str, Tensor]:
        L.seed_everything(5, verbose=False)
        module = kind(dropout=0.2)
        callbacks: list[Any] = [EMAWeightAveraging(decay=0.9)]
        if attached:
            pair = [tracer(tmp_path, every_n_train_steps=1), monitor()]
            callbacks += pair if first == "tracer" else pair[::-1]
        fit(
            tmp_path / str(attached),
            callbacks,
            module,
            accumulate_grad_batches=2,
            max_epochs=epochs,
        )
        return {name: value.clone() for name, value in module.state_dict().items()}

    plain, watched = weights_after(False), weights_after(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    # Two micro-batches and one: x is the optimizer step, from 0, as for the module's own loss.
    found = curves(events(tmp_path / "True"))
    assert list(found["ctrak/strength/red"]) == list(range(2 * epochs)) == list(found["loss_step"])


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_flags_random_state_and_gradients_are_left_alone(tmp_path: Path) -> None:
    """With a task that draws random numbers, and would use dropout, where the monitor calls it."""

    class Drawing(OnUNet):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            assert not self.training
            torch.rand(10)
            return super().condition(spec, n)

    class Watcher(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            flags = {name: m.training for name, m in pl_module.named_modules()}
            requires = all(p.requires_grad for p in pl_module.parameters())
            self.seen.append((flags, requires, torch.get_rng_state().tolist()))

    watchers = []
    for attached in (False, True):
        L.seed_everything(6, verbose=False)
        module = Drawing()
        module.denoiser.down_blocks[1].eval()
        watchers.append(Watcher())
        pair = [tracer(tmp_path, every_n_train_steps=1), monitor()] if attached else []
        fit(tmp_path / str(attached), [*pair, watchers[-1]], module, max_epochs=1)
    assert len(watchers[0].seen) == 3
    assert watchers[0].seen == watchers[1].seen
    assert not watchers[0].seen[0][0]["denoiser.down_blocks.1"]


def test_scalars_are_what_the_attributor_says(
    run: tuple[Path, Any], expected: dict[int, list[Attribution]]
) -> None:
    path, _ = run
    found = curves(events(path))
    assert list(found["loss_epoch"]) == [2, 5, 8]
    for i, name in enumerate(NAMES):
        assert list(found[f"ctrak/strength/{name}"]) == [2, 5, 8]
        for x, results in expected.items():
            assert found[f"ctrak/strength/{name}"][x] == pytest.approx(
                results[i].strength, rel=1e-5
            )
            contributors = results[i].effective_contributors()
            assert found[f"ctrak/contributors/{name}"][x] == pytest.approx(contributors, rel=1e-4)
            shares = {share.group: share.share for share in results[i].by_group("owner")}
            assert sum(shares.values()) == pytest.approx(1)
            for owner, share in shares.items():
                tag = f"ctrak/share/{name}/{owner.replace(' ', '_')}"
                assert found[tag][x] == pytest.approx(share, abs=1e-5)
    store = TraceStore(path / "traces")
    for x, checkpoint in zip([2, 5, 8], store.checkpoints, strict=True):
        for q in (10, 50, 90):
            norm = np.quantile(checkpoint.features().norm(dim=1).double().numpy(), q / 100)
            assert found[f"ctrak/trace_norm/q{q}"][x] == pytest.approx(norm, rel=1e-5)
    for x in (2, 5, 8):
        assert 0 < found["ctrak/overhead/tracer"][x] + found["ctrak/overhead/monitor"][x] < 1
        assert min(found["ctrak/seconds/tracer"][x], found["ctrak/seconds/monitor"][x]) > 0


def test_histograms_and_tables_are_of_the_same_scores(
    run: tuple[Path, Any], expected: dict[int, list[Attribution]]
) -> None:
    found = events(run[0])
    for i, name in enumerate(NAMES):
        tables = text(found, name)
        for event in found.Histograms(f"ctrak/scores/{name}"):
            result = expected[event.step][i]
            value = event.histogram_value
            assert value.num == 12
            assert value.sum == pytest.approx(float(result.scores.sum()), rel=1e-4, abs=1e-4)
            assert value.max == pytest.approx(float(result.scores.max()), rel=1e-4)
            rows = [line for line in tables[event.step].splitlines() if line.startswith("| 1 |")]
            best = result.top(1)[0]
            assert rows == [
                f"| 1 | {best.sample_id} | {best.metadata['owner']} | {best.score:.3f} |"
            ]


def test_pictures_show_the_thumbnails_by_rank(
    run: tuple[Path, Any], expected: dict[int, list[Attribution]]
) -> None:
    found = events(run[0])
    geometry = Geometry(8, 4)
    for i, name in enumerate(NAMES):
        for event in found.Images(f"ctrak/concept/{name}"):
            picture = Image.open(io.BytesIO(event.encoded_image_string))
            result = expected[event.step][i]
            order = result.scores.argsort(descending=True, stable=True).tolist()
            assert result.samples.thumbnails is not None
            places = [*map(geometry.proponent, range(8)), *map(geometry.opponent, range(4))]
            for box, position in zip(places, [*order[:8], *order[:-5:-1]], strict=True):
                shown = (
                    result.samples.thumbnails[position]
                    .numpy()
                    .repeat(CELL // 8, 0)
                    .repeat(CELL // 8, 1)
                )
                np.testing.assert_array_equal(np.asarray(picture.crop(box)), shown)
            assert result.image is not None
            pixels = (result.image * 255).round().byte().permute(1, 2, 0).numpy()
            generated = np.asarray(picture.crop(geometry.generated))
            # Weights that were stored and loaded: the same to rounding.
            centres = generated[17::34, 17::34].astype(int)
            assert np.abs(centres - pixels).max() <= 1


def test_the_layout_charts_what_is_there(run: tuple[Path, Any]) -> None:
    found = events(run[0])
    [event] = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = [chart.title for category in layout.category for chart in category.chart]
    assert charts[:2] == ["red: share by owner", "a ring | 猫: share by owner"]
    assert len(charts) == 7


def hparams(found: EventAccumulator) -> tuple[dict[str, Any], list[str]]:
    content = found.PluginTagToContent("hparams")
    info = hparams_metadata.parse_session_start_info_plugin_data(
        content["_hparams_/session_start_info"]
    )
    experiment = hparams_metadata.parse_experiment_plugin_data(content["_hparams_/experiment"])
    values = {
        name: getattr(value, str(value.WhichOneof("kind"))) for name, value in info.hparams.items()
    }
    assert {info.name for info in experiment.hparam_infos} == values.keys()
    return values, [metric.name.tag for metric in experiment.metric_infos]


def test_hyperparameters_are_the_modules_and_the_methods(run: tuple[Path, Any]) -> None:
    values, metrics = hparams(events(run[0]))
    assert values["width"] == 7
    assert values["dropout"] == 0
    assert values["ctrak/method"] == "concept_trak"
    assert values["ctrak/damping"] == "agreement"
    assert values["ctrak/timesteps"] == 2
    assert values["ctrak/dim"] == 64
    assert "hp_metric" in metrics
    tags = events(run[0]).Tags()["scalars"]
    assert (
        {"ctrak/strength/red", "ctrak/contributors/red", "ctrak/overhead/monitor"}
        < set(metrics)
        < set(tags)
    )
    # What Lightning itself keeps of the module's hyperparameters is as without the monitor.
    assert yaml.safe_load((run[0] / "board" / "hparams.yaml").read_text()) == {
        "dropout": 0.0,
        "width": 7,
    }


def test_a_users_own_summary_of_hyperparameters_is_not_displaced(tmp_path: Path) -> None:
    class Own(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.logger.log_hyperparams({"mine": 5}, {"my_metric": 0})

    logger = TensorBoardLogger(
        str(tmp_path / "board"), name="", version="", default_hp_metric=False
    )
    fit(tmp_path, [tracer(tmp_path), monitor(), Own()], logger=logger, max_epochs=1)
    assert hparams(events(tmp_path)) == ({"mine": 5.0}, ["my_metric"])


def test_the_projector_has_the_last_traces_with_their_images(
    run: tuple[Path, Any], expected: dict[int, list[Attribution]]
) -> None:
    folder = run[0] / "board" / "00008" / "ctrak"
    header, *rows = [
        line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()
    ]
    assert header == [
        "sample id",
        "colour",
        "owner",
        "shape",
        "trace norm",
        "score red",
        "score a ring | 猫",
    ]
    samples = expected[8][0].samples
    assert [row[0] for row in rows] == samples.sample_ids
    assert [row[2] for row in rows] == samples.metadata["owner"]
    scores = [float(row[5]) for row in rows]
    np.testing.assert_allclose(scores, expected[8][0].scores.numpy(), atol=1e-3)
    points = np.loadtxt(folder / "tensors.tsv")
    features = TraceStore(run[0] / "traces").checkpoints[-1].features().double().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gram = (unit - unit.mean(0)) @ (unit - unit.mean(0)).T
    np.testing.assert_allclose(points @ points.T, gram, atol=1e-6)
    sprite = np.asarray(Image.open(folder / "sprite.png"))
    assert samples.thumbnails is not None
    for i in range(12):
        y, x = 8 * (i // 4), 8 * (i % 4)
        np.testing.assert_array_equal(sprite[y : y + 8, x : x + 8], samples.thumbnails[i].numpy())
    config = (run[0] / "board" / "projector_config.pbtxt").read_text()
    assert "single_image_dim: 8" in config
    assert "00008/ctrak/metadata.tsv" in config


def test_the_order_of_the_callbacks_does_not_matter(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        L.seed_everything(4, verbose=False)
        pair = [tracer(tmp_path / name), monitor()]
        fit(tmp_path / name, pair if name == "a" else pair[::-1])
        timed = ("ctrak/seconds", "ctrak/overhead")
        values = {
            tag: v
            for tag, v in curves(events(tmp_path / name)).items()
            if not tag.startswith(timed)
        }
        found.append(values)
    assert found[0] == found[1]
    assert list(found[0]["ctrak/strength/red"]) == [2, 5]


def test_tags_do_not_grow_with_owners_and_samples(tmp_path: Path) -> None:
    class Many(Logging):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            encoded = super().encode(batch)
            encoded.metadata["owner"] = list(encoded.sample_ids)
            return encoded

    data = ToyData(batch_size=12, copies=3)
    fit(tmp_path, [tracer(tmp_path), monitor()], Many(), data=data, max_epochs=4)
    tags = events(tmp_path).Tags()
    own = [
        t
        for kind in ("images", "histograms", "scalars", "tensors")
        for t in tags[kind]
        if "ctrak" in t
    ]
    assert len(own) <= 2 * 16 + 12
    found = curves(events(tmp_path))
    shares = [values for tag, values in found.items() if tag.startswith("ctrak/share/red/")]
    assert 6 < len(shares) <= 11
    assert sum(values[2] for values in shares if 2 in values) == pytest.approx(1, abs=1e-5)
    assert "ctrak/share/red/others" in found


def test_the_right_logger_is_found_among_several(tmp_path: Path) -> None:
    board = TensorBoardLogger(str(tmp_path / "board"), name="", version="")
    fit(
        tmp_path,
        [tracer(tmp_path), monitor()],
        logger=[CSVLogger(str(tmp_path / "csv")), board],
        max_epochs=1,
    )
    assert list(curves(events(tmp_path))["ctrak/strength/red"]) == [2]


@pytest.mark.parametrize("installed", [True, False])
def test_without_tensorboard_training_goes_on_and_it_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setattr("ctrak_lightning.callbacks.monitored_run.find_spec", lambda name: None)
    states = []
    for attached in (False, True):
        L.seed_everything(1, verbose=False)
        module = QuickDiffusion()
        logger = CSVLogger(str(tmp_path / "csv"), version=int(attached)) if installed else False
        callbacks = [tracer(tmp_path), monitor()] if attached else []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, callbacks, module, logger=logger)
        told = [str(w.message) for w in caught if "ConceptMonitor" in str(w.message)]
        states.append(module.state_dict())
    [message] = told
    assert "no TensorBoardLogger" in message
    assert ("CSVLogger" if installed else "none") in message
    assert ("pip install tensorboard" in message) != installed
    assert "HINT" in message
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(TraceStore(tmp_path / "traces").checkpoints) == 2


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, [tracer(tmp_path), monitor()], fast_dev_run=True)
    assert not (tmp_path / "traces").exists()


def test_arguments_that_cannot_work_are_refused() -> None:
    for arguments, message in (
        ({"concepts": []}, r"concepts=\[\].*at least one.*HINT"),
        ({"concepts": [{"name": "x", "present": {"a": "b"}}]}, r"absent.*HINT"),
        ({"concepts": [{"name": "x", "present": "a", "absent": "a"}]}, r"both 'a'.*HINT"),
        ({"top": 0}, r"top=0.*>= 1.*HINT"),
        ({"bottom": -1}, r"bottom=-1.*>= 0.*HINT"),
        ({"on_error": "ignore"}, r"on_error='ignore'.*'raise', 'warn'.*HINT"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            monitor(**arguments)  # type: ignore[arg-type]


def test_what_to_follow_must_be_clear(tmp_path: Path) -> None:
    pair = [tracer(tmp_path / "a"), tracer(tmp_path / "b", method=methods.d_trak(timesteps=2))]
    with pytest.raises(MisconfigurationException, match=r"the Trainer has: none.*HINT"):
        fit(tmp_path, [monitor()])
    with pytest.raises(
        MisconfigurationException, match=r"one ConceptTracer to follow.*/a/traces.*/b/traces"
    ):
        fit(tmp_path, [*pair, monitor()])
    with pytest.raises(MisconfigurationException, match="2 ConceptMonitors"):
        fit(tmp_path, [pair[0], monitor(), monitor([RED])])
    fit(tmp_path, [*pair, monitor(dirpath=pair[1].dirpath)], max_epochs=1)
    assert hparams(events(tmp_path))[0]["ctrak/method"] == "d_trak"


def test_mistakes_are_refused_before_the_first_step(tmp_path: Path) -> None:
    unknown = Concept("x", {"colour": "rad"}, {})
    module = Logging()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"unknown colour 'rad'. Known: red"):
        fit(tmp_path / "a", [monitor([unknown]), tracer(tmp_path / "a")], module)
    with pytest.raises(
        MisconfigurationException, match=r"group='ownr'.*They have: colour, owner, shape.*HINT"
    ):
        fit(tmp_path / "b", [monitor(group="ownr"), tracer(tmp_path / "b")], module)
    with pytest.raises(
        MisconfigurationException, match=r"looks at 2 states .* has 1.*HINT: .*steps=3"
    ):
        fit(tmp_path / "c", [monitor(sampler=Sampler(steps=1)), tracer(tmp_path / "c")], module)
    with pytest.raises(MisconfigurationException, match="between 1 and 100 steps"):
        fit(tmp_path / "d", [monitor(sampler=Sampler(steps=101)), tracer(tmp_path / "d")], module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("columns", "group"), [([], "artist"), (["colour"], "owner")])
def test_owners_that_are_not_there_are_told_and_left_out(
    tmp_path: Path, columns: list[str], group: str
) -> None:
    class Bare(Logging):
        def encode(self, batch: dict[str, Any]) -> Encoded:
            encoded = super().encode(batch)
            for name in set(encoded.metadata) - set(columns):
                del encoded.metadata[name]
            return encoded

    with pytest.warns(
        UserWarning, match=f"group='{group}'.*They have: {columns[0] if columns else 'none'}"
    ):
        fit(tmp_path, [tracer(tmp_path), monitor(group=group)], Bare(), max_epochs=1)
    found = curves(events(tmp_path))
    assert not [tag for tag in found if "share" in tag]
    assert list(found["ctrak/strength/red"]) == [2]


def test_a_failure_costs_its_own_panels_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = watch.Attributor, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 2):
            raise RuntimeError("out of luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(watch, "Attributor", failing)
    with pytest.warns(UserWarning, match="ConceptMonitor") as caught:
        fit(tmp_path, [tracer(tmp_path), monitor(on_error="warn")], max_epochs=3)
    told = [str(w.message) for w in caught if "ConceptMonitor" in str(w.message)]
    assert len(told) == 2
    assert "step 3 are missing or incomplete: RuntimeError: out of luck" in told[0]
    assert "steps [3, 6]" in told[1]
    assert list(curves(events(tmp_path))["ctrak/strength/red"]) == [8]
    assert len(TraceStore(tmp_path / "traces").checkpoints) == 3
    calls.clear()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path / "raise", [tracer(tmp_path / "raise"), monitor()])


def test_weights_are_put_back_after_a_failure_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Logging):
        def decode(self, latents: Tensor) -> Tensor:
            if len(latents) == 2:
                raise RuntimeError("no decoder")
            return super().decode(latents)

    states = []
    for callbacks in ([], [tracer(tmp_path), monitor(on_error="warn")]):
        L.seed_everything(1, verbose=False)
        module = Failing()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fit(tmp_path / str(len(callbacks)), callbacks, module)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_without_traces_has_no_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda path: path.parent.name == "checkpoint-00000003")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tracer's, of the step without a trace
        fit(tmp_path, [tracer(tmp_path), monitor()])
    assert list(curves(events(tmp_path))["ctrak/strength/red"]) == [5]


def test_a_ranking_that_says_nothing_is_told_once_and_has_no_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "FAINT", 10.0)
    with pytest.warns(UserWarning, match="say nothing so far") as caught:
        fit(tmp_path, [tracer(tmp_path), monitor()], max_epochs=3)
    told = [str(w.message) for w in caught if "say nothing so far" in str(w.message)]
    assert len(told) == 1
    assert "red, a ring | 猫" in told[0]
    found = events(tmp_path)
    for table in text(found, "red").values():
        assert 0 < table.index(escaped(diagnostics.NOT_LEARNT)) < table.index("Proponents")
        assert "Shares" not in table
    assert not any("/share/" in tag for tag in found.Tags()["scalars"])


def test_a_concept_without_any_gradient_does_not_cost_the_others(tmp_path: Path) -> None:
    class Deaf(Logging):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            return super().condition({key: v for key, v in spec.items() if key == "colour"}, n)

    fit(tmp_path, [tracer(tmp_path), monitor()], Deaf(), max_epochs=1)
    found = events(tmp_path)
    assert "No scores at this checkpoint" in text(found, NAMES[1])[2]
    assert found.Tags()["images"] == ["ctrak/concept/red"]
    assert list(curves(found)["ctrak/strength/red"]) == [2]


def test_a_task_without_decode_shows_ids(tmp_path: Path) -> None:
    class Latent(Logging):
        def decode(self, latents: Any) -> Any:
            return None

    fit(tmp_path, [tracer(tmp_path), monitor()], Latent(), max_epochs=1)
    found = events(tmp_path)
    assert found.Tags()["images"] == [f"ctrak/concept/{name}" for name in NAMES]
    assert (tmp_path / "board" / "00002" / "ctrak" / "metadata.tsv").exists()
    assert not (tmp_path / "board" / "00002" / "ctrak" / "sprite.png").exists()


def test_inline_traces_are_the_same_under_the_monitor(tmp_path: Path) -> None:
    features = []
    for callbacks in ([], [monitor()]):
        L.seed_everything(2, verbose=False)
        path = tmp_path / str(len(callbacks))
        own = tracer(path, mode="inline", method=methods.inline_trak(timesteps=2))
        fit(path, [own, *callbacks])
        features.append(
            torch.stack([c.features() for c in TraceStore(path / "traces").checkpoints])
        )
    assert torch.equal(features[0], features[1])
    assert list(curves(events(tmp_path / "1"))["ctrak/strength/red"]) == [2, 5]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_resumed_run_goes_on_along_the_x_axis(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="last")
    fit(tmp_path / "a", [tracer(tmp_path), monitor(), keep], max_epochs=1)
    callbacks = [tracer(tmp_path), monitor(), keep]
    fit(tmp_path / "b", callbacks, max_epochs=2, ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    found = curves(events(tmp_path / "b"))
    assert list(found["ctrak/strength/red"]) == [5] == list(found["loss_epoch"])
