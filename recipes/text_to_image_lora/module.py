"""LoRA on Stable Diffusion 1.x, 2.x or XL."""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from ctrak_lightning import DiffusersTask

from ..fine_tune import FineTune
from ..lora import ATTENTION, add_lora, save_lora
from ..pipelines import load


class TextToImageLoRA(FineTune):
    """Trains a LoRA on the UNet of a text-to-image pipeline, and writes it to
    ``<default_root_dir>/adapter`` at the end, for ``pipeline.load_lora_weights``.

    Args:
        pretrained: a folder or a name on the Hub, or ``"tiny-sd1"``, ``"tiny-sd2"``,
            ``"tiny-sdxl"``.
        frozen_dtype: of the weights that are not trained; the adapter is float32.
        rank: of the LoRA.
        targets: ends of the names of the layers that get one.
        learning_rate, warmup_steps: see :class:`FineTune`.
        caption_dropout: the share of the images that are trained on without caption.
        min_snr: the gamma of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), 5 in the
            paper; None weighs all timesteps alike.
        gradient_checkpointing: see :class:`FineTune`.
        resolution: of the images in pixels; None takes the pipeline's.

    Raises:
        ValueError: an argument out of range, or no layer by a target's name.
    """

    def __init__(
        self,
        pretrained: str = "tiny-sd1",
        frozen_dtype: str = "float32",
        rank: int = 8,
        targets: list[str] | None = None,
        learning_rate: float = 1e-4,
        warmup_steps: int = 0,
        caption_dropout: float = 0.0,
        min_snr: float | None = None,
        gradient_checkpointing: bool = False,
        resolution: int | None = None,
    ) -> None:
        if min_snr is not None and min_snr <= 0:
            raise ValueError(
                f"TextToImageLoRA(min_snr={min_snr}): expected a positive number, or None."
            )
        pipeline = load(pretrained, dtype=frozen_dtype)
        add_lora(pipeline.unet, rank, targets or ATTENTION)
        super().__init__(
            DiffusersTask.from_pipeline(pipeline, resolution=resolution),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            dropout=caption_dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.min_snr = min_snr

    @override
    def weights(self, t: Tensor) -> Tensor:
        """The weight [B] of each sample's loss: as if the clean image were predicted, at ``min(SNR,
        gamma)``."""
        if self.min_snr is None:
            return super().weights(t)
        signal, noise = self.task.noise_schedule.signal_and_noise(t)
        snr = signal.square() / noise.square()
        kept = snr.clamp(max=self.min_snr)
        # An error e of the noise is e / SNR in the clean image; one of v is e / (SNR + 1).
        kind = self.task.noise_schedule.to_dict()["prediction_type"]
        if kind == "epsilon":
            return torch.where(
                snr > self.min_snr, kept / snr, torch.ones_like(snr)
            )  # defined at SNR 0, too
        return kept / (snr + 1) if kind == "v_prediction" else kept

    @override
    def save(self, folder: Path) -> None:
        save_lora(self.task.pipeline, "unet", folder / "adapter")
