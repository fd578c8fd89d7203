"""Which samples of its data set a DataLoader can draw, told from its samplers without drawing."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


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
        return (
            replace(self, positions=self.positions[: count * self.processes])
            if self.is_fixed
            else self
        )


def drawable(loader: DataLoader[Any], batches: float) -> list[Any] | None:
    """The positions in its data set that a loader can draw in epochs of at most so many batches, in
    the data set's order.

    Where an epoch is cut short (``limit_train_batches``, ``drop_last``), a loader that draws in a
    fixed order can draw only the first samples, one that shuffles all of them.

    Args:
        loader: of a data set with positions.
        batches: in an epoch, in each process; may be infinite.

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
        yield (
            int(position)
            if isinstance(position, torch.Tensor) or hasattr(position, "__index__")
            else position
        )
