"""What our sampler generates is what the pipeline itself generates from the same noise, prompt,
guidance and scheduler."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning import PipelineTask, Sampler
from tests.tasks.support import ALL, pipelines_of
from tests.tasks.tiny import SIZE, TOKENS, task_of

STEPS = 4
"""A divisor of 1000: diffusers' DDIM steps by T // steps, whatever the next timestep is."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
"""Of latents of order one; the two differ in the order of float32 operations only."""
FLUX = ("flux", "flux-schnell")
OTHERS = ("dit", "ddpm", "ddpm-classes")
WITH_PROMPTS = set(ALL) - {*FLUX, *OTHERS}
PROMPTS = ["a cat by x"] * 2


def noise(channels: int = 4, size: int = SIZE) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def ours(task: PipelineTask, latents: Tensor, spec: Any, guidance: float) -> Tensor:
    with torch.no_grad():
        condition = task.condition(spec, len(latents))
        null = None if guidance == 1.0 else task.condition({}, len(latents))
        return Sampler(steps=STEPS, guidance=guidance).run(task, latents, condition, null).latents


def evaluated(name: str, **options: Any) -> PipelineTask:
    """A task of which both ways of generating are in evaluation mode."""
    return task_of(name, **options).eval()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("name", pipelines_of("generation", among=WITH_PROMPTS))
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (6.0, None), (6.0, "a dog")])
def test_prompts(name: str, guidance: float, negative: str | None) -> None:
    task = evaluated(name, negative_prompt=negative)
    options: dict[str, Any] = {}
    if name.startswith("pixart"):
        options = {
            "clean_caption": False,
            "use_resolution_binning": False,
            "negative_prompt": negative or "",
        }
    elif negative is not None:
        options = {"negative_prompt": [negative] * 2}
    if name.startswith(("sd3", "pixart")):
        options |= {"max_sequence_length": TOKENS}
    theirs = task.pipeline(
        prompt=PROMPTS,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=noise(),
        height=2 * SIZE,
        width=2 * SIZE,
        output_type="latent",
        return_dict=False,
        **options,
    )[0]
    assert_same(ours(task, noise(), PROMPTS[0], guidance), theirs)


@pytest.mark.parametrize("name", pipelines_of("generation", among=FLUX))
@pytest.mark.parametrize(("true_cfg", "negative"), [(1.0, None), (3.0, "a dog")])
def test_flux(name: str, true_cfg: float, negative: str | None) -> None:
    task = evaluated(name, negative_prompt=negative, embedded_guidance=5.0)
    pipeline = task.pipeline
    latents = noise()
    theirs = pipeline(
        prompt=PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        true_cfg_scale=true_cfg,
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        latents=pipeline._pack_latents(latents, 2, 4, SIZE, SIZE),
        height=2 * SIZE,
        width=2 * SIZE,
        max_sequence_length=TOKENS,
        output_type="latent",
        return_dict=False,
    )[0]
    found = ours(task, latents, PROMPTS[0], true_cfg)
    assert_same(pipeline._pack_latents(found, 2, 4, SIZE, SIZE), theirs)


@pytest.mark.parametrize("name", pipelines_of("generation", among=("dit",)))
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit(name: str, guidance: float) -> None:
    task = evaluated(name)
    generator = torch.Generator().manual_seed(
        3
    )  # the pipeline takes no latents; this is the seed of noise()
    theirs = task.pipeline(
        class_labels=[207, 207],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="pt",
        return_dict=False,
    )[0]
    assert_same(task.decode(ours(task, noise(), {"class": "golden retriever"}, guidance)), theirs)


@pytest.mark.parametrize("name", pipelines_of("generation", among=("ddpm",)))
def test_unconditional_unet(name: str) -> None:
    task = evaluated(name)
    generator = torch.Generator().manual_seed(3)
    theirs = task.pipeline(
        batch_size=2,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="pt",
        return_dict=False,
    )
    # This pipeline makes arrays of anything but a tensor's name.
    found = task.decode(ours(task, noise(3, 2 * SIZE), {}, 1.0))
    assert_same(found, torch.as_tensor(theirs[0]))


@pytest.mark.parametrize("name", pipelines_of("generation", among=("ddpm-classes",)))
def test_class_conditional_unet(name: str) -> None:
    task = evaluated(name, null_class=3)
    scheduler, unet = task.pipeline.scheduler, task.pipeline.unet
    scheduler.set_timesteps(STEPS)
    x = noise(3, 2 * SIZE)
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_class, without = (unet(x, t, torch.tensor([c, c])).sample for c in (2, 3))
            x = scheduler.step(without + 2.0 * (with_class - without), t, x).prev_sample
    assert_same(ours(task, noise(3, 2 * SIZE), {"class": "2"}, 2.0), x)
