"""LoRA on Stable Diffusion 3, 3.5 or Flux."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from ctrak_lightning import DiffusersTask, FlowSchedule

from ..fine_tune import FineTune
from ..lora import ATTENTION, add_lora, save_lora
from ..pipelines import load

Timesteps = Literal["logit-normal", "uniform"]
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")
"""The text's side of joint attention."""


class FlowMatchingLoRA(FineTune):
    """Trains a LoRA on the transformer of a flow-matching pipeline, and writes it to
    ``<default_root_dir>/adapter`` at the end, for ``pipeline.load_lora_weights``.

    Args:
        pretrained: a folder or a name on the Hub, or ``"tiny-sd3"``, ``"tiny-flux"``.
        frozen_dtype: of the weights that are not trained; the adapter is float32.
        rank: of the LoRA.
        targets: ends of the names of the layers that get one; None takes all attention.
        learning_rate, warmup_steps: see :class:`FineTune`.
        caption_dropout: the share of the images that are trained on without caption.
        timesteps: where training looks: ``"logit-normal"``, mostly at middling noise (Esser et al.
            2024, arXiv 2403.03206), or ``"uniform"``; both under the scheduler's shift. (Traces are
            at evenly spread timesteps of the latter.)
        gradient_checkpointing: see :class:`FineTune`.
        resolution: of the images in pixels; None takes the pipeline's.
        max_sequence_length: of T5's tokens; None takes the pipeline's default.
        without: parts to leave out, see :func:`~recipes.pipelines.load`.
        embedded_guidance: of FLUX.1-dev: the guidance scale that it is told in training, tracing
            and generation; None leaves 3.5.

    Raises:
        ValueError: an unknown distribution of timesteps, or no layer by a target's name.
    """

    def __init__(
        self,
        pretrained: str = "tiny-sd3",
        frozen_dtype: str = "float32",
        rank: int = 8,
        targets: list[str] | None = None,
        learning_rate: float = 1e-4,
        warmup_steps: int = 0,
        caption_dropout: float = 0.0,
        timesteps: Timesteps = "logit-normal",
        gradient_checkpointing: bool = False,
        resolution: int | None = None,
        max_sequence_length: int | None = None,
        without: list[str] | None = None,
        embedded_guidance: float | None = None,
    ) -> None:
        if timesteps not in get_args(Timesteps):
            raise ValueError(
                f"FlowMatchingLoRA(timesteps={timesteps!r}): expected one of {get_args(Timesteps)}."
            )
        pipeline = load(pretrained, dtype=frozen_dtype, without=without or ())
        add_lora(pipeline.transformer, rank, targets or ATTENTION + TEXT)
        options: dict[str, Any] = (
            {} if embedded_guidance is None else {"embedded_guidance": embedded_guidance}
        )
        super().__init__(
            DiffusersTask.from_pipeline(
                pipeline, resolution=resolution, max_sequence_length=max_sequence_length, **options
            ),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            dropout=caption_dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.favours_the_middle = timesteps == "logit-normal"

    @override
    def timesteps(self, count: int) -> Tensor:
        if not self.favours_the_middle:
            return super().timesteps(count)
        flow = self.task.noise_schedule
        assert isinstance(flow, FlowSchedule)
        share = torch.randn(count, dtype=torch.float64).sigmoid()
        return (len(flow) * flow.shift * share / (1 + (flow.shift - 1) * share)).float()

    @override
    def save(self, folder: Path) -> None:
        save_lora(self.task.pipeline, "transformer", folder / "adapter")
