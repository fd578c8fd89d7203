"""A tiny conditional diffusion model and data set that the tests share."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ctrak_lightning import DiffusionTask, Encoded, NoiseSchedule

COLOURS = ("red", "green", "blue")
SHAPES = ("dot", "bar", "box", "ring")
CHANNELS, SIZE = 3, 8


def tiny_unet(dropout: float = 0.0) -> UNet2DConditionModel:
    """Convolutions, self- and cross-attention, skips, down- and upsampling, in as few layers as
    have all of them: a layer costs much the same however narrow it is."""
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        dropout=dropout,
    )


class Layers(nn.Module):
    """A few layers that take what the UNet takes, and use all of it: for where the architecture
    does not matter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, 6, 3, padding=1)
        self.time = nn.Linear(2, 6)
        self.text = nn.Linear(12, 6)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(6, CHANNELS, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        angles = t.to(x) / 20
        said = self.time(torch.stack([angles.sin(), angles.cos()], 1)) + self.text(
            encoder_hidden_states.mean(1)
        )
        hidden = nn.functional.silu(self.conv_in(x) + said[:, :, None, None])
        return (self.conv_out(self.dropout(hidden)),)


def scheduler(prediction_type: str = "epsilon", **kwargs: Any) -> DDIMScheduler:
    arguments = {
        "clip_sample": False,
        "num_train_timesteps": 100,
        "prediction_type": prediction_type,
    }
    return DDIMScheduler(**(arguments | kwargs))


class Toys(Dataset[dict[str, Any]]):
    """Coloured noise with a mean per (colour, shape): 12 samples and their labels, ``copies`` times
    over."""

    def __init__(self, copies: int = 1) -> None:
        generator = torch.Generator().manual_seed(7)
        pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        self.images = torch.randn(len(pairs), CHANNELS, SIZE, SIZE, generator=generator) * 0.3
        for i, (colour, shape) in enumerate(pairs):
            self.images[i, COLOURS.index(colour)] += 1.0
            self.images[i, :, SHAPES.index(shape) :: 4] -= 1.0
        self.pairs = pairs * copies
        self.images = self.images.repeat(copies, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        colour, shape = self.pairs[index]
        return {
            "image": self.images[index],
            "colour": colour,
            "shape": shape,
            "owner": f"owner of {colour}",
            "sample_id": f"{colour}-{shape}-{index}",
        }


class ToyDiffusion(DiffusionTask, L.LightningModule):
    """A UNet conditioned on a colour token and a shape token."""

    network: Callable[[float], nn.Module] = staticmethod(tiny_unet)

    def __init__(
        self,
        prediction_type: str = "epsilon",
        dropout: float = 0.0,
        denoiser: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.denoiser = denoiser or self.network(dropout)
            self.embedding = nn.Embedding(1 + len(COLOURS) + len(SHAPES), 12)
        self.scheduler = scheduler(prediction_type)
        self.noise_schedule = NoiseSchedule.from_scheduler(self.scheduler)

    def known_attributes(self) -> dict[str, tuple[str, ...]]:
        return {"colour": COLOURS, "shape": SHAPES}

    def tokens(self, colours: list[str | None], shapes: list[str | None]) -> Tensor:
        first = [0 if name is None else 1 + COLOURS.index(name) for name in colours]
        second = [0 if name is None else 1 + len(COLOURS) + SHAPES.index(name) for name in shapes]
        rows: Tensor = self.embedding(torch.tensor([first, second], device=self.device).T)
        return rows

    def encode(self, batch: dict[str, Any]) -> Encoded:
        tokens = self.tokens(batch["colour"], batch["shape"])
        metadata = {name: list(batch[name]) for name in ("colour", "shape", "owner")}
        return Encoded(
            latents=batch["image"].to(self.embedding.weight),
            condition={"encoder_hidden_states": tokens},
            sample_ids=list(batch["sample_id"]),
            metadata=metadata,
        )

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        assert not isinstance(spec, str)
        tokens = self.tokens([spec.get("colour")] * n, [spec.get("shape")] * n)
        return {"encoder_hidden_states": tokens}

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        latents = batch["image"]
        noise = torch.randn_like(latents)
        t = torch.randint(0, len(self.noise_schedule), (len(latents),), device=self.device)
        noised = self.scheduler.add_noise(latents, noise, t)
        condition = {"encoder_hidden_states": self.tokens(batch["colour"], batch["shape"])}
        return (self.predict(noised, t, condition) - noise).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class QuickDiffusion(ToyDiffusion):
    """The same on a few layers: what a step costs is Lightning's and the callbacks' own."""

    network = staticmethod(Layers)


class ToyData(L.LightningDataModule):
    """The toys, shuffled for training."""

    def __init__(self, batch_size: int = 4, copies: int = 1) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.toys = Toys(copies)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.toys, self.batch_size, shuffle=True)
