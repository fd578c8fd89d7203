"""How adapters are applied, which no weight tells: their scaling, and whether they are disabled or
merged."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from ctrak_lightning.naming import modules_of


def adapter_facts(owner: nn.Module, parts: Collection[str] | None) -> dict[str, str]:
    """``{"adapters": text}`` of peft's adapter layers: how many are applied how, and a sha256 of
    which; ``{}`` without such layers.

    Args:
        owner: the module that has them.
        parts: the parts of it that count, as :func:`~ctrak_lightning.frozen.parts_of` gives them;
            None for all.
    """
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
