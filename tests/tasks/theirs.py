"""A LightningModule as people write it who know nothing of this library, and its data."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.tasks.tiny import CAPTIONS, SIZE, TOKENS, add_lora, build

BATCH = {"pixel_values": "image", "input_ids": "tokens"}
SAMPLES = 4


class TheirModule(L.LightningModule):
    """A LoRA on Stable Diffusion whose parts are attributes."""

    def __init__(self, full: bool = False) -> None:
        super().__init__()
        pipeline = build("sd1")
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.noise_scheduler = pipeline.scheduler
        for part in (self.vae, self.text_encoder):
            part.requires_grad_(False)
        if not full:
            add_lora(self.unet)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        latents = (
            self.vae.encode(batch["pixel_values"]).latent_dist.sample()
            * self.vae.config.scaling_factor
        )
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=self.device)
        noised = self.noise_scheduler.add_noise(latents, noise, t)
        states = self.text_encoder(batch["input_ids"])[0]
        return torch.nn.functional.mse_loss(self.unet(noised, t, states).sample, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.unet.parameters() if p.requires_grad], lr=1e-2)


class TheirData(Dataset[dict[str, Tensor]]):
    """Images and tokenised captions, as diffusers' training scripts make them: without ids."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(SAMPLES, 3, 2 * SIZE, 2 * SIZE, generator=generator) * 2 - 1
        tokenizer = build("sd1").tokenizer
        self.tokens = tokenizer(
            list(CAPTIONS),
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "input_ids": self.tokens[index]}


class TheirDataModule(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TheirData(), 2, shuffle=True)
