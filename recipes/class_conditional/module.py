"""A model whose condition is a class: a UNet2DModel with classes, or DiT."""

from typing import Any

from ctrak_lightning import DiffusersTask

from ..fine_tune import FineTune
from ..pipelines import TINY, load_or_build


class ClassConditional(FineTune):
    """Trains all of a ``DDPMPipeline`` with classes or of the transformer of a ``DiTPipeline``, and
    writes the pipeline to ``<default_root_dir>/pipeline`` at the end.

    Args:
        classes: names of the labels 0, 1, ...: the values of the data's class column.
        pretrained: a folder or a name on the Hub, or ``"tiny-ddpm-classes"``, ``"tiny-dit"``.
        unet: instead of it, the arguments of a new ``UNet2DModel`` but for ``num_class_embeds``.
        null_class: the label that stands for no class; None takes DiT's own, or for a UNet that is
            made here the one after the last.
        class_dropout: the share of the images that are trained on without class. DiT drops a tenth
            by itself in training, so leave 0 there.
        learning_rate, warmup_steps, gradient_checkpointing: see :class:`FineTune`.

    Raises:
        ValueError: both of ``pretrained`` and ``unet``, or neither.
        TaskError: the network has fewer labels.
    """

    def __init__(
        self,
        classes: list[str],
        pretrained: str | None = None,
        unet: dict[str, Any] | None = None,
        null_class: int | None = None,
        class_dropout: float = 0.0,
        learning_rate: float = 1e-4,
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        made_here = unet is not None or pretrained == f"{TINY}ddpm-classes"
        if made_here and null_class is None:
            null_class = len(classes)
        count = max(len(classes), (null_class or 0) + 1)
        unet = None if unet is None else unet | {"num_class_embeds": count}
        tiny = {"classes": count} if made_here else {}
        super().__init__(
            DiffusersTask.from_pipeline(
                load_or_build(pretrained, unet, **tiny), classes=classes, null_class=null_class
            ),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            dropout=class_dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
