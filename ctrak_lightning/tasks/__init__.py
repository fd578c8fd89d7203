"""How a model is addressed: the seam between this library and a user's LightningModule."""

from ctrak_lightning.tasks.base import (
    Condition,
    DiffusionTask,
    Encoded,
    OptionalMembers,
    Spec,
    Wrapped,
    condition_of,
    encode,
    name_of,
    named_samples,
    require_rows,
    resolve_task,
    select,
    task_modules,
    unwrapped,
    whole,
)
from ctrak_lightning.tasks.classes import ClassTask
from ctrak_lightning.tasks.diffusers_task import DiffusersTask
from ctrak_lightning.tasks.pipeline import PipelineTask
from ctrak_lightning.tasks.precision import (
    InPrecision,
    Precision,
    in_own_precision,
    under_autocast,
    widened,
    with_wide_latents,
)
from ctrak_lightning.tasks.registry import register_family
from ctrak_lightning.tasks.text import PromptTask

__all__ = [
    "ClassTask",
    "Condition",
    "DiffusersTask",
    "DiffusionTask",
    "Encoded",
    "InPrecision",
    "OptionalMembers",
    "PipelineTask",
    "Precision",
    "PromptTask",
    "Spec",
    "Wrapped",
    "condition_of",
    "encode",
    "in_own_precision",
    "name_of",
    "named_samples",
    "register_family",
    "require_rows",
    "resolve_task",
    "select",
    "task_modules",
    "under_autocast",
    "unwrapped",
    "whole",
    "widened",
    "with_wide_latents",
]
