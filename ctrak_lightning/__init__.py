"""Which training samples taught a diffusion model this concept? Traces while it is fine-tuned,
answers afterwards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrak_lightning import methods
    from ctrak_lightning.attribution import Attribution, Attributions, Attributor, Concept
    from ctrak_lightning.capture import Capture
    from ctrak_lightning.flow import FlowSchedule
    from ctrak_lightning.gradients import GradientTracer, Projection
    from ctrak_lightning.inline import InlineCapture
    from ctrak_lightning.method import Method
    from ctrak_lightning.parameterization import NoiseSchedule
    from ctrak_lightning.task import DiffusersTask, DiffusionTask, Encoded, PipelineTask
    from ctrak_lightning.traces import TraceStore, TraceWriter
    from ctrak_lightning.trajectory import Sampler

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
    "Method",
    "NoiseSchedule",
    "PipelineTask",
    "Projection",
    "Sampler",
    "TraceStore",
    "TraceWriter",
    "methods",
]

# What is not asked for is not imported, so that `ctrak --help` need not wait for PyTorch.
_PLACES = {
    "Attribution": "attribution",
    "Attributions": "attribution",
    "Attributor": "attribution",
    "Capture": "capture",
    "Concept": "attribution",
    "DiffusersTask": "task",
    "DiffusionTask": "task",
    "Encoded": "task",
    "FlowSchedule": "flow",
    "GradientTracer": "gradients",
    "InlineCapture": "inline",
    "Method": "method",
    "NoiseSchedule": "parameterization",
    "PipelineTask": "task",
    "Projection": "gradients",
    "Sampler": "trajectory",
    "TraceStore": "traces",
    "TraceWriter": "traces",
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
