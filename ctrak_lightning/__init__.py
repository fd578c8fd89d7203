"""Which training samples taught a diffusion model this concept? Traces while it is fine-tuned, answers afterwards."""

from ctrak_lightning import methods
from ctrak_lightning.attribution import Attribution, Attributions, Attributor, Concept
from ctrak_lightning.capture import Capture
from ctrak_lightning.flow import FlowSchedule
from ctrak_lightning.gradients import GradientTracer, Projection
from ctrak_lightning.inline import InlineCapture
from ctrak_lightning.method import Method
from ctrak_lightning.parameterization import NoiseSchedule
from ctrak_lightning.task import DiffusersTask, DiffusionTask, Encoded
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
    "Projection",
    "Sampler",
    "TraceStore",
    "TraceWriter",
    "methods",
]
