"""Norms: their scale and shift."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrak_lightning.gradients.layers import Layer, register_layer
from ctrak_lightning.gradients.layouts import Layout


class NormLayer(Layer):
    """A norm's scale and shift: [1, n (+ n)]. It keeps its whole input, since the product with g is
    elementwise."""

    group: ClassVar[str] = "normalisation"

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        self.rows = 1
        self.cols = sum(parameter.numel() for parameter in self.parameters.values())

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        parts = [gradients[own].flatten(1) for own in ("weight", "bias") if own in self.own_names]
        return torch.cat(parts, dim=1).unsqueeze(1)

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[len(self.leading(x)) :])  # [R, *event]

    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        g = cotangent.reshape(kept.shape).float()
        products = [g * self.normalise(kept)] if self.has_weight else []
        if self.has_bias:
            products.append(g)
        sums = [self.sum_positions(layout.by_sample(part)) for part in products]
        return (torch.cat(sums, dim=1) @ right).unsqueeze(1) * left

    @abstractmethod
    def normalise(self, x: Tensor) -> Tensor:
        """The input before scale and shift, float32."""

    def sum_positions(self, products: Tensor) -> Tensor:
        """Sums [B, F, *event] over all but the batch and the n normalised features: [B, n]."""
        return products.reshape(len(products), -1, self.layer.weight.numel()).sum(1)


@register_layer(nn.LayerNorm, "diffusers.models.normalization.FP32LayerNorm")
class LayerNormLayer(NormLayer):
    """nn.LayerNorm."""

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.normalized_shape)

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.layer.normalized_shape, eps=self.layer.eps)


@register_layer(nn.RMSNorm)
class RMSNormLayer(NormLayer):
    """nn.RMSNorm."""

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.normalized_shape)

    def normalise(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.layer.eps is None else self.layer.eps
        return F.rms_norm(x.float(), self.layer.normalized_shape, eps=eps)


@register_layer("diffusers.models.normalization.RMSNorm")
class DiffusersRMSNormLayer(NormLayer):
    """diffusers.models.normalization.RMSNorm, which normalises over the last dimension only."""

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.dim)

    def normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.layer.eps)


@register_layer(nn.GroupNorm)
class GroupNormLayer(NormLayer):
    """nn.GroupNorm."""

    def event_dims(self, x: Tensor) -> int:
        return x.dim() - 1

    def normalise(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.layer.num_groups, eps=self.layer.eps)

    def sum_positions(self, products: Tensor) -> Tensor:
        return products.flatten(3).sum(dim=(1, 3)) if products.dim() > 3 else products.sum(1)
