"""The page that shows an attribution to a reader: one self-contained HTML file."""

from ctrak_lightning.attribution.report.page import write_report

__all__ = ["write_report"]
