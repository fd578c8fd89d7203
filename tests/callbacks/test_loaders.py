"""The samples that are traced are those that the training loader can draw: compared with what it
does draw."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from ctrak_lightning import TraceStore
from ctrak_lightning.callbacks.loaders import TrainingLoader
from ctrak_lightning.capture.survey import Once, bounded
from ctrak_lightning.errors import BatchError

from ..toy import ToyDiffusion, Toys
from .test_concept_tracer import fit, tracer

N = 12


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: Any) -> Any:
        return torch.tensor(i)


NUMBERS = Numbers()


def training(
    loaders: Any, *, limit: float = float("inf"), name: Any = None, world: int = 1
) -> TrainingLoader:
    length = (
        len(loaders)
        if isinstance(loaders, DataLoader) and not isinstance(loaders.dataset, IterableDataset)
        else limit
    )
    trainer: Any = SimpleNamespace(
        train_dataloader=loaders, num_training_batches=min(length, limit), world_size=world
    )
    return TrainingLoader(trainer, name)


def traced(loader: Any, **options: Any) -> list[int]:
    return [int(i) for batch in training(loader, **options).batches(None) for i in batch.flatten()]


def drawn(loaders: Callable[[], list[Any]], limit: int | None, epochs: int = 60) -> set[int]:
    """Everything that epochs of at most ``limit`` batches draw, in all processes."""
    found: set[int] = set()
    for epoch in range(epochs):
        for loader in loaders():
            for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(epoch)
            for number, batch in enumerate(loader):
                if limit is not None and number >= limit:
                    break
                found.update(batch.flatten().tolist())
    return found


def shares(make: Callable[[int], DistributedSampler[Any]], **options: Any) -> list[Any]:
    return [DataLoader(NUMBERS, 2, sampler=make(rank), **options) for rank in range(3)]


CASES: dict[str, Callable[[], list[Any]]] = {
    "in order": lambda: [DataLoader(NUMBERS, 5)],
    "in order, drop_last": lambda: [DataLoader(NUMBERS, 5, drop_last=True)],
    "shuffled, drop_last": lambda: [DataLoader(NUMBERS, 5, shuffle=True, drop_last=True)],
    "few with replacement": lambda: [
        DataLoader(NUMBERS, 5, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=3))
    ],
    "the first in order": lambda: [DataLoader(NUMBERS, 5, sampler=SequentialSampler(range(7)))],
    "a list": lambda: [DataLoader(NUMBERS, 2, sampler=[9, 3, 3, 1, 7])],
    "subset": lambda: [DataLoader(NUMBERS, 2, sampler=SubsetRandomSampler([8, 2, 5]))],
    "weights": lambda: [
        DataLoader(NUMBERS, 2, sampler=WeightedRandomSampler([0, 1, 0, 2, 0, 0.5], num_samples=4))
    ],
    "lists of batches": lambda: [DataLoader(NUMBERS, batch_sampler=[[9, 3], [1], [4, 5]])],
    "a batch sampler": lambda: [
        DataLoader(NUMBERS, batch_sampler=BatchSampler(range(7), 3, drop_last=True))
    ],
    "index lists": lambda: [
        DataLoader(
            NUMBERS, sampler=BatchSampler(SubsetRandomSampler([1, 5, 6]), 2, False), batch_size=None
        )
    ],
    "items are batches": lambda: [DataLoader(NUMBERS, sampler=[4, 6, 8], batch_size=None)],
    "processes": lambda: shares(lambda rank: DistributedSampler(NUMBERS, 3, rank)),
    "processes in order": lambda: shares(
        lambda rank: DistributedSampler(range(11), 3, rank, shuffle=False, drop_last=True)  # type: ignore[arg-type]
    ),
    "processes, drop_last": lambda: shares(
        lambda rank: DistributedSampler(range(11), 3, rank, shuffle=False),  # type: ignore[arg-type]
        drop_last=True,
    ),
    "processes, wrapped": lambda: shares(
        lambda rank: DistributedSamplerWrapper(
            [0, 9, 2, 7, 4, 5], num_replicas=3, rank=rank, shuffle=False
        )
    ),
    "processes, wrapped subset": lambda: shares(
        lambda rank: DistributedSamplerWrapper(
            SubsetRandomSampler([2, 7, 9]), num_replicas=3, rank=rank
        )
    ),
}


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_what_is_traced_is_what_many_epochs_draw(case: str, limit: int | None) -> None:
    loader = CASES[case]()[0]
    found = traced(loader, limit=float("inf") if limit is None else limit)
    assert found == sorted(drawn(CASES[case], limit))


def test_a_batch_sampler_of_ones_own_gives_what_its_sampler_draws() -> None:
    class BySize(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            yield from sorted(super().__iter__(), key=lambda batch: -batch[0])

    loader = DataLoader(NUMBERS, batch_sampler=BySize(SubsetRandomSampler([4, 8, 1]), 2, False))
    assert traced(loader, limit=1) == [1, 4, 8]


class Own(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([3])

    def __len__(self) -> int:
        return 1


class Redrawn(RandomSampler):
    def __iter__(self) -> Iterator[int]:
        return iter([3])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.tensor(0)


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (DataLoader(NUMBERS, 2, sampler=Own()), "decided by Own, and cannot be known"),
        (DataLoader(NUMBERS, 2, sampler=Redrawn(NUMBERS)), "decided by Redrawn"),
        (
            DataLoader(NUMBERS, batch_sampler=BatchSampler(Own(), 2, False)),
            "decided by BatchSampler",
        ),
        (DataLoader(NUMBERS, batch_sampler=Own()), "decided by Own"),  # type: ignore[arg-type]
        (DataLoader(Stream(), 2), "does not say how long it is"),
        (
            DataLoader(NUMBERS, 2, sampler=WeightedRandomSampler([0, 0], 1)),
            "can draw none of its 12",
        ),
        (Own(), "is Own, expected one DataLoader"),
    ],
)
def test_what_cannot_be_known_is_refused_with_what_to_do(loader: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{match}.*HINT: define `trace_dataloader"):
        training(loader, limit=3).batches(None)


def test_it_loads_as_the_training_loader_does() -> None:
    def pairs(rows: list[Any]) -> Any:
        return default_collate(rows) * 10

    loader = DataLoader(
        NUMBERS, 4, shuffle=True, collate_fn=pairs, num_workers=2, prefetch_factor=3, worker_init_fn=print, timeout=7,
        multiprocessing_context="spawn",
    )  # fmt: skip
    made: Any = training(loader).batches(6)
    for name in (
        "collate_fn",
        "num_workers",
        "prefetch_factor",
        "worker_init_fn",
        "timeout",
        "pin_memory",
    ):
        assert getattr(made, name) == getattr(loader, name)
    assert made.multiprocessing_context.get_start_method() == "spawn"
    assert made.generator is None
    assert [len(batch) for batch in made.batch_sampler] == [6, 6]


def test_the_one_of_several_loaders_is_named() -> None:
    several = {
        "images": DataLoader(NUMBERS, 4),
        "more": [DataLoader(NUMBERS, 3), DataLoader(NUMBERS, 5)],
    }
    with pytest.raises(
        MisconfigurationException, match=r"3 loaders, 'images', 'more\.0', 'more\.1'.*loader=\.\.\."
    ):
        training(several).batches(None)
    with pytest.raises(
        MisconfigurationException, match=r"loader='text'.*'images', 'more\.0', 'more\.1'"
    ):
        training(several, name="text")
    with pytest.raises(
        MisconfigurationException,
        match=r"loader='images'.*one loader, DataLoader.*leave `loader` out",
    ):
        training(DataLoader(NUMBERS), name="images")
    one = training(several, name="more.1")
    assert one.batch_size == 5
    assert one.part({"images": 1, "more": [2, 3]}) == 3
    assert training([DataLoader(NUMBERS, 4)], name=0).part([7]) == 7
    assert training(several, name="images").part({"images": None, "more": None}) is None


@pytest.mark.parametrize(
    ("given", "described"),
    [
        (
            [{"image": torch.ones(2, 3), "ids": ["a", "b"]}] * 39,
            "a list of 39 dicts, which are no DataLoaders",
        ),
        ((torch.ones(2), [1, 2]), "a tuple of 2 Tensors and lists, which are no DataLoaders"),
        ({"images": torch.ones(4)}, "a dict of 1 Tensors, which are no DataLoaders"),
    ],
)
def test_batches_in_a_list_are_no_loaders(given: Any, described: str) -> None:
    match = (
        f"the training data is {described}\\. Expected one DataLoader.*HINT: define "
        "`trace_dataloader"
    )
    with pytest.raises(MisconfigurationException, match=match):
        training(given).batches(None)
    with pytest.raises(
        MisconfigurationException, match=f"loader='x'.*{described}\\. HINT: define `trace"
    ):
        training(given, name="x")


def test_of_many_loaders_some_are_named_and_what_is_beside_them_is_not() -> None:
    given = {"some": [DataLoader(NUMBERS, 4)] * 30, "other": [torch.ones(2)]}
    with pytest.raises(
        MisconfigurationException, match=r"30 loaders, 'some\.0', .*'some\.9' and 20 more\. Exp"
    ):
        training(given).batches(None)


def test_data_without_an_end_is_told() -> None:
    class Long(list[int]):
        def __len__(self) -> int:
            return 2

    assert list(bounded(Long([1, 2]))) == [1, 2]
    with pytest.raises(BatchError, match="length of 2 batches and goes on"):
        list(bounded(Long([1, 2, 3])))
    once = Once()
    once.add(["a", "b"])
    with pytest.raises(
        BatchError, match=r"1 samples a second time, for example \[.x.\], after 0 others"
    ):
        Once().add(["x", "x"])
    with pytest.raises(
        BatchError, match=r"1 samples a second time, for example \['a'\].*after 2 others"
    ):
        once.add(["c", "a"])


def test_a_named_loader_is_traced_and_training_is_as_without(tmp_path: Path) -> None:
    class Combined(ToyDiffusion):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["images"], batch_idx)

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loaders()

    def loaders() -> Any:
        subset = SubsetRandomSampler([1, 4, 6], generator=torch.Generator().manual_seed(0))
        return CombinedLoader(
            {"images": DataLoader(Toys(), 2, sampler=subset), "rest": DataLoader(NUMBERS, 4)}
        )

    with_, without = Combined(), Combined()
    for module, callbacks in ((with_, [tracer(tmp_path, loader="images")]), (without, [])):
        L.seed_everything(3, verbose=False)
        fit(module, callbacks, data=Data(), max_epochs=1)
    toys = Toys()
    assert TraceStore(tmp_path / "traces").samples.sample_ids == [
        toys[i]["sample_id"] for i in (1, 4, 6)
    ]
    for a, b in zip(with_.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
