"""What identifies a model in a store: its weights, schedule and adapters, as sha256."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ctrak_lightning.model.frozen import Frozen, is_rounded, warn_of_rounding
from ctrak_lightning.utilities.naming import bytes_of, modules_of, parameters_of


def adapter_facts(owner: nn.Module, parts: Collection[str] | None) -> dict[str, str]:
    """``{"adapters": text}`` of peft's adapter layers: how many are applied how, and a sha256 of
    which; ``{}`` without such layers."""
    # Where peft was never imported, no module is of its kind.
    kind: Any = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if kind is None:
        return {}
    states = {
        name: _state(layer)
        for name, layer in modules_of(owner)
        if isinstance(layer, kind)
        and (parts is None or any(_overlap(name, part) for part in parts))
    }
    if not states:
        return {}
    counts = Counter(states.values())
    listed = "; ".join(f"{state} (layers: {counts[state]})" for state in sorted(counts))
    digest = hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()
    return {"adapters": f"{listed}; sha256 {digest}"}


def _state(layer: Any) -> str:
    """Such as ``default, scaling 0.5``."""
    if layer.disable_adapters:
        return "disabled"
    scaling = getattr(layer, "scaling", None) or {}
    merged = set(layer.merged_adapters)
    # Six digits: scaling up and down again, as diffusers does for a call, may cost the last one.
    return (
        " + ".join(
            name
            + (f", scaling {float(scaling[name]):.6g}" if name in scaling else "")
            + (", merged" if name in merged else "")
            for name in sorted({*layer.active_adapters, *merged})
        )
        or "none active"
    )


def _overlap(name: str, part: str) -> bool:
    return part == "" or f"{name}.".startswith(f"{part}.") or part.startswith(f"{name}.")


def model_fingerprint(
    module: nn.Module, trained: Collection[str], schedule: Any, parts: Collection[str] | None
) -> dict[str, str]:
    """Hashes (sha256, hex) of the trained parameters' names and shapes, of what is frozen, and of
    the schedule; and how adapters are applied, where there are any.

    Args:
        module: the model.
        trained: names of the trained parameters.
        schedule: its noise schedule.
        parts: which parts of the module the task computes with (``frozen.parts_of``), recorded
            beside the hashes; None takes all frozen parameters and no buffers, as stores of schema
            4 do.
    """
    own = parameters_of(module)
    shapes = "".join(f"{name}:{tuple(own[name].shape)};" for name in sorted(trained) if name in own)
    facts = {
        "trained_parameters": hashlib.sha256(shapes.encode()).hexdigest(),
        "noise_schedule": schedule_digest(schedule),
    }
    if parts is None:
        return facts | {"frozen_weights": _all_frozen(own, trained)}
    frozen = Frozen(module, parts, trained)
    facts |= {"frozen_weights": frozen.digest, "frozen_sketch": frozen.sketch}
    return facts | {"frozen_parts": json.dumps(sorted(parts))} | adapter_facts(module, parts)


def schedule_digest(schedule: Any) -> str:
    """Sha256 (hex) of a noise schedule."""
    return hashlib.sha256(repr(sorted(schedule.to_dict().items())).encode()).hexdigest()


def as_stored(stored: Mapping[str, str], mine: Mapping[str, str]) -> dict[str, str]:
    """A model's facts as a store has them, where they differ in nothing but the rounding of frozen
    weights.

    Warns:
        RoundedWeightsWarning: they have been rounded.
    """
    facts, sketch, own = dict(mine), stored.get("frozen_sketch"), mine.get("frozen_sketch")
    if sketch is None or own is None:  # of an earlier version, or of weights that are not frozen
        facts.pop("frozen_sketch", None)
        return facts
    is_same = stored.get("frozen_weights") == mine["frozen_weights"]
    if not is_same and is_rounded(sketch, own):
        is_same = True
        warn_of_rounding(
            f"sha256 {mine['frozen_weights']}, and in the store {stored.get('frozen_weights')}"
        )
    # The last digits of a sketch depend on the processor.
    return facts | (
        {name: stored[name] for name in ("frozen_weights", "frozen_sketch")}
        if is_same
        else {"frozen_sketch": sketch}
    )


def _all_frozen(parameters: Mapping[str, Tensor], trained: Collection[str]) -> str:
    frozen = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        if name not in trained:
            frozen.update(f"{name}:{tuple(value.shape)};".encode())
            frozen.update(bytes_of(value))
    return frozen.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of weights: their names, dtypes, shapes and bytes, whatever their order."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        found.update(bytes_of(value))
    return found.hexdigest()
