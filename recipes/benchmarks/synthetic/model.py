"""The models of the Synthetic recipe, and what recipes with other factors share with them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import Parameter

from ctrak_lightning import DiffusionTask, Encoded, NoiseSchedule

from ...pixels import clean_image_loss, cosine_scheduler
from .figures import find_variant

TOKEN_DIM = 64
NULL = 0


def build_unet(
    size: int, patch: int, channels: tuple[int, int], cross_attention_dim: int = TOKEN_DIM
) -> UNet2DConditionModel:
    """About a million parameters; tokens are attended to at half resolution.

    It predicts the clean image, which here takes far fewer steps than predicting the noise, and it
    sees single pixels or 2x2 patches: on larger ones a shape is one or two patches, which it learns
    as wholes. (Paper variant, 2x2 patches, 1,000 steps: no red triangle in 16; single pixels: 15.)
    """
    return UNet2DConditionModel(
        sample_size=size // patch,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=True,
    )


class FactorTokens(nn.Module):
    """One token per factor: a vector for each of its values, and one for a factor not named.

    Args:
        factors: the values of each factor, in the order of the tokens.
    """

    def __init__(self, factors: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.factors = {name: list(values) for name, values in factors.items()}
        self.vectors = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(1 + len(values), TOKEN_DIM))
                for name, values in factors.items()
            }
        )

    def rows(self, columns: Mapping[str, Sequence[str | None]]) -> Tensor:
        """Row numbers [B, factors] of the named values; a value or factor not named is ``NULL``.

        Raises:
            ValueError: a factor or a value that the model does not know.
        """
        unknown = sorted(set(columns) - set(self.factors))
        unknown += [
            f"{name}={value}"
            for name, values in columns.items()
            for value in set(values) - {None, *self.factors.get(name, values)}
        ]
        if unknown:
            names = (f"{name}: {', '.join(values)}" for name, values in self.factors.items())
            raise ValueError(
                f"FactorTokens.rows(...): unknown {', '.join(unknown)}. HINT: known are "
                f"{'; '.join(names)}."
            )
        length = max((len(values) for values in columns.values()), default=0)
        listed = []
        for name, known in self.factors.items():
            asked = columns.get(name, [None] * length)
            listed.append([NULL if value is None else 1 + known.index(value) for value in asked])
        return torch.tensor(listed, dtype=torch.long).T

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [B, factors] to tokens [B, factors, TOKEN_DIM]."""
        return torch.stack(
            [self.vectors[name][rows[:, i]] for i, name in enumerate(self.factors)], 1
        )


class FactorDiffusion(DiffusionTask, L.LightningModule):
    """Pixel diffusion trained from scratch, conditioned on one token per factor.

    A batch has ``image`` [B, 3, size, size] in [-1, 1], a column of value names per factor,
    ``caption`` and ``sample_id``.

    Args:
        factors: the values of each factor.
        size: height and width of the images in pixels.
        patch: side of the pixel patches that the network sees as channels.
        channels: the network's, at the resolution of its input and at half of it.
        learning_rate: AdamW's highest, after a warm-up and before a cosine decay to nothing.
        drop: probability of dropping each token, independently, in a training step.
        drop_all: probability of dropping all tokens of an image, for guidance.

    Raises:
        ValueError: a size that is no multiple of the patch.
    """

    def __init__(
        self,
        factors: Mapping[str, Sequence[str]],
        size: int,
        patch: int,
        channels: tuple[int, int],
        learning_rate: float = 2e-3,
        drop: float = 0.02,
        drop_all: float = 0.1,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(
                f"{type(self).__name__}(size={size}, patch={patch}): expected a multiple of the "
                f"patch. HINT: size={size - size % patch}."
            )
        self.size = size
        self.patch = patch
        self.learning_rate = learning_rate
        self.drop = drop
        self.drop_all = drop_all
        self.denoiser = build_unet(size, patch, channels)
        self.tokens = FactorTokens(factors)
        self.noise_schedule = NoiseSchedule.from_scheduler(cosine_scheduler())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (3 * self.patch**2, self.size // self.patch, self.size // self.patch)

    def known_attributes(self) -> dict[str, list[str]]:
        return dict(self.tokens.factors)

    def encode(self, batch: dict[str, Any]) -> Encoded:
        return Encoded(
            latents=self.latents(batch["image"].to(self.device)),
            condition={"encoder_hidden_states": self.tokens(self._rows(batch))},
            sample_ids=self.sample_ids(batch),
            metadata={name: list(batch[name]) for name in (*self.tokens.factors, "caption")},
        )

    def sample_ids(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["sample_id"])

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        if isinstance(spec, str):
            raise TypeError(
                f"{type(self).__name__}.condition({spec!r}): expected attributes such as "
                f"{ {name: values[0] for name, values in self.tokens.factors.items()} }."
            )
        columns = {name: [spec.get(name)] * n for name in {*self.tokens.factors, *spec}}
        return {"encoder_hidden_states": self.tokens(self.tokens.rows(columns).to(self.device))}

    def decode(self, latents: Tensor) -> Tensor:
        return ((F.pixel_shuffle(latents, self.patch) + 1) / 2).clamp(0, 1)

    def latents(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.patch)

    def latent_mask(self, mask: Tensor) -> Tensor:
        """Every pixel has channels of its own, so that a mask stays as fine as it is."""
        return F.pixel_unshuffle(mask.expand(1, 3, *mask.shape), self.patch)[0]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        latents = self.latents(batch["image"])
        noise = torch.randn_like(latents)
        t = torch.randint(0, len(self.noise_schedule), (len(latents),), device=self.device)
        noised = self.noise_schedule.add_noise(latents, noise, t)
        rows = self._rows(batch)
        dropped = torch.rand(rows.shape, device=self.device) < self.drop
        dropped |= torch.rand(len(rows), 1, device=self.device) < self.drop_all
        rows = torch.where(dropped, NULL, rows)
        predicted = self.predict(noised, t, {"encoder_hidden_states": self.tokens(rows)})
        loss = clean_image_loss(self.noise_schedule, predicted, latents, t)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return one_cycle(
            self.parameters(), self.learning_rate, int(self.trainer.estimated_stepping_batches)
        )

    def _rows(self, batch: dict[str, Any]) -> Tensor:
        return self.tokens.rows({name: batch[name] for name in self.tokens.factors}).to(self.device)


class SyntheticDiffusion(FactorDiffusion):
    """Diffusion on the Synthetic images.

    Args:
        variant: ``"paper"`` or ``"hard"``, as in
            :class:`~recipes.benchmarks.synthetic.figures.Synthetic`.
        size, patch: as in :class:`FactorDiffusion`; the variant's defaults if None.
        learning_rate, drop, drop_all: as in :class:`FactorDiffusion`. Keep ``drop`` low: "red, any
            shape" is only ever a circle in the paper variant; who learns it draws no red triangle.

    Raises:
        ValueError: an unknown variant, or a size that is no multiple of the patch.
    """

    def __init__(
        self,
        variant: Literal["paper", "hard"] = "paper",
        size: int | None = None,
        patch: int | None = None,
        learning_rate: float = 2e-3,
        drop: float = 0.02,
        drop_all: float = 0.1,
    ) -> None:
        chosen = find_variant(variant)
        super().__init__(
            factors=chosen.factors,
            size=chosen.size if size is None else size,
            patch=chosen.patch if patch is None else patch,
            channels=chosen.channels,
            learning_rate=learning_rate,
            drop=drop,
            drop_all=drop_all,
        )
        self.variant = chosen


def one_cycle(parameters: Iterable[Parameter], learning_rate: float, steps: int) -> dict[str, Any]:
    """AdamW with a short warm-up to ``learning_rate`` and a cosine decay to nothing over ``steps``,
    as Lightning takes it."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
