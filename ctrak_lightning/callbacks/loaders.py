"""The samples that a Trainer's loader can draw, as batches to trace."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from ctrak_lightning.callbacks.samplers import batch_size_of, drawable, gives_batches
from ctrak_lightning.numbering import reloaded

_SHOWN = 10
_HINT = (
    "HINT: define `trace_dataloader()` on the DataModule or module: the samples that are trained "
    "on, each once, in a fixed order, without augmentation."
)


class TrainingLoader:
    """The one of a Trainer's training loaders whose samples are traced; made once training has
    started.

    Args:
        trainer: that trains.
        name: of the loader, where the Trainer has several: the key or the position that it was
            given at, with dots between them where they are nested.

    Raises:
        MisconfigurationException: there is no loader of this name; the message lists the names.
    """

    def __init__(self, trainer: L.Trainer, name: str | int | None) -> None:
        self._trainer = trainer
        given = trainer.train_dataloader
        self._path = "" if name is None else str(name)
        loaders = _leaves(given)
        self._described, hint = _described(given, loaders)
        if name is not None and self._path not in loaders:
            raise MisconfigurationException(
                f"`ConceptTracer(loader={name!r})`: the training data is {self._described}. "
                f"{hint or 'HINT: give one of these names'}{', or leave `loader` out.' if '' in loaders else '' if hint else '.'}"
            )
        self._hint = hint or "HINT: ConceptTracer(loader=...) names it."
        self._loaders = loaders
        self.loader: Any = loaders.get(self._path)
        """The loader, or None where there are several and none was named."""

    def batches(self, batch_size: int | None) -> Iterable[Any]:
        """The samples that the loader can draw, each once, in the data set's order.

        Args:
            batch_size: samples in a batch; None takes the loader's.

        Raises:
            MisconfigurationException: they cannot be known.
        """
        loader = self.loader
        if loader is None:
            raise MisconfigurationException(
                f"`ConceptTracer`: the training data is {self._described}. Expected one "
                f"DataLoader, or the name of the one whose samples are traced. {self._hint}"
            )
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                f"`ConceptTracer`: the training data is {type(loader).__name__}, expected one "
                f"DataLoader. {_HINT}"
            )
        if isinstance(loader.dataset, IterableDataset):
            return self._stream(loader, batch_size)
        return self._known(loader, batch_size)

    def apart(self, loader: Any) -> Any:
        """A loader that gives what ``loader`` does and shares no workers with training, where it is
        one of training's own."""
        if not isinstance(loader, DataLoader) or all(
            loader is not one for one in self._loaders.values()
        ):
            return loader
        if loader.batch_sampler is not None:
            return reloaded(loader, loader.dataset, batch_sampler=loader.batch_sampler)
        return reloaded(loader, loader.dataset, batch_size=None, sampler=loader.sampler)

    def part(self, batch: Any) -> Any:
        """What a training batch has of this loader; None where this loader had nothing more to give
        to it."""
        for name in self._path.split(".") if self._path else ():
            if batch is None:
                return None
            batch = (
                batch[name] if isinstance(batch, Mapping) and name in batch else batch[int(name)]
            )
        return batch

    @property
    def batch_size(self) -> int | None:
        """How many samples of the loader a training batch has at most, where that is known."""
        return batch_size_of(self.loader) if isinstance(self.loader, DataLoader) else None

    def _known(self, loader: DataLoader[Any], batch_size: int | None) -> DataLoader[Any]:
        positions = drawable(loader, self._trainer.num_training_batches)
        if positions is None:
            own = loader.batch_sampler if loader.batch_size is None else loader.sampler
            raise MisconfigurationException(
                "`ConceptTracer`: which samples the training loader draws is decided by "
                f"{type(own).__name__}, and cannot be known without drawing. Expected a sampler of "
                f"torch's, a list, or a batch sampler whose `sampler` is one of these. {_HINT}"
            )
        if not positions:
            raise MisconfigurationException(
                "`ConceptTracer`: the training loader can draw none of its "
                f"{len(loader.dataset)} samples. {_HINT}"  # type: ignore[arg-type]
            )
        size = batch_size or self.batch_size or 1
        chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
        if loader.batch_sampler is not None:
            return reloaded(loader, loader.dataset, batch_sampler=chunks)
        sampler = positions if gives_batches(loader) else chunks
        return reloaded(loader, loader.dataset, batch_size=None, sampler=sampler)

    def _stream(self, loader: DataLoader[Any], batch_size: int | None) -> DataLoader[Any]:
        kind = type(loader.dataset).__name__
        if hasattr(loader.dataset, "__next__"):
            raise MisconfigurationException(
                f"`ConceptTracer`: the training data is a stream, {kind}, that is an iterator "
                "itself: whoever goes through it, as every capture would, takes from training "
                f"what it is given. {_HINT}"
            )
        try:
            len(loader)
        except TypeError as error:
            raise MisconfigurationException(
                f"`ConceptTracer`: the training data is a stream, {kind}, that does not say how "
                f"long it is: it may have no end. {_HINT}"
            ) from error
        if self._trainer.world_size > 1:
            raise MisconfigurationException(
                f"`ConceptTracer`: the training data is a stream, {kind}, in "
                f"{self._trainer.world_size} processes, and which samples each of them gets is "
                f"decided by itself. {_HINT}"
            )
        size = loader.batch_size if loader.batch_size is None else batch_size or loader.batch_size
        return reloaded(loader, loader.dataset, batch_size=size)


def _leaves(loaders: Any, path: str = "") -> dict[str, Any]:
    """The loaders in dicts and lists of them, by their names; a lone one's is empty."""
    if isinstance(loaders, Mapping):
        items: Iterable[tuple[Any, Any]] = loaders.items()
    elif isinstance(loaders, (list, tuple)):
        items = enumerate(loaders)
    else:
        return {path: loaders}
    return {
        name: leaf
        for key, inner in items
        for name, leaf in _leaves(inner, f"{path}.{key}" if path else str(key)).items()
    }


def _described(given: Any, loaders: Mapping[str, Any]) -> tuple[str, str]:
    """What the training data is, and a hint where there is no loader in it that could be named."""
    if "" in loaders:
        return f"one loader, {type(loaders['']).__name__}", ""
    named = [name for name, leaf in loaders.items() if isinstance(leaf, DataLoader)]
    if not named:
        inside = given.values() if isinstance(given, Mapping) else given
        kinds = " and ".join(sorted({f"{type(one).__name__}s" for one in inside})[:_SHOWN])
        return f"a {type(given).__name__} of {len(given)} {kinds}, which are no DataLoaders", _HINT
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return f"{len(named)} loaders, {', '.join(map(repr, named[:_SHOWN]))}{more}", ""
