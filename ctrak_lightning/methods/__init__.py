"""Methods: what is traced of a training sample, what is asked of a concept, and how both are scored.

``methods.concept_trak()`` and its like make the known ones; :class:`Method` puts together one's own.
"""

from typing import TYPE_CHECKING

from ctrak_lightning._moved import names_of
from ctrak_lightning.methods.damping import DampingRule
from ctrak_lightning.methods.ensembles import EnsembleRule
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.presets import (
    PRESETS,
    by_name,
    concept_trak,
    concept_trak_norm,
    concept_trak_paper,
    d_trak,
    das,
    influence,
    inline_trak,
    journey_trak,
    random_probe,
    retrac,
    tracin,
    trak,
)

__all__ = [
    "PRESETS",
    "DampingRule",
    "EnsembleRule",
    "Method",
    "by_name",
    "concept_trak",
    "concept_trak_norm",
    "concept_trak_paper",
    "d_trak",
    "das",
    "influence",
    "inline_trak",
    "journey_trak",
    "random_probe",
    "retrac",
    "tracin",
    "trak",
]

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__)
