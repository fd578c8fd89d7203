"""What a task makes of labels and prompts, in a few numbers by which another label map or tokenizer
is noticed."""

from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.rng import isolated_rng, seeded_noise
from ctrak_lightning.task import Spec

VALUES, SPECS = 8, 32
"""At most so many values of an attribute, and specs in all, are looked at: each may cost a pass of
a text encoder."""
PROMPTS = ("a red house beside the sea", "portrait of a cat, oil painting")
_NUMBERS = 4


def conditions_of(task: Any) -> tuple[Tensor | None, int]:
    """Random projections of ``task.condition(spec, 1)`` for fixed specs, one row for each of the
    condition's T tensors, float32 [T, K] (None where the task takes no such specs), and how many
    specs they were chosen from.

    The specs are values of ``task.known_attributes()``, one by one, or else prompts. They are known
    by their place in the list and not by name, since a name may be that of someone whose samples
    are forgotten later.
    """
    with isolated_rng(0), torch.no_grad():
        try:
            specs, count = specs_of(task)
            conditions = [task.condition(spec, 1) for spec in specs]
            names = sorted({name for condition in conditions for name in condition})
            rows = [
                torch.cat([_projected(name, condition[name]) for condition in conditions])
                for name in names
            ]
        except Exception:  # what it takes for a spec is its own affair: a question shows that
            return None, 0
    found = torch.stack(rows) if rows else None
    return (None, 0) if found is None or not found.isfinite().all() else (found, count)


def specs_of(task: Any) -> tuple[list[Spec], int]:
    """Some specs that a task may take, which may be wrong of prompts, and how many they were chosen
    from."""
    if not hasattr(task, "known_attributes"):
        return list(PROMPTS), len(PROMPTS)
    known = {name: sorted(values) for name, values in sorted(task.known_attributes().items())}
    some: list[Spec] = [
        {name: value}
        for name, values in known.items()
        for value in values[:: -(-len(values) // VALUES) or 1]
    ]
    return some[:SPECS], sum(map(len, known.values()))


def _projected(name: str, value: Tensor) -> Tensor:
    """Four numbers: of the order of the values, or, for whole numbers, others for every other
    value."""
    if not value.is_floating_point():
        return seeded_noise((_NUMBERS,), 0, 0, f"{name}/{value.tolist()}")
    flat = value.float().cpu().flatten()
    projected: Tensor = flat @ seeded_noise((len(flat), _NUMBERS), 0, 0, f"condition/{name}")
    return projected
