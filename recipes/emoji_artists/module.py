"""A small model of emoji by artist and object: pre-trained, fine-tuned whole, or by LoRA."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from ctrak_lightning import DiffusionTask, Encoded, NoiseSchedule

from ..lora import add_lora
from ..pixels import clean_image_loss, cosine_scheduler, falling_rate
from .data import METADATA, NEW_ARTISTS, Emoji
from .network import NULL, EmojiDenoiser, patchify, unpatchify

BASE = Path(__file__).parent / "base.safetensors"


class EmojiDiffusion(DiffusionTask, L.LightningModule):
    """Diffusion on emoji, conditioned on an artist token and an object token.

    Args:
        adaptation: ``"none"`` trains all weights from scratch on the base vocabulary
            (pre-training); ``"lora"`` starts from the base model and trains a LoRA on its attention
            and the new names' tokens; ``"full"`` starts from the base model and trains all of it.
        learning_rate: AdamW's.
        token_learning_rate: AdamW's for the tokens of new names.
        rank: of the LoRA.
        drop: probability of dropping each of the two tokens, independently, in a training step.
        warmup_steps: steps of linear learning-rate warm-up.
    """

    denoiser: EmojiDenoiser

    def __init__(
        self,
        adaptation: Literal["none", "lora", "full"] = "lora",
        learning_rate: float = 4e-3,
        token_learning_rate: float = 4e-2,
        rank: int = 16,
        drop: float = 0.12,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.token_learning_rate = token_learning_rate
        self.drop = drop
        self.warmup_steps = warmup_steps
        emoji = Emoji.load()
        base_objects, new_objects = emoji.split_objects()
        tuned = adaptation != "none"
        self.decays = tuned
        self.denoiser = EmojiDenoiser(
            artist=(emoji.base_artists(), list(NEW_ARTISTS) if tuned else []),
            object=(base_objects, new_objects if tuned else []),
        )
        self.scheduler = cosine_scheduler()
        self.noise_schedule = NoiseSchedule.from_scheduler(self.scheduler)
        if tuned:
            self._start_from_base()
        if adaptation == "lora":
            self.requires_grad_(False)
            add_lora(self.denoiser.unet, rank)
            for vocabulary in (self.denoiser.artist, self.denoiser.object):
                assert vocabulary.new is not None
                vocabulary.new.requires_grad_(True)

    def _start_from_base(self) -> None:
        weights = load_file(BASE)
        state = self.state_dict()
        fresh = [name for name in state if name.endswith(".new.weight")]
        names = {file_name(name): name for name in state if name not in fresh}
        if names.keys() != weights.keys():
            raise ValueError(
                f"{BASE.name} does not fit the network: {sorted(names.keys() ^ weights.keys())}."
            )
        self.load_state_dict(
            {names[name]: value.float() for name, value in weights.items()}, strict=False
        )
        generator = torch.Generator().manual_seed(0)
        self.denoiser.artist.initialise_new(generator)
        self.denoiser.object.initialise_new(generator)

    def known_attributes(self) -> dict[str, list[str]]:
        return {
            "artist": list(self.denoiser.artist.index),
            "object": list(self.denoiser.object.index),
        }

    def encode(self, batch: dict[str, Any]) -> Encoded:
        return Encoded(
            latents=self.latents(batch["image"]),
            condition=self._names(batch["artist_token"], batch["object_token"]),
            sample_ids=self.sample_ids(batch),
            metadata={name: list(batch[name]) for name in METADATA},
        )

    def latents(self, images: Tensor) -> Tensor:
        return patchify(images)

    def latent_mask(self, mask: Tensor) -> Tensor:
        return patchify(mask.expand(1, 3, -1, -1))[0]

    def sample_ids(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["sample_id"])

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        if isinstance(spec, str):
            raise TypeError(
                f"EmojiDiffusion.condition({spec!r}): expected attributes: {{'object': 'owl'}}."
            )
        return self._names([spec.get("artist")] * n, [spec.get("object")] * n)

    def decode(self, latents: Tensor) -> Tensor:
        return ((unpatchify(latents) + 1) / 2).clamp(0, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        predicted, latents, t = self.denoised(batch)
        loss = clean_image_loss(self.noise_schedule, predicted, latents, t)
        self.log("loss", loss, prog_bar=True)
        return loss

    def denoised(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """A training step's prediction of the latents, these themselves, and the timesteps drawn."""
        latents = patchify(batch["image"])
        noise = torch.randn_like(latents)
        t = torch.randint(0, len(self.noise_schedule), (len(latents),), device=self.device)
        noised = self.noise_schedule.add_noise(latents, noise, t)
        condition = self._names(batch["artist_token"], batch["object_token"], self.drop)
        return self.predict(noised, t, condition), latents, t

    def configure_optimizers(self) -> Any:
        vocabularies = [*self.denoiser.artist.parameters(), *self.denoiser.object.parameters()]
        # A token is in few batches: at the network's rate it would hardly leave its random start.
        groups: list[dict[str, Any]] = [
            {"params": _trainable(parameters), "lr": rate, "weight_decay": decay}
            for parameters, rate, decay in (
                (self.denoiser.unet.parameters(), self.learning_rate, 0.01),
                (vocabularies, self.token_learning_rate, 0.0),
            )
        ]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Pre-training averages its weights instead of falling."""
        return falling_rate(self, step) if self.decays else min(1.0, (step + 1) / self.warmup_steps)

    def _names(
        self, artists: Sequence[str | None], objects: Sequence[str | None], drop: float = 0.0
    ) -> dict[str, Tensor]:
        """The condition: name indices [B] of both kinds; a dropped name gives the null token."""
        condition = {}
        for kind, names in (("artist", artists), ("object", objects)):
            indices = getattr(self.denoiser, kind).indices(names).to(self.device)
            if drop:
                dropped = torch.rand(len(indices), device=self.device) < drop
                indices = torch.where(dropped, NULL, indices)
            condition[kind] = indices
        return condition


def file_name(name: str) -> str:
    """A parameter's name in ``base.safetensors``, which knows nothing of how parts are nested."""
    name = name.removeprefix("denoiser.")
    if name.startswith("unet."):
        return name.replace("unet.", "denoiser.", 1)
    return name.removesuffix(".weight")


def _trainable(parameters: Iterable[Parameter]) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
