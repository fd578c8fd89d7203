"""Which parameters of a network are traced, and in which blocks."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ctrak_lightning.errors import ExtensionError, GradientError, listed
from ctrak_lightning.gradients import kinds  # noqa: F401, as each registers itself
from ctrak_lightning.gradients.checks import naming_extension
from ctrak_lightning.gradients.layers import BareParameter, Layer, layer_kind
from ctrak_lightning.utilities.naming import modules_of, parameters_of, place_of


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
        # By name: none of these libraries need be installed, and torch's takes long to import.
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


SHOWN_NAMES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The selected parameters.

    Args:
        layers: blocks of layers with a known kind.
        bare: the other parameters, each with the reason why the hook engine cannot trace it.
    """

    layers: list[Layer]
    bare: list[tuple[BareParameter, str]]


def plan_blocks(
    module: nn.Module,
    patterns: Sequence[str] | None,
    trained: Collection[str] | None = None,
    unused_kinds: Collection[str] = (),
) -> Plan:
    """Sorts the parameters that require a gradient into blocks.

    Args:
        module: the network.
        patterns: `fnmatch` patterns for the names of the modules that own them; None takes all.
        trained: names of the parameters that training changes; None takes all that require a
            gradient.
        unused_kinds: places of classes of modules whose kinds of layers are not used.

    Raises:
        GradientError: nothing requires a gradient, or a pattern matches nothing that does, or a
            registered kind makes no usable layer.
    """
    chosen = {
        id(value)
        for name, value in parameters_of(module, remove_duplicate=False).items()
        if value.requires_grad and (trained is None or name in trained)
    }
    owners: dict[int, list[str]] = {}
    candidates: dict[str, tuple[nn.Module, list[str]]] = {}
    for name, submodule in modules_of(module):
        trainable = [
            own for own, parameter in _own_parameters(submodule) if id(parameter) in chosen
        ]
        if trainable:
            candidates[name] = (submodule, trainable)
        for own in trainable:
            owners.setdefault(id(submodule.get_parameter(own)), []).append(_qualified(name, own))
    if not candidates:
        raise GradientError(
            f"`GradientTracer({type(module).__name__})`: no parameter requires a gradient and is "
            "in an optimizer, so there is nothing to trace. It has: "
            f"{listed(parameters_of(module), SHOWN_NAMES) or 'none'}. HINT: call `requires_grad_()` on the "
            "parameters to trace and give them to an optimizer, or add the adapter first."
        )
    _require_matches(patterns or [], list(candidates))
    in_attention = {
        id(submodule.out_proj)
        for submodule in module.modules()
        if isinstance(submodule, nn.MultiheadAttention)
    }
    layers: list[Layer] = []
    bare: list[tuple[BareParameter, str]] = []
    seen: set[int] = set()
    for name, (submodule, trainable) in candidates.items():
        if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        reasons = {}
        for own in trainable:
            shared = owners[id(submodule.get_parameter(own))]
            if len(shared) > 1:
                reasons[own] = f"shared as {', '.join(shared)}"
        exact = [own for own in trainable if own not in reasons]
        kind = layer_kind(submodule, unused_kinds)
        called = id(submodule) not in in_attention
        layer, reason = _layer(kind, name, submodule, exact, called)
        if layer is not None:
            layers.append(layer)
        reasons |= {own: reason for own in exact if layer is None or own not in layer.own_names}
        for own, why in reasons.items():
            if id(submodule.get_parameter(own)) not in seen:
                seen.add(id(submodule.get_parameter(own)))
                bare.append((BareParameter(_qualified(name, own), submodule, own), why))
    return Plan(layers=layers, bare=bare)


def _layer(
    kind: type[Layer] | None, name: str, module: nn.Module, own_names: list[str], called: bool
) -> tuple[Layer | None, str]:
    """The layer that traces the parameters it knows, and why the others are not traced."""
    if not called:
        return None, "used inside nn.MultiheadAttention without a call of its layer"
    if kind is None:
        own = " with a `forward` of its own" if "forward" in vars(module) else ""
        return None, f"{type(module).__name__}{own} is not a known layer kind"
    known = [own for own in own_names if own in kind.names]
    unknown = f"not the {' or '.join(kind.names)} of its {type(module).__name__}"
    if not known:
        return None, unknown
    made = f"{place_of(kind)}({name!r}, {type(module).__name__}, {known})"
    try:
        with naming_extension(made):
            layer = kind(name, module, known)
    except GradientError as error:
        return None, str(error)
    if not all(isinstance(getattr(layer, side, None), int) for side in ("rows", "cols")):
        raise ExtensionError(
            f"{made} has no rows and cols, expected the two sizes of its gradient's matrix. HINT: "
            "set `self.rows, self.cols` in `__init__`."
        )
    return layer, unknown


def _require_matches(patterns: Sequence[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise GradientError(
                f"`GradientTracer(layers={list(patterns)!r})`: {pattern!r} matches no module that "
                f"owns a trainable parameter. Expected `fnmatch` patterns for: {listed(names, SHOWN_NAMES)}. "
                "HINT: e.g. '*attn2*'."
            )


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return (
        (own, parameter) for own, parameter in module._parameters.items() if parameter is not None
    )


def _qualified(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own
