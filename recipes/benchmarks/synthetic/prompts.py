"""Synthetic conditioned on prompts, "a red triangle", read by MiniLM, in place of tokens."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from ctrak_lightning import NoiseSchedule

from ...pixels import cosine_scheduler
from ...text import TEXT_DIM, clean_text_loss, text_task
from .figures import Combo, find_variant, prompt
from .model import build_unet, one_cycle

MAX_TOKENS = 8


class PromptedSynthetic(L.LightningModule):
    """The network of :class:`~recipes.benchmarks.synthetic.model.SyntheticDiffusion` inside a
    Stable Diffusion pipeline with a frozen MiniLM.

    Args:
        variant: ``"paper"`` or ``"hard"``.
        learning_rate: AdamW's highest, after a warm-up and before a cosine decay to nothing.
        drop: probability that a training step's caption leaves a factor unnamed, for each factor.
        drop_all: probability that it is empty, for guidance.
    """

    def __init__(
        self,
        variant: Literal["paper", "hard"] = "paper",
        learning_rate: float = 2e-3,
        drop: float = 0.02,
        drop_all: float = 0.1,
    ) -> None:
        super().__init__()
        self.variant = find_variant(variant)
        self.learning_rate, self.drop, self.drop_all = learning_rate, drop, drop_all
        size, patch = self.variant.size, self.variant.patch
        unet = build_unet(size, patch, self.variant.channels, TEXT_DIM)
        self.task = text_task(
            unet, cosine_scheduler(), patch, MAX_TOKENS, batch={"prompt": "caption"}
        )
        self.latent_shape = (3 * patch**2, size // patch, size // patch)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        schedule: NoiseSchedule = self.task.noise_schedule  # type: ignore[assignment]
        return schedule

    def condition(self, combo: Combo, n: int) -> dict[str, Tensor]:
        """The network's keyword arguments for a combination, by its prompt."""
        return self.task.condition(prompt(combo) or {}, n)

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.task.predict(x_t, t, condition)

    def decode(self, latents: Tensor) -> Tensor:
        images = self.task.decode(latents)
        assert images is not None
        return images

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = clean_text_loss(self.task, {**batch, "prompt": self._shortened(batch)})
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return one_cycle(trained, self.learning_rate, int(self.trainer.estimated_stepping_batches))

    def _shortened(self, batch: Mapping[str, Any]) -> list[str]:
        prompts = []
        for i in range(len(batch["prompt"])):
            named = {
                name: batch[name][i]
                for name in self.variant.factors
                if float(torch.rand(())) >= self.drop
            }
            prompts.append("" if float(torch.rand(())) < self.drop_all else prompt(named))
        return prompts
