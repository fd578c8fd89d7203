"""Which kind of layer a traced block belongs to: cross-attention, convolution and so on."""

from torch import nn

from ctrak_lightning.gradients.layers import (
    Block,
    ConvLayer,
    EmbeddingLayer,
    NormLayer,
)
from ctrak_lightning.naming import inside

OTHER = "other layers"
_KINDS: tuple[tuple[type[Block], str], ...] = (
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
    return next((group for kind, group in _KINDS if isinstance(block, kind)), OTHER)


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
