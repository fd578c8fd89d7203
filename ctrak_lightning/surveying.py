"""What is asked of the data that is traced: an end, and each sample once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ctrak_lightning.errors import BatchError

NO_AUGMENTATION = (
    "HINT: define `trace_dataloader()` on the DataModule or module: the same samples in a fixed order, without augmentation, and "
    "let `encode` draw nothing."
)


def bounded(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, as many as they say they are.

    Raises:
        BatchError: there are more.
    """
    try:
        count: float = len(batches)  # type: ignore[arg-type]
    except TypeError:
        count = float("inf")
    for number, batch in enumerate(batches):
        if number >= count:
            raise BatchError(
                f"The data to trace has a length of {count} batches and goes on after them: it may have no end. HINT: let "
                "trace_dataloader() give each sample once, then end."
            )
        yield batch


class Once:
    """Looks that no sample comes twice, which is how a stream without an end is noticed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def add(self, sample_ids: Sequence[str]) -> None:
        """Raises a BatchError that names samples which were there before."""
        again = [name for name in sample_ids if name in self._seen]
        if again:
            raise BatchError(
                f"The data to trace gives {len(again)} samples a second time, for example {again[:5]}, after {len(self._seen)} others. "
                "Expected each sample once, under an id of its own. HINT: let trace_dataloader() give each once, then end; a stream "
                "that repeats itself has no end."
            )
        self._seen.update(sample_ids)
