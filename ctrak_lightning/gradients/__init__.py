"""Per-sample projected vector-Jacobian products."""

from ctrak_lightning.gradients.modes import tracing_mode
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
    "tracing_mode",
]
