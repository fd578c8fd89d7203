"""Tracing a data set: at a checkpoint, or inside training steps; the trial before the first one."""

from typing import TYPE_CHECKING

from ctrak_lightning._moved import names_of

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__)
