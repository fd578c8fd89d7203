"""The library's typed errors, and how names and other people's text stand in messages and tables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence


class TaskError(TypeError):
    """An object that should be a :class:`~ctrak_lightning.DiffusionTask` lacks members."""


class BatchError(ValueError):
    """A batch lacks a field or holds one of the wrong kind."""


class ConceptError(ValueError):
    """A concept names an attribute or value that the task does not know."""


class MethodError(ValueError):
    """A method cannot be described in a store, or an objective or rule of it does not do what it
    should."""


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


def listed(names: Iterable[object], most: int = 5, show: Callable[[object], str] = repr) -> str:
    """Names as a message lists them: the first ``most``, and how many more there are.

    Example:
        >>> listed("abcdefg", most=2), listed(["unet.conv"], show=str)
        ("'a', 'b' and 5 more", 'unet.conv')
    """
    every = list(names)
    shown = ", ".join(map(show, every[:most]))
    return shown if len(every) <= most else f"{shown} and {len(every) - most} more"


def nearest(name: str, known: Iterable[str], most: int = 20, cutoff: float = 0.5) -> str:
    """What is known, as a message lists it, with what looks most like ``name`` first.

    Example:
        >>> nearest("own", ["uri", "owner", "licence"])
        'owner, uri, licence'
    """
    every = list(known)
    # A name may be a document: the comparison takes the product of the lengths.
    near = difflib.get_close_matches(name[:200], every, n=5, cutoff=cutoff)
    return listed([*near, *(other for other in every if other not in near)], most, str)


def shorten(value: object, most: int = 60) -> str:
    """``repr(value)`` in at most ``most`` characters.

    Example:
        >>> shorten("a long name", most=8)
        "'a lo..."
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


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
