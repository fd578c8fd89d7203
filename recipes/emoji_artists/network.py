"""The denoiser and the condition tokens of the EmojiArtists recipe."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

PATCH = 4
LATENT = (3 * PATCH**2, 32 // PATCH, 32 // PATCH)
"""Shape of an image's latents."""
TOKEN_VECTORS = 4
TOKEN_DIM = 128
NULL = -1


def build_unet(cross_attention_dim: int = TOKEN_DIM) -> UNet2DConditionModel:
    """4x4 pixel patches on an 8x8 grid: small enough for two cores, as it predicts clean images.

    (A network that predicts the noise must carry 48 noisy values per patch through its narrow trunk
    and fails.)

    Args:
        cross_attention_dim: width of the condition's vectors.
    """
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(96, 112),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def patchify(images: Tensor) -> Tensor:
    """Images [B, 3, 32, 32] to latents [B, 48, 8, 8]; a permutation of the values."""
    return F.pixel_unshuffle(images, PATCH)


def unpatchify(latents: Tensor) -> Tensor:
    """The inverse of :func:`patchify`."""
    return F.pixel_shuffle(latents, PATCH)


class Vocabulary(nn.Module):
    """Token vectors of one kind of name: the base's, a fine-tune's new ones, and a null token.

    Args:
        base: names the base model was trained on.
        new: names added by a fine-tune; their vectors are an embedding of their own, so that the
            base stays frozen.
    """

    def __init__(self, base: list[str], new: list[str]) -> None:
        super().__init__()
        self.index = {name: i for i, name in enumerate([*base, *new])}
        self.null = _embedding(torch.randn(1, TOKEN_VECTORS * TOKEN_DIM) * 0.5)
        self.base = _embedding(torch.randn(len(base), TOKEN_VECTORS * TOKEN_DIM) * 0.5)
        self.new = _embedding(torch.zeros(len(new), TOKEN_VECTORS * TOKEN_DIM)) if new else None

    def indices(self, names: Sequence[str | None]) -> Tensor:
        """Indices [B]; None and an empty name give ``NULL``."""
        return torch.tensor([self.index[name] if name else NULL for name in names])

    def initialise_new(self, generator: torch.Generator) -> None:
        """Starts every new name at the mean of the base names plus noise of their own spread."""
        if self.new is None:
            return
        base = self.base.weight
        with torch.no_grad():
            noise = torch.randn(self.new.weight.shape, generator=generator)
            noise *= base.std(0, keepdim=True)
            self.new.weight.copy_(base.mean(0, keepdim=True) + 0.3 * noise)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices [B] (``NULL`` for the null token) to token vectors [B, TOKEN_VECTORS,
        TOKEN_DIM]."""
        known = self.base.num_embeddings
        vectors = self.base(indices.clamp(0, known - 1))
        null = self.null(torch.zeros_like(indices))
        vectors = torch.where((indices == NULL).unsqueeze(1), null, vectors)
        if self.new is not None:
            new = self.new((indices - known).clamp(min=0))
            vectors = torch.where((indices >= known).unsqueeze(1), new, vectors)
        return vectors.view(len(indices), TOKEN_VECTORS, TOKEN_DIM)


class EmojiDenoiser(nn.Module):
    """The network with its token embeddings, so that what the tokens learn is traced too.

    Args:
        artist: tokens of the artists.
        object: tokens of the objects.
    """

    def __init__(
        self, artist: tuple[list[str], list[str]], object: tuple[list[str], list[str]]
    ) -> None:
        super().__init__()
        self.unet = build_unet()
        self.artist = Vocabulary(*artist)
        self.object = Vocabulary(*object)

    def forward(
        self, x_t: Tensor, t: Tensor, artist: Tensor, object: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """States [B, 48, 8, 8], timesteps [B] and name indices [B] to the predicted clean latents,
        as a tuple of one."""
        tokens = torch.cat([self.artist(artist), self.object(object)], 1)
        output: tuple[Tensor] = self.unet(
            x_t, t, encoder_hidden_states=tokens, return_dict=return_dict
        )
        return output


def _embedding(rows: Tensor) -> nn.Embedding:
    embedding: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    return embedding
