"""Metadata that a run gives otherwise than the store recorded it."""

from __future__ import annotations

import warnings
from pathlib import Path
from reprlib import repr as shortened

from ctrak_lightning.traces.samples import SampleTable

_SHOWN = 5


class ChangedMetadataWarning(UserWarning):
    """The metadata of the samples is not what the store recorded, and the store keeps that."""


def warn_of_changed_metadata(stored: SampleTable, given: SampleTable, path: Path) -> None:
    """Compare the metadata of two tables of the same samples in the same order.

    Args:
        stored: of the store at ``path``.
        given: of the run that goes on with it.
        path: folder of the store.

    Warns:
        ChangedMetadataWarning: Columns were added, are gone or have other values; names them, with
            one sample of each.
    """
    changes = _changes(stored, given)
    if not changes:
        return
    more = f"; and {len(changes) - _SHOWN} more columns" if len(changes) > _SHOWN else ""
    warnings.warn(
        f"{path}: the metadata of the samples is not what this store recorded "
        f"({'; '.join(changes[:_SHOWN])}{more}). The store keeps what it recorded, and answers, "
        "shares and `ctrak forget` go by that. HINT: to have the metadata as it is now, trace "
        "into a new folder.",
        ChangedMetadataWarning,
        stacklevel=4,  # the caller of TraceWriter.write_samples
    )


def _changes(stored: SampleTable, given: SampleTable) -> list[str]:
    found = []
    for name in sorted(stored.metadata.keys() | given.metadata.keys()):
        if name not in stored.metadata:
            found.append(f"column {name!r} is new")
        elif name not in given.metadata:
            found.append(f"column {name!r} is not given any more")
        elif other := [
            i for i, value in enumerate(stored.metadata[name]) if value != given.metadata[name][i]
        ]:
            i = other[0]
            found.append(
                f"column {name!r} differs for {len(other)} of {len(stored)} samples, such as "
                f"{stored.sample_ids[i]!r}: recorded {shortened(stored.metadata[name][i])}, now "
                f"{shortened(given.metadata[name][i])}"
            )
    return found
