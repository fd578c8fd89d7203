"""nn.Linear, and nn.Embedding, which is one on one-hot inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients.layers import Layer, register_layer
from ctrak_lightning.gradients.layouts import Layout


@register_layer(nn.Linear)
class LinearLayer(Layer):
    """nn.Linear: [out, in (+ 1)]."""

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        self.rows = module.weight.shape[0]
        self.cols = module.weight[0].numel() * self.has_weight + self.has_bias

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        parts = [gradients["weight"].flatten(2)] if self.has_weight else []
        return torch.cat(
            [*parts, gradients["bias"].unsqueeze(2)] if self.has_bias else parts, dim=2
        )

    def event_dims(self, x: Tensor) -> int:
        return 1

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        positions = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)  # [R, in]
        weight, bias = self._split(right)
        if weight is None:
            return right.expand(len(positions), 1)
        if bias is None:
            return _sided(positions.float(), weight)
        return torch.addmm(bias, positions.float(), weight)  # [R, p_in]

    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        g = _sided(cotangent.reshape(len(kept), self.rows).float(), left)  # [R, p_out]
        return layout.by_sample(g).mT @ layout.by_sample(kept)  # [B, p_out, T] x [B, T, p_in]

    def _split(self, right: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows of P_in for the weight's columns, and the one for the bias."""
        if not self.has_bias:
            return right, None
        return (right[:-1] if self.has_weight else None), right[-1]


@register_layer(nn.Embedding)
class EmbeddingLayer(LinearLayer):
    """nn.Embedding, as a Linear on one-hot inputs: [dim, num_embeddings]."""

    group: ClassVar[str] = "embedding"

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise GradientError(
                    f"nn.Embedding({option}={getattr(module, option)!r}) is not traced exactly: "
                    "expected the default. HINT: turn it off, or exclude the layer with `layers=`."
                )
        self.rows, self.cols = module.embedding_dim, module.num_embeddings

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return gradients["weight"].mT

    def event_dims(self, x: Tensor) -> int:
        return 0

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        ids = x.flatten()
        projected = right[ids]  # [R, p_in]
        if self.layer.padding_idx is None:
            return projected
        return projected * ids.ne(self.layer.padding_idx).unsqueeze(-1)


def _sided(x: Tensor, side: Tensor) -> Tensor:
    """``x @ side``; a square side is the identity
    (:class:`~ctrak_lightning.gradients.projection.Projection`), as in LoRA."""
    return x if side.shape[0] == side.shape[1] else x @ side
