"""How a model is addressed: the seam between this library and a user's LightningModule."""

from ctrak_lightning.task.diffusers_task import DiffusersTask
from ctrak_lightning.task.pipeline_task import PipelineTask
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

__all__ = [
    "Condition",
    "DiffusersTask",
    "DiffusionTask",
    "Encoded",
    "PipelineTask",
    "Spec",
    "encode",
    "named_samples",
    "resolve_task",
    "select",
    "task_modules",
]
