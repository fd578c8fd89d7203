"""Per-sample projected vector-Jacobian products."""

from ctrak_lightning.gradients.modes import parameters_unmoved, tracing_mode, undisturbed
from ctrak_lightning.gradients.projection import Projection
from ctrak_lightning.gradients.tracer import (
    Engine,
    GradientTracer,
    SlowParameterWarning,
    UntracedParameterWarning,
)

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
