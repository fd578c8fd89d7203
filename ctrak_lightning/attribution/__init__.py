"""Scores generated concepts against stored traces."""

from ctrak_lightning.attribution.attributor import Attributor
from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.parts import Parts
from ctrak_lightning.attribution.result import Attribution, Record, Share
from ctrak_lightning.attribution.top import Shortlist

__all__ = ["Attribution", "Attributor", "Concept", "Parts", "Record", "Share", "Shortlist"]
