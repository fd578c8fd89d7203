"""Lightning callbacks: thin adapters over the core."""

from ctrak_lightning.callbacks.concept_monitor import ConceptMonitor
from ctrak_lightning.callbacks.concept_tracer import ConceptTracer

__all__ = ["ConceptMonitor", "ConceptTracer"]
