"""Lightning callbacks: thin adapters over the core."""

from ctrak_lightning.callbacks.concept_tracer import ConceptTracer

__all__ = ["ConceptTracer"]
