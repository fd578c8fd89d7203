"""Which kind of layer a traced block belongs to: cross-attention, convolution and so on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients.layouts import Layout
from ctrak_lightning.utilities.naming import inside


class Block:
    """Parameters whose gradient is one matrix [rows, cols] per sample.

    Args:
        name: the block's name, which seeds its projection.
        module: the module that owns the parameters.
        own_names: names of the traced parameters within ``module``.
    """

    rows: int
    cols: int

    def __init__(self, name: str, module: nn.Module, own_names: Sequence[str]) -> None:
        self.name = name
        self.module = module
        self.own_names = sorted(own_names)
        self.prefix = name

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The traced parameters by their names from the traced root."""
        dot = f"{self.prefix}." if self.prefix else ""
        return {f"{dot}{own}": self.module.get_parameter(own) for own in self.own_names}

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Parameters' gradients [B, *shape] by own name, laid out as [B, rows, cols]."""
        raise NotImplementedError


class BareParameter(Block):
    """A parameter without a layer kind, as a 1 x n matrix; only the reference engines trace it."""

    def __init__(self, name: str, module: nn.Module, own_name: str) -> None:
        super().__init__(name, module, [own_name])
        self.prefix = name.removesuffix(own_name).removesuffix(".")
        self.rows, self.cols = 1, module.get_parameter(own_name).numel()

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return gradients[self.own_names[0]].flatten(1).unsqueeze(1)


class Layer(Block):
    """A block that the hook engine traces from its module's inputs and output cotangents."""

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        self.layer = module
        self.has_weight, self.has_bias = "weight" in own_names, "bias" in own_names

    def event_dims(self, x: Tensor) -> int:
        """How many trailing dimensions of an input ``x`` belong to one position or image; the
        others are batch."""
        raise NotImplementedError

    def leading(self, x: Tensor) -> tuple[int, ...]:
        """The sizes of an input's batch dimensions; () of one position or image alone."""
        return tuple(x.shape[: max(x.dim() - self.event_dims(x), 0)])

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        """What must be kept of an input until its cotangent arrives, given P_in ``right`` [cols,
        p_in]: one entry for each of its rows (position or image), R of them."""
        raise NotImplementedError

    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        """Projected gradient [B, p_out, p_in] from what was kept and the output's cotangent."""
        raise NotImplementedError


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


class ConvLayer(LinearLayer):
    """nn.Conv1d, 2d and 3d: [out, in / groups * kernel (+ 1)], as in torch's weight layout.

    Convolving with P_in as the kernel projects every patch without unfolding it.
    """

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.kernel_size) + 1

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        groups, p_in = self.layer.groups, right.shape[1]
        positions = output.shape[-len(self.layer.kernel_size) :].numel()
        weight, bias = self._split(right)
        if weight is None:
            return right.expand(output.numel() // (self.rows * positions), groups, 1, positions)
        kernel = weight.mT.reshape(p_in, *self.layer.weight.shape[1:])
        kernel = kernel.repeat(groups, *[1] * (kernel.dim() - 1))
        # The layer's own method honours its stride, padding and padding mode.
        patches: Tensor = self.layer._conv_forward(
            x.float(), kernel, None if bias is None else bias.repeat(groups)
        )
        return patches.reshape(-1, groups, p_in, positions)

    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        images, groups, _, positions = kept.shape
        g = cotangent.reshape(images, groups, self.rows // groups, positions).float()
        sides = left.reshape(groups, self.rows // groups, -1).mT.expand(images, -1, -1, -1)
        # Images and groups are further positions to sum over: [B, F, groups, p_out, L].
        return (
            _join_positions(layout.by_sample(sides @ g))
            @ _join_positions(layout.by_sample(kept)).mT
        )


class EmbeddingLayer(LinearLayer):
    """nn.Embedding, as a Linear on one-hot inputs: [dim, num_embeddings]."""

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


class NormLayer(Layer):
    """A norm's scale and shift: [1, n (+ n)]. It keeps its whole input, since the product with g is
    elementwise."""

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

    def normalise(self, x: Tensor) -> Tensor:
        """The input before scale and shift, float32."""
        raise NotImplementedError

    def sum_positions(self, products: Tensor) -> Tensor:
        """Sums [B, F, *event] over all but the batch and the n normalised features: [B, n]."""
        return products.reshape(len(products), -1, self.layer.weight.numel()).sum(1)


class LayerNormLayer(NormLayer):
    """nn.LayerNorm."""

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.normalized_shape)

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.layer.normalized_shape, eps=self.layer.eps)


class RMSNormLayer(NormLayer):
    """nn.RMSNorm."""

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.normalized_shape)

    def normalise(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.layer.eps is None else self.layer.eps
        return F.rms_norm(x.float(), self.layer.normalized_shape, eps=eps)


class DiffusersRMSNormLayer(NormLayer):
    """diffusers.models.normalization.RMSNorm, which normalises over the last dimension only."""

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.dim)

    def normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.layer.eps)


class GroupNormLayer(NormLayer):
    """nn.GroupNorm."""

    def event_dims(self, x: Tensor) -> int:
        return x.dim() - 1

    def normalise(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.layer.num_groups, eps=self.layer.eps)

    def sum_positions(self, products: Tensor) -> Tensor:
        return products.flatten(3).sum(dim=(1, 3)) if products.dim() > 3 else products.sum(1)


def layer_kind(module: nn.Module) -> type[Layer] | None:
    """The kind that traces a module exactly, or None. A class, or an instance, that computes in its
    own way is another layer."""
    kind = type(module)
    if any(name in vars(module) for name in _COMPUTING):
        return None
    for base, layer in _KINDS.items():
        if isinstance(module, base) and all(
            getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING
        ):
            return layer
    return _KINDS_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")


def _sided(x: Tensor, side: Tensor) -> Tensor:
    """``x @ side``; a square side is the identity
    (:class:`~ctrak_lightning.gradients.projection.Projection`), as in LoRA."""
    return x if side.shape[0] == side.shape[1] else x @ side


def _join_positions(maps: Tensor) -> Tensor:
    """[B, F, groups, p, L] as [B, p, F * groups * L]."""
    return maps.permute(0, 3, 1, 2, 4).flatten(2)


_COMPUTING = ("forward", "_conv_forward", "__call__")
_KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.Embedding: EmbeddingLayer,
    nn.LayerNorm: LayerNormLayer,
    nn.GroupNorm: GroupNormLayer,
    nn.RMSNorm: RMSNormLayer,
}
_KINDS_BY_NAME: dict[str, type[Layer]] = {
    "diffusers.models.normalization.RMSNorm": DiffusersRMSNormLayer,
    "diffusers.models.normalization.FP32LayerNorm": LayerNormLayer,
}


OTHER = "other layers"
_GROUPS_OF_BLOCKS: tuple[tuple[type[Block], str], ...] = (
    (ConvLayer, "convolution"),
    (EmbeddingLayer, "embedding"),
    (NormLayer, "normalisation"),
)


def layer_group(root: nn.Module, block: Block) -> str:
    """The group of a block within the network ``root``.

    What is inside an attention or a feed-forward module (an adapter's matrices too) counts with it;
    other layers by their kind.

    Example:
        >>> from ctrak_lightning.gradients.layers import LinearLayer
        >>> network = nn.Sequential(nn.Linear(2, 2))
        >>> layer_group(network, LinearLayer("0", network[0], ["weight"]))
        'other layers'
    """
    module = root
    for part in block.prefix.split("."):
        if group := _container_group(inside(module)):
            return group
        module = module.get_submodule(part)
    return next((group for kind, group in _GROUPS_OF_BLOCKS if isinstance(block, kind)), OTHER)


def _container_group(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name.endswith("FeedForward"):
        return "feed-forward"
    if not name.endswith("Attention"):
        return None
    # diffusers' Attention says of itself which kind it is; classes that do not are told by their
    # names.
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "joint attention"
    if getattr(module, "is_cross_attention", "Cross" in name):
        return "cross-attention"
    return "attention" if isinstance(module, nn.MultiheadAttention) else "self-attention"
