"""The page that shows an attribution to a reader: one self-contained HTML file."""

from ctrak_lightning.report.page import check_path, write_report

__all__ = ["check_path", "write_report"]
