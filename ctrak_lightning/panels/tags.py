"""Names of what loggers show, and where it stands."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ctrak_lightning.gradients import Projection
from ctrak_lightning.methods.method import Method

ROOT = "ctrak"
_LONGEST = 60


class TagNames:
    """Turns names into parts of a tag: letters, digits, ``_``, ``-`` and ``.`` only, and no two
    names alike.

    Args:
        reserved: parts that no name gets.

    Example:
        >>> names = TagNames()
        >>> names.of("a/b"), names.of("a b"), names.of("a/b")
        ('a_b', 'a_b_2', 'a_b')
    """

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        self._taken = set(reserved)
        self._parts: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The part that stands for ``name``; the same at every call."""
        if name not in self._parts:
            self._parts[name] = self._free(name)
        return self._parts[name]

    def one_each(self, names: Sequence[str]) -> list[str]:
        """A part for each of several things, which may have the same name."""
        return [self._free(name) for name in names]

    def _free(self, name: str) -> str:
        wanted = re.sub(r"[^\w.\-]+", "_", name)[:_LONGEST]
        part, count = wanted, 1
        while part in self._taken:
            count += 1
            part = f"{wanted}_{count}"
        self._taken.add(part)
        return part


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


HParams = dict[str, bool | int | float | str]


def method_hparams(method: Method, projection: Projection, layers: Sequence[str] | None) -> HParams:
    """What was traced and how, by name."""
    facts = {
        "method": method.name,
        "normalisation": method.normalisation,
        "damping": "none" if method.damping is None else str(method.damping),
        "ensemble": str(method.ensemble),
        "timesteps": getattr(method.training_trajectory, "timesteps", None) or "all",
        "rank": projection.rank,
        "dim": projection.dim or "all",
        "layers": "all" if layers is None else " ".join(layers),
    }
    return {f"{ROOT}/{name}": value for name, value in facts.items()}


def write_hparams(
    writer: Any, values: Mapping[str, bool | int | float | str], metrics: Sequence[str]
) -> None:
    """One summary of hyperparameters; the dashboard shows the last value of the scalars ``metrics``
    beside them.

    TensorBoard takes the first such summary of a run and no other. ``SummaryWriter.add_hparams``
    would start a run of its own, so the summary goes to the writer's file, as Lightning's loggers
    write theirs.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):
        writer._get_file_writer().add_summary(summary)
