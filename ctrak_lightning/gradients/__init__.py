"""Per-sample projected vector-Jacobian products."""

from ctrak_lightning.gradients.modes import tracing_mode
from ctrak_lightning.gradients.projection import Projection
from ctrak_lightning.gradients.tracer import GradientTracer, UntracedParameterWarning

__all__ = ["GradientTracer", "Projection", "UntracedParameterWarning", "tracing_mode"]
