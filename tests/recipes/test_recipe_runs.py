"""The recipes of diffusers fine-tunes as their READMEs run them: ``ctrak fit`` with a tracer's
YAML, then ``ctrak attribute``."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from ctrak_lightning import DiffusersTask, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.cli import main
from recipes import emoji_folder
from recipes.images import FILE, ImageFolder
from recipes.pipelines import load
from recipes.text_to_image_lora.module import TextToImageLoRA

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
pytestmark = [
    # The frozen VAE and text encoders are in evaluation mode, as they should be.
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    # Four steps of a random network teach it nothing; the default's noisy states are fainter still.
    pytest.mark.filterwarnings("ignore:The concept direction"),
]
PROMPT = ["--present", "angry face by noto", "--absent", "angry face"]
CLASS = ["--present", "class=noto", "--absent"]
COLUMNS = ("object", "category", "owner", "licence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawings with captions, owners and licences."""
    path = tmp_path_factory.mktemp("emoji")
    emoji_folder.write(path, objects=4, artists=["noto", "twemoji"])
    return path


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def configs(
    tmp_path: Path, folder: Path, recipe: str, tracer: Path, data: dict[str, Any], **trainer: Any
) -> tuple[Path, Path]:
    """A recipe's YAML and a tracer's, but for their folders, two epochs, and a trace after each."""
    run, attached = (yaml.safe_load(path.read_text()) for path in (RECIPES / recipe, tracer))
    run["trainer"] |= {
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": str(tmp_path / "run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | trainer
    run["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "run")
    run["trainer"]["callbacks"] = []
    run["data"]["init_args"] |= {"root": str(folder), "batch_size": 2} | data
    attached["trainer"]["callbacks+"][0]["init_args"] |= {
        "dirpath": str(tmp_path / "traces"),
        "every_n_epochs": 1,
    }
    paths = tmp_path / "run.yaml", tmp_path / "tracer.yaml"
    for path, facts in zip(paths, (run, attached), strict=True):
        path.write_text(yaml.safe_dump(facts))
    return paths


SMALL = {"resolution": 8}
"""Pixels, where the network takes any: faster than the models' own 32."""


@pytest.mark.parametrize(
    ("recipe", "question", "needs", "data"),
    [
        ("class_conditional/dit.yaml", CLASS, "class", {}),
        ("flow_matching_lora/flux.yaml", [*PROMPT, "--guidance", "1"], "caption", SMALL),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("text_to_image_lora/sd15.yaml", PROMPT, "caption", {}),
                ("text_to_image_lora/sd21.yaml", PROMPT, "caption", SMALL),
                ("text_to_image_lora/sdxl.yaml", PROMPT, "caption", SMALL),
                ("class_conditional/unet.yaml", CLASS, "class", SMALL),
                ("ddpm_unconditional/ddpm.yaml", ["--present", "", "--name", "image"], None, SMALL),
                ("flow_matching_lora/sd3.yaml", [*PROMPT, "--guidance", "1"], "caption", SMALL),
            )
        ),
    ],
)
def test_a_recipe_is_trained_traced_and_asked(
    recipe: str,
    question: list[str],
    needs: str | None,
    data: dict[str, Any],
    folder: Path,
    tmp_path: Path,
) -> None:
    own = RECIPES / Path(recipe).parent / "concept_tracer.yaml"
    tracer = own if own.exists() else ROOT / "callbacks" / "concept_tracer.yaml"
    run, attached = configs(tmp_path, folder, recipe, tracer, data)
    main(["fit", "--config", str(run), "--config", str(attached)])

    lines = lines_of(folder)
    store = TraceStore(tmp_path / "traces")
    assert [checkpoint.step for checkpoint in store.checkpoints] == [2, 4]
    assert store.samples.sample_ids == [line["file_name"] for line in lines]
    for column in COLUMNS:
        assert store.samples.metadata[column] == [line[column] for line in lines]
    if needs == "caption":
        assert store.samples.metadata["caption"] == [line["text"] for line in lines]
    if needs == "class":
        assert store.samples.metadata["class"] == [line["artist"] for line in lines]
    first, last = (checkpoint.features() for checkpoint in store.checkpoints)
    assert (last.norm(dim=1) > 0).all()
    assert not torch.allclose(first, last)  # the weights moved

    question = [*question, "--steps", "6", "--csv", str(tmp_path / "ranking.csv")]
    main(["attribute", str(tmp_path / "traces"), "--config", str(run), *question])
    with (tmp_path / "ranking.csv").open(newline="") as file:
        ranking = list(csv.DictReader(file))
    assert {row["sample_id"] for row in ranking} == set(store.samples.sample_ids)
    scores = torch.tensor([float(row["score"]) for row in ranking])
    assert scores.isfinite().all()
    assert scores.std() > 0

    # What the recipe leaves behind holds the weights of the last checkpoint.
    weights = store.checkpoints[-1].weights()
    if (tmp_path / "run" / "adapter").exists():
        pretrained = yaml.safe_load(run.read_text())["model"]["init_args"]["pretrained"]
        pipeline = load(pretrained)
        pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    else:
        pipeline = load(str(tmp_path / "run" / "pipeline"))
    left = dict(DiffusersTask.from_pipeline(pipeline).denoiser.named_parameters())
    for name, value in weights.items():
        mine = left[name.removeprefix("task.denoiser.").replace(".default.", ".default_0.")]
        assert torch.equal(mine, value), name
    assert len(weights) == sum("lora" in name for name in left) or len(weights) == len(left)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["text_to_image_lora/sdxl.yaml", "flow_matching_lora/flux.yaml"])
def test_mixed_precision_accumulation_and_averaging_leave_a_sound_store(
    recipe: str, folder: Path, tmp_path: Path
) -> None:
    run, attached = configs(
        tmp_path,
        folder,
        recipe,
        ROOT / "callbacks" / "concept_tracer.yaml",
        SMALL,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
    )
    facts = yaml.safe_load(run.read_text())
    facts["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
            "init_args": {"decay": 0.5},
        }
    ]
    facts["model"]["init_args"] |= {"frozen_dtype": "bfloat16", "gradient_checkpointing": True}
    run.write_text(yaml.safe_dump(facts))
    main(["fit", "--config", str(run), "--config", str(attached)])
    store = TraceStore(tmp_path / "traces")
    store.verify()
    assert [checkpoint.step for checkpoint in store.checkpoints] == [1, 2]
    for checkpoint in store.checkpoints:
        assert checkpoint.features().isfinite().all()
        assert {value.dtype for value in checkpoint.weights().values()} == {torch.float32}
    main(["attribute", str(tmp_path / "traces"), "--config", str(run), *PROMPT, "--steps", "6"])


class InOrder(ImageFolder):
    """Without shuffling, so that a run that is cut goes on as if it had not been."""

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.trace_dataloader()


class Reseeded(Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        L.seed_everything(trainer.global_step, verbose=False)


def fit(
    tmp_path: Path,
    data: ImageFolder,
    *callbacks: Callback,
    epochs: int = 2,
    resumed: Path | None = None,
    **options: Any,
) -> TextToImageLoRA:
    L.seed_everything(0, verbose=False)
    module = TextToImageLoRA(
        "tiny-sd1",
        rank=2,
        learning_rate=1e-2,
        caption_dropout=0.3,
        min_snr=5.0,
        gradient_checkpointing=True,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    return module


def tracer(path: Path) -> ConceptTracer:
    return ConceptTracer(
        str(path),
        methods.concept_trak_norm(timesteps=1),
        every_n_epochs=1,
        rank=4,
        dim=64,
        thumbnails=False,
    )


def test_the_tracer_changes_no_bit_of_training(folder: Path, tmp_path: Path) -> None:
    def data() -> ImageFolder:
        return ImageFolder(
            str(folder), batch_size=2, resolution=8, random_crop=True, random_flip=True
        )

    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    plain = fit(tmp_path / "plain", data(), EMAWeightAveraging(decay=0.5), **options)
    traced = fit(
        tmp_path / "traced",
        data(),
        EMAWeightAveraging(decay=0.5),
        tracer(tmp_path / "traces"),
        **options,
    )
    for theirs, ours in zip(plain.parameters(), traced.parameters(), strict=True):
        assert torch.equal(theirs, ours)
    adapters = [
        tmp_path / each / "adapter" / "pytorch_lora_weights.safetensors"
        for each in ("plain", "traced")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert len(TraceStore(tmp_path / "traces")) == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("average", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_ends_as_one_that_was_not_cut(
    average: bool, folder: Path, tmp_path: Path
) -> None:
    def callbacks(name: str, saves: str) -> list[Callback]:
        averaging: list[Callback] = [EMAWeightAveraging(decay=0.5)] if average else []
        saved = ModelCheckpoint(tmp_path / saves, filename="{epoch}", save_top_k=-1)
        return [*averaging, Reseeded(), tracer(tmp_path / name / "traces"), saved]

    whole = fit(
        tmp_path / "whole",
        InOrder(str(folder), batch_size=2, resolution=8),
        *callbacks("whole", "saves"),
    )
    fit(
        tmp_path / "cut",
        InOrder(str(folder), batch_size=2, resolution=8),
        *callbacks("cut", "saves of cut"),
        epochs=1,
    )
    saved = tmp_path / "saves of cut" / "epoch=0.ckpt"
    facts = torch.load(saved, weights_only=True)
    assert ("current_model_state" in facts) == average
    for states in (facts["state_dict"], facts.get("current_model_state", facts["state_dict"])):
        assert states
        assert all("lora" in name for name in states)
    resumed = fit(
        tmp_path / "cut",
        InOrder(str(folder), batch_size=2, resolution=8),
        *callbacks("cut", "saves of cut"),
        resumed=saved,
    )
    for theirs, ours in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(theirs, ours)
    stores = [TraceStore(tmp_path / name / "traces") for name in ("whole", "cut")]
    for checkpoint, other in zip(stores[0].checkpoints, stores[1].checkpoints, strict=True):
        assert torch.equal(checkpoint.features(), other.features())
        assert checkpoint.step == other.step


@pytest.mark.slow
def test_training_lowers_the_loss(folder: Path, tmp_path: Path) -> None:
    """A network from nothing learns four drawings."""
    from recipes.benchmarks.class_labels import UNET
    from recipes.ddpm_unconditional.module import Unconditional

    L.seed_everything(0, verbose=False)
    module = Unconditional(unet=UNET, learning_rate=2e-3, warmup_steps=5)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any
        ) -> None:
            losses.append(float(outputs["loss"]))

    L.Trainer(
        accelerator="cpu",
        max_epochs=80,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, datamodule=ImageFolder(str(folder), batch_size=4, caption_column=None))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


@pytest.mark.parametrize(
    "name", ["text_to_image_lora", "class_conditional", "ddpm_unconditional", "flow_matching_lora"]
)
def test_every_yaml_is_in_its_readme_and_says_how_it_is_run(name: str) -> None:
    readme = (RECIPES / name / "README.md").read_text()
    for path in (RECIPES / name).glob("*.yaml"):
        relative = path.relative_to(ROOT).as_posix()
        assert relative in readme or path.name in readme
        command = path.read_text().splitlines()[0]
        assert relative in command
        if "model" in (facts := yaml.safe_load(path.read_text())):
            module = (RECIPES / name / "module.py").read_text()
            assert f"class {facts['model']['class_path'].rsplit('.', 1)[1]}(" in module
    assert len((RECIPES / name / "module.py").read_text().splitlines()) < 150
