"""The LightningModule of the AbC recipe: a text-to-image model that learns one personalised token."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ctrak_lightning import DiffusionTask, Encoded, NoiseSchedule
from recipes.abc.components import Components
from recipes.abc.data import TOKEN, without_token

KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")


class ExtendedEmbedding(nn.Module):
    """A frozen token embedding and one token more, which is trained.

    Args:
        base: the text encoder's own embedding.
        token_id: of the new token.
        start: its vector to start from [d].
    """

    def __init__(self, base: nn.Module, token_id: int, start: Tensor) -> None:
        super().__init__()
        self.base = base
        self.token_id = token_id
        self.new: nn.Embedding = nn.Embedding.from_pretrained(start.detach().clone()[None], freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to vectors [B, T, d]."""
        is_new = ids == self.token_id
        # The base may have no row for the new token; what it gives there is not used.
        known = self.base(torch.where(is_new, torch.zeros_like(ids), ids))
        return torch.where(is_new.unsqueeze(-1), self.new(torch.zeros_like(ids)), known)


class TextDenoiser(nn.Module):
    """The network with its text encoder, so that what the new token learns is traced too.

    Args:
        unet: the network.
        text_encoder: token ids [B, T] to (vectors [B, T, d], ...).
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self, x_t: Tensor, t: Tensor, input_ids: Tensor, return_dict: bool = False
    ) -> tuple[Tensor, ...]:
        """States [B, C, h, w], timesteps [B] and token ids [B, T] to the network's output, as a tuple of one."""
        vectors = self.text_encoder(input_ids)[0]
        output: tuple[Tensor, ...] = self.unet(x_t, t, encoder_hidden_states=vectors, return_dict=return_dict)
        return output


class CustomDiffusion(DiffusionTask, L.LightningModule):
    """Learns a token from a few exemplars, as Custom Diffusion does (Kumari et al. 2023, arXiv 2212.04488): the
    cross-attention's keys and values and the token's vector are trained, all else is frozen.

    Conditions are prompts; ``{}`` is the empty prompt.

    Args:
        components: the model; its text encoder and tokenizer get the new token.
        train_prompt: the exemplars' caption, such as ``"<new1> fish"``. The token's vector starts at the mean of the
            caption's other words.
        learning_rate: AdamW's for keys and values.
        token_learning_rate: AdamW's for the token's vector.

    Raises:
        ValueError: the caption lacks the token, the tokenizer knows it already, or the network has no cross-attention.
    """

    denoiser: TextDenoiser

    def __init__(
        self,
        components: Components,
        train_prompt: str,
        learning_rate: float = 1e-5,
        token_learning_rate: float = 5e-4,
    ) -> None:
        super().__init__()
        self.learning_rate, self.token_learning_rate = learning_rate, token_learning_rate
        self.tokenizer = components.tokenizer
        others = without_token(train_prompt)
        start = self._mean_vector(components.text_encoder, others)
        encoder: Any = components.text_encoder
        if self.tokenizer.add_tokens([TOKEN]) != 1:
            raise ValueError(
                f"CustomDiffusion: the tokenizer knows {TOKEN} already. HINT: load the components anew for every customised model."
            )
        token_id = int(self.tokenizer.convert_tokens_to_ids(TOKEN))
        embedding = ExtendedEmbedding(encoder.get_input_embeddings(), token_id, start)
        encoder.set_input_embeddings(embedding)
        self.denoiser = TextDenoiser(components.unet, components.text_encoder)
        self.vae = components.vae
        self.noise_schedule = NoiseSchedule.from_scheduler(components.scheduler)
        self.requires_grad_(False)
        trained = [layer for name, layer in components.unet.named_modules() if name.endswith(KEYS_AND_VALUES)]
        if not trained:
            raise ValueError(
                f"CustomDiffusion({type(components.unet).__name__}): no layer named *{' or *'.join(KEYS_AND_VALUES)}; expected a "
                "network with cross-attention."
            )
        for layer in (*trained, embedding.new):
            layer.requires_grad_(True)

    @property
    def embedding(self) -> ExtendedEmbedding:
        """The text encoder's embedding, with the new token."""
        encoder: Any = self.denoiser.text_encoder
        embedding: ExtendedEmbedding = encoder.get_input_embeddings()
        return embedding

    def encode(self, batch: dict[str, Any]) -> Encoded:
        captions = list(batch["caption"])
        return Encoded(
            latents=self._latents(batch["image"]),
            condition={"input_ids": self._ids(captions)},
            sample_ids=self.sample_ids(batch),
            metadata={"kind": list(batch["kind"]), "caption": captions},
        )

    def sample_ids(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["sample_id"])

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        if not isinstance(spec, str) and spec:
            raise TypeError(
                f"CustomDiffusion.condition({dict(spec)!r}): expected a prompt, such as '{TOKEN} fish', or {{}} for none."
            )
        return {"input_ids": self._ids([spec if isinstance(spec, str) else ""] * n)}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = [self.vae.decode(row[None] / self.vae.config.scaling_factor).sample for row in latents]
        return ((torch.cat(images) + 1) / 2).clamp(0, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        latents = self._latents(batch["image"])
        noise = torch.randn_like(latents)
        t = torch.randint(0, len(self.noise_schedule), (len(latents),), device=self.device)
        noised = self.noise_schedule.add_noise(latents, noise, t)
        output = self.predict(noised, t, {"input_ids": self._ids(list(batch["caption"]))})
        loss = (self.noise_schedule.epsilon(output, noised, t) - noise).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        network = [p for p in self.denoiser.unet.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [
                {"params": network, "lr": self.learning_rate},
                {
                    "params": self.embedding.new.parameters(),
                    "lr": self.token_learning_rate,
                    "weight_decay": 0.0,
                },
            ]
        )

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        # The mean, not a draw: the same image has the same latent in every trace.
        mean: Tensor = self.vae.encode(images.to(self.device)).latent_dist.mode()
        return mean * float(self.vae.config.scaling_factor)

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, T], padded; a prompt that is too long is cut, as Stable Diffusion does."""
        length = self.tokenizer.model_max_length
        tokenized = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = tokenized["input_ids"].to(self.device)
        return ids

    def _mean_vector(self, text_encoder: Any, words: str) -> Tensor:
        ids = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(
                f"CustomDiffusion: the exemplars' caption has no word beside {TOKEN}, so its vector has no start. HINT: name the "
                f"kind of thing, such as '{TOKEN} fish'."
            )
        with torch.no_grad():
            vectors: Tensor = text_encoder.get_input_embeddings()(torch.tensor(ids))
            return vectors.mean(0)
