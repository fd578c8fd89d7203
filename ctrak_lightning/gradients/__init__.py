"""Per-sample projected vector-Jacobian products."""

from ctrak_lightning.gradients.layers import Layer, register_layer
from ctrak_lightning.gradients.layouts import Layout
from ctrak_lightning.gradients.modes import (
    Attention,
    exact_products,
    parameters_unmoved,
    tracing_mode,
    undisturbed,
)
from ctrak_lightning.gradients.projection import Projection
from ctrak_lightning.gradients.tracer import (
    Engine,
    GradientTracer,
    SlowParameterWarning,
    UntracedParameterWarning,
)

__all__ = [
    "Attention",
    "Engine",
    "GradientTracer",
    "Layer",
    "Layout",
    "Projection",
    "SlowParameterWarning",
    "UntracedParameterWarning",
    "exact_products",
    "parameters_unmoved",
    "register_layer",
    "tracing_mode",
    "undisturbed",
]
