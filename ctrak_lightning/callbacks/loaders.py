"""The samples that a Trainer's loader can draw, as batches to trace."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ctrak_lightning.capture.identity import reloaded
from ctrak_lightning.errors import listed


@dataclass(frozen=True, slots=True)
class Drawable:
    """Positions in a data set that a sampler can draw, each once."""

    positions: list[Any]
    """In ascending order; of a sampler that draws in a fixed order, in that."""
    is_fixed: bool
    """Whether every epoch draws them in this order from the first one on, so that one that is cut
    short draws the first ones."""
    processes: int = 1
    """How many draw them together, in turn."""

    def first(self, count: int) -> "Drawable":
        """Those that ``count`` draws in each process can give."""
        if not self.is_fixed:
            return self
        return replace(self, positions=self.positions[: count * self.processes])


def drawable(loader: DataLoader[Any], batches: float) -> list[Any] | None:
    """The positions in its data set that a loader can draw in epochs of at most so many batches in
    each process (infinite, where that is not limited), in the data set's order.

    Where an epoch is cut short (``limit_train_batches``, ``drop_last``), a loader that draws in a
    fixed order can draw only the first samples, one that shuffles all of them.

    Returns:
        None where a sampler of a kind that is not known here decides.
    """
    found = _of_batches(loader, batches)
    if found is None:
        return None
    once = list(dict.fromkeys(_plain(found.positions)))
    return sorted(once) if all(isinstance(position, int) for position in once) else once


def gives_batches(loader: DataLoader[Any]) -> bool:
    """Whether each item of the loader's data set is a batch already."""
    return _batch_sampler(loader) is None


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """How many samples a batch of the loader has at most, where that is known."""
    if gives_batches(loader):
        return 1
    sampler = _batch_sampler(loader)
    if isinstance(sampler, (list, tuple)):
        return max((len(batch) for batch in sampler), default=1)
    size = getattr(sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _batch_sampler(loader: DataLoader[Any]) -> Any:
    """What draws the positions of whole batches, or None where the items of the data set are
    batches themselves."""
    if loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler):
        return loader.sampler
    return loader.batch_sampler


def _of_batches(loader: DataLoader[Any], batches: float) -> Drawable | None:
    sampler = _batch_sampler(loader)
    if sampler is None:
        found = _of_sampler(loader.sampler)
        return found if found is None or batches == float("inf") else found.first(int(batches))
    if isinstance(sampler, (list, tuple)):
        drawn = sampler if batches == float("inf") else sampler[: int(batches)]
        return Drawable([position for batch in drawn for position in batch], is_fixed=True)
    found = _of_sampler(getattr(sampler, "sampler", None))
    if found is None or type(sampler).__iter__ is not BatchSampler.__iter__:
        # One that groups by size, say: of what its sampler draws, in an order of its own.
        return None if found is None else replace(found, is_fixed=False)
    length = -(-len(found.positions) // found.processes)
    whole = length // sampler.batch_size * sampler.batch_size if sampler.drop_last else length
    return found.first(int(min(whole, batches * sampler.batch_size)))


def _of_sampler(sampler: Any) -> Drawable | None:
    """What a sampler can draw; judged by the method that draws, which a class of the user's may
    have replaced."""
    if isinstance(sampler, (list, tuple, range)):
        return Drawable(list(sampler), is_fixed=True)
    draws = getattr(type(sampler), "__iter__", None)
    if draws is SequentialSampler.__iter__:
        return Drawable(list(range(len(sampler.data_source))), is_fixed=True)
    if draws is RandomSampler.__iter__:
        return Drawable(list(range(len(sampler.data_source))), is_fixed=False)
    if draws is SubsetRandomSampler.__iter__:
        return Drawable(list(sampler.indices), is_fixed=False)
    if draws is WeightedRandomSampler.__iter__:
        return Drawable((sampler.weights > 0).nonzero().flatten().tolist(), is_fixed=False)
    if draws is DistributedSamplerWrapper.__iter__:
        inner = _of_sampler(sampler.dataset._sampler)
        return inner if inner is None else _shared(sampler, inner)
    if draws is DistributedSampler.__iter__:
        return _shared(sampler, Drawable(list(range(len(sampler.dataset))), is_fixed=True))
    return None


def _shared(sampler: DistributedSampler[Any], whole: Drawable) -> Drawable:
    """What the processes of a DistributedSampler draw together."""
    if sampler.shuffle or not whole.is_fixed:
        return replace(whole, is_fixed=False)
    return replace(
        whole, positions=whole.positions[: sampler.total_size], processes=sampler.num_replicas
    )


def _plain(positions: Iterable[Any]) -> Iterable[Hashable]:
    for position in positions:
        is_number = isinstance(position, torch.Tensor) or hasattr(position, "__index__")
        yield int(position) if is_number else position


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
            instead = ", or leave `loader` out." if "" in loaders else "."
            raise MisconfigurationException(
                f"`ConceptTracer(loader={name!r})`: the training data is {self._described}. "
                f"{hint or f'HINT: give one of these names{instead}'}"
            )
        self._hint = hint or "HINT: ConceptTracer(loader=...) names it."
        self._loaders = loaders
        self.loader: Any = loaders.get(self._path)
        """The loader, or None where there are several and none was named."""

    def batches(self, batch_size: int | None) -> Iterable[Any]:
        """The samples that the loader can draw, each once, in the data set's order; in batches of
        ``batch_size``, by default of the loader's.

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
            is_key = isinstance(batch, Mapping) and name in batch
            batch = batch[name] if is_key else batch[int(name)]
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
        kinds = " and ".join(sorted({f"{type(one).__name__}s" for one in inside})[:10])
        return f"a {type(given).__name__} of {len(given)} {kinds}, which are no DataLoaders", _HINT
    return f"{len(named)} loaders, {listed(named, 10)}", ""
