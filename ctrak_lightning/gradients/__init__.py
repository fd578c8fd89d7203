"""Per-sample projected vector-Jacobian products."""

from ctrak_lightning.gradients.modes import tracing_mode
from ctrak_lightning.gradients.projection import Projection
from ctrak_lightning.gradients.tracer import (
    Engine,
    GradientTracer,
    SlowParameterWarning,
    UntracedParameterWarning,
)
from ctrak_lightning.gradients.undisturbed import parameters_unmoved, undisturbed

__all__ = [
    "Engine",
    "GradientTracer",
    "Projection",
    "SlowParameterWarning",
    "UntracedParameterWarning",
    "parameters_unmoved",
    "tracing_mode",
    "undisturbed",
]
