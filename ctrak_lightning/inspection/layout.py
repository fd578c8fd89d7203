"""How the Custom Scalars dashboard groups the curves."""

import re
from collections.abc import Mapping, Sequence

from ctrak_lightning.inspection.tags import ROOT

Layout = dict[str, dict[str, list[str | list[str]]]]


def layout(concepts: Mapping[str, str], group: str | None) -> Layout:
    """Categories and charts for ``SummaryWriter.add_custom_scalars``.

    Args:
        concepts: the titles of the concepts' charts, by tag part.
        group: the metadata column whose shares are drawn, or None.
    """
    categories: Layout = {}
    if group is not None:
        categories["ctrak: shares"] = {
            f"{title}: share by {group}": _lines([f"{ROOT}/share/{re.escape(part)}/"])
            for part, title in concepts.items()
        }
    categories["ctrak: concepts"] = {
        "concept strength": _lines([f"{ROOT}/strength/"]),
        "effective number of contributors": _lines([f"{ROOT}/contributors/"]),
    }
    categories["ctrak: traces and cost"] = {
        "trace norm, quantiles": _lines([f"{ROOT}/trace_norm/"]),
        "seconds per checkpoint": _lines([f"{ROOT}/seconds/"]),
        "share of the run's time": _lines([f"{ROOT}/overhead/"]),
    }
    return categories


def _lines(starts: Sequence[str]) -> list[str | list[str]]:
    # The dashboard matches regular expressions at the start of a tag.
    return ["Multiline", [f"{start}.*" for start in starts]]
