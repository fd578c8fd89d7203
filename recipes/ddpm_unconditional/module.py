"""A UNet2DModel without a condition: trained from nothing, or further."""

from typing import Any

from ctrak_lightning import DiffusersTask

from ..fine_tune import FineTune
from ..pipelines import load_or_build


class Unconditional(FineTune):
    """Trains all of a ``DDPMPipeline`` or ``DDIMPipeline``, and writes it to
    ``<default_root_dir>/pipeline`` at the end.

    Args:
        pretrained: a folder or a name on the Hub, or ``"tiny-ddpm"``.
        unet: instead of it, the arguments of a new ``UNet2DModel``.
        learning_rate, warmup_steps, gradient_checkpointing: see :class:`FineTune`.

    Raises:
        ValueError: both of ``pretrained`` and ``unet``, or neither.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        unet: dict[str, Any] | None = None,
        learning_rate: float = 1e-4,
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            DiffusersTask.from_pipeline(load_or_build(pretrained, unet)),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            gradient_checkpointing=gradient_checkpointing,
        )
