"""The library's typed errors, and how names and other people's text stand in messages and tables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence


class TaskError(TypeError):
    """An object that should be a :class:`~ctrak_lightning.DiffusionTask` lacks members, or a
    :class:`~ctrak_lightning.DiffusersTask` does not find the parts that it names.

    Why: the library knows a model only by its task; what it cannot address it cannot trace.

    What to do: define the members that the message names, or give the names of your module's
    attributes (``docs/attach.md``).
    """


class BatchError(ValueError):
    """A batch lacks a field or holds one of the wrong kind.

    Why: what a sample is, and which row is whose, is read from the batch alone.

    What to do: add the column, or say what yours is called: ``DiffusersTask(batch={"pixel_values":
    "image"})``. ``docs/attach.md`` lists the columns.
    """


class ConceptError(ValueError):
    """A concept names an attribute or value that the task does not know, or its image does not fit
    the model.

    Why: a condition that the model was never told gives a ranking all the same, and it would mean
    nothing.

    What to do: take a name from those that the message lists; look at both sides of
    ``print(concept)``.
    """


class MethodError(ValueError):
    """A method cannot be described in a store, or an objective or rule of it does not do what it
    should.

    Why: a store holds its method in numbers and texts, so that it can be asked later; what cannot
    be written down could not be made again.

    What to do: make an objective, a trajectory or a rule of your own a dataclass of numbers and
    texts at the top of a module (``docs/methods.md``), and let it return what the message expects.
    """


class InversionError(ValueError):
    """An image that exists cannot be traced back to the states of its generation.

    Why: the schedule loses what the way back needs (it clips, or has a step without signal), or
    the way back ends in numbers that are not finite.

    What to do: ``Attributor(..., given="noised")`` asks at states that are noised instead; less
    guidance or more steps of the sampler may do as well.
    """


class GradientError(ValueError):
    """Per-sample gradients are zero or not finite, or a parameter cannot be traced.

    Why: a row that is zero or infinite would rank its sample first, last or nowhere for no reason.

    What to do: where a sample is named, look at it and at its loss; where a layer is named, leave
    it out with ``layers=``; in 16 bits try float32.
    """


class ExtensionError(ValueError):
    """A class of your own that the library calls, such as a layer kind or an objective, raised an
    error or gave what it should not; the message names the class, the member and the layer.

    Why: it runs inside the network's pass, where its error would look like one of the data or of
    the network.

    What to do: the error that hangs on it as its cause, if there is one, is the original; the
    shapes of what a member is given and has to give are in its base class's docstring
    (``docs/extending.md``).
    """


class TrialError(ValueError):
    """Data, task, network and method do not fit together, as tracing two samples before training
    has shown.

    Why: the same would have gone wrong at the first checkpoint, hours later.

    What to do: what the message says; the error that hangs on it as its cause is the original one.
    Nothing has been written.
    """


class ReportError(ValueError):
    """A report cannot be made of these results, or not be written to this path.

    Why: one page has results of one image and one store, and a file in a folder that is there.

    What to do: give results of one :meth:`~ctrak_lightning.Attributor.attribute_many`, a column
    from those that the message lists, or another path.
    """


class RecipeError(ValueError):
    """A recipe is not there, or cannot be copied to where it was asked for.

    Why: a copy is there to be changed, and one command must not undo that.

    What to do: ``ctrak recipe list`` says what there is; name a new folder, or ``--force``.
    """


class StoreError(ValueError):
    """A trace store cannot be used as it is: it is not there, cannot be read or written, or what is
    asked of it does not fit it.

    Why: this is also the class of all errors of a store, so that one ``except`` gets them.

    What to do: look at path, rights and room on the disk; ``ctrak info STORE`` says what the
    folder holds.
    """


class StoreMismatchError(StoreError):
    """A trace store was made with another method, projection, model or data set than it is used
    with.

    Why: inner products of rows that were made in different ways are numbers without a meaning.

    What to do: the message names what differs. Ask with the model and method that were traced, or
    trace into a new folder.
    """


class UnknownMethodError(StoreMismatchError):
    """A trace store's method has a class that is not known here, so that it cannot be made again.

    Why: a store may come from somebody else, and nothing is imported because it says so.

    What to do: import the module of that class first, or name the method: ``Attributor(store,
    module, method=...)``, ``ctrak attribute --method package.module.name``.
    """


class DatasetChangedError(StoreMismatchError):
    """The samples differ from those that the store describes, in number, order, ids or content.

    Why: rows are found by their place in the data set, and a row of another picture would be shown
    as this one's.

    What to do: trace the same samples in the same order without augmentation
    (``trace_dataloader()``), or trace into a new folder. Samples that were forgotten must be out
    of the data as well.
    """


class TrainingChangedError(StoreMismatchError):
    """What trains, or what is frozen, is no longer what the traces of the run began with.

    Why: traces of different parameters cannot be compared, so the store ends where they change.

    What to do: unfreeze before the first step and leave it so; preview without merging an adapter
    in 16 bits; or begin a new store for what trains from there on.
    """


class StoreLockedError(StoreError):
    """Another process, or another writer of this one, has a trace store open to change it.

    Why: two writers would waste each other's work.

    What to do: end the run that the message names, or give this one another folder. The lock goes
    with its process: there is no file to delete.
    """


class CorruptStoreError(StoreError):
    """A file of a trace store is missing, truncated or altered.

    Why: an answer from altered traces would look like any other.

    What to do: ``ctrak verify STORE`` names every file that is not what was recorded. Take the
    store from a copy, or trace again.
    """


class ProcessLostError(RuntimeError):
    """Another process of the run has died, or does not answer.

    Why: each process traces a share of the samples, and without one the checkpoint would have
    holes.

    What to do: look for the first error in the logs of the other processes, and start the run
    again from its last checkpoint: what was sealed is kept.
    """


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
