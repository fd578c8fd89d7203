"""FineTune: what the LightningModules of the diffusers recipes have in common."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from ctrak_lightning import Encoded, PipelineTask
from ctrak_lightning.tasks import Condition

OF_THE_IMAGE = ("time_ids",)
"""Conditions that tell of the image, not of what it shows; they stay when the caption goes."""


class FineTune(L.LightningModule):
    """A pipeline's fine-tune: the denoising loss, AdamW with a linear warm-up, checkpoints of what
    is trained alone, and at the end the result under the trainer's ``default_root_dir``.

    Args:
        task: the pipeline's task; whatever its denoiser leaves trainable is trained.
        learning_rate: AdamW's.
        warmup_steps: over which the learning rate rises from zero.
        dropout: the share of the images that are trained on without their condition, as
            classifier-free guidance needs.
        gradient_checkpointing: less memory for more time: activations are computed twice.

    Raises:
        ValueError: a share outside [0, 1), or dropout of a model without a null condition.
    """

    def __init__(
        self,
        task: PipelineTask,
        *,
        learning_rate: float,
        warmup_steps: int = 0,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"FineTune(dropout={dropout}): expected a share in [0, 1).")
        self.task = task
        self.learning_rate, self.warmup_steps, self.dropout = learning_rate, warmup_steps, dropout
        if dropout:
            task.condition({}, 1)  # says so at once where there is none
        if gradient_checkpointing:
            task.denoiser.enable_gradient_checkpointing()

    def timesteps(self, count: int) -> Tensor:
        """Timesteps [count] of a training step."""
        return self.task.noise_schedule.random_timesteps(count)

    def weights(self, t: Tensor) -> Tensor:
        """The weight [B] of each sample's loss at its timestep."""
        return torch.ones(len(t))

    def losses(self, encoded: Encoded, t: Tensor) -> Tensor:
        """The squared error [B] of the network's output at timesteps ``t`` [B], before weights."""
        schedule, latents = self.task.noise_schedule, encoded.latents
        noise = torch.randn_like(latents)
        t = t.to(latents.device)
        condition = self.dropped(encoded.condition, len(latents))
        output = self.task.predict(schedule.add_noise(latents, noise, t), t, condition)
        error = output.float() - schedule.target(latents, noise, t).float()
        return error.square().flatten(1).mean(1)

    def dropped(self, condition: Condition, count: int) -> Condition:
        """The condition, of some rows replaced by the null condition."""
        if not self.dropout:
            return condition
        null = self.task.condition({}, count)
        gone = torch.rand(count, device=self.device) < self.dropout
        return {
            name: value
            if name in OF_THE_IMAGE
            else torch.where(gone.view(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in condition.items()
        }

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        encoded = self.task.encode(batch)
        t = self.timesteps(len(encoded.latents))
        losses = self.losses(encoded, t)
        loss = (self.weights(t).to(losses) * losses).mean()
        self.log("loss", loss, prog_bar=True, batch_size=len(losses))
        return loss

    @override
    def configure_optimizers(self) -> Any:
        trained = [
            parameter for parameter in self.task.denoiser.parameters() if parameter.requires_grad
        ]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save(self, folder: Path) -> None:
        """Writes what was trained, for diffusers to load: here the whole pipeline, with
        ``from_pretrained(folder / "pipeline")``."""
        self.task.pipeline.save_pretrained(folder / "pipeline")

    @override
    def on_train_end(self) -> None:
        # After the callbacks' hook of that name, so of averaged weights where there are any.
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            self.save(Path(self.trainer.default_root_dir))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what is frozen, gigabytes that the next start loads anyway."""
        for states in (checkpoint[name] for name in STATES if name in checkpoint):
            for name in self._frozen() & states.keys():
                del states[name]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        for states in (checkpoint[name] for name in STATES if name in checkpoint):
            states.update({name: own[name] for name in self._frozen() - states.keys()})

    def _frozen(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


STATES = ("state_dict", "current_model_state")
"""Of a checkpoint; the second is that of the weights in training, where the first holds their
average (WeightAveraging)."""
