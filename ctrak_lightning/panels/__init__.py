"""What a run's traces say, to look at while it trains: pictures, tables, curves and points."""

from ctrak_lightning.panels.board import Board
from ctrak_lightning.panels.watch import Answer, Watch

__all__ = ["Answer", "Board", "Watch"]
