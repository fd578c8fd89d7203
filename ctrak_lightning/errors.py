"""Other people's text where it could act: on a terminal, in a spreadsheet's cell, as a second
column of our own name."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class TaskError(TypeError):
    """An object that should be a :class:`~ctrak_lightning.DiffusionTask` lacks members."""


class BatchError(ValueError):
    """A batch lacks a field or holds one of the wrong kind."""


class ConceptError(ValueError):
    """A concept names an attribute or value that the task does not know."""


class InversionError(ValueError):
    """An image cannot be traced back to the states of its generation."""


class GradientError(ValueError):
    """Per-sample gradients are zero or not finite, or a parameter cannot be traced."""


class TrialError(ValueError):
    """Data, task, network and method do not fit together, as tracing two samples before training
    has shown."""


class ReportError(ValueError):
    """A report cannot be made of these results, or not be written to this path."""


class StoreError(ValueError):
    """A trace store cannot be used as it is."""


class StoreMismatchError(StoreError):
    """A trace store was made with another method, projection, model or dataset."""


class UnknownMethodError(StoreMismatchError):
    """A trace store's method has a class that is not known here, so that it cannot be made
    again."""


class DatasetChangedError(StoreMismatchError):
    """The samples differ from those that the store describes."""


class TrainingChangedError(StoreMismatchError):
    """What trains is no longer what the traces of the run began with."""


class StoreLockedError(StoreError):
    """Another process, or another writer of this one, has a trace store open to change it."""


class CorruptStoreError(StoreError):
    """A file of a trace store is missing, truncated or altered."""


class ProcessLostError(RuntimeError):
    """Another process of the run has died, or does not answer."""


METADATA_PREFIX = "metadata."
# With these a spreadsheet takes a cell for a formula (OWASP, "CSV Injection"; the wide forms as
# some input methods type them). The apostrophe is no formula: it is escaped too, so that taking one
# off gives back what was written.
_LEADING = frozenset("=+-@'\uff1d\uff0b\uff0d\uff20")


def visible(text: object) -> str:
    """``text`` on one line, as a terminal may show it: what is not printable (control and escape
    characters, line ends, marks that turn the direction of writing) becomes its Python escape.

    Example:
        >>> visible("cat\\x1b[2J\\nverified"), visible("ünï 猫")
        ('cat\\\\x1b[2J\\\\nverified', 'ünï 猫')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def csv_cell(text: str) -> str:
    """``text`` as a cell that a spreadsheet shows and does not compute: with an apostrophe before
    it where it begins with ``=``, ``+``, ``-``, ``@``, a control character or an apostrophe. Taking
    one apostrophe off the front gives it back.

    Example:
        >>> csv_cell("=1+1"), csv_cell("a=1"), csv_cell("'tis")
        ("'=1+1", 'a=1', "''tis")
    """
    first = text[:1]
    return f"'{text}" if first in _LEADING or not first.isprintable() else text


def metadata_heads(columns: Sequence[str], taken: Collection[str]) -> list[str]:
    """What metadata columns are called in a table that has the columns ``taken`` too, whatever
    their case: ``metadata.score`` for a column ``score``.

    Example:
        >>> metadata_heads(["owner", "score", "metadata.score"], ["rank", "score"])
        ['owner', 'metadata.score', 'metadata.metadata.score']
    """
    ours = {name.casefold() for name in taken}
    return [
        f"{METADATA_PREFIX}{name}"
        if name.casefold() in ours or name.startswith(METADATA_PREFIX)
        else name
        for name in columns
    ]
