"""Scores generated concepts against stored traces."""

from ctrak_lightning.attribution.attributions import (
    Attributions,
    CoincidingConceptsWarning,
    RankedSample,
)
from ctrak_lightning.attribution.attributor import Attributor
from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.parts import Parts
from ctrak_lightning.attribution.result import Attribution, Record, Share

__all__ = [
    "Attribution",
    "Attributions",
    "Attributor",
    "CoincidingConceptsWarning",
    "Concept",
    "Parts",
    "RankedSample",
    "Record",
    "Share",
]
