"""How a run's ConceptTracer was told to address the module, from the run's YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from ctrak_lightning.task import DiffusersTask


def tracer_task(config: str | Path) -> Any:
    """The ``task`` of the ConceptTracer among a LightningCLI YAML's callbacks; None where there is
    none.

    Raises:
        ValueError: several tracers of the file have different tasks.
    """
    facts = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    trainer = facts.get("trainer") if isinstance(facts, Mapping) else None
    found: list[Any] = []
    for key in ("callbacks", "callbacks+"):
        listed = (trainer or {}).get(key) or []
        for callback in [listed] if isinstance(listed, Mapping) else listed:
            if str(callback.get("class_path", "")).rpartition(".")[2] == "ConceptTracer":
                found.append((callback.get("init_args") or {}).get("task"))
    given = [task for task in found if task]
    if not given:
        return None
    if any(task != given[0] for task in given):
        raise ValueError(
            f"{config}: its ConceptTracers have different tasks: {given}. HINT: keep one of them "
            "in the file."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DiffusersTask, "task")
    return parser.instantiate(parser.parse_object({"task": given[0]})).task
