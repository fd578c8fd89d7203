"""How a model is addressed: the seam between this library and a user's LightningModule."""

from ctrak_lightning.task.diffusers_task import DiffusersTask
from ctrak_lightning.task.pipeline_task import PipelineTask
from ctrak_lightning.task.precision import InPrecision, in_own_precision
from ctrak_lightning.task.protocol import (
    Condition,
    DiffusionTask,
    Encoded,
    Spec,
    encode,
    named_samples,
    resolve_task,
    select,
    task_modules,
)
from ctrak_lightning.task.wrapped import Wrapped, name_of

__all__ = [
    "Condition",
    "DiffusersTask",
    "DiffusionTask",
    "Encoded",
    "InPrecision",
    "PipelineTask",
    "Spec",
    "Wrapped",
    "encode",
    "in_own_precision",
    "name_of",
    "named_samples",
    "resolve_task",
    "select",
    "task_modules",
]
