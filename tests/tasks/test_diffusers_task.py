"""What a pipeline's task makes of batches and concepts: latents, prompts, classes, sizes; and what
it refuses."""

import math
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from ctrak_lightning import Concept, DiffusersTask, FlowSchedule
from ctrak_lightning.attribution.concept import check_known
from ctrak_lightning.errors import ConceptError, TaskError
from ctrak_lightning.gradients import tracing_mode
from ctrak_lightning.tasks import encode, resolve_task, unwrapped
from tests.tasks.tiny import (
    PIPELINES,
    SIZE,
    TOKENS,
    batch,
    build,
    stable_diffusion,
    stable_diffusion_xl,
    task_of,
)


class HalfVAE(torch.nn.Module):
    """An autoencoder whose mean is half of an image's left columns, so that factors can be followed
    by hand."""

    dtype = torch.float32

    def __init__(self, shift: float | None) -> None:
        super().__init__()
        self.config = {"scaling_factor": 0.4, "shift_factor": shift}
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, images: Tensor) -> Any:
        mean = images[..., :2] * 0.5
        distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
        spread = torch.full_like(mean, 9.0)  # a draw would be far from the mean
        return type("Output", (), {"latent_dist": distribution(torch.cat([mean, spread], dim=1))})

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents.repeat(1, 1, 1, 2),)


@pytest.mark.parametrize(("name", "shift"), [("sd1", None), ("sd3", 0.3), ("flux", 0.3)])
def test_latents_and_images_use_the_scaling_and_the_shift(name: str, shift: float | None) -> None:
    task = task_of(name)
    task.vae = HalfVAE(shift)
    image = torch.tensor([0.8, -0.4, 0.1, 0.0]).expand(2, 3, 4, 4)
    latents = task.latents(image)
    # (0.4 - shift) * 0.4 and (-0.2 - shift) * 0.4, with a shift of 0 or 0.3.
    by_hand = [0.16, -0.08] if shift is None else [0.04, -0.2]
    torch.testing.assert_close(latents, torch.tensor(by_hand).expand(2, 3, 4, 2))
    # 0.04 / 0.4 + 0.3 = 0.4 again, shown at 0.4 / 2 + 0.5.
    torch.testing.assert_close(task.decode(latents)[0, 0, 0], torch.tensor([0.7, 0.4, 0.7, 0.4]))
    torch.testing.assert_close(task.decode(latents * 100).max(), torch.tensor(1.0))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_a_task(name: str) -> None:
    task = task_of(name).eval()  # DiT drops labels while it trains
    assert unwrapped(resolve_task(task)) is task
    encoded = encode(task, batch(3))
    assert encoded.sample_ids == ["image-0", "image-1", "image-2"]
    assert encoded.metadata["owner"] == ["owner 0", "owner 1", "owner 2"]
    assert "sample_id" not in encoded.metadata
    if hasattr(task, "vae"):
        z = task.vae.encode(batch(3)["image"]).latent_dist.mean
        factors = task.vae.config
        torch.testing.assert_close(
            encoded.latents, (z - (factors["shift_factor"] or 0)) * factors["scaling_factor"]
        )
    assert task.decode(encoded.latents).shape == (3, 3, 2 * SIZE, 2 * SIZE)
    t = torch.tensor(task.noise_schedule.even_timesteps(3))
    output = task.predict(encoded.latents, t, encoded.condition)
    assert output.shape == encoded.latents.shape
    # A sample's output does not depend on the others.
    alone = task.predict(
        encoded.latents[1:2], t[1:2], {k: v[1:2] for k, v in encoded.condition.items()}
    )
    torch.testing.assert_close(output[1:2], alone, rtol=1e-4, atol=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = task.loss(batch(3))
        torch.manual_seed(0)
        noise = torch.randn_like(encoded.latents)
        t = task.noise_schedule.random_timesteps(3)
    x_t = task.noise_schedule.add_noise(encoded.latents, noise, t)
    a, s = task.noise_schedule.levels(t, noise)
    target = {
        "flow": noise - encoded.latents,
        "v_prediction": a * noise - s * encoded.latents,
        "epsilon": noise,
    }[task.noise_schedule.to_dict()["prediction_type"]]
    by_hand = (task.predict(x_t, t, encoded.condition) - target).square().mean()
    torch.testing.assert_close(loss, by_hand)
    assert loss.requires_grad


@pytest.mark.parametrize("name", [n for n in PIPELINES if not n.startswith(("ddpm", "dit"))])
def test_prompts_are_encoded_as_the_pipeline_does_and_once(name: str) -> None:
    task = task_of(name)
    calls: list[Any] = []
    encode_prompt = task.pipeline.encode_prompt

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return encode_prompt(*args, **kwargs)

    task.pipeline.encode_prompt = counted
    captions = batch(4) | {"caption": ["a cat", "a dog", "a cat", "a cat"]}
    condition = task.encode(captions).condition
    assert len(calls) == 2
    assert all(len(value) == 4 for value in condition.values())
    again = task.condition("a dog", 3)
    assert len(calls) == 2
    for key, value in again.items():
        assert len(value) == 3
        assert torch.equal(value, condition[key][1:2].expand_as(value))
    cat, dog = condition["encoder_hidden_states"][:2]
    assert (cat - dog).abs().max() > 1e-3
    assert not condition["encoder_hidden_states"].requires_grad
    expected = encode_prompt(
        **{
            "prompt": ["a dog"],
            "device": torch.device("cpu"),
            **({} if name.startswith("flux") else {"do_classifier_free_guidance": False}),
            **({"num_images_per_prompt": 1} if name in ("sd1", "sd2") else {}),
            **({"prompt_2": None, "prompt_3": None} if name.startswith("sd3") else {}),
            **(
                {"max_sequence_length": TOKENS}
                if name.startswith(("sd3", "flux", "pixart"))
                else {}
            ),
        }
    )
    torch.testing.assert_close(expected[0][0], dog)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: tracing_mode(torch.nn.ReLU()),
    ],
)
def test_what_is_kept_does_not_depend_on_who_asks_first(mode: Any) -> None:
    expected = task_of("sd3").condition("a cat", 1)["encoder_hidden_states"]
    task = task_of("sd3")
    with mode():
        task.condition("a cat", 1)
    kept = task.condition("a cat", 1)["encoder_hidden_states"]
    assert torch.equal(kept, expected)
    assert not kept.is_inference()


def test_a_trained_text_encoder_is_not_kept() -> None:
    task = task_of("sd1")
    before = task.condition("a cat", 1)["encoder_hidden_states"]
    assert not any(p.requires_grad for p in task.text_encoder.parameters())
    task.text_encoder.requires_grad_(True)
    assert task.condition("a cat", 1)["encoder_hidden_states"].requires_grad
    with torch.no_grad():
        for parameter in task.text_encoder.parameters():
            parameter.mul_(1.5)
    assert (task.condition("a cat", 1)["encoder_hidden_states"] - before).abs().max() > 1e-3


def test_a_text_encoder_with_an_adapter_is_left_as_it_is() -> None:
    pipeline = build("sd1")
    pipeline.text_encoder.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder)
    task = DiffusersTask.from_pipeline(pipeline)
    trained = [name for name, p in task.text_encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    assert not any(p.requires_grad for p in task.vae.parameters())


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    task = task_of("sd3").train()
    assert task.denoiser.training
    assert not any(m.training for part in (task.vae, task.text_encoder_3) for m in part.modules())


def test_the_prompts_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("sd1")
    row = sum(value.nbytes for value in task.condition("a cat", 1).values())
    monkeypatch.setattr("ctrak_lightning.tasks.text.CACHE_BYTES", 2 * row)
    for prompt in ("a dog", "a cat", "a picture"):
        task.condition(prompt, 1)
    assert list(task._cache) == ["a cat", "a picture"]  # type: ignore[attr-defined]
    assert len(task.encode(batch(4)).condition["encoder_hidden_states"]) == 4


def test_null_condition() -> None:
    """The unconditional side is the negative prompt, else what the pipeline takes: the empty
    prompt, or zeros."""
    sd = task_of("sd1")
    assert torch.equal(
        sd.condition({}, 1)["encoder_hidden_states"], sd.condition("", 1)["encoder_hidden_states"]
    )
    negative = task_of("sd1", negative_prompt="a dog")
    assert torch.equal(
        negative.condition({}, 2)["encoder_hidden_states"],
        negative.condition("a dog", 2)["encoder_hidden_states"],
    )
    xl = task_of("sdxl")
    null = xl.condition({}, 1)
    assert null["encoder_hidden_states"].abs().max() == null["text_embeds"].abs().max() == 0
    assert null["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]]
    assert xl.condition("", 1)["text_embeds"].abs().max() > 0
    unforced = DiffusersTask.from_pipeline(stable_diffusion_xl(force_zeros_for_empty_prompt=False))
    assert unforced.condition({}, 1)["text_embeds"].abs().max() > 0


def test_time_ids_of_a_batch_are_its_own() -> None:
    task = task_of("sdxl", resolution=(32, 16), batch={"size": "original_size"})
    assert task.condition("a cat", 1)["time_ids"].tolist() == [[32, 16, 0, 0, 32, 16]]
    assert task.encode(batch(1)).condition["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]]
    rows = batch(2) | {
        "size": torch.tensor([[20, 30], [40, 50]]),
        "crop_top_left": [[1, 2], [3, 4]],
    }
    assert task.encode(rows).condition["time_ids"].tolist() == [
        [20, 30, 1, 2, 8, 8],
        [40, 50, 3, 4, 8, 8],
    ]


def test_embedded_guidance_and_the_shift_of_flux() -> None:
    task = task_of("flux", embedded_guidance=4.5)
    assert task.condition("a cat", 2)["guidance"].tolist() == [4.5, 4.5]
    assert task.encode(batch(1)).condition["guidance"].tolist() == [4.5]
    assert "guidance" not in task_of("flux-schnell").condition("a cat", 1)
    shifts = []
    for size in (8, 1024):
        schedule = task_of("flux", resolution=size).noise_schedule
        assert isinstance(schedule, FlowSchedule)
        shifts.append(schedule.shift)
    # 4 and 65,536 tokens, for the tiny VAE halves the sides and packing halves them again: 0.5 +
    # 0.65 (n - 256) / 3840.
    assert shifts == pytest.approx([math.exp(0.5 - 0.65 * 252 / 3840), math.exp(0.5 + 0.65 * 17)])


def test_sizes_of_pixart_and_its_mask() -> None:
    condition = task_of("pixart-sized", resolution=(8, 16)).condition("a cat", 2)
    assert condition["resolution"].tolist() == [[8.0, 16.0]] * 2
    assert condition["aspect_ratio"].tolist() == [[0.5]] * 2
    assert condition["encoder_attention_mask"].sum(1).tolist() == [
        7,
        7,
    ]  # "_a_cat", its first space, and the end
    assert "resolution" not in task_of("pixart").condition("a cat", 1)


def test_classes_by_name_and_number() -> None:
    dit = task_of("dit")
    for name, label in {"golden retriever": 207, "Tinca tinca": 0, "999": 999}.items():
        assert dit.condition({"class": name}, 2)["class_labels"].tolist() == [label] * 2
    assert dit.condition({}, 1)["class_labels"].tolist() == [1000]
    assert dit.encode(batch(3)).condition["class_labels"].tolist() == [0, 1, 2]
    named = task_of("ddpm-classes", classes=["cat", "dog"], null_class=3)
    rows = batch(2) | {"class": ["dog", "cat"]}
    assert named.encode(rows).condition["class_labels"].tolist() == [1, 0]
    assert named.condition({}, 1)["class_labels"].tolist() == [3]
    assert "dog" in named.known_attributes()["class"]
    with pytest.raises(ConceptError, match="unknown class 'owl'"):
        named.condition({"class": "owl"}, 1)
    with pytest.raises(ConceptError, match="no label for no class.*HINT"):
        task_of("ddpm-classes").condition({}, 1)
    with pytest.raises(TaskError, match="5 names.*has 4"):
        task_of("ddpm-classes", classes=list("abcde"))


@pytest.mark.parametrize("name", ["sd1", "dit", "ddpm-classes", "ddpm"])
def test_specs_of_the_wrong_kind_are_refused(name: str) -> None:
    spec = {"object": "cat"} if name == "sd1" else "a cat"
    with pytest.raises(ConceptError, match="cat"):
        task_of(name).condition(spec, 1)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pixart", "flux"])
def test_a_concept_that_the_tokenizers_cut_away_is_refused(name: str) -> None:
    """Sixteen letters and marks are left of a prompt: up to "a cat by a long" or so."""
    task = task_of(name)
    away = Concept("name", present="a cat by a long named x", absent="a cat by a long named y")
    left = Concept("cat", present="a cat by a long named x", absent="a dog by a long named x")
    with pytest.raises(
        ConceptError, match=r"'name'.*cut away.*a long named x.*tokens of at most 16.*HINT"
    ):
        check_known(away, task)
    with pytest.warns(UserWarning, match=r"'cat'.*tokenizers cut.*tokens of at most 16.*HINT"):
        check_known(left, task)
    conditions = [
        task.condition(spec, 1)["encoder_hidden_states"] for spec in (left.present, left.absent)
    ]
    assert not torch.equal(*conditions)
    cut = task.encode(
        batch(1) | {"caption": [away.present]}
    ).condition  # a caption is cut, as the pipeline cuts it
    assert all(torch.isfinite(value).all() for value in cut.values())
    if name == "flux":  # T5 sees all of it, if it may
        check_known(away, task_of(name, max_sequence_length=32))
    with pytest.warns(UserWarning, match="tokenizers cut"):
        check_known(Concept("all", present=away.present, absent={}), task)


def test_the_absent_side_may_be_the_negative_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unconditional side of guidance and a concept's other side are different things, and may
    be the same text."""
    task = task_of("sd1", negative_prompt="a dog")
    for absent in ("a dog", {}):
        concept = Concept("cat", present="a cat", absent=absent)
        check_known(concept, task)
        assert torch.equal(
            task.condition(concept.absent, 1)["encoder_hidden_states"],
            task_of("sd1").condition("a dog", 1)["encoder_hidden_states"],
        )


def test_a_schedule_that_cannot_be_used_is_refused() -> None:
    """With its reason, when the task is made, not in the middle of a run."""
    silent = stable_diffusion(rescale_betas_zero_snr=True)  # and noise prediction
    with pytest.raises(TaskError, match="no signal at timestep 999.*inverted.*HINT.*v_prediction"):
        DiffusersTask.from_pipeline(silent)
    pipeline = build("sd1")
    pipeline.scheduler = diffusers.DDIMScheduler(thresholding=True)
    with pytest.raises(TaskError, match="thresholding.*HINT"):
        DiffusersTask.from_pipeline(pipeline)
    pipeline = build("sd3")
    pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(TaskError, match="FlowMatchHeunDiscreteScheduler.*HINT"):
        DiffusersTask.from_pipeline(pipeline)


def test_encodings_are_made_anew_in_another_dtype() -> None:
    task = task_of("sd1").to(torch.bfloat16)
    assert task.condition("a cat", 1)["encoder_hidden_states"].dtype == torch.bfloat16
    exact = task.float().condition("a cat", 1)["encoder_hidden_states"]
    torch.testing.assert_close(exact, task.encode_prompts(["a cat"])["encoder_hidden_states"])


def test_columns_may_have_other_names() -> None:
    rows = batch(2)
    renamed = {
        "pixel_values": rows["image"],
        "text": rows["caption"],
        "sample_id": rows["sample_id"],
    }
    task = task_of("sd1", batch={"pixel_values": "image", "text": "caption"})
    assert torch.equal(task.encode(renamed).latents, task_of("sd1").encode(rows).latents)
    with pytest.raises(TaskError, match="unknown \\['picture'\\].*caption.*HINT"):
        task_of("sd1", batch={"pixel_values": "picture"})


def test_separate_parts_make_the_same_task() -> None:
    parts = {k: v for k, v in build("sd1").components.items() if v is not None}
    task = DiffusersTask.from_parts(diffusers.StableDiffusionPipeline, parts)
    assert torch.equal(task.encode(batch(2)).latents, task_of("sd1").encode(batch(2)).latents)
    del parts["vae"]
    with pytest.raises(TaskError, match=r"missing \['vae'\], unknown \['tagger'\]"):
        DiffusersTask.from_parts(diffusers.StableDiffusionPipeline, parts | {"tagger": 1})


def test_what_is_no_supported_pipeline_is_refused() -> None:
    with pytest.raises(TaskError, match=r"from_pipeline\(Linear\).*StableDiffusionPipeline.*HINT"):
        DiffusersTask.from_pipeline(torch.nn.Linear(2, 2))
    pipeline = build("sd1")
    pipeline.register_modules(vae=None)
    with pytest.raises(TaskError, match="lacks vae.*HINT"):
        DiffusersTask.from_pipeline(pipeline)
    pipeline = build("sd1")
    pipeline.vae.register_to_config(latents_mean=[0.1] * 4)
    with pytest.raises(TaskError, match="latents_mean.*HINT"):
        DiffusersTask.from_pipeline(pipeline)
    pipeline = build("sd1")
    pipeline.unet.register_to_config(time_cond_proj_dim=4)
    with pytest.raises(TaskError, match="time_cond_proj_dim.*HINT"):
        DiffusersTask.from_pipeline(pipeline)


UNET = {
    "class_embed_type": "projection",
    "num_class_embeds": 7,
    "encoder_hid_dim_type": "ip_image_proj",
}
UNET |= {"in_channels": 9, "out_channels": 8, "time_cond_proj_dim": 4, "attention_type": "gated"}
OF_OTHER_PIPELINES: dict[str, dict[str, Any]] = {
    "sd1": UNET | {"addition_embed_type": "image", "cross_attention_dim": 99},
    "sdxl": UNET
    | {"addition_embed_type": "text_image", "projection_class_embeddings_input_dim": 99},
    "sd3": {"in_channels": 33, "out_channels": 2},
    "flux": {"in_channels": 384, "out_channels": 2},
    "pixart": {"in_channels": 9, "out_channels": 99, "caption_channels": 99},
    "dit": {"in_channels": 9, "norm_type": "layer_norm"},
    "ddpm": {"in_channels": 6, "class_embed_type": "timestep"},
}


@pytest.mark.parametrize("name", OF_OTHER_PIPELINES)
def test_networks_of_other_pipelines_are_refused_by_their_configuration(name: str) -> None:
    pipeline = build(name)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for entry, value in OF_OTHER_PIPELINES[name].items():
        own = network.config.get(entry)
        network.register_to_config(**{entry: value})
        with pytest.raises(
            TaskError,
            match=rf"{type(network).__name__} has {entry}={value!r}.*expected.*HINT.*predict",
        ):
            DiffusersTask.from_pipeline(pipeline)
        network.register_to_config(**{entry: own})
    DiffusersTask.from_pipeline(pipeline)
    network.register_to_config(in_channels=None)  # nothing is known of it
    DiffusersTask.from_pipeline(pipeline)


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "VQModel"])
def test_other_vaes_are_refused(kind: str) -> None:
    pipeline = build("sd1")
    pipeline.register_modules(vae=getattr(diffusers, kind)())
    with pytest.raises(TaskError, match=f"VAE is a {kind}, expected an AutoencoderKL.*HINT"):
        DiffusersTask.from_pipeline(pipeline)


def test_a_module_with_a_control_net_is_refused() -> None:
    class ControlNetModel(torch.nn.Module):
        pass

    module = torch.nn.Module()
    for part, value in build("sd1").components.items():
        setattr(module, part, value)
    assert DiffusersTask().bind(module).denoiser is module.unet
    module.control = ControlNetModel()
    with pytest.raises(TaskError, match=r"Module\.control is a ControlNet.*HINT"):
        DiffusersTask().bind(module)
