"""Lightning callbacks: thin adapters over the core."""

from ctrak_lightning.callbacks.concept_monitor import ConceptMonitor
from ctrak_lightning.callbacks.concept_tracer import ConceptTracer
from ctrak_lightning.callbacks.provenance_recorder import ProvenanceRecorder

__all__ = ["ConceptMonitor", "ConceptTracer", "ProvenanceRecorder"]
