"""LoRA on a small Stable Diffusion pipeline that reads captions of emoji."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..lora import add_lora
from ..pixels import falling_rate
from ..text import clean_text_loss
from .captions import DROP_ALL, DROP_ARTIST, DROP_OBJECT, wordings
from .pipeline import BASE, build_task, build_text_unet, load_base


class EmojiText(L.LightningModule):
    """Fine-tunes a LoRA on the attention of the base model; MiniLM stays frozen.

    Args:
        learning_rate: AdamW's.
        text_learning_rate: AdamW's for the adapters of the keys and values that read text.
        rank: of the LoRA.
        warmup_steps: of the learning rate; it falls to zero in the last third.
        base: the matrices of the base model that read text.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        text_learning_rate: float = 2e-3,
        rank: int = 16,
        warmup_steps: int = 20,
        base: str = str(BASE),
    ) -> None:
        super().__init__()
        self.learning_rate, self.text_learning_rate = learning_rate, text_learning_rate
        self.warmup_steps = warmup_steps
        unet = build_text_unet()
        load_base(unet, Path(base))
        add_lora(unet, rank)
        self.task = build_task(unet)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = clean_text_loss(self.task, {**batch, "caption": shortened(batch)})
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        reading = [p for name, p in trained.items() if "attn2.to_k" in name or "attn2.to_v" in name]
        others = [p for p in trained.values() if not any(p is q for q in reading)]
        optimizer = torch.optim.AdamW(
            [
                {"params": others, "lr": self.learning_rate},
                {"params": reading, "lr": self.text_learning_rate},
            ],
            weight_decay=0.01,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: falling_rate(self, step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def shortened(batch: Mapping[str, Any]) -> list[str]:
    """The captions of a training step: some say nothing (for guidance), or the object only, or the
    artist only, so that counter-prompts are what the model has seen."""
    captions = []
    for text, name, artist in zip(batch["caption"], batch["object"], batch["artist"], strict=True):
        u = float(torch.rand(()))
        if u < DROP_ALL:
            text = ""
        elif u < DROP_ALL + DROP_OBJECT:
            text = _one_of(wordings(None, artist))
        elif u < DROP_ALL + DROP_OBJECT + DROP_ARTIST:
            text = _one_of(wordings(name, None))
        captions.append(text)
    return captions


def _one_of(texts: list[str]) -> str:
    return texts[int(torch.randint(0, len(texts), ()))]
