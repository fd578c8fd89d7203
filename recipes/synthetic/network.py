"""The denoiser and the condition tokens of the Synthetic recipe."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

TOKEN_DIM = 64
NULL = 0


def build_unet(
    size: int, patch: int, channels: tuple[int, int], cross_attention_dim: int = TOKEN_DIM
) -> UNet2DConditionModel:
    """About a million parameters; tokens are attended to at half resolution.

    It predicts the clean image, which here takes far fewer steps than predicting the noise, and it sees single pixels or 2x2
    patches: on larger ones a shape is one or two patches, which it learns as wholes. (Paper variant, 2x2 patches, 1,000 steps:
    no red triangle in 16; single pixels: 15.)
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


def build_scheduler() -> DDIMScheduler:
    """Cosine schedule with zero terminal SNR: the last step is pure noise, as sampling assumes."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


class FactorTokens(nn.Module):
    """One token per factor: a vector for each of its values, and a null vector for a factor that is not named.

    Args:
        factors: the values of each factor, in the order of the tokens.
    """

    def __init__(self, factors: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.factors = {name: list(values) for name, values in factors.items()}
        self.vectors = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(1 + len(values), TOKEN_DIM)) for name, values in factors.items()}
        )

    def rows(self, columns: Mapping[str, Sequence[str | None]]) -> Tensor:
        """Row numbers [B, factors] of the named values; None, or a factor without a column, is ``NULL``.

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
            known = "; ".join(f"{name}: {', '.join(values)}" for name, values in self.factors.items())
            raise ValueError(
                f"FactorTokens.rows(...): unknown {', '.join(unknown)}. HINT: known are {known}."
            )
        length = max((len(values) for values in columns.values()), default=0)
        listed = [
            [
                NULL if value is None else 1 + known.index(value)
                for value in columns.get(name, [None] * length)
            ]
            for name, known in self.factors.items()
        ]
        return torch.tensor(listed, dtype=torch.long).T

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [B, factors] to tokens [B, factors, TOKEN_DIM]."""
        return torch.stack([self.vectors[name][rows[:, i]] for i, name in enumerate(self.factors)], 1)
