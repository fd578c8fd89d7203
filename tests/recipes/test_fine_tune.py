"""What the diffusers recipes have in common: losses, dropped conditions, timesteps, checkpoints of
what is trained alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning import DiffusersTask, FlowSchedule
from recipes.class_conditional.module import ClassConditional
from recipes.ddpm_unconditional.module import Unconditional
from recipes.fine_tune import FineTune
from recipes.flow_matching_lora.module import FlowMatchingLoRA
from recipes.lora import add_lora
from recipes.pipelines import load, load_or_build
from recipes.text_to_image_lora.module import TextToImageLoRA
from recipes.tiny import build
from tests.tasks.tiny import batch


def images(side: int = 32) -> dict[str, Any]:
    """Four captioned images of the size of the recipes' tiny pipelines."""
    rows = batch(4)
    return rows | {"image": torch.nn.functional.interpolate(rows["image"], side)}


def test_the_loss_is_the_tasks_own_where_nothing_is_weighed_or_dropped() -> None:
    module, rows = TextToImageLoRA(), images()
    module.log = lambda *args, **options: None  # type: ignore[method-assign, assignment]
    encoded = module.task.encode(rows)
    torch.manual_seed(3)
    t = module.timesteps(4)
    losses = module.losses(encoded, t)
    assert losses.shape == (4,)
    torch.manual_seed(3)
    assert torch.equal(module.timesteps(4), t)
    noise = torch.randn_like(encoded.latents)
    for i in range(4):  # each image by itself
        one = t[i : i + 1]
        x_t = module.task.noise_schedule.add_noise(
            encoded.latents[i : i + 1], noise[i : i + 1], one
        )
        output = module.task.predict(
            x_t, one, {k: v[i : i + 1] for k, v in encoded.condition.items()}
        )
        assert torch.allclose(losses[i], (output - noise[i : i + 1]).square().mean(), rtol=1e-4)
    weighed = TextToImageLoRA(min_snr=5.0)
    weighed.log = lambda *args, **options: None  # type: ignore[method-assign, assignment]
    torch.manual_seed(3)
    expected = (losses * weighed.weights(t)).mean()
    torch.manual_seed(3)
    assert torch.allclose(weighed.training_step(rows, 0).double(), expected.double(), rtol=1e-5)


@pytest.mark.parametrize(
    ("pretrained", "weight"),
    [
        ("tiny-sd1", lambda snr: min(snr, 5.0) / snr),
        ("tiny-sd2", lambda snr: min(snr, 5.0) / (snr + 1)),
    ],
)
def test_min_snr_by_hand(pretrained: str, weight: Any) -> None:
    module = TextToImageLoRA(pretrained, min_snr=5.0)
    power = module.task.pipeline.scheduler.alphas_cumprod.double()
    t = torch.tensor([0, 5, 200, 500, 900])
    expected = [weight(float(power[i] / (1 - power[i]))) for i in t]
    assert torch.allclose(module.weights(t), torch.tensor(expected).double(), rtol=1e-4)
    assert module.weights(torch.tensor([999])).isfinite().all()  # no signal is left there
    assert TextToImageLoRA(pretrained).weights(t).tolist() == [1.0] * 5


def test_dropped_rows_have_the_null_condition_and_the_others_their_own() -> None:
    module = TextToImageLoRA("tiny-sdxl", caption_dropout=0.4)
    rows = images() | {"original_size": torch.tensor([[40, 50]] * 4)}
    encoded = module.task.encode(rows)
    null = module.task.condition({}, 1)
    torch.manual_seed(0)
    gone = 0
    for _ in range(50):
        condition = module.dropped(encoded.condition, 4)
        for i in range(4):
            texts = [
                (condition[name][i], encoded.condition[name][i], null[name][0])
                for name in ("encoder_hidden_states", "text_embeds")
            ]
            own = [torch.equal(value, mine) for value, mine, _ in texts]
            none = [torch.equal(value, empty) for value, _, empty in texts]
            assert own == [not each for each in none]
            assert len(set(own)) == 1
            gone += none[0]
        assert condition["time_ids"].tolist() == [[40, 50, 0, 0, 32, 32]] * 4
    assert 60 < gone < 100  # of 200, at 0.4


def test_classes_are_dropped_for_the_label_of_none() -> None:
    module = ClassConditional(["a", "b", "c"], pretrained="tiny-ddpm-classes", class_dropout=0.5)
    assert module.task.denoiser.config.num_class_embeds == 4
    torch.manual_seed(0)
    labels = module.dropped({"class_labels": torch.tensor([0, 1, 2] * 20)}, 60)["class_labels"]
    kept = labels != 3
    assert (labels[kept] == torch.tensor([0, 1, 2] * 20)[kept]).all()
    assert 15 < int(kept.sum()) < 45
    with pytest.raises(ValueError, match="no label for no class"):
        FineTune(
            DiffusersTask.from_pipeline(build("ddpm-classes")), learning_rate=1e-4, dropout=0.1
        )


def test_timesteps_favour_the_middle_under_the_schedulers_shift() -> None:
    module = FlowMatchingLoRA("tiny-sd3")
    flow = module.task.noise_schedule
    assert isinstance(flow, FlowSchedule)
    assert flow.shift == 3.0
    torch.manual_seed(0)
    t = module.timesteps(4000).sort().values
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.1, 0.5, 0.9])).sigmoid()
    expected = 1000 * 3 * level / (1 + 2 * level)
    assert torch.allclose(t[[400, 2000, 3600]], expected, atol=15)
    even = FlowMatchingLoRA("tiny-sd3", timesteps="uniform")
    torch.manual_seed(0)
    mine = even.timesteps(5)
    torch.manual_seed(0)
    assert torch.equal(mine, flow.random_timesteps(5))


def test_flux_is_told_its_guidance() -> None:
    module = FlowMatchingLoRA("tiny-flux", embedded_guidance=1.5, max_sequence_length=16)
    assert module.task.resolution == (32, 32)
    assert module.task.condition("a cat", 2)["guidance"].tolist() == [1.5, 1.5]
    assert FlowMatchingLoRA("tiny-flux").task.condition("a cat", 1)["guidance"].tolist() == [3.5]


def test_lora_is_float32_on_frozen_weights_of_another_dtype() -> None:
    module = TextToImageLoRA(frozen_dtype="bfloat16", rank=3, targets=["to_k"])
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert all("to_k.lora" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {3}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    whole = FlowMatchingLoRA("tiny-flux")
    names = [name for name, p in whole.named_parameters() if p.requires_grad]
    assert any("add_q_proj.lora_A" in name for name in names)


def test_the_warm_up_rises_linearly() -> None:
    module = Unconditional("tiny-ddpm", learning_rate=0.4, warmup_steps=4)
    parts = module.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(parts["optimizer"].param_groups[0]["lr"])
        parts["optimizer"].step()
        parts["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(module: FineTune) -> list[Tensor]:
        module.log = lambda *args, **options: None  # type: ignore[method-assign, assignment]
        torch.manual_seed(1)
        module.train().training_step(images(), 0).backward()
        return [p.grad for p in module.task.denoiser.parameters() if p.grad is not None]

    torch.manual_seed(0)
    plain = TextToImageLoRA()
    torch.manual_seed(0)
    saving = TextToImageLoRA(gradient_checkpointing=True)
    assert saving.task.denoiser.is_gradient_checkpointing
    for mine, theirs in zip(gradients(saving), gradients(plain), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "dit", "ddpm-classes"])
def test_a_folder_takes_the_place_of_a_tiny_pipeline_in_one_line(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    names = (str(tmp_path), f"tiny-{name}")
    # In evaluation mode: DiT drops labels by itself in training.
    task, same = (DiffusersTask.from_pipeline(load(each)).eval() for each in names)
    rows = images()
    ours, theirs = task.encode(rows), same.encode(rows)
    assert torch.equal(ours.latents, theirs.latents)
    t = torch.full((4,), 500)
    mine = task.predict(ours.latents, t, ours.condition)
    assert torch.allclose(mine, same.predict(theirs.latents, t, theirs.condition), atol=1e-5)


def test_stable_diffusion_3_can_do_without_t5(tmp_path: Path) -> None:
    build("sd3").save_pretrained(tmp_path)
    t5 = ["text_encoder_3", "tokenizer_3"]
    for name in (str(tmp_path), "tiny-sd3"):
        module = FlowMatchingLoRA(name, without=t5, max_sequence_length=16)
        assert not any("text_encoder_3" in parameter for parameter, _ in module.named_parameters())
        embeddings = module.task.condition("a cat", 1)["encoder_hidden_states"]
        assert embeddings[:, 77:].abs().max() == 0  # where T5's tokens would be


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("tiny-sd9"), "no such tiny pipeline. Expected one of tiny-sd1, tiny-sd2"),
        (
            lambda: load("tiny-sd1", dtype="int8"),
            r"dtype='int8'\): expected one of float32, bfloat16",
        ),
        (lambda: load_or_build(None, None), "expected exactly one of the two. HINT"),
        (lambda: load_or_build("tiny-ddpm", {}), "expected exactly one of the two"),
        (
            lambda: add_lora(build("dit").transformer, 2, ["q_proj"]),
            "no layer has a name that ends so. HINT",
        ),
        (lambda: TextToImageLoRA(min_snr=0.0), "expected a positive number, or None"),
        (
            lambda: TextToImageLoRA(caption_dropout=1.0),
            r"dropout=1.0\): expected a share in \[0, 1\)",
        ),
        (
            lambda: FlowMatchingLoRA(timesteps="cosine"),
            r"expected one of \('logit-normal', 'uniform'\)",
        ),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (TextToImageLoRA, "tiny-sd1"),
        (TextToImageLoRA, "tiny-sdxl"),
        (FlowMatchingLoRA, "tiny-sd3"),
        (FlowMatchingLoRA, "tiny-flux"),
    ],
)
def test_the_adapter_is_what_load_lora_weights_reads(
    module: Any, name: str, tmp_path: Path
) -> None:
    trained = module(name, rank=2)
    task = trained.task
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task.denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save(tmp_path)
    fresh = load(name)
    before = DiffusersTask.from_pipeline(fresh)
    encoded = before.encode(images())
    t = torch.full((4,), 500)
    noise = torch.randn_like(encoded.latents)
    plain = before.predict(noise, t, encoded.condition)
    fresh.load_lora_weights(tmp_path / "adapter")
    loaded = before.predict(noise, t, encoded.condition)
    assert torch.allclose(loaded, task.predict(noise, t, encoded.condition), atol=1e-5)
    assert (loaded - plain).abs().max() > 1e-3
