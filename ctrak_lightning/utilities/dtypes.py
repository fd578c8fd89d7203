"""In what dtype a network computes, where its weights are stored in another one."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Those that layers compute in; float8 and whole numbers are storage."""


def computation_dtype(network: nn.Module) -> torch.dtype:
    """The dtype that a network's inputs have: of its first parameter that is of a dtype of
    :data:`COMPUTED`, or the one that diffusers' layerwise casting computes in.

    A quantised weight is whole numbers (bitsandbytes, 4 and 8 bits), a layerwise-cast one float8.
    """
    for submodule in network.modules():
        registry = getattr(submodule, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("layerwise_casting")
        if hook is not None:
            dtype: torch.dtype = hook.compute_dtype
            return dtype
    return next((one.dtype for one in _held(network) if one.dtype in COMPUTED), torch.float32)


def device_of(network: nn.Module) -> torch.device:
    """Where a network is: the device of its first parameter or buffer."""
    return next((one.device for one in _held(network)), torch.device("cpu"))


def _held(network: nn.Module) -> Iterator[Tensor]:
    # One by one: most who ask need the first alone, and ask for every state.
    return itertools.chain(network.parameters(), network.buffers())


def input_like(network: nn.Module) -> Tensor:
    """An empty tensor of the device and dtype of a network's inputs."""
    return torch.empty(0, device=device_of(network), dtype=computation_dtype(network))
