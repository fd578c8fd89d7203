"""Networks whose parameters are spread over processes."""

from torch import nn

from ctrak_lightning.errors import GradientError
from ctrak_lightning.naming import modules_of, parameters_of


def refuse_sharded(module: nn.Module) -> None:
    """Raises a GradientError for a network of which this process holds only a part of each layer,
    whoever split it.

    Raises:
        GradientError: a parameter is sharded; names the first one and how.
    """
    for name, inner in modules_of(module):
        if type(inner).__name__ == "FullyShardedDataParallel":
            _refuse(name or type(inner).__name__, "FullyShardedDataParallel")
    for name, parameter in parameters_of(module).items():
        # By name: none of these libraries need be installed, and torch's is dear to import.
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            _refuse(name, "a DTensor, as fully_shard and tensor parallelism make them")
        if hasattr(parameter, "ds_id"):
            _refuse(name, "a parameter of DeepSpeed ZeRO-3")


def _refuse(name: str, how: str) -> None:
    raise GradientError(
        f"`GradientTracer`: {name} is {how}: no process holds the whole of a layer, and a "
        "per-sample gradient needs it whole. HINT: use DDP or a single device; LoRA makes most "
        "models fit."
    )
