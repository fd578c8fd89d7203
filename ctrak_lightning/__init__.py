"""Which training samples taught a diffusion model this concept? Traces while it is fine-tuned,
answers afterwards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ctrak_lightning import _moved

if TYPE_CHECKING:
    from ctrak_lightning import methods
    from ctrak_lightning.attribution import Attribution, Attributions, Attributor, Concept
    from ctrak_lightning.capture.capture import Capture
    from ctrak_lightning.capture.inline import InlineCapture
    from ctrak_lightning.gradients import GradientTracer, Layer, Projection, register_layer
    from ctrak_lightning.methods.method import Method
    from ctrak_lightning.methods.trajectories import Sampler
    from ctrak_lightning.schedules import FlowSchedule, NoiseSchedule
    from ctrak_lightning.store import TraceStore, TraceWriter
    from ctrak_lightning.tasks import (
        DiffusersTask,
        DiffusionTask,
        Encoded,
        PipelineTask,
        register_family,
    )

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "Attributions",
    "Attributor",
    "Capture",
    "Concept",
    "DiffusersTask",
    "DiffusionTask",
    "Encoded",
    "FlowSchedule",
    "GradientTracer",
    "InlineCapture",
    "Layer",
    "Method",
    "NoiseSchedule",
    "PipelineTask",
    "Projection",
    "Sampler",
    "TraceStore",
    "TraceWriter",
    "methods",
    "register_family",
    "register_layer",
]

_moved.install()

# What is not asked for is not imported, so that `ctrak --help` need not wait for PyTorch.
_PLACES = {
    "Attribution": "attribution",
    "Attributions": "attribution",
    "Attributor": "attribution",
    "Capture": "capture.capture",
    "Concept": "attribution",
    "DiffusersTask": "tasks",
    "DiffusionTask": "tasks",
    "Encoded": "tasks",
    "FlowSchedule": "schedules",
    "GradientTracer": "gradients",
    "InlineCapture": "capture.inline",
    "Layer": "gradients",
    "Method": "methods",
    "NoiseSchedule": "schedules",
    "PipelineTask": "tasks",
    "Projection": "gradients",
    "Sampler": "methods.trajectories",
    "TraceStore": "store",
    "TraceWriter": "store",
    "register_family": "tasks",
    "register_layer": "gradients",
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module(f"{__name__}.methods")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
